"""Samplers: predictors, correctors, their registries, time grids, and the loop that joins them.

    x_T ~ π;  at each time: correctors move x within p_t, the predictor moves it to the next time.

Predictor–Corrector sampling is Algorithm 1 of Song et al. 2021. Few-step and higher-order
predictors live in `solvers.py`, loaded when a name is not found here.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import ode
import sde_lib
from models.utils import get_score_fn
from parametrization import as_score_function
from sde_lib import alpha_sigma, expand

_PREDICTORS: dict[str, type] = {}
_CORRECTORS: dict[str, type] = {}
_SAMPLERS: dict[str, Callable] = {}


# --- registries ---------------------------------------------------------------------------


def _register(registry: dict, kind: str, obj, name: str | None):
    def register(obj):
        key = name or obj.__name__
        if key in registry:
            raise ValueError(f"a {kind} named {key!r} is already registered: {registry[key]!r}")
        registry[key] = obj
        return obj

    return register if obj is None else register(obj)


def register_predictor(cls=None, *, name: str | None = None):
    """Register a Predictor class, to be chosen by `config.sampling.predictor`."""
    return _register(_PREDICTORS, "predictor", cls, name)


def register_corrector(cls=None, *, name: str | None = None):
    """Register a Corrector class, to be chosen by `config.sampling.corrector`."""
    return _register(_CORRECTORS, "corrector", cls, name)


def register_sampler(fn=None, *, name: str | None = None):
    """Register a whole sampling method, chosen by `config.sampling.method`: a function of
    (config, sde, shape, inverse_scaler, eps, **options) that returns sampler(model)."""
    return _register(_SAMPLERS, "sampler", fn, name)


def _get(registry: dict, kind: str, name: str):
    if name not in registry and importlib.util.find_spec("solvers"):
        importlib.import_module("solvers")
    if name not in registry:
        raise ValueError(f"{kind} {name!r} is unknown; registered: {sorted(registry)}")
    return registry[name]


def get_predictor(name: str) -> type:
    """The Predictor class registered under `name`."""
    return _get(_PREDICTORS, "predictor", name)


def get_corrector(name: str) -> type:
    """The Corrector class registered under `name`."""
    return _get(_CORRECTORS, "corrector", name)


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
    sampler = _get(_SAMPLERS, "sampling.method", config.sampling.method.lower())
    return sampler(config, sde, shape, inverse_scaler, eps, **options)


# --- noise --------------------------------------------------------------------------------


class NoiseSource:
    """Where a sampler's noise comes from: torch's global state, one generator, or per-sample seeds.

    With `seeds`, sample i depends on seeds[i] alone, at any batch size.
    """

    def __init__(self, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None):
        if generator is not None and seeds is not None:
            raise ValueError("expected generator= or seeds=, got both; give one")
        self.generator = generator
        self.seeds = None if seeds is None else [int(s) for s in seeds]
        self._per_sample: list[torch.Generator] = []

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers of x's shape, dtype and device."""
        if self.seeds is None:
            return torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
        if not self._per_sample:
            self._per_sample = [torch.Generator(x.device).manual_seed(s) for s in self.seeds]
        rows = (
            torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=x.device)
            for g in self._per_sample
        )
        return torch.stack(list(rows))

    def prior(self, sde, shape) -> torch.Tensor:
        """`sde.prior_sampling(shape)` under this source; any process, as written."""
        if self.seeds is not None:
            parts = [self._seeded_prior(sde, (1, *shape[1:]), seed) for seed in self.seeds]
            return torch.cat(parts)
        if self.generator is not None:
            g = self.generator
            seed = torch.randint(2**62, (), generator=g, device=g.device)
            return self._seeded_prior(sde, shape, int(seed))
        return sde.prior_sampling(shape)

    @staticmethod
    def _seeded_prior(sde, shape, seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            # Another stream than `randn_like` of the same seed.
            torch.random.default_generator.manual_seed(seed ^ 0x5DEECE66D)
            return sde.prior_sampling(shape)


class _Stepper:
    """What predictors and correctors share: their source of noise."""

    noise: NoiseSource | None = None

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Noise of x's shape; use this, not torch.randn_like, to obey `seeds=`."""
        return torch.randn_like(x) if self.noise is None else self.noise.randn_like(x)


# --- predictors ---------------------------------------------------------------------------


class Predictor(_Stepper):
    """One reverse-time update of the state. A subclass defines `update_fn`, `step` or both.

    `update_fn(x, t)` is score_sde's and belongs to the grid of `sde.N` times; `step(x, t, s)`
    goes from any t to any s < t. The loop calls the first on that grid, the second elsewhere.

    Args:
      sde: the forward process.
      score_fn: s(x, t).
      probability_flow: use the probability-flow ODE in place of the reverse SDE.
    """

    order = 1
    nfe_per_step = 1
    stochastic = True

    def __init__(self, sde, score_fn, probability_flow: bool = False):
        super().__init__()
        self.sde = sde
        self.rsde = sde.reverse(score_fn, probability_flow)
        self.score_fn = score_fn
        self.probability_flow = probability_flow

    def update_fn(self, x, t):
        """One update at times t (B,), of step T/N: (x, x_mean), x_mean being x without noise."""
        raise NotImplementedError(f"{type(self).__name__} defines no update_fn(x, t); call step(x, t, s)")

    def step(self, x, t, s):
        """From time t to s < t, 0-dim float64 tensors on the CPU: (x, x_mean)."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no step(x, t, s), so it runs only on the grid of sde.N "
            "uniform times: leave out steps= and schedule=, or define step"
        )

    def start(self, times: torch.Tensor) -> None:
        """Called before sampling with the whole grid; solvers with history drop it here."""

    def finish(self, x, t):
        """The last call, at t = eps: (x, x_mean)."""
        vec_t = batch_time(x, t)
        if _own_update(type(self)):
            return self.update_fn(x, vec_t)
        return x, as_score_function(self.score_fn, self.sde).denoise(x, vec_t)


def _depth(cls: type, method: str) -> float:
    """How far up `cls`'s ancestors `method` is defined; infinity where only Predictor has it."""
    owners = (i for i, c in enumerate(cls.__mro__) if method in vars(c) and c is not Predictor)
    return next(owners, math.inf)


def _own_update(cls: type) -> bool:
    """Whether `cls` goes by `update_fn` on the grid of sde.N times: not if its `step` is newer."""
    return math.inf > _depth(cls, "update_fn") <= _depth(cls, "step")


def _own_step(cls: type) -> bool:
    """Whether `cls` goes by `step` on any grid: not if it is inherited and `update_fn` newer."""
    return math.inf > _depth(cls, "step") <= _depth(cls, "update_fn")


def batch_time(x: torch.Tensor, t) -> torch.Tensor:
    """The time t as a vector (B,) on x's device, in x's dtype."""
    return torch.full((x.shape[0],), float(t), dtype=x.dtype, device=x.device)


@register_predictor(name="euler_maruyama")
class EulerMaruyamaPredictor(Predictor):
    """Euler–Maruyama on the reverse SDE: x ← x − [f x − g² s] Δt + g √Δt z, Δt = T/N. Weak order 1."""

    def update_fn(self, x, t):
        return self._update(x, t, self.sde.T / self.sde.N)

    def step(self, x, t, s):
        return self._update(x, batch_time(x, t), float(t - s))

    def _update(self, x, t, dt: float):
        z = self.randn_like(x)
        drift, diffusion = self.rsde.sde(x, t)
        x_mean = x - drift * dt
        return x_mean + expand(diffusion, x) * math.sqrt(dt) * z, x_mean


@register_predictor(name="reverse_diffusion")
class ReverseDiffusionPredictor(Predictor):
    """Discretise the reverse SDE as the forward one is: x ← x − f + G² s + G z
    (Song et al. 2021, eq. 46). Weak order 1.

    Off the training grid f and G are those of the exact transition from s to t:
    f = (α_t/α_s − 1) x, G² = σ_t² − (α_t σ_s/α_s)²; Euler's for a process without α and σ.
    """

    def __init__(self, sde, score_fn, probability_flow=False):
        super().__init__(sde, score_fn, probability_flow)
        _refuse_bad_tables(sde, sde_lib.VPSDE)
        self.affine = sde_lib.is_affine(sde)

    def update_fn(self, x, t):
        f, G = self.rsde.discretize(x, t)
        z = self.randn_like(x)
        x_mean = x - f
        return x_mean + expand(G, x) * z, x_mean

    def step(self, x, t, s):
        vec_t, z = batch_time(x, t), self.randn_like(x)
        f, G2 = self._transition(x, vec_t, t, s)
        x_mean = x - f + (0.5 if self.probability_flow else 1.0) * G2 * self.score_fn(x, vec_t)
        return x_mean + (0.0 if self.probability_flow else 1.0) * G2**0.5 * z, x_mean

    def _transition(self, x, vec_t, t, s):
        if not self.affine:
            drift, diffusion = self.sde.sde(x, vec_t)
            return drift * float(t - s), expand(diffusion, x) ** 2 * float(t - s)
        (a_t, sigma_t), (a_s, sigma_s) = alpha_sigma(self.sde, t, x), alpha_sigma(self.sde, s, x)
        ratio = a_t / a_s
        return (ratio - 1) * x, sigma_t**2 - (ratio * sigma_s) ** 2


@register_predictor(name="ancestral_sampling")
class AncestralSamplingPredictor(Predictor):
    """Sample p(x_s | x_t, x_0 = D(x_t)): DDPM's ancestral sampling and, for VE, eq. 47 of
    Song et al. 2021; for any other affine process

        x_s = (σ_s/σ_t) e^{−h} x + α_s (1 − e^{−2h}) D + σ_s √(1 − e^{−2h}) z,   h = λ_s − λ_t.

    Weak order 1; the variance is exact for a point mass.
    """

    def __init__(self, sde, score_fn, probability_flow=False):
        super().__init__(sde, score_fn, probability_flow)
        if probability_flow:
            raise ValueError(
                "ancestral sampling is stochastic and has no probability flow; "
                "use reverse_diffusion or euler_maruyama with it"
            )
        if not sde_lib.is_affine(sde):
            raise ValueError(
                f"ancestral sampling needs α(t) and σ(t), and the drift or mean of "
                f"{type(sde).__name__} is not affine in x; use euler_maruyama or reverse_diffusion"
            )
        _refuse_bad_tables(sde, sde_lib.VPSDE)

    def update_fn(self, x, t):
        if isinstance(self.sde, sde_lib.VESDE):
            return self._ve_update(x, t)
        if isinstance(self.sde, sde_lib.VPSDE):
            return self._vp_update(x, t)
        return self._posterior(x, t, t, (t - self.sde.T / self.sde.N).clamp(min=0))

    def step(self, x, t, s):
        return self._posterior(x, batch_time(x, t), t, s)

    def _posterior(self, x, vec_t, t, s):
        D = as_score_function(self.score_fn, self.sde).denoise(x, vec_t)
        (a_t, sigma_t), (a_s, sigma_s) = alpha_sigma(self.sde, t, x), alpha_sigma(self.sde, s, x)
        e_h = a_t * sigma_s / (a_s * sigma_t)
        x_mean = expand(sigma_s / sigma_t * e_h, x) * x + expand(a_s * (1 - e_h**2), x) * D
        return x_mean + expand(sigma_s * torch.sqrt(1 - e_h**2), x) * self.randn_like(x), x_mean

    def _ve_update(self, x, t):
        sigma, adjacent = sde_lib.adjacent_sigmas(self.sde, t)
        variance = sigma**2 - adjacent**2
        x_mean = x + expand(variance, x) * self.score_fn(x, t)
        std = adjacent * torch.sqrt(variance) / sigma
        return x_mean + expand(std, x) * self.randn_like(x), x_mean

    def _vp_update(self, x, t):
        beta = sde_lib.lookup(self.sde.discrete_betas, sde_lib.row(self.sde, t))
        x_mean = (x + expand(beta, x) * self.score_fn(x, t)) / expand(torch.sqrt(1 - beta), x)
        return x_mean + expand(torch.sqrt(beta), x) * self.randn_like(x), x_mean


@register_predictor(name="none")
class NonePredictor(Predictor):
    """No predictor: corrector-only sampling. The loop takes x_mean from the corrector."""

    nfe_per_step = 0

    def __init__(self, sde, score_fn, probability_flow=False):
        self.sde, self.score_fn, self.probability_flow = sde, score_fn, probability_flow

    def update_fn(self, x, t):
        return x, x

    def step(self, x, t, s):
        return x, x


def _refuse_bad_tables(sde, kinds) -> None:
    if isinstance(sde, kinds):
        sde.discrete_betas  # noqa: B018  raises here, not at the first step, where N ≤ beta_max


# --- correctors ---------------------------------------------------------------------------


class Corrector(_Stepper):
    """Steps of a Markov chain that leaves p_t invariant. A subclass defines `update_fn`.

    Args:
      sde: the forward process.
      score_fn: s(x, t).
      snr: the signal-to-noise ratio r that sets the step size.
      n_steps: steps per predictor update.
    """

    def __init__(self, sde, score_fn, snr: float, n_steps: int):
        super().__init__()
        self.sde = sde
        self.score_fn = score_fn
        self.snr = snr
        self.n_steps = n_steps

    def update_fn(self, x, t):
        """n_steps steps at times t (B,): (x, x_mean), x_mean being x without the last noise."""
        raise NotImplementedError(f"{type(self).__name__} defines no update_fn(x, t)")


class _Langevin(Corrector):
    """Langevin steps x ← x + ε s + √(2ε) z at a step size that subclasses choose."""

    def __init__(self, sde, score_fn, snr, n_steps):
        super().__init__(sde, score_fn, snr, n_steps)
        if snr < 0:
            raise ValueError(f"a corrector needs snr ≥ 0, got {snr}; the published values are 0.01 to 0.2")
        _refuse_bad_tables(sde, (sde_lib.VPSDE, sde_lib.subVPSDE))
        if not isinstance(sde, sde_lib.AffineSDE) and not sde_lib.is_affine(sde):
            raise ValueError(
                f"{type(self).__name__} needs α(t), and the drift or mean of {type(sde).__name__} "
                "is not affine in x; use corrector 'none' or your own"
            )

    def step_size(self, x, t, score, noise) -> torch.Tensor:
        """ε (B,) from state, time, score and noise."""
        raise NotImplementedError

    def update_fn(self, x, t):
        x_mean = x
        for _ in range(self.n_steps):
            score = self.score_fn(x, t)
            noise = self.randn_like(x)
            eps = self.step_size(x, t, score, noise)
            x_mean = x + expand(eps, x) * score
            x = x_mean + expand(torch.sqrt(2 * eps), x) * noise
        return x, x_mean

    def _alpha(self, x, t):
        """The α_i of App. G: 1 − β_i for VP and sub-VP, 1 for VE, (α_t/α_{t−T/N})² elsewhere."""
        if isinstance(self.sde, (sde_lib.VPSDE, sde_lib.subVPSDE)):
            return sde_lib.lookup(self.sde.alphas, sde_lib.row(self.sde, t))
        if isinstance(self.sde, sde_lib.VESDE):
            return torch.ones_like(t)
        before = (t - self.sde.T / self.sde.N).clamp(min=0)
        ratio = alpha_sigma(self.sde, t, x)[0] / alpha_sigma(self.sde, before, x)[0]
        return (ratio**2).to(t.dtype)


@register_corrector(name="langevin")
class LangevinCorrector(_Langevin):
    """Langevin dynamics with ε = 2 α_i (r ‖z‖/‖s‖)² (Song et al. 2021, App. G, alg. 4 and 5).

    The norms are means over the batch, as published; under `seeds=` they are each sample's own.
    """

    #: Below so many numbers per sample, ‖z‖/‖s‖ of one sample fluctuates without bound.
    MIN_NUMBERS = 768

    def step_size(self, x, t, score, noise):
        score_norm = torch.linalg.vector_norm(score.reshape(len(x), -1), dim=1)
        noise_norm = torch.linalg.vector_norm(noise.reshape(len(x), -1), dim=1)
        if self.noise is None or self.noise.seeds is None:
            score_norm, noise_norm = score_norm.mean(), noise_norm.mean()
        return 2 * self._alpha(x, t) * (self.snr * noise_norm / score_norm) ** 2


@register_corrector(name="ald")
class AnnealedLangevinDynamics(_Langevin):
    """Annealed Langevin dynamics with ε = 2 α_i (r σ_t)² (NCSN and NCSNv2)."""

    def step_size(self, x, t, score, noise):
        sigma = alpha_sigma(self.sde, t, x)[1].to(t.dtype)
        return 2 * self._alpha(x, t) * (self.snr * sigma) ** 2


@register_corrector(name="none")
class NoneCorrector(Corrector):
    """No corrector: predictor-only sampling."""

    def __init__(self, sde, score_fn, snr, n_steps):
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps

    def update_fn(self, x, t):
        return x, x


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
            f"schedule {schedule!r} is unknown; known: uniform, quadratic, logsnr, karras, a function"
        )
    if not callable(schedule):  # the ends, free of rounding
        times[0] = ends[0]
        times[1:][-1:] = ends[1]
    if times.shape != (steps,) or not (times.diff() < 0).all() or not 0 <= times[-1] <= times[0] <= sde.T:
        raise ValueError(f"the schedule must give {steps} falling times in [0, {sde.T}], got {times}")
    return times


def check_eps(sde, eps: float, shape) -> None:
    """Refuse an end time outside [0, T) or at which the process has no noise left."""
    if not 0 <= eps < sde.T or not alpha_sigma(
        sde, torch.tensor([eps]), torch.zeros((1,) * len(shape))
    )[1].item() > 0:
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
            with _own_noise_refused(seeds is not None and i == 0, target):
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
    if legacy and _own_update(type(p)):
        return p.update_fn(x, vec_t)
    if i == len(times) - 1:
        return p.finish(x, times[i])
    return p.step(x, times[i], times[i + 1])


def _check_pair(sde, predictor, corrector, snr, n_steps, probability_flow, legacy) -> None:
    if n_steps < 1 and corrector is not NoneCorrector:
        raise ValueError(f"a corrector needs n_steps ≥ 1, got {n_steps}; use corrector None for none")

    def no_score(x, t):
        return torch.zeros_like(x)

    p = predictor(sde, no_score, probability_flow)
    corrector(sde, no_score, snr, n_steps)
    if not _own_update(type(p)) and not _own_step(type(p)):
        raise TypeError(f"{type(p).__name__} defines neither update_fn(x, t) nor step(x, t, s)")
    if not legacy and not _own_step(type(p)):
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
            f"'langevin' with seeds= uses each sample's own norms, and samples of {numbers} numbers "
            f"(fewer than {LangevinCorrector.MIN_NUMBERS}) make them blow up; use corrector 'ald', "
            "or generator= in place of seeds="
        )


class _own_noise_refused:
    """Refuse a step that draws from torch's global state, which per-sample seeds cannot govern."""

    def __init__(self, active: bool, device: torch.device):
        self.active, self.device = active, device

    def _state(self):
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def __enter__(self):
        self.before = self._state() if self.active else []

    def __exit__(self, kind, *_):
        if kind is None and self.active:
            for a, b in zip(self.before, self._state(), strict=True):
                if not torch.equal(a, b):
                    raise ValueError(
                        "a predictor, corrector or network draws its own noise, so seeds= cannot "
                        "govern it; draw by self.randn_like(x), or use generator="
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
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


@register_sampler(name="pc")
def _pc_from_config(config, sde, shape, inverse_scaler, eps, **options):
    s = config.sampling
    options.setdefault("steps", s.get("steps", 0) or None)
    options.setdefault("schedule", s.get("schedule", "uniform"))
    return get_pc_sampler(
        sde,
        shape,
        get_predictor(s.predictor.lower()),
        get_corrector(s.corrector.lower()),
        inverse_scaler,
        s.snr,
        n_steps=s.n_steps_each,
        probability_flow=s.probability_flow,
        continuous=config.training.continuous,
        denoise=s.noise_removal,
        eps=eps,
        device=config.device,
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
        _refuse_bad_tables(sde, sde_lib.VPSDE)

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

        (x,), _ = ode.solve_scipy(
            rhs, (x,), float(sde.T), eps, rtol=rtol, atol=atol, method=method
        )
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
        denoise=config.sampling.noise_removal,
        eps=eps,
        device=config.device,
        continuous=config.training.continuous,
        **options,
    )
