"""Samplers: the loop that joins predictors and correctors, and the names of this room.

    x_T ~ π;  at each time: correctors move x within p_t, the predictor moves it to the next time.

Predictor–Corrector sampling is Algorithm 1 of Song et al. 2021. Predictors and correctors are in
`sampling_steps.py`, time grids in `sampling_grids.py`, the ODE sampler and latent codes in
`sampling_ode.py`, thresholding and guidance in `sampling_wrappers.py`; their names are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import arguments
from models.utils import get_score_fn
from sampling_grids import RHO, check_eps, check_shape, time_grid
from sampling_langevin import get_langevin_sampler
from sampling_loop import (
    FiniteWatch,
    Trajectory,
    check_common,
    check_kind,
    check_seeds,
    class_of,
    is_continuous,
    score_and_device,
    solver_options,
    step_bar,
    with_options,
)
from sampling_noise import NoiseSource, own_noise_refused
from sampling_ode import decode, encode, get_ode_sampler, round_trip_error, slerp
from sampling_steps import (
    AncestralSamplingPredictor,
    AnnealedLangevinDynamics,
    Corrector,
    EulerMaruyamaPredictor,
    LangevinCorrector,
    NoneCorrector,
    NonePredictor,
    Predictor,
    ReverseDiffusionPredictor,
    batch_time,
    get_corrector,
    get_predictor,
    get_sampler,
    own_step,
    own_update,
    register_corrector,
    register_predictor,
    register_sampler,
)
from sampling_wrappers import (
    autoguidance,
    classifier_free_guidance,
    classifier_guidance,
    dynamic_threshold,
    static_threshold,
    wrap_denoiser,
)

__all__ = [
    "AncestralSamplingPredictor",
    "AnnealedLangevinDynamics",
    "Corrector",
    "EulerMaruyamaPredictor",
    "LangevinCorrector",
    "NoiseSource",
    "NoneCorrector",
    "NonePredictor",
    "Predictor",
    "ReverseDiffusionPredictor",
    "Trajectory",
    "autoguidance",
    "batch_time",
    "check_eps",
    "classifier_free_guidance",
    "classifier_guidance",
    "decode",
    "dynamic_threshold",
    "encode",
    "get_corrector",
    "get_langevin_sampler",
    "get_ode_sampler",
    "get_pc_sampler",
    "get_predictor",
    "get_sampling_fn",
    "register_corrector",
    "register_predictor",
    "register_sampler",
    "round_trip_error",
    "shared_corrector_update_fn",
    "shared_predictor_update_fn",
    "slerp",
    "static_threshold",
    "time_grid",
    "wrap_denoiser",
]


def get_sampling_fn(config, sde, shape, inverse_scaler, eps, **options):
    """The sampler that `config.sampling` describes: sampler(model) -> (samples, evaluations).

    Args:
      config: its `sampling`, `training.continuous` and `device` are read.
      sde: the forward process.
      shape: (B, *), the shape of a batch of samples.
      inverse_scaler: from the network's range to [0, 1].
      eps: the time at which sampling ends.
      options: keyword arguments of `get_pc_sampler` or `get_ode_sampler`, such as `progress`.
    """
    sampler = get_sampler(config.sampling.method)
    return sampler(config, sde, shape, inverse_scaler, eps, **options)


def shared_predictor_update_fn(x, t, sde, model, predictor, probability_flow, continuous):
    """One predictor update of a network: what hand-written loops of score_sde's users call."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return (predictor or NonePredictor)(sde, score_fn, probability_flow).update_fn(x, t)


def shared_corrector_update_fn(x, t, sde, model, corrector, continuous, snr, n_steps):
    """One corrector update of a network: what hand-written loops of score_sde's users call."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return (corrector or NoneCorrector)(sde, score_fn, snr, n_steps).update_fn(x, t)


# --- the Predictor–Corrector loop -----------------------------------------------------------


def get_pc_sampler(
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
    eps: float = 1e-3,
    device=None,
    *,
    steps: int | None = None,
    schedule: str | Callable = "uniform",
    rho: float = RHO,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    callback: Callable | None = None,
    progress: bool = False,
    constrain: Callable | None = None,
    start: Callable | None = None,
) -> Callable:
    """A Predictor–Corrector sampler: pc_sampler(model) -> (samples, evaluations of the network).

    Args:
      sde: the forward process.
      shape: (B, *), the shape of the batch.
      predictor, corrector: classes, or functools.partial of them with options; None for none.
      inverse_scaler: from the network's range to [0, 1].
      snr, n_steps: of the corrector.
      probability_flow: let the predictor solve the probability-flow ODE.
      continuous: whether the network was trained with continuous time.
      denoise: return the last x_mean, without the noise of the last step.
      eps: the time at which sampling ends.
      device: of the samples; by default the network's.
      steps: number of times on the grid; by default `sde.N`.
      schedule, rho: of the times, see `time_grid`.
      dtype: of the state, float32 by default, or float64. The network runs in its own parameters'
        dtype and its output is cast back, so that bfloat16 networks are integrated in either.
      generator, seeds: the source of noise; see `NoiseSource`.
      callback: called as callback(i, t, x, x_mean) after every step.
      progress: show a progress bar.
      constrain: called as constrain(x, x_mean, t) -> (x, x_mean) whenever the corrector or the
        predictor has moved the state, which is then at time t (0-dim float64 on the CPU); t = 0
        after the last step, where the state is data; see `controllable_generation.Constraint`.
        Multistep predictors then go at first order, each step anew.
      start: called once, as start(x) -> x, on a draw from the prior, for the state at the first
        time of the grid; by default the constraint's own `start`, where it has one.

    Raises: ValueError here, not while sampling, for pairs that cannot run;
      FloatingPointError, naming t, where the state is not finite.
    """
    shape = check_shape(shape)
    check_eps(sde, eps, shape)
    check_common(inverse_scaler, dtype, callback=callback, constrain=constrain, start=start)
    predictor, corrector = predictor or NonePredictor, corrector or NoneCorrector

    def plan():
        n = sde.N if steps is None else steps
        legacy = n == sde.N and schedule == "uniform"
        _check_pair(sde, predictor, corrector, snr, n_steps, probability_flow, legacy)
        return legacy, time_grid(sde, eps, n, schedule, rho=rho)

    plan()
    check_seeds(seeds, shape, corrector)

    @torch.no_grad()
    def pc_sampler(model):
        legacy, times = plan()  # again: sde.N may have been assigned since
        score_fn, target = score_and_device(sde, model, continuous, device)
        before = score_fn.nfe
        source = NoiseSource(generator, seeds)
        p = predictor(sde, score_fn, probability_flow)
        c = corrector(sde, score_fn, snr, n_steps)
        own = source if generator is not None or seeds is not None else None
        p.noise = c.noise = own
        hold = _Hold(constrain, start, p, own)
        if hasattr(p, "start"):
            p.start(times)
        x = x_mean = source.prior(sde, shape).to(target, dtype or torch.float32)
        # In float32 from the start, as the original's: table rows are floors of these numbers.
        grid = torch.linspace(sde.T, eps, len(times)) if legacy else times
        vec_times = grid.to(target, x.dtype)
        with own_noise_refused(seeds, target):
            x = hold.begin(x)
        after = torch.cat([times[1:], torch.zeros(1, dtype=times.dtype)])  # data have t = 0
        watch = FiniteWatch(grid)
        for i in step_bar(range(len(times)), progress):
            vec_t = vec_times[i].expand(shape[0])
            with own_noise_refused(seeds, target, i):
                x, x_mean = c.update_fn(x, vec_t)
                if not isinstance(c, NoneCorrector):
                    x, x_mean = hold(x, x_mean, times[i])
                x, mean = _predict(p, x, vec_t, times, i, legacy)
                x_mean = x_mean if isinstance(p, NonePredictor) else mean
                x, x_mean = hold(x, x_mean, after[i])
            watch(i, x)
            if callback is not None:
                callback(i, float(grid[i]), x, x_mean)
        result = x_mean if denoise else x
        watch.last(result)
        return inverse_scaler(result), score_fn.nfe - before

    return pc_sampler


class _Hold:
    """The state's constraint, if there is one, under the sampler's source of noise."""

    def __init__(self, constrain, start, predictor, noise):
        self.constrain, self.predictor = constrain, predictor
        self.start = start or getattr(constrain, "start", None)
        if hasattr(constrain, "noise"):
            constrain.noise = noise

    def begin(self, x):
        return x if self.start is None else self._checked(self.start(x), x)

    def __call__(self, x, x_mean, t):
        if self.constrain is None:
            return x, x_mean
        if hasattr(self.predictor, "forget"):
            self.predictor.forget()
        moved, mean = self.constrain(x, x_mean, t)
        return self._checked(moved, x), self._checked(mean, x)

    @staticmethod
    def _checked(moved, x):
        if moved.shape != x.shape:
            raise ValueError(
                f"a constraint got a state of shape {tuple(x.shape)} and returned "
                f"{tuple(moved.shape)}; expected the same"
            )
        return moved


def _predict(p, x, vec_t, times, i: int, legacy: bool):
    if legacy and own_update(type(p)):
        return p.update_fn(x, vec_t)
    if i == len(times) - 1:
        return p.finish(x, times[i])
    return p.step(x, times[i], times[i + 1])


def _check_pair(sde, predictor, corrector, snr, n_steps, probability_flow, legacy) -> None:
    check_kind(predictor, "predictor")
    check_kind(corrector, "corrector")
    if class_of(corrector) is not NoneCorrector:
        arguments.whole(n_steps=n_steps)
        if n_steps < 1:
            raise ValueError(
                f"a corrector needs n_steps ≥ 1, got {n_steps}; use corrector None for none"
            )

    def no_score(x, t):
        return torch.zeros_like(x)

    for maker in (predictor, corrector):
        with_options(class_of(maker), getattr(maker, "keywords", {}))
    p = predictor(sde, no_score, probability_flow)
    c = corrector(sde, no_score, snr, n_steps)
    if getattr(p, "multistep", False) and not isinstance(c, NoneCorrector):
        raise ValueError(
            f"{type(p).__name__} goes by the outputs of earlier steps, which a corrector would "
            f"leave behind, got {type(c).__name__}; use corrector 'none', or a predictor of one "
            "step such as 'ddim' or 'heun'"
        )
    if not own_update(type(p)) and not own_step(type(p)):
        raise TypeError(f"{type(p).__name__} defines neither update_fn(x, t) nor step(x, t, s)")
    if not legacy and not own_step(type(p)):
        raise ValueError(
            f"{type(p).__name__} has an update_fn(x, t) of its own but no step(x, t, s), and "
            f"update_fn is bound to the uniform grid of sde.N = {sde.N} times; leave out steps= "
            "and schedule=, or define step"
        )


@register_sampler(name="pc")
def _pc_from_config(config, sde, shape, inverse_scaler, eps, **options):
    s = config.sampling
    options.setdefault("steps", getattr(s, "steps", 0) or None)
    options.setdefault("schedule", getattr(s, "schedule", "uniform"))
    options.setdefault("rho", getattr(s, "rho", RHO))
    return get_pc_sampler(
        sde,
        shape,
        with_options(
            get_predictor(s.predictor), solver_options(config), f"predictor {s.predictor!r}"
        ),
        get_corrector(s.corrector),
        inverse_scaler,
        getattr(s, "snr", 0.16),
        n_steps=getattr(s, "n_steps_each", 1),
        probability_flow=getattr(s, "probability_flow", False),
        continuous=is_continuous(config),
        denoise=getattr(s, "noise_removal", True),
        eps=eps,
        device=getattr(config, "device", None),
        **options,
    )
