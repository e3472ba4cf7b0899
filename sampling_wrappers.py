"""Changes to what a network predicts while sampling: thresholding and guidance.

A wrapper takes a ScoreFunction and gives one back, with its four faces (score, D, ε̂, velocity) in
keeping, so that it goes wherever a network goes: every sampler, the likelihood, another wrapper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch

import arguments
from parametrization import OUTPUTS, Point, ScoreFunction, convert
from sde_lib import expand, unbound


class _Wrapper(ScoreFunction):
    """A ScoreFunction made of others."""

    def __init__(self, *inner: ScoreFunction):
        for fn in inner:
            if not isinstance(fn, ScoreFunction):
                raise arguments.WrongTypeError(
                    f"expected a ScoreFunction, got {type(fn).__name__}; make one of a network by "
                    "models.utils.get_score_fn(sde, network), of a function s(x, t) by "
                    "parametrization.as_score_function(s, sde)"
                )
        kinds = [type(unbound(fn.sde)).__name__ for fn in inner]
        if len({*kinds}) > 1:
            raise ValueError(
                f"expected scores of one process, got those of {' and '.join(kinds)}; carry one "
                "over by parametrization.on_process(score_fn, sde)"
            )
        super().__init__(inner[0].model_fn, inner[0].sde, inner[0].parametrization)
        self.inner = inner
        self.trained = inner[0].trained
        self.device = inner[0].device
        self.evaluations: int = sum(getattr(f, "evaluations", 1) for f in inner)  # of one call

    def with_conditions(self, **conditions):
        bound = copy.copy(self)
        bound.inner = tuple(f.with_conditions(**conditions) for f in self.inner)
        bound.nfe = 0
        return bound

    def _point(self, x, t) -> Point:
        """The coefficients of `sde`, as the network knows them where it was trained on `sde`."""
        if self.trained is not None:
            return Point(self.sde, t, x, self.parametrization.sigma_data)
        return self.parametrization.point(self.sde, t, x)


class _Denoiser(_Wrapper):
    def __init__(self, score_fn: ScoreFunction, fn: Callable):
        super().__init__(score_fn)
        self.fn = fn

    def _face(self, target, x, t, conditions):
        # At one x, moving D by δ moves a face with coordinates (P, R) in (D, ε̂) by (P − Rα/σ) δ.
        # So where fn leaves D alone the face is the network's own, with no division by α or σ.
        self.nfe += self.evaluations
        (base,), kind = self.inner, self.parametrization.output
        point = self._point(x, t)
        output = base._face(kind, x, t, conditions)
        D = convert(output, kind, "data", point)
        moved = self.fn(D, x, t)
        if moved.shape != D.shape:
            raise ValueError(
                f"a denoiser wrapper got D of shape {tuple(D.shape)} and returned "
                f"{tuple(moved.shape)}; expected the same"
            )
        P, R = OUTPUTS[target](point)
        slope = torch.as_tensor(P - R * point.alpha / point.sigma)
        return convert(output, kind, target, point) + expand(slope, x) * (moved - D)


def wrap_denoiser(score_fn: ScoreFunction, fn: Callable) -> ScoreFunction:
    """`score_fn` with D(x, t) replaced by fn(D, x, t); score, ε̂ and velocity follow.

    Args:
      score_fn: from `get_score_fn(sde, network, ...)`.
      fn: takes D and x, (B, *), and t, (B,) or 0-dim; returns the new D.
    """
    return _Denoiser(score_fn, fn)


def static_threshold(score_fn: ScoreFunction, low: float = -1.0, high: float = 1.0):
    """D clipped to the data's range [low, high] (Ho et al. 2020; Saharia et al. 2022, sec. 2.3)."""
    _check_range(low, high)
    return wrap_denoiser(score_fn, lambda D, x, t: D.clamp(low, high))


def dynamic_threshold(
    score_fn: ScoreFunction, p: float = 0.995, low: float = -1.0, high: float = 1.0
):
    """D clipped to ±s and divided by s, sample by sample (Saharia et al. 2022, sec. 2.3):

        s = max(1, the p-th quantile of |D|)

    for data in [−1, 1]; other ranges are moved there and back.

    Args:
      p: the share of a sample's numbers left unclipped.
      low, high: the data's range.
    """
    _check_range(low, high)
    if not 0 < p <= 1:
        raise ValueError(f"dynamic thresholding needs 0 < p ≤ 1, got {p}; the published is 0.995")
    centre, radius = (low + high) / 2, (high - low) / 2

    def threshold(D, x, t):
        unit = (D - centre) / radius
        size = unit.reshape(len(D), -1).abs().float()
        s = expand(torch.quantile(size, p, dim=1).clamp(min=1), unit)
        return centre + radius * torch.clamp(unit, -s, s) / s

    return wrap_denoiser(score_fn, threshold)


def _check_range(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"thresholding needs low < high, got {low} and {high}")


class _Weighted(_Wrapper):
    """Guidance of weight w at the noise levels σ/α of an interval."""

    def __init__(self, *inner: ScoreFunction, w: float, interval: tuple[float, float]):
        super().__init__(*inner)
        if not math.isfinite(w):
            raise ValueError(f"guidance needs a finite w, got {w}")
        low, high = (float(v) for v in interval)
        if not 0 <= low < high:
            raise ValueError(f"guidance needs an interval 0 ≤ low < high of σ/α, got {interval}")
        self.w, self.interval = float(w), (low, high)

    def _weight(self, x, t):
        if self.interval == (0.0, math.inf):
            return self.w
        low, high = self.interval
        noise = self._point(x, t).sigma_tilde
        return expand(self.w * ((noise >= low) & (noise <= high)).to(noise.dtype), x)


class _Guided(_Weighted):
    def _face(self, target, x, t, conditions):
        # Every face is affine in D with the same slope, so the lerp of D is the lerp of the face.
        self.nfe += self.evaluations
        strong, weak = (f._face(target, x, t, conditions) for f in self.inner)
        return strong + self._weight(x, t) * (strong - weak)


def classifier_free_guidance(
    conditional: ScoreFunction,
    unconditional: ScoreFunction,
    w: float,
    *,
    interval: tuple[float, float] = (0.0, math.inf),
) -> ScoreFunction:
    """Guidance away from a weaker denoiser, D = D_c + w (D_c − D_∅); w = 0 is none.

    With one network, `score_fn.with_conditions(y=labels)` and `score_fn` itself, which is told of
    no class, this is classifier-free guidance (Ho and Salimans 2022, eq. 6). The network must have
    been trained with `model.label_dropout`. Two evaluations a call.

    Args:
      interval: the noise levels σ/α within which w acts (Kynkäänniemi et al. 2024).
    """
    return _Guided(conditional, unconditional, w=w, interval=interval)


def autoguidance(
    strong: ScoreFunction,
    weak: ScoreFunction,
    w: float,
    *,
    interval: tuple[float, float] = (0.0, math.inf),
) -> ScoreFunction:
    """Guidance by a worse version of the network itself, D = D_1 + w (D_1 − D_0); w = 0 is none
    (Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself").

    The weak network is smaller or trained for less time, on the same data and, where there are
    classes, told of the same ones. Two evaluations a call.

    Args:
      interval: the noise levels σ/α within which w acts.
    """
    return _Guided(strong, weak, w=w, interval=interval)


class _Pushed(_Weighted):
    def __init__(self, score_fn, gradient: Callable, w: float, interval: tuple[float, float]):
        super().__init__(score_fn, w=w, interval=interval)
        self.gradient = gradient

    def _face(self, target, x, t, conditions):
        # At one x, moving the score by γ moves D by γ σ²/α and ε̂ by −γ σ.
        self.nfe += self.evaluations
        (base,), point = self.inner, self._point(x, t)
        P, R = OUTPUTS[target](point)
        slope = -R * point.sigma
        if torch.is_tensor(P):  # a face that D has a part in; for the others α may be 0
            slope = slope + P * point.sigma**2 / point.alpha
        push = expand(slope, x) * self.gradient(x, self._times(x, t))
        return base._face(target, x, t, conditions) + self._weight(x, t) * push

    @staticmethod
    def _times(x, t):
        return torch.as_tensor(t).to(x.device).expand(len(x))


def classifier_guidance(
    score_fn: ScoreFunction,
    gradient: Callable,
    w: float = 1.0,
    *,
    interval: tuple[float, float] = (0.0, math.inf),
) -> ScoreFunction:
    """The score of p_t(x) p_t(y | x)^w (Song et al. 2021, eq. 14; Dhariwal & Nichol 2021, eq. 13),

        s + w ∇_x log p_t(y | x),   D + w (σ²/α) ∇_x log p_t(y | x);   w = 0 is no guidance

    Args:
      gradient: gradient(x, t) = ∇_x log p_t(y | x), of x's shape, for times t (B,); of a
        classifier `controllable_generation.classifier_gradient`.
      interval: the noise levels σ/α within which w acts (Kynkäänniemi et al. 2024).
    """
    return _Pushed(score_fn, gradient, w, interval)
