"""Score matching as it came about: explicit, implicit, sliced, and at one or several noise levels.

All of these have the same minimiser, s = ∇ log p_t, and for any weight w(t) and any s

    explicit    E w ‖s(x_t) − ∇ log p_t(x_t)‖²                          (Hyvärinen 2005, eq. 2)
    implicit    E w [‖s‖² + 2 tr ∇s]                                    (Hyvärinen 2005, theorem 1)
    sliced      E w [(vᵀs)² + 2 vᵀ ∇s v], or with ‖s‖² in place of (vᵀs)² (Song et al. 2019)
    denoising   E w ‖s(x_t) + z/σ‖²                                     (Vincent 2011, eq. 11)

differ by what does not depend on s: explicit = implicit + E w ‖∇ log p_t‖², and denoising =
implicit + E w d/σ², so that with the weight σ² denoising score matching is the implicit one plus d.
`sliced` has the implicit one as its mean over v of covariance I. They act at the times of a
process, on x_t = α x_0 + σ z, or at one of them, where σ/α is `training.sigma`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import arguments
import sde_lib
from losses_registry import register_objective
from losses_step import Objective
from losses_weights import check_weighting, own_error, relative_weight
from models.utils import get_score_fn
from randomness import normal
from sde_lib import expand, sum_except_batch


class OneTime(sde_lib.TimeSampler):
    """The time at which the noise level σ/α of x/α is `sigma`, always.

    Raises: ValueError for a level that the process does not have between eps and T.
    """

    def __init__(self, sde, sigma: float, eps: float = 1e-5):
        super().__init__(sde, eps)
        ends = torch.tensor([self.eps, self.T], dtype=torch.float64)
        low, high = torch.exp(-sde_lib.half_log_snr(sde, ends)).tolist()
        if not low <= sigma <= high:
            raise ValueError(
                f"training.sigma: expected a noise level of {type(sde).__name__}, {low:.3g} to "
                f"{high:.3g}, got {sigma}"
            )
        level = torch.tensor(-math.log(sigma), dtype=torch.float64)
        self.time = sde_lib.time_of_half_log_snr(sde, level).item()

    def quantile(self, u):
        return torch.full_like(u, self.time)


class Levels(sde_lib.TimeSampler):
    """One of N noise levels, even in t from 0, or from eps where there is no noise at 0, to T."""

    def __init__(self, sde, N: int, eps: float = 1e-5):
        super().__init__(sde, eps)
        arguments.whole(N=N)
        if N < 1:
            raise ValueError(f"expected N ≥ 1 noise levels, got {N}")
        zero = torch.zeros((), dtype=torch.float64)
        low = 0.0 if sde_lib.alpha_sigma(sde, zero)[1] > 0 else self.eps
        self.times = torch.linspace(low, self.T, N, dtype=torch.float64)

    def quantile(self, u):
        index = (sde_lib.double(u) * len(self.times)).long().clamp(max=len(self.times) - 1)
        return sde_lib.lookup(self.times, index)


def times_from_config(config, sde) -> sde_lib.TimeSampler:
    """The one time that `training.sigma` names, or the distribution of `training.time_sampler`."""
    t = config.training
    if not t.sigma:
        return sde_lib.get_time_sampler(config, sde)
    if t.time_sampler.lower() != "uniform" or t.stratified:
        raise ValueError(
            f"training.sigma={t.sigma} is one noise level, and training.time_sampler="
            f"{t.time_sampler!r} or stratified={t.stratified} draws many; leave these 'uniform' "
            "and False, or sigma 0.0"
        )
    return OneTime(sde, t.sigma, t.eps)


# --- objectives -----------------------------------------------------------------------------


def _objective(
    integrand: Callable,
    sde,
    train: bool,
    times: sde_lib.TimeSampler | None = None,
    weighting: str = "dsm",
    min_snr_gamma: float = 5.0,
    reduce_mean: bool = True,
    continuous: bool = True,
) -> Objective:
    """E_t w(t) `integrand`(score_fn at t, x_t, t, draws), (B,), a sum over the coordinates."""
    check_weighting(weighting, min_snr_gamma)
    times = times or sde_lib.TimeSampler(sde)

    def per_image(model, batch, *, draws=None, **conditions):
        score_fn = get_score_fn(sde, model, train=train, continuous=continuous)
        t = times(len(batch), batch.device, draws)
        mean, std = sde.marginal_prob(batch, t)
        x = mean + expand(std, batch) * normal(batch, draws, "z")
        losses = integrand(lambda y: score_fn(y, t, **conditions), x, t, draws)
        point = score_fn.parametrization.point(sde, t, x)
        losses = losses * relative_weight(weighting, "score", point, min_snr_gamma).to(losses)
        losses = losses * (1 / batch[0].numel() if reduce_mean else 0.5)
        if times.importance:
            losses = losses / (times.density(t) * (times.T - times.eps)).to(losses)
        return losses, t

    return Objective(per_image)


def get_explicit_loss_fn(
    sde,
    exact_score: Callable,
    train: bool = True,
    **options,
) -> Objective:
    """loss_fn(model, batch, *, draws=None, **conditions): explicit score matching,

        E_t w(t) ‖s(x_t, t) − ∇ log p_t(x_t)‖²,

    zero for the exact score. The formulas and weights are those above and of `losses_weights.py`.

    Args:
      exact_score: exact_score(x, α, σ), the score of x_t = α x_0 + σ z, with α and σ of shape (B,).
      train: whether the network runs in training mode.
      options: `times`, a `sde_lib.TimeSampler`, by default of uniform times; `weighting`, by
        default 'dsm', and `min_snr_gamma`, `reduce_mean`, `continuous` as `losses.get_sde_loss_fn`.
    """

    def integrand(score, x, t, draws):
        alpha, sigma = sde_lib.alpha_sigma(sde, t, x)
        return sum_except_batch((score(x) - exact_score(x, alpha, sigma).to(x)) ** 2)

    return _objective(integrand, sde, train, **options)


def get_implicit_loss_fn(
    sde,
    train: bool = True,
    *,
    slices: int = 0,
    variance_reduction: bool = True,
    **options,
) -> Objective:
    """loss_fn(model, batch, *, draws=None, **conditions): implicit score matching,

        E_t w(t) [‖s‖² + 2 tr ∇s]   with the exact trace, by d backward passes, or
        E_t w(t) [‖s‖² + 2 vᵀ ∇s v]   over `slices` random v of ±1 for each x_t,

    which may be below zero. The network is differentiated twice.

    Args:
      slices: how many v; 0 = the exact trace.
      variance_reduction: False takes (vᵀs)² in place of ‖s‖², its mean over v.
      train, options: as `get_explicit_loss_fn`.
    """
    arguments.whole(slices=slices)
    if slices < 0:
        raise ValueError(f"expected slices ≥ 0, 0 being the exact trace, got {slices}")

    def integrand(score, x, t, draws):
        vectors = _signs(x, slices, draws) if slices else _basis(x)
        value, products = jacobian_products(score, x, vectors)
        traces = torch.stack([sum_except_batch(v * p) for v, p in zip(vectors, products)])
        if not slices:
            return sum_except_batch(value**2) + 2 * traces.sum(dim=0)
        squares = sum_except_batch(value**2)
        if not variance_reduction:
            squares = torch.stack([sum_except_batch(v * value) ** 2 for v in vectors]).mean(dim=0)
        return squares + 2 * traces.mean(dim=0)

    return _objective(integrand, sde, train, **options)


def get_annealed_loss_fn(
    sde,
    train: bool = True,
    *,
    N: int = 0,
    anneal_power: float = 2.0,
    reduce_mean: bool = False,
    continuous: bool = True,
    eps: float = 1e-5,
) -> Objective:
    """loss_fn(model, batch, *, draws=None, **conditions): NCSN's loss over N noise levels,

        E_i σ_i^p ‖s(x_i, i) + z/σ_i‖²   (Song & Ermon 2019, eq. 5 and 6; there p = 2)

    for VE at the levels of `VESDE.discrete_sigmas`, for other processes at even times.

    Args:
      N: number of levels; by default the process's.
      anneal_power: p; 2 makes all levels weigh alike, smaller ones favour small noise.
      reduce_mean, continuous, train, eps: as `losses.get_sde_loss_fn`.
    """
    arguments.real(anneal_power=anneal_power)
    times = Levels(sde, N or sde.N, eps)

    def per_image(model, batch, *, draws=None, **conditions):
        score_fn = get_score_fn(sde, model, train=train, continuous=continuous)
        t, z = times(len(batch), batch.device, draws), normal(batch, draws, "z")
        mean, std = sde.marginal_prob(batch, t)
        x = mean + expand(std, batch) * z
        error, point = own_error(score_fn, batch, z, x, t, conditions)
        weight = relative_weight("score", score_fn.parametrization.output, point)
        losses = sum_except_batch(error**2) * (weight * point.sigma**anneal_power).to(error)
        return losses * (1 / batch[0].numel() if reduce_mean else 0.5), t

    return Objective(per_image)


def jacobian_products(fn: Callable, x: torch.Tensor, vectors: torch.Tensor):
    """f(x), of x's shape, and vᵀ ∂f/∂x for each of `vectors` (c, B, *), differentiable by weights.

    Without a graph under no_grad, as in evaluation.
    """
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x).detach().requires_grad_(True)
        value = fn(x)
        products = torch.stack(
            [
                torch.autograd.grad(
                    value, x, v, create_graph=recording, retain_graph=True, materialize_grads=True
                )[0]
                for v in vectors
            ]
        )
    return (value, products) if recording else (value.detach(), products.detach())


def _signs(x: torch.Tensor, count: int, draws) -> torch.Tensor:
    """±1 with equal probability, (count, B, *)."""
    shape = (count, *x.shape[1:])
    u = torch.rand(len(x), *shape) if draws is None else draws.rand("slices", shape)
    return torch.where(u < 0.5, -1.0, 1.0).to(x).transpose(0, 1)


def _basis(x: torch.Tensor) -> torch.Tensor:
    """The d unit vectors, (d, B, *)."""
    d = x[0].numel()
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    return eye.reshape(d, 1, *x.shape[1:]).expand(-1, *x.shape)


# --- by configuration -----------------------------------------------------------------------


def options_from_config(config, sde) -> dict:
    """Times, weight, reduction and labels of an objective of this file."""
    t = config.training
    return {
        "times": times_from_config(config, sde),
        "weighting": t.weighting or ("likelihood" if t.likelihood_weighting else "dsm"),
        "min_snr_gamma": t.min_snr_gamma,
        "reduce_mean": t.reduce_mean,
        "continuous": t.continuous,
    }


@register_objective(name="implicit")
def _implicit(config, sde, train: bool) -> Objective:
    return get_implicit_loss_fn(sde, train, **options_from_config(config, sde))


@register_objective(name="sliced")
def _sliced(config, sde, train: bool) -> Objective:
    t = config.training
    options = {"slices": t.slices, "variance_reduction": t.variance_reduction}
    return get_implicit_loss_fn(sde, train, **options, **options_from_config(config, sde))


@register_objective(name="annealed")
def _annealed(config, sde, train: bool) -> Objective:
    t = config.training
    if t.weighting or t.likelihood_weighting or t.sigma:
        raise ValueError(
            f"training.objective='annealed' has the weight σ^anneal_power at all levels, got "
            f"weighting={t.weighting!r}, likelihood_weighting={t.likelihood_weighting}, sigma="
            f"{t.sigma}; leave them '', False and 0.0"
        )
    options = {"anneal_power": t.anneal_power, "reduce_mean": t.reduce_mean, "eps": t.eps}
    N = config.model.num_scales
    return get_annealed_loss_fn(sde, train, N=N, continuous=t.continuous, **options)
