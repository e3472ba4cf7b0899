"""Inverse problems by projection: the state or the denoiser is moved to what the measurement says.

    replacement   x_t ← x_t + A⁺(α_t y + σ_t A z − A x_t)                Song et al. 2021, App. I.2
    projection    x_t ← x_t + w A⁺(α_t y + σ_t A z − A x_t)              Song et al. 2022
    repaint       replacement, and every stretch of steps several times   Lugmayr et al. 2022
    ddrm          a Gaussian for each singular value                      Kawar et al. 2022
    ddnm          D ← D + A⁺(y − A D); with noise, for each singular value  Wang et al. 2023
    sdedit        from the guide, noised to t_0                           Meng et al. 2022

None sees the part of the score that the measurement gives to the unknown. With a perfect network
replacement and ddnm are exact where known and unknown part are independent, and else shrink the
unknown towards its prior; repaint does so less; ddrm and sdedit are biased in ways of their own.
With noise in the measurement they work on singular values (`controllable_generation_spectral.py`).
How far each is off stands in docs/inverse_problems.md.

All work on every affine process, under any time grid, at any `seeds=` and batch size.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch

import arguments
import sde_lib
from controllable_generation_loop import Constraint
from controllable_generation_methods import (
    check_problem,
    chosen_predictor,
    method_sampler,
    register_inverse_solver,
)
from controllable_generation_spectral import DDNMPlusPredictor, DDRMPredictor, Spectrum
from parametrization import Point
from sampling import NoiseSource, get_predictor, time_grid, wrap_denoiser
from sampling_grids import RHO, SCHEDULES
from sampling_loop import class_of
from sampling_steps import Predictor, own_step
from sde_lib import alpha_sigma

Tensor = torch.Tensor


# --- the measurement ----------------------------------------------------------------------------


class KnownMeasurement(Constraint):
    """The measured part of the state is the measurement's, at the noise level of the state.

        x ← x + w A⁺(α_t y + σ_t A z − A x),   x_mean ← x_mean + w A⁺(α_t y − A x_mean)

    With noise σ_y, which y brings along, a direction of singular value s gets only what is missing
    of σ_t, √(σ_t² − α_t² σ_y²/s²) z, and is left to the network once y is noisier than the state:
    exact for a direction independent of all others, under a stochastic predictor.

    Args:
      sde: the forward process.
      operator, y, noise: of the measurement; noise > 0 needs singular values.
      weight: w, 1 for replacement.
    """

    def __init__(self, sde, operator, y: Tensor, noise: float = 0.0, weight: float = 1.0):
        super().__init__()
        self.sde, self.operator, self.y, self.weight = sde, operator, y, weight
        self.spectrum = Spectrum(operator, y, noise, "replacement with noise") if noise else None

    def start(self, x):
        return self(x, x, torch.as_tensor(float(self.sde.T), dtype=torch.float64))[0]

    def holds(self, x, t) -> bool:
        """Whether at time t every direction that is measured is still moved."""
        alpha, sigma = alpha_sigma(self.sde, t, x)
        return self.spectrum is None or float(sigma / alpha) >= self.spectrum.noisiest(x)

    def __call__(self, x, x_mean, t):
        spectrum = self.spectrum
        move = functools.partial(self._move_measured, spectrum) if spectrum else self._move
        if float(t) == 0:  # data
            return move(x, 1.0, 0.0, None), move(x_mean, 1.0, 0.0, None)
        point = Point(self.sde, t, x)
        alpha, sigma, m = point.alpha, point.sigma, point.shift
        z = self.randn_like(x)
        if m is None:
            return move(x, alpha, sigma, z), move(x_mean, alpha, sigma, None)
        return move(x - m, alpha, sigma, z) + m, move(x_mean - m, alpha, sigma, None) + m

    def _move(self, x, alpha, sigma, z):
        self.y = self.y.to(x)
        y = alpha * self.y
        target = y if z is None else y + sigma * self.operator(z)
        return x + self.weight * self.operator.pinv(target - self.operator(x))

    def _move_measured(self, spectrum, x, alpha, sigma, z):
        ybar, std, known = spectrum.at(x)
        target, room = alpha * ybar, sigma**2 - (alpha * std) ** 2
        if z is not None:
            target = target + room.clamp(min=0).sqrt() * spectrum.svd.Vt(z)
        return spectrum.move(x, known & (room >= 0), target.expand(len(x), -1), self.weight)


# --- replacement and projection -------------------------------------------------------------------


@register_inverse_solver(name="replacement")
def get_replacement_sampler(sde, shape, operator, y, *, noise: float = 0.0, **options: Any):
    """The measured part of the state is replaced by the noised measurement (Song et al. 2021, App.
    I.2): sampler(model) -> (samples, evaluations).

    Exact for independent directions; else the unknown part is biased towards its prior. Without
    noise A x = y holds at the end.

    Args:
      sde: the forward process, affine.
      shape: (B, *), the shape of the samples.
      operator, y: A and the measurement, (1 or B, *shape_out).
      noise: σ_y.
      options: of `get_wrapped_sampler`: steps, schedule, eps, continuous, generator, seeds,
        progress, predictor, corrector, snr ….
    """
    return get_projection_sampler(sde, shape, operator, y, noise=noise, weight=1.0, **options)


@register_inverse_solver(name="projection")
def get_projection_sampler(
    sde, shape, operator, y, *, noise: float = 0.0, weight: float = 0.8, **options: Any
):
    """The measured part of the state is drawn towards the noised measurement by a share w
    (Song et al. 2022, there λ): sampler(model) -> (samples, evaluations).

    Args:
      weight: w in (0, 1]; 1 is replacement. Smaller trusts the measurement less.
      The others as `get_replacement_sampler`.
    """
    noise = check_problem(shape, operator, y, noise)
    if not 0 < weight <= 1:
        raise ValueError(f"projection needs a weight of 0 < w ≤ 1, got {weight}; 1 is replacement")
    known = KnownMeasurement(sde, operator, y, noise, weight)
    own = {"constrain": known, "start": known.start}
    return method_sampler("projection", _as_it_is, sde, shape, own, options)


def _as_it_is(score):
    return score


# --- RePaint ----------------------------------------------------------------------------------


class _RePaint(Predictor):
    """One stretch of steps, gone down r times: after each but the last the state is noised again.

    x_t ~ p(x_t | x_s):   x_t = (α_t/α_s) x_s + √(σ_t² − (α_t/α_s)² σ_s²) z
    """

    def __init__(
        self, sde, score_fn, probability_flow=False, *, inner, constrain, times, resamplings: int
    ):
        super().__init__(sde, score_fn, probability_flow)
        self.inner = inner(sde, score_fn, probability_flow)
        self.constrain, self.times, self.resamplings = constrain, times, resamplings

    def start(self, times):
        self.inner.noise = self.noise
        self.inner.start(self.times)

    def step(self, x, t, s):
        path = self.times[(self.times <= t) & (self.times >= s)]
        x_mean = x
        # Where the measurement is noisier than the state, noising again would only forget it.
        rounds = self.resamplings if self.constrain.holds(x, s) else 1
        for k in range(rounds):
            if k > 0:
                x = self._noised_again(x, s, t)
            for i, (a, b) in enumerate(pairwise(path), 2):
                x, x_mean = self.inner.step(x, a, b)
                self.inner.forget()
                if k < rounds - 1 or i < len(path):  # the loop does the last one
                    x, x_mean = self.constrain(x, x_mean, b)
        return x, x_mean

    def finish(self, x, t):
        return self.inner.finish(x, t)

    def _noised_again(self, x, s, t):
        (a_s, sigma_s), (a_t, sigma_t) = (alpha_sigma(self.sde, u, x) for u in (s, t))
        ratio = a_t / a_s
        y = sde_lib.origin(self.sde, x)
        x = ratio * x if y is None else y + ratio * (x - y)
        return x + (sigma_t**2 - (ratio * sigma_s) ** 2).sqrt() * self.randn_like(x)


@register_inverse_solver(name="repaint")
def get_repaint_sampler(
    sde,
    shape,
    operator,
    y,
    *,
    noise: float = 0.0,
    jump: int = 10,
    resamplings: int = 10,
    predictor: Any = "ancestral_sampling",
    steps: int | None = None,
    schedule: Any = "uniform",
    rho: float = RHO,
    eps: float | None = None,
    solver: dict | None = None,
    **options: Any,
):
    """Replacement with resampling (Lugmayr et al. 2022): sampler(model) -> (samples, evaluations).

    The grid is cut into stretches of `jump` steps; each is gone down `resamplings` times, so that
    the unknown part has time to agree with the known. About `resamplings` × steps evaluations;
    less biased than replacement the more there are. With noise, stretches that end where a
    measured direction is noisier than the state are gone down once.

    Args:
      jump: j, steps of a stretch.
      resamplings: r; 1 is replacement.
      predictor, solver: what takes the steps, by name or class, and its options; it needs a
        step(x, t, s).
      The others as `get_replacement_sampler`.
    """
    noise = check_problem(shape, operator, y, noise)
    arguments.whole(jump=jump, resamplings=resamplings)
    if jump < 1 or resamplings < 1:
        raise ValueError(f"repaint needs jump and resamplings ≥ 1, got {jump} and {resamplings}")
    inner = chosen_predictor(predictor, solver)
    if not own_step(class_of(inner)):
        raise ValueError(
            f"repaint goes by step(x, t, s), and {class_of(inner).__name__} has none of its own; "
            "use 'ancestral_sampling' or 'ddim'"
        )
    eps = sde.sampling_eps if eps is None else eps
    times = time_grid(sde, eps, sde.N if steps is None else steps, schedule, rho=rho)
    ends = times[sorted({*range(0, len(times), jump), len(times) - 1})]
    known = KnownMeasurement(sde, operator, y, noise)
    stretch = functools.partial(
        _RePaint, inner=inner, constrain=known, times=times, resamplings=resamplings
    )
    own = {
        "predictor": stretch,
        "steps": len(ends),
        "schedule": lambda *_: ends,
        "eps": eps,
        "constrain": known,
        "start": known.start,
    }
    return method_sampler("repaint", _as_it_is, sde, shape, own, options)


# --- DDRM -------------------------------------------------------------------------------------


@register_inverse_solver(name="ddrm")
def get_ddrm_sampler(
    sde,
    shape,
    operator,
    y,
    *,
    noise: float = 0.0,
    eta: float = 0.85,
    eta_b: float = 1.0,
    **options: Any,
):
    """Denoising diffusion restoration by singular values (Kawar et al. 2022):
    sampler(model) -> (samples, evaluations).

    A rule made for some 20 steps: it hides η ρ_s of fresh noise in each, so that the variance of
    the unknown falls with their number. Exact as steps → ∞ for η = 0, no noise and independent
    directions. Without noise A x = y holds at the end.

    Args:
      eta: η in [0, 1], 0.85 as published.
      eta_b: η_b in [0, 1], the trust in the measurement, 1 as published.
      The others as `get_replacement_sampler`; no predictor, since this is one. `operator` needs
      singular values.
    """
    noise = check_problem(shape, operator, y, noise)
    if not (0 <= eta <= 1 and 0 <= eta_b <= 1):
        raise ValueError(f"ddrm needs eta and eta_b of 0 to 1, got {eta} and {eta_b}")
    spectrum = Spectrum(operator, y, noise, "ddrm")
    predictor = functools.partial(DDRMPredictor, spectrum=spectrum, eta=eta, eta_b=eta_b)
    own = {"predictor": predictor, "solver": None, "start": predictor(sde, _no_score).begin}
    return method_sampler("ddrm", _as_it_is, sde, shape, own, options)


def _no_score(x, t):
    raise NotImplementedError("the start of a chain asks for no score")


# --- DDNM -------------------------------------------------------------------------------------


@register_inverse_solver(name="ddnm")
def get_ddnm_sampler(
    sde,
    shape,
    operator,
    y,
    *,
    noise: float = 0.0,
    eta: float = 0.85,
    predictor: Any = None,
    **options: Any,
):
    """Denoising diffusion null-space sampling, and DDNM+ where there is noise (Wang et al. 2023):
    sampler(model) -> (samples, evaluations).

        D ← D + A⁺(y − A D)

    Without noise a wrapper of the denoiser, so that every predictor and corrector goes, and A x = y
    holds at the end; exact for independent directions. With noise, DDNM+ takes the steps itself,
    by singular values and without a corrector; biased.

    Args:
      eta: η of DDIM's steps, 0.85 as published.
      predictor: in place of DDIM, where there is no noise.
      The others as `get_replacement_sampler`.
    """
    noise = check_problem(shape, operator, y, noise)
    if not 0 <= eta <= 1:
        raise ValueError(f"ddnm needs eta of 0 to 1, got {eta}; 0.85 is published")
    if noise:
        if predictor is not None or eta == 0:
            raise ValueError(
                "ddnm with noise is DDNM+, which takes its own steps and hides noise in theirs: "
                "leave predictor out and take eta > 0"
            )
        spectrum = Spectrum(operator, y, noise, "ddnm with noise")
        plus = functools.partial(DDNMPlusPredictor, spectrum=spectrum, eta=eta)
        own = {"predictor": plus, "solver": None}
        return method_sampler("ddnm with noise", _as_it_is, sde, shape, own, options)
    if predictor is None:
        predictor = functools.partial(get_predictor("ddim"), eta=eta)

    def wrap(score):
        return ddnm_score(score, operator, y)

    inner = method_sampler("ddnm", wrap, sde, shape, {"predictor": predictor}, options)

    def sampler(model):
        samples, nfe = inner(model)
        return operator.project(samples, y.to(samples)), nfe

    return sampler


def ddnm_score(score_fn, operator, y: Tensor):
    """`score_fn` with D replaced by D + A⁺(y − A D), for every sampler (Wang et al. 2023)."""
    return wrap_denoiser(score_fn, lambda D, x, t: operator.project(D, y.to(D)))


# --- SDEdit -----------------------------------------------------------------------------------


@register_inverse_solver(name="sdedit")
def get_sdedit_sampler(
    sde,
    shape,
    operator,
    y,
    *,
    noise: float = 0.0,
    t0: float | None = None,
    steps: int | None = None,
    schedule: str = "uniform",
    rho: float = RHO,
    eps: float | None = None,
    generator: torch.Generator | None = None,
    seeds=None,
    **options: Any,
):
    """Sampling from a guide that is noised to t_0 (Meng et al. 2022): sampler(model) -> (samples,
    evaluations).

        x_{t_0} = α_{t_0} A⁺ y + σ_{t_0} z

    Between the guide (t_0 → 0) and a sample without any measurement (t_0 → T): x_0 given x_{t_0} in
    place of y, so biased for any t_0, towards the guide or towards the prior.

    Args:
      operator: A; None where y is the guide itself, (1 or B, *).
      t0: t_0, in (eps, T]; T/2 by default.
      steps: number of times from t_0 to eps; by default that share of sde.N.
      schedule: by name.
      The others as `get_replacement_sampler`; `noise` is not used.
    """
    if operator is not None:
        check_problem(shape, operator, y, noise)
    elif tuple(y.shape[1:]) != tuple(shape[1:]) or len(y) not in (1, shape[0]):
        raise ValueError(f"expected a guide of shape {tuple(shape)}, got {tuple(y.shape)}")
    eps = sde.sampling_eps if eps is None else eps
    t0 = sde.T / 2 if t0 is None else t0
    arguments.real(t0=t0, eps=eps)
    if not eps < t0 <= sde.T:
        raise ValueError(f"sdedit needs eps < t0 ≤ T, that is {eps} to {sde.T}, got {t0}")
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"schedule {schedule!r} is unknown; sdedit knows {known}")
    steps = max(round(t0 / sde.T * sde.N), 2) if steps is None else steps
    times = time_grid(sde, eps, steps, schedule, rho=rho, start=t0)
    # Another stream than the steps' own of the same seeds.
    noising = None if seeds is None else [int(s) ^ 0x9E3779B9 for s in seeds]

    def start(x):
        guide = y.to(x) if operator is None else operator.pinv(y.to(x))
        point = Point(sde, times[0], x)
        noised = point.alpha * guide + point.sigma * NoiseSource(generator, noising).randn_like(x)
        return noised if point.shift is None else noised + point.shift

    own = {
        "steps": steps,
        "schedule": lambda *_: times,
        "eps": eps,
        "generator": generator,
        "seeds": seeds,
        "start": start,
    }
    return method_sampler("sdedit", _as_it_is, sde, shape, own, options)
