"""Samplers: time grids, the loop that joins predictors and correctors, and the ODE sampler.

    x_T ~ π;  at each time: correctors move x within p_t, the predictor moves it to the next time.

Predictor–Corrector sampling is Algorithm 1 of Song et al. 2021. The predictors and correctors
themselves are in `sampling_steps.py`; their names are here too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import ode
import sde_lib
from models.utils import get_score_fn
from parametrization import ScoreFunction
from sampling_noise import NoiseSource, own_noise_refused
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
    add_to,
    batch_time,
    get_corrector,
    get_predictor,
    look_up,
    own_step,
    own_update,
    refuse_bad_tables,
    register_corrector,
    register_predictor,
)
from sde_lib import alpha_sigma

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
    "batch_time",
    "check_eps",
    "get_corrector",
    "get_ode_sampler",
    "get_pc_sampler",
    "get_predictor",
    "get_sampling_fn",
    "register_corrector",
    "register_predictor",
    "register_sampler",
    "shared_corrector_update_fn",
    "shared_predictor_update_fn",
    "time_grid",
]

_SAMPLERS: dict[str, Callable] = {}


def register_sampler(fn=None, *, name: str | None = None):
    """Register a whole sampling method, chosen by `config.sampling.method`: a function of
    (config, sde, shape, inverse_scaler, eps, **options) that returns sampler(model)."""
    return add_to(_SAMPLERS, "sampler", fn, name)


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
    sampler = look_up(_SAMPLERS, "sampling.method", config.sampling.method.lower())
    return sampler(config, sde, shape, inverse_scaler, eps, **options)


def shared_predictor_update_fn(x, t, sde, model, predictor, probability_flow, continuous):
    """One predictor update of a network: what hand-written loops of score_sde's users call."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return (predictor or NonePredictor)(sde, score_fn, probability_flow).update_fn(x, t)


def shared_corrector_update_fn(x, t, sde, model, corrector, continuous, snr, n_steps):
    """One corrector update of a network: what hand-written loops of score_sde's users call."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return (corrector or NoneCorrector)(sde, score_fn, snr, n_steps).update_fn(x, t)


# --- time grids ---------------------------------------------------------------------------


def time_grid(sde, eps: float, steps: int, schedule: str | Callable = "uniform") -> torch.Tensor:
    """`steps` falling times from T to eps, float64 on the CPU: steps − 1 intervals and a last call.

    Args:
      schedule: "uniform" in t; "quadratic", uniform in √t; "logsnr", uniform in λ; "karras",
        uniform in (σ/α)^{1/7} (Karras et al. 2022, eq. 5); or a function of (sde, eps, steps).
    """
    if steps < 1:
        raise ValueError(f"sampling needs steps ≥ 1, got {steps}")
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    ends = torch.tensor([float(sde.T), eps], dtype=torch.float64)
    if callable(schedule):
        times = torch.as_tensor(schedule(sde, eps, steps), dtype=torch.float64)
    elif schedule == "uniform":
        times = ends[0] + u * (ends[1] - ends[0])
    elif schedule == "quadratic":
        times = (ends[0].sqrt() + u * (ends[1].sqrt() - ends[0].sqrt())) ** 2
    elif schedule in ("logsnr", "karras"):
        if not sde_lib.is_affine(sde):
            raise ValueError(
                f"schedule {schedule!r} needs λ(t), and the drift or mean of {type(sde).__name__} "
                "is not affine in x; use uniform or quadratic"
            )
        power = 7.0
        lam = sde_lib.half_log_snr(sde, ends)
        if schedule == "logsnr":
            lam = lam[0] + u * (lam[1] - lam[0])
        else:
            root = torch.exp(-lam / power)
            lam = -power * torch.log(root[0] + u * (root[1] - root[0]))
        times = sde_lib.time_of_half_log_snr(sde, lam)
    else:
        raise ValueError(
            f"schedule {schedule!r} is unknown; known: uniform, quadratic, logsnr, karras, "
            "or a function"
        )
    if not callable(schedule):  # the ends, free of rounding
        times[0] = ends[0]
        times[1:][-1:] = ends[1]
    if (
        times.shape != (steps,)
        or not (times.diff() < 0).all()
        or not 0 <= times[-1] <= times[0] <= sde.T
    ):
        raise ValueError(
            f"the schedule must give {steps} falling times in [0, {sde.T}], got {times}"
        )
    return times


def check_eps(sde, eps: float, shape) -> None:
    """Refuse an end time outside [0, T) or at which the process has no noise left."""
    if (
        not 0 <= eps < sde.T
        or not alpha_sigma(sde, torch.tensor([eps]), torch.zeros((1,) * len(shape)))[1].item() > 0
    ):
        raise ValueError(
            f"{type(sde).__name__} needs 0 < eps < {sde.T}, with σ(eps) > 0, got {eps}; "
            f"use {sde.sampling_eps:g}"
        )


def _check_shape(shape) -> tuple[int, ...]:
    shape = tuple(int(n) for n in shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"expected a shape (B, *) of positive numbers, got {shape}")
    return shape


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
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    callback: Callable | None = None,
    progress: bool = False,
) -> Callable:
    """A Predictor–Corrector sampler: pc_sampler(model) -> (samples, evaluations of the network).

    Args:
      sde: the forward process.
      shape: (B, *), the shape of the batch.
      predictor, corrector: classes; None for none.
      inverse_scaler: from the network's range to [0, 1].
      snr, n_steps: of the corrector.
      probability_flow: let the predictor solve the probability-flow ODE.
      continuous: whether the network was trained with continuous time.
      denoise: return the last x_mean, without the noise of the last step.
      eps: the time at which sampling ends.
      device: of the samples; by default the network's.
      steps: number of times on the grid; by default `sde.N`.
      schedule: of the times, see `time_grid`.
      dtype: of the state; float32 by default.
      generator, seeds: the source of noise; see `NoiseSource`.
      callback: called as callback(i, t, x, x_mean) after every step.
      progress: show a progress bar.

    Raises: ValueError here, not while sampling, for pairs that cannot run;
      FloatingPointError, naming t, where the state is not finite.
    """
    shape = _check_shape(shape)
    check_eps(sde, eps, shape)
    predictor, corrector = predictor or NonePredictor, corrector or NoneCorrector

    def plan():
        n = sde.N if steps is None else steps
        legacy = n == sde.N and schedule == "uniform"
        _check_pair(sde, predictor, corrector, snr, n_steps, probability_flow, legacy)
        return legacy, time_grid(sde, eps, n, schedule)

    plan()
    _check_seeds(seeds, shape, corrector)

    @torch.no_grad()
    def pc_sampler(model):
        legacy, times = plan()  # again: sde.N may have been assigned since
        target = torch.device(device) if device is not None else _device_of(model)
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        before = score_fn.nfe
        source = NoiseSource(generator, seeds)
        p = predictor(sde, score_fn, probability_flow)
        c = corrector(sde, score_fn, snr, n_steps)
        p.noise = c.noise = source if generator is not None or seeds is not None else None
        p.start(times) if hasattr(p, "start") else None
        x = x_mean = source.prior(sde, shape).to(target, dtype or torch.float32)
        # In float32 from the start, as the original's: table rows are floors of these numbers.
        grid = torch.linspace(sde.T, eps, len(times)) if legacy else times
        vec_times = grid.to(target, x.dtype)
        watch = _FiniteWatch(grid)
        for i in _bar(range(len(times)), progress):
            vec_t = vec_times[i].expand(shape[0])
            # On a GPU asking for the state synchronises, so only the first step is watched there.
            watched = seeds is not None and (i == 0 or target.type == "cpu")
            with own_noise_refused(watched, target):
                x, x_mean = c.update_fn(x, vec_t)
                x, mean = _predict(p, x, vec_t, times, i, legacy)
            x_mean = x_mean if isinstance(p, NonePredictor) else mean
            watch(i, x)
            if callback is not None:
                callback(i, float(grid[i]), x, x_mean)
        watch.check()
        return inverse_scaler(x_mean if denoise else x), score_fn.nfe - before

    return pc_sampler


def _predict(p, x, vec_t, times, i: int, legacy: bool):
    if legacy and own_update(type(p)):
        return p.update_fn(x, vec_t)
    if i == len(times) - 1:
        return p.finish(x, times[i])
    return p.step(x, times[i], times[i + 1])


def _check_pair(sde, predictor, corrector, snr, n_steps, probability_flow, legacy) -> None:
    if n_steps < 1 and corrector is not NoneCorrector:
        raise ValueError(
            f"a corrector needs n_steps ≥ 1, got {n_steps}; use corrector None for none"
        )

    def no_score(x, t):
        return torch.zeros_like(x)

    p = predictor(sde, no_score, probability_flow)
    corrector(sde, no_score, snr, n_steps)
    if not own_update(type(p)) and not own_step(type(p)):
        raise TypeError(f"{type(p).__name__} defines neither update_fn(x, t) nor step(x, t, s)")
    if not legacy and not own_step(type(p)):
        raise ValueError(
            f"{type(p).__name__} has an update_fn(x, t) of its own but no step(x, t, s), and "
            f"update_fn is bound to the uniform grid of sde.N = {sde.N} times; leave out steps= "
            "and schedule=, or define step"
        )


def _check_seeds(seeds, shape, corrector) -> None:
    if seeds is None:
        return
    if len(seeds) != shape[0]:
        raise ValueError(f"expected {shape[0]} seeds, one per sample, got {len(seeds)}")
    numbers = math.prod(shape[1:])
    if issubclass(corrector, LangevinCorrector) and numbers < LangevinCorrector.MIN_NUMBERS:
        raise ValueError(
            f"'langevin' with seeds= uses each sample's own norms, and {numbers} numbers a sample "
            f"(fewer than {LangevinCorrector.MIN_NUMBERS}) make them blow up; use corrector 'ald', "
            "or generator= in place of seeds="
        )


class _FiniteWatch:
    """Remember the first step after which the state is not finite, without synchronising a GPU."""

    def __init__(self, grid: torch.Tensor):
        self.grid = grid
        self.first: torch.Tensor | None = None

    def __call__(self, i: int, x: torch.Tensor) -> None:
        bad = torch.where(torch.isfinite(x).all(), len(self.grid), i)
        self.first = bad if self.first is None else torch.minimum(self.first, bad)
        if x.device.type == "cpu":
            self.check()

    def check(self) -> None:
        i = len(self.grid) if self.first is None else int(self.first)
        if i < len(self.grid):
            raise FloatingPointError(
                f"the state is not finite after step {i} of {len(self.grid)}, "
                f"at t = {float(self.grid[i]):.6g}; check the network, snr and the number of steps"
            )


def _bar(iterable, show: bool):
    if not show:
        return iterable
    from tqdm import tqdm

    wait = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        iterable, desc="sampling", unit="step", leave=False, dynamic_ncols=True, mininterval=wait
    )


def _device_of(model) -> torch.device:
    if isinstance(model, ScoreFunction):
        return model.device or torch.device("cpu")
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def _is_continuous(config) -> bool:
    return getattr(getattr(config, "training", None), "continuous", True)


@register_sampler(name="pc")
def _pc_from_config(config, sde, shape, inverse_scaler, eps, **options):
    s = config.sampling
    options.setdefault("steps", getattr(s, "steps", 0) or None)
    options.setdefault("schedule", getattr(s, "schedule", "uniform"))
    return get_pc_sampler(
        sde,
        shape,
        get_predictor(s.predictor.lower()),
        get_corrector(s.corrector.lower()),
        inverse_scaler,
        getattr(s, "snr", 0.16),
        n_steps=getattr(s, "n_steps_each", 1),
        probability_flow=getattr(s, "probability_flow", False),
        continuous=_is_continuous(config),
        denoise=getattr(s, "noise_removal", True),
        eps=eps,
        device=getattr(config, "device", None),
        **options,
    )


# --- the probability-flow ODE sampler -------------------------------------------------------


def get_ode_sampler(
    sde,
    shape,
    inverse_scaler,
    denoise: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-3,
    device=None,
    *,
    continuous: bool = True,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    callback: Callable | None = None,
    progress: bool = False,
) -> Callable:
    """A sampler that solves the probability-flow ODE: ode_sampler(model, z=None) -> (samples, NFE).

    Args as `get_pc_sampler`, and:
      denoise: end with the x_mean of one reverse-diffusion update at eps.
      rtol, atol, method: of SciPy's solver.
      z: of the returned function, a latent code to decode; by default drawn from the prior.

    Raises: FloatingPointError, naming t, where the drift is not finite; RuntimeError where the
      solver gives up.
    """
    shape = _check_shape(shape)
    check_eps(sde, eps, shape)
    _check_seeds(seeds, shape, NoneCorrector)
    if denoise:
        refuse_bad_tables(sde, sde_lib.VPSDE)

    @torch.no_grad()
    def ode_sampler(model, z=None):
        target = torch.device(device) if device is not None else _device_of(model)
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        before = score_fn.nfe
        rsde = sde.reverse(score_fn, probability_flow=True)
        x = NoiseSource(generator, seeds).prior(sde, shape) if z is None else z
        x = x.to(target, x.dtype if z is not None else torch.float32)
        bar = _OdeBar(progress, float(sde.T), eps)

        def rhs(t, state):
            bar(t)
            if callback is not None:
                callback(score_fn.nfe - before, t, state[0], state[0])
            return (rsde.sde(state[0], batch_time(state[0], t))[0],)

        (x,), _ = ode.solve_scipy(rhs, (x,), float(sde.T), eps, rtol=rtol, atol=atol, method=method)
        bar.close()
        if denoise:
            p = ReverseDiffusionPredictor(sde, score_fn)
            x = p.update_fn(x, batch_time(x, eps))[1]
        return inverse_scaler(x), score_fn.nfe - before

    return ode_sampler


class _OdeBar:
    """A progress bar over the time that an adaptive solver has covered."""

    def __init__(self, show: bool, start: float, end: float):
        self.bar: Any = None
        self.start, self.length, self.seen = start, abs(start - end), 0.0
        if show:
            from tqdm import tqdm

            form = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
            self.bar = tqdm(total=1.0, desc="ODE", leave=False, bar_format=form, dynamic_ncols=True)

    def __call__(self, t: float) -> None:
        done = abs(self.start - t) / self.length
        if self.bar is not None and done > self.seen:
            self.bar.update(done - self.seen)
            self.seen = done

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


@register_sampler(name="ode")
def _ode_from_config(config, sde, shape, inverse_scaler, eps, **options):
    return get_ode_sampler(
        sde,
        shape,
        inverse_scaler,
        denoise=getattr(config.sampling, "noise_removal", True),
        eps=eps,
        device=getattr(config, "device", None),
        continuous=_is_continuous(config),
        **options,
    )
