"""Samplers that choose their steps by an error estimate, each sample its own.

A step from two solutions x_lo and x_hi of different order is accepted where

    E = ‖(x_hi − x_lo)/δ‖ / √n ≤ 1,   δ = max(atol, rtol max(|x_lo|, k |x_lo of the last step|)),

and the next step is θ h E^{−r}. k = √(α² + σ²) after the step over before: 1 for VP; for VE it
keeps a step from σ = 50 to σ = 0.1 from being allowed 5 % of 50. Each sample has its own h and
waits when it has arrived, so no result depends on batch mates, and what is bound to the samples of
a batch, such as labels, stays with them; evaluations are calls of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import arguments
import sde_lib
from ode_adaptive import SolverError
from parametrization import Point
from sampling_grids import check_eps, check_shape
from sampling_loop import (
    FiniteWatch,
    FractionBar,
    check_common,
    check_seeds,
    is_continuous,
    score_and_device,
    solver_options,
    with_options,
)
from sampling_noise import NoiseSource
from sampling_steps import batch_time, register_sampler
from sde_lib import alpha_sigma, double, expand


@dataclass
class Control:
    """What decides on a step: tolerances, first step, θ, r, largest growth, most evaluations."""

    rtol: float
    atol: float
    h0: float
    theta: float
    exponent: float
    max_growth: float
    max_nfe: int

    def __post_init__(self):
        arguments.number(**vars(self))
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"an adaptive sampler needs {name} > 0, got {value}")

    def growth(self, error: torch.Tensor) -> torch.Tensor:
        """The next step over this one, θ E^{−r}: (B,)."""
        return (self.theta * error**-self.exponent).clamp(max=self.max_growth)

    def error(self, low, high, previous) -> torch.Tensor:
        """E of each sample: (B,), float64."""
        delta = torch.clamp(self.rtol * torch.maximum(low.abs(), previous.abs()), min=self.atol)
        scaled = double(((high - low) / delta).reshape(len(low), -1))
        return scaled.square().mean(dim=1).sqrt()


@dataclass
class Method:
    """A pair of methods, bound to a network.

    Args:
      attempt: (x, left, h, dw) -> (x_lo, x_hi) after a step of length h (B,) on x (B, *), which has
        `left` (B,) to go; 0 where it has arrived.
      time: left -> t.
      length: to go at the start, in the method's own variable, t or λ.
      path: where dw comes from, for methods with noise; it may shorten a step.
    """

    attempt: Callable
    time: Callable
    length: float
    path: BrownianPath | None = None


@dataclass
class _Run:
    """One call of an adaptive sampler."""

    method: Method
    control: Control
    size: Callable  # (t, x) -> √(α² + σ²)
    evaluations: Callable
    bar: FractionBar
    callback: Callable | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x at the end, each sample having gone `method.length`."""
        method = self.method
        left = double(torch.full((len(x),), method.length, device=x.device))
        h, previous, calls = torch.full_like(left, self.control.h0), x, 0
        while (left > 0).any():
            step, dw = torch.minimum(h, left), None
            if method.path is not None:
                step, dw = method.path.propose(step)
            low, high = method.attempt(x, left, step, dw)
            error = self._error(low, high, previous, left, step)
            self._check(error, left, step)
            accept = (error <= 1) & (left > 0)
            if method.path is not None:
                method.path.accept(accept)
            x, previous = _choose(accept, high, x), _choose(accept, low, previous)
            rest = torch.where(accept, left - step, left)
            left = torch.where(rest > 1e-9 * method.length, rest, 0.0)
            # 0 for those that have arrived: their growth may be infinite.
            h = torch.where(left > 0, step * self.control.growth(error), 0.0)
            self._tell(calls, x, left)
            calls += 1
        self.bar.close()
        return x

    def _error(self, low, high, previous, left, step) -> torch.Tensor:
        after, before = (self.size(self.method.time(v), low) for v in (left - step, left))
        return self.control.error(low, high, expand(after / before, low) * previous)

    def _tell(self, i: int, x, left) -> None:
        if not self.bar.shown and self.callback is None:
            return  # without a look at the device
        furthest = left.max()
        self.bar(1 - float(furthest) / self.method.length)
        if self.callback is not None:
            self.callback(i, float(self.method.time(furthest)), x, x)

    def _check(self, error, left, step) -> None:
        bad = ~torch.isfinite(error) & (left > 0)
        # The last step may be as short as it likes.
        stuck = (step < left) & (left - step == left)
        used = self.evaluations()
        if used <= self.control.max_nfe and not (bad | stuck).any():
            return
        if bad.any():
            t = float(self.method.time(left[bad].max()))
            raise FloatingPointError(
                f"the state is not finite after a step from t = {t:.6g}; check the network "
                "(untrained or diverged?) and eps"
            )
        t = float(self.method.time(left.max()))
        why = "the step has become too short" if stuck.any() else f"{used} evaluations"
        raise SolverError(
            f"{why} at t = {t:.6g}, with errors up to {float(error.max()):.3g} times what is "
            f"allowed; raise rtol={self.control.rtol:g}, atol={self.control.atol:g} or "
            f"max_nfe={self.control.max_nfe}"
        )


def adaptive_sampler(
    sde,
    shape,
    inverse_scaler,
    control: Control,
    prepare: Callable,
    *,
    denoise: bool = True,
    eps: float | None = None,
    device=None,
    continuous: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    callback: Callable | None = None,
    progress: bool = False,
) -> Callable:
    """What adaptive samplers share: sampler(model) -> (samples, evaluations of the network).

    Args:
      sde, shape, inverse_scaler, device, continuous, dtype, generator, seeds, progress: as in
        `sampling.get_pc_sampler`.
      control: of the steps.
      prepare: (score_fn, noise, x, eps) -> Method.
      denoise: return D(x, eps), one evaluation more.
      eps: the time at which sampling ends; by default the process's own.
      callback: called as callback(i, t, x, x) after every attempt, t of the sample furthest behind.

    Raises: FloatingPointError where the state is not finite, SolverError where max_nfe is
      reached, both naming t.
    """
    shape = check_shape(shape)
    end = sde.sampling_eps if eps is None else eps
    check_eps(sde, end, shape)
    check_seeds(seeds, shape)
    check_common(inverse_scaler, dtype, callback=callback)

    @torch.no_grad()
    def sampler(model):
        score_fn, target = score_and_device(sde, model, continuous, device)
        before, noise = score_fn.nfe, NoiseSource(generator, seeds)
        x = noise.prior(sde, shape).to(target, dtype or torch.float32)
        run = _Run(
            method=prepare(score_fn, noise, x, end),
            control=control,
            size=_size(sde),
            evaluations=lambda: score_fn.nfe - before,
            bar=FractionBar(progress, "sampling"),
            callback=callback,
        )
        x = run(x)
        if denoise:
            x = score_fn.denoise(x, batch_time(x, end))
            FiniteWatch(torch.tensor([end])).last(x)
        return inverse_scaler(x), score_fn.nfe - before

    return sampler


def _choose(mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _size(sde) -> Callable:
    if not sde_lib.is_affine(sde):
        return lambda t, x: torch.ones_like(t)
    return lambda t, x: torch.hypot(*alpha_sigma(sde, t, x))


def _times(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return t.to(x.dtype)


# --- DPM-Solver-12 and -23 ------------------------------------------------------------------


def get_dpm_solver_adaptive(
    sde,
    shape,
    inverse_scaler,
    *,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h0: float = 0.05,
    theta: float = 0.9,
    max_growth: float = 5.0,
    max_nfe: int = 10_000,
    **common,
) -> Callable:
    """DPM-Solver-12 or -23 with adaptive steps in λ: sampler(model) -> (samples, NFE).

    The probability-flow ODE in noise form (Lu et al. 2022a, eq. 3.4 and App. C), order 2 or 3
    checked against the order below, which costs no evaluation more. Any affine process.

    Args:
      order: 2 for DPM-Solver-12, two evaluations a step; 3 for -23, three.
      rtol, atol: tolerances, relative and in units of the state; 0.0078 is a level of 256.
      h0: first step in λ.
      theta: the safety factor.
      max_growth: of a step over the one before; infinite as published, where an error that
        happens to vanish lets a step leap over what matters.
      max_nfe: evaluations after which to give up.
      common: the other arguments of `adaptive_sampler`, and its errors.
    """
    if order not in (2, 3):
        raise ValueError(f"dpm_solver_adaptive needs order 2 or 3, got {order}")
    sde_lib.check_process(sde)
    if not sde_lib.is_affine(sde):
        raise ValueError(
            f"dpm_solver_adaptive needs λ(t), and the drift or mean of {type(sde).__name__} is not "
            "affine in x; use gotta_go_fast"
        )
    control = Control(rtol, atol, h0, theta, 1 / order, max_growth, max_nfe)

    def prepare(score_fn, noise, x, eps):
        ends = torch.tensor([eps, float(sde.T)], dtype=torch.float64)
        end, start = (float(v) for v in sde_lib.half_log_snr(sde, ends))

        def attempt(x, left, h, dw):
            return dpm_solver_pair(sde, score_fn.noise, x, end - left, h, order)

        def time(left):
            return sde_lib.time_of_half_log_snr(sde, end - left)

        return Method(attempt, time, end - start)

    return adaptive_sampler(sde, shape, inverse_scaler, control, prepare, **common)


def dpm_solver_pair(sde, noise_fn: Callable, x, lam, h, order: int):
    """DPM-Solver's solutions of order − 1 and `order` after a step h (B,) in λ from λ (B,).

    Lu et al. 2022a, alg. 1 and 2, with ε = ε̂(x, t), r₁ = ½ for orders 1 and 2, and r₁ = ⅓, r₂ = ⅔
    for orders 2 and 3:

        u₁ = (α₁/α) x − σ₁ expm1(r₁h) ε
        x⁽¹⁾ = (α_s/α) x − σ_s expm1(h) ε,   x⁽²⁾ = x⁽¹⁾ − σ_s expm1(h) (ε₁ − ε)/(2r₁)
        u₂ = (α₂/α) x − σ₂ expm1(r₂h) ε − σ₂ (r₂/r₁) φ(r₂h) (ε₁ − ε)
        x⁽³⁾ = x⁽¹⁾ − (σ_s/r₂) φ(h) (ε₂ − ε),   φ(h) = expm1(h)/h − 1
    """
    here = Point(sde, sde_lib.time_of_half_log_snr(sde, lam), x)
    origin = here.shift
    centred = x if origin is None else x - origin

    def eps_at(y, time):
        return noise_fn(y, _times(time, y))

    def go(r: float, terms):
        """(α'/α) x − σ' Σ c·d at λ + r h, both x from the origin, and the time there."""
        there = Point(sde, sde_lib.time_of_half_log_snr(sde, lam + r * h), x)
        y, origin = expand(there.alpha / here.alpha, x) * centred, there.shift
        for c, d in terms:
            y = y - expand(there.sigma * c, x) * d
        return (y if origin is None else y + origin), there.t

    e = eps_at(x, here.t)
    r1 = 0.5 if order == 2 else 1 / 3
    e1 = eps_at(*go(r1, [(torch.expm1(r1 * h), e)]))
    euler = (torch.expm1(h), e)
    second = go(1, [euler, (torch.expm1(h) / (2 * r1), e1 - e)])[0]
    if order == 2:
        return go(1, [euler])[0], second
    r2 = 2 / 3
    u2 = go(r2, [(torch.expm1(r2 * h), e), (r2 / r1 * _phi(r2 * h), e1 - e)])
    return second, go(1, [euler, (_phi(h) / r2, eps_at(*u2) - e)])[0]


def _phi(h: torch.Tensor) -> torch.Tensor:
    """expm1(h)/h − 1, by its series where h is small."""
    series = h / 2 * (1 + h / 3 * (1 + h / 4 * (1 + h / 5)))
    safe = torch.where(h.abs() < 1e-3, torch.ones_like(h), h)
    return torch.where(h.abs() < 1e-3, series, torch.expm1(safe) / safe - 1)


# --- Gotta Go Fast --------------------------------------------------------------------------


def get_gotta_go_fast(
    sde,
    shape,
    inverse_scaler,
    *,
    rtol: float = 0.02,
    atol: float = 0.0078,
    h0: float = 0.01,
    theta: float = 0.9,
    exponent: float = 0.9,
    max_growth: float = 5.0,
    max_nfe: int = 10_000,
    **common,
) -> Callable:
    """The reverse SDE with adaptive steps: sampler(model) -> (samples, NFE).

    Jolicoeur-Martineau et al. 2021, algorithm 1: `stochastic_pair` with steps in t, two evaluations
    each. Any process with `sde()`. Where the published algorithm draws new noise for a rejected
    step, this one keeps the sample's Brownian path (`BrownianPath`): rejecting noise for its error
    selects it, and for data of two numbers gave a standard deviation of 0.41 for 0.30.

    Args:
      rtol: published values are 0.01 to 0.05.
      atol: 0.0078 for data in [−1, 1], 0.0039 for data in [0, 1].
      h0: first step, as a share of T.
      exponent: r of the rule for the next step.
      theta, max_growth, max_nfe: as in `get_dpm_solver_adaptive`.
      common: the other arguments of `adaptive_sampler`, and its errors.
    """
    sde_lib.check_process(sde)
    arguments.number(h0=h0)
    control = Control(rtol, atol, h0 * float(sde.T), theta, exponent, max_growth, max_nfe)

    def prepare(score_fn, noise, x, eps):
        rsde = sde.reverse(score_fn)

        def attempt(x, left, h, dw):
            return stochastic_pair(rsde, x, eps + left, h, dw)

        length = float(sde.T) - eps
        return Method(attempt, lambda left: eps + left, length, BrownianPath(noise, x))

    return adaptive_sampler(sde, shape, inverse_scaler, control, prepare, **common)


def stochastic_pair(rsde, x, t, h, dw):
    """Euler–Maruyama's step h (B,) back from t (B,), and the improved one with the same Δw.

        K₁ = −h d(x, t) + g_t Δw,   K₂ = −h d(x + K₁, t − h) + g_{t−h} Δw,   Δw ~ N(0, h)
        x' = x + K₁,   x'' = x + ½ (K₁ + K₂)

    with drift d and diffusion g of the reverse process. x'' has weak order 2 where g depends on t
    alone, as in every process here.
    """

    def increment(y, time):
        drift, diffusion = rsde.sde(y, _times(time, y))
        return expand(diffusion, x) * dw - expand(h, x) * drift

    first = increment(x, t)
    second = increment(x + first, t - h)
    return x + first, x + 0.5 * (first + second)


class BrownianPath:
    """The Brownian paths of a batch, as far as they are known: a stack of segments per sample.

    A step takes its increment from the top segment, of length L, or new where none is known, L = ∞:

        w(h) | w(L) ~ N((h/L) w(L), h (1 − h/L)),   h ≤ L,

    and what remains of the segment stays on the stack. So a rejected step is tried again on the
    same path (Rackauckas and Nie 2017, with steps that end where known segments do).
    """

    def __init__(self, noise: NoiseSource, x: torch.Tensor):
        self.noise = noise
        self.depth = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.lengths = double(torch.zeros(1, len(x), device=x.device))  # by depth and sample
        self.values = torch.zeros_like(x)[None]

    def propose(self, h: torch.Tensor):
        """A step of length h or less for each sample: its length and its increment."""
        z, rows = self.noise.randn_like(self.values[0]), torch.arange(len(h), device=h.device)
        known, top = self.depth > 0, (self.depth - 1).clamp(min=0)
        length = torch.where(known, self.lengths[top, rows], math.inf)
        value = _choose(known, self.values[top, rows], torch.zeros_like(z))
        h = torch.where(h < length * (1 - 1e-6), h, length)
        part = h / length
        first = expand(part, z) * value + expand((h * (1 - part)).sqrt(), z) * z
        new = (h < length) & (h > 0)
        self._put(known & new, length - h, value - first)
        self.depth = self.depth + new
        if int(self.depth.max()) > len(self.lengths):
            self.lengths = torch.cat([self.lengths, torch.zeros_like(self.lengths[:1])])
            self.values = torch.cat([self.values, torch.zeros_like(self.values[:1])])
        self._put(new, h, first)
        return h, first

    def accept(self, mask: torch.Tensor) -> None:
        """Drop the segments that the samples of `mask` have gone through."""
        self.depth = self.depth - mask.long()

    def _put(self, mask, length, value) -> None:
        """Write the top segments of the samples of `mask`."""
        top, rows = (self.depth - 1).clamp(min=0), torch.arange(len(mask), device=mask.device)
        self.lengths[top, rows] = torch.where(mask, length, self.lengths[top, rows])
        self.values[top, rows] = _choose(mask, value, self.values[top, rows])


# --- registration ---------------------------------------------------------------------------


def _from_config(maker: Callable, name: str) -> Callable:
    def from_config(config, sde, shape, inverse_scaler, eps, **options):
        sampler = with_options(maker, solver_options(config), f"sampling.method {name!r}")
        options.setdefault("device", getattr(config, "device", None))
        options.setdefault("continuous", is_continuous(config))
        options.setdefault("denoise", getattr(config.sampling, "noise_removal", True))
        return sampler(sde, shape, inverse_scaler, eps=eps, **options)

    return from_config


register_sampler(
    _from_config(get_dpm_solver_adaptive, "dpm_solver_adaptive"), name="dpm_solver_adaptive"
)
register_sampler(_from_config(get_gotta_go_fast, "gotta_go_fast"), name="gotta_go_fast")
