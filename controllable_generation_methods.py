"""Names of the solvers of linear inverse problems, and what all of them share.

    sampler = get_inverse_solver(name)(sde, shape, operator, y, noise=σ_y, **options)
    samples, evaluations = sampler(model)

Every one draws, or tries to, from p(x_0 | y) with y = A x_0 + σ_y z. How near each comes is in
docs/inverse_problems.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch

from sampling import get_corrector, get_pc_sampler, get_predictor
from sampling_loop import class_of, score_and_device, with_options
from sampling_steps import add_to

#: By name: functions of (sde, shape, operator, y, *, noise, steps, schedule, eps, continuous,
#: generator, seeds, progress, **options) that return sampler(model) -> (samples, evaluations).
METHODS: dict[str, Callable] = {}

#: Modules that register methods, loaded when a name is asked for.
_PROVIDERS = tuple(f"controllable_generation_{part}" for part in ("projection", "posterior", "smc"))


def register_inverse_solver(fn=None, *, name: str):
    """Register a solver of inverse problems under `name`; see METHODS for its signature."""
    return add_to(METHODS, "inverse solver", fn, name)


def get_inverse_solver(name: str) -> Callable:
    """The solver registered under `name`."""
    load_inverse_solvers()
    if name not in METHODS:
        raise ValueError(f"inverse solver {name!r} is unknown; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def load_inverse_solvers() -> dict[str, Callable]:
    """METHODS, with every module of this room that registers some loaded."""
    for module in _PROVIDERS:
        if importlib.util.find_spec(module):
            importlib.import_module(module)
    return METHODS


# --- what is checked before the long work -----------------------------------------------------


def check_problem(shape, operator, y: torch.Tensor, noise: float) -> float:
    """σ_y as a float, after the check that samples, operator and measurement fit one another.

    Raises: ValueError naming what does not.
    """
    if tuple(shape[1:]) != tuple(operator.shape_in):
        raise ValueError(
            f"samples of shape {tuple(shape[1:])} do not fit {operator!r}; make the operator for "
            "the shape of one sample"
        )
    out = tuple(operator.shape_out)
    if tuple(y.shape[1:]) != out or len(y) not in (1, shape[0]):
        raise ValueError(
            f"expected a measurement of shape (1 or {shape[0]}, *{out}) for {shape[0]} samples, "
            f"got {tuple(y.shape)}; give one y for all samples, or one each"
        )
    if not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"expected the standard deviation of the noise, ≥ 0, got {noise}")
    return float(noise)


def need_svd(operator, method: str):
    """The singular values of `operator`, or an error that names a method without."""
    if operator.svd is None:
        raise ValueError(
            f"{method} needs singular values, and those of {operator!r} are not cheap; use a "
            "smaller shape, or a method that goes by A and its adjoint, such as 'mmps' or 'ddnm'"
        )
    return operator.svd


# --- a method that is a wrapper of the denoiser -----------------------------------------------


def get_wrapped_sampler(
    wrap: Callable,
    sde,
    shape,
    *,
    predictor: Any = "ancestral_sampling",
    corrector: Any = None,
    snr: float = 0.16,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = True,
    denoise: bool = True,
    eps: float | None = None,
    device=None,
    solver: dict | None = None,
    **options: Any,
) -> Callable:
    """A sampler of the score `wrap(score_fn)`, under any predictor and corrector.

    Args:
      wrap: from the network's ScoreFunction to another.
      predictor, corrector: classes, or their registered names.
      eps: where sampling ends; by default `sde.sampling_eps`.
      solver: options of the predictor, by name.
      options: of `sampling.get_pc_sampler`: steps, schedule, rho, dtype, generator, seeds,
        callback, progress, constrain, start.
      The others are those of `sampling.get_pc_sampler`.
    """
    predictor = get_predictor(predictor) if isinstance(predictor, str) else predictor
    corrector = get_corrector(corrector) if isinstance(corrector, str) else corrector
    if solver:
        predictor = with_options(predictor, solver, f"predictor {class_of(predictor).__name__}")
    inner = get_pc_sampler(
        sde,
        shape,
        predictor,
        corrector,
        lambda x: x,
        snr,
        n_steps,
        probability_flow,
        continuous,
        denoise,
        sde.sampling_eps if eps is None else eps,
        device,
        **options,
    )

    def sampler(model):
        return inner(wrap(score_and_device(sde, model, continuous, device)[0]))

    return sampler
