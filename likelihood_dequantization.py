"""From the density of images with noise added to the probability of the images themselves.

Images of integer levels k in 0 … L − 1 have no density. With noise u ~ q(u | k) on [0, 1)^d and the
density p of x = scaler((k + u)/L), Jensen's inequality gives (Theis et al. 2016; Ho et al. 2019)

    log P(k) = log ∫ p(x(u)) |det dx/du| du ≥ E_q[log p(x) + log|det dx/du| − log q(u | k)]

and K draws in a mean inside the logarithm a tighter bound (Burda et al. 2016),

    log P(k) ≥ E log (1/K) Σ_j w_j,   log w_j = log p(x_j) + log|det dx/du| − log q(u_j | k).

A dequantizer is called `dequantizer(images, draws=None) -> (u, log_q)`: images (B, C, H, W) of
integers, u in [0, 1) of their shape, log_q (B,); `dequantizer.protocol()` says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import sde_lib
from likelihood_bits import log_volume_at
from likelihood_objective import get_elbo_loss_fn
from models.utils import get_score_fn
from randomness import Draws, normal
from sde_lib import expand, sum_except_batch


class UniformDequantizer:
    """q(u | k) = 1: the noise of `data_lib.prepare(dequantize=True)`, number for number."""

    def __call__(self, images: torch.Tensor, draws=None):
        check_levels(images)
        u = unit_noise(images, draws)
        return u, u.new_zeros(len(u))

    def protocol(self) -> dict[str, Any]:
        """What a reader needs to recompute a number made with it."""
        return {"dequantization": "uniform"}


class VariationalDequantizer:
    """q(u | k) of a trained flow, called network(images, e) -> (u, log_q) with e ~ U[0, 1)^d.

    Args:
      network: such as `models.dequantizer.Dequantizer`.
      about: where it came from, for the protocol.
    """

    def __init__(self, network: torch.nn.Module, about: dict[str, Any] | None = None):
        self.network, self.about = network.eval(), about or {}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, draws=None):
        check_levels(images)
        return self.network(images, unit_noise(images, draws))

    def protocol(self) -> dict[str, Any]:
        """What a reader needs to recompute a number made with it."""
        return {"dequantization": "variational", **self.about}


def unit_noise(images: torch.Tensor, draws=None) -> torch.Tensor:
    """Uniform numbers in [0, 1) of the images' shape, float32: torch's, or the images' own."""
    if draws is None:
        return torch.rand(images.shape, device=images.device)
    return draws.rand("dequantize", images.shape[1:]).to(images.device)


def add_noise(images: torch.Tensor, u: torch.Tensor, levels: int) -> torch.Tensor:
    """(k + u)/L in [0, 1), where rounding never takes k + u to the next level."""
    k = images.to(u.dtype)
    return torch.minimum(k + u, torch.nextafter(k + 1, k)) / levels


def log_weights(
    images: torch.Tensor,
    dequantizer: Callable,
    log_density: Callable,
    *,
    scaler: Callable,
    inverse_scaler: Callable,
    levels: int,
    count: int = 1,
    draws=None,
) -> torch.Tensor:
    """log w_j of `count` dequantisations of each image, in nats, (K, B).

    Their mean over j is the ordinary bound, `likelihood_bounds.importance_weighted` of them the
    tighter one. That holds for log p itself, or an estimate of it whose noise the draws j share:
    noise of their own would lift the logarithm of a mean above log P. So `log_density` gets the
    same `draws` for every j, and with them the same probes and times, and the dequantizer others.

    Args:
      images: integers, (B, C, H, W).
      dequantizer: (images, draws) -> (u, log_q).
      log_density: fn(x, draws=) -> log p(x) in nats, (B,).
      scaler, inverse_scaler: between [0, 1] and the network's range.
      levels: L.
      count: K.
      draws: a `randomness.Draws` of the images; the first dequantisation is that of K = 1.
    """
    if count < 1:
        raise ValueError(f"expected count ≥ 1 dequantisations of an image, got {count}; use 1")
    found = []
    for j in range(count):
        u, log_q = dequantizer(images, draws if j == 0 else _draws_of(draws, j))
        x = scaler(add_noise(images, u, levels))
        volume = log_volume_at(x, inverse_scaler, levels)
        found.append(log_density(x, draws=draws) + volume - log_q)
    return torch.stack(found)


def get_differentiable_elbo_fn(sde, *, eps: float = 1e-5, continuous: bool = True) -> Callable:
    """elbo(model, x, *, draws=None, **conditions) -> (log p(x) ≥ this in mean (B,), the times).

    The bound of `likelihood_bounds`, all three terms of it, at one time of each x, uniform in
    log-SNR, those of a batch evenly spread; differentiable in x, and so in what x came from. Two
    network evaluations.
    """
    times = sde_lib.LikelihoodTimes(sde, eps, stratified=True)
    options = {"time_sampler": times, "reduce_mean": False, "continuous": continuous}
    path = get_elbo_loss_fn(sde, train=False, eps=eps, **options)

    def elbo(model, x, *, draws=None, **conditions):
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        d, ends = x.shape[1:].numel(), torch.tensor([eps, float(sde.T)], dtype=torch.float64)
        (alpha, _), (sigma, sigma_T) = (c.tolist() for c in sde_lib.alpha_sigma(sde, ends))

        def perturbed(t: float, stream: str):
            vec_t = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
            z = normal(x, draws, stream)
            mean, std = sde.marginal_prob(x, vec_t)
            return mean + expand(std, x) * z, vec_t, z

        prior = sde.prior_logp(perturbed(float(sde.T), "prior")[0])
        at_eps, vec_t, z = perturbed(eps, "offset")
        error = -sigma * score_fn(at_eps, vec_t, **conditions) - z
        offset = d * math.log(alpha) + 0.5 * (d - sum_except_batch(error**2))
        losses, t = path.per_image(model, x, draws=draws, **conditions)
        return prior + d * math.log(sigma_T / sigma) - losses + offset, t

    return elbo


def bits_loss(
    network,
    images: torch.Tensor,
    log_density: Callable,
    *,
    scaler: Callable,
    inverse_scaler: Callable,
    levels: int,
    draws=None,
) -> torch.Tensor:
    """Bits/dim of the bound of q = `network`, (B,), whose gradient trains the network.

        −[log p(x(u)) + log|det dx/du| − log q(u | k)] / (d ln 2),   u = network(k, e)

    The arguments are those of `log_weights`; log_density is differentiable in x, and may itself be
    a bound.
    """
    u, log_q = network(images, unit_noise(images, draws))
    x = scaler(add_noise(images, u, levels))
    bound = log_density(x, draws=draws) + log_volume_at(x, inverse_scaler, levels) - log_q
    return (-bound / (images[0].numel() * math.log(2))).to(log_q)


def levels_of(x: torch.Tensor, inverse_scaler: Callable, levels: int) -> torch.Tensor:
    """The integers k of images x = scaler(k/(L − 1)), which is how training has them."""
    return (inverse_scaler(x) * (levels - 1)).round().long().clamp(0, levels - 1)


def _draws_of(draws, j: int):
    """Random numbers for dequantisation j of the same images."""
    if draws is None:
        return None
    step = (draws.step, "dequantisation", j)
    return Draws(draws.seed, step, draws.first, draws.count, draws.total, draws.device)


def check_levels(images: torch.Tensor) -> None:
    """Refuse what is not a batch of images of integer levels."""
    if images.is_floating_point() or images.is_complex() or images.ndim != 4:
        raise ValueError(
            f"expected images of integer levels, of shape (B, C, H, W), got {images.dtype} of "
            f"shape {tuple(images.shape)}; points and dequantised images need no dequantisation"
        )
