"""The constrained Predictor–Corrector loop: a state that keeps to what is known of it.

It is the loop of `sampling.get_pc_sampler`; a constraint is what passes over the state after each
of its moves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import sampling
from sampling_noise import Stepper
from sde_lib import expand


class Constraint(Stepper):
    """What passes over the state of a sampler; a subclass defines `__call__`, and `start` at need.

    Noise is drawn by `self.randn_like(x)`, which obeys the sampler's `seeds=` and `generator=`. A
    plain function of (x, x_mean, t) that draws none is a constraint too.
    """

    def start(self, x: torch.Tensor) -> torch.Tensor:
        """The state to begin with, from a draw x of the prior."""
        return x

    def __call__(self, x, x_mean, t):
        """(x, x_mean) from a state at time t, 0-dim float64 on the CPU; t = 0 for data, the last
        call, whose x or x_mean is returned."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(x, x_mean, t)")


class KnownPart(Constraint):
    """The known part of the state is the data's, at the noise level of the state (Song et al. 2021,
    App. I.2):

        x ← P(x, α_t x_0 + σ_t z),   x_mean ← P(x_mean, α_t x_0);   P(·, x_0) at the end

    Exact where known and unknown part are independent; biased towards the prior of the unknown part
    where they are correlated, since the known part at time t is drawn without regard to it.

    Args:
      sde: the forward process.
      data: x_0, (B, *); what is not known of it may be anything finite.
      project: P(x, known), the state x with the known part of the second.
    """

    def __init__(self, sde, data: torch.Tensor, project: Callable):
        super().__init__()
        self.sde, self.data, self.project = sde, data, project

    def start(self, x):
        T = torch.as_tensor(float(self.sde.T), dtype=torch.float64)
        return self(x, x, T)[0]

    def __call__(self, x, x_mean, t):
        data = self.data = self.data.to(x)
        if float(t) == 0:
            return self.project(x, data), self.project(x_mean, data)
        mean, std = self.sde.marginal_prob(data, sampling.batch_time(data, t))
        noised = mean + expand(std, data) * self.randn_like(data)
        return self.project(x, noised), self.project(x_mean, mean)


def check_finite(x: torch.Tensor, name: str) -> None:
    """Refuse numbers that no state can be kept to: ValueError."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"expected finite {name}, got {bad} numbers that are not")


def get_constrained_sampler(
    sde,
    shape,
    predictor,
    corrector,
    inverse_scaler,
    snr,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
    device=None,
    *,
    constrain: Callable,
    start: Callable | None = None,
    **options,
) -> Callable:
    """A sampler whose state keeps to a constraint: sampler(model) -> (samples, evaluations).

    Args:
      sde ... device: as `sampling.get_pc_sampler`.
      constrain: constrain(x, x_mean, t) -> (x, x_mean), called after the corrector with the time t
        of its state, after the predictor with the time that it went to, and at the end with t = 0;
        a `Constraint` or a function.
      start: start(x) -> x, from the prior's draw to the state to begin with; by default the
        constraint's own `start`, where it has one.
      options: steps, schedule, rho, dtype, generator, seeds, callback, progress.

    Any predictor and corrector go; a multistep predictor forgets its history whenever the state is
    moved, and so takes steps of order 1.
    """
    return sampling.get_pc_sampler(
        sde,
        shape,
        predictor,
        corrector,
        inverse_scaler,
        snr,
        n_steps,
        probability_flow,
        continuous,
        denoise,
        eps,
        device,
        constrain=constrain,
        start=start,
        **options,
    )
