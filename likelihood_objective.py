"""The bound on the log-likelihood as a training objective."""

from __future__ import annotations

from collections.abc import Callable

import torch

import sde_lib
from divergence import get_probe
from likelihood_bounds import FORMS, check_process, path_factor
from models.utils import get_score_fn
from randomness import normal
from sde_lib import expand


class ElboObjective:
    """loss_fn(model, batch, *, draws=None, **conditions): the mean of `per_image`'s losses, with
    the protocol of `losses.Objective`."""

    def __init__(self, per_image: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        self.per_image = per_image

    def __call__(self, model, batch, *, draws=None, **conditions) -> torch.Tensor:
        return self.per_image(model, batch, draws=draws, **conditions)[0].mean()


def get_elbo_loss_fn(
    sde,
    train: bool = True,
    *,
    eps: float = 1e-5,
    form: str = "score",
    time_sampler=None,
    probe: str = "rademacher",
    lam: float = 0.0,
    reduce_mean: bool = True,
    continuous: bool = True,
) -> ElboObjective:
    """loss_fn(model, batch, *, draws=None, **conditions): the path term of minus the ELBO, in nats.

        c ∫ E ‖ε̂ − z‖² |dλ|,   or   c ∫ E [‖ε̂‖² + d − 2 σ ∇·ε̂] |dλ|   over λ from λ_T to λ_eps

    at one random time per image, divided by that time's density: all of the bound that weights
    change but the last step's offset (`likelihood_bounds.py`). The score form is T − eps times
    `losses.get_sde_loss_fn`'s with weighting='likelihood' and the same times and numbers.

    Args:
      sde: the forward process, any affine one.
      train: whether the network runs in training mode.
      eps: the smallest time.
      form: 'score', or 'implicit' for sliced score matching with the same weight, whose gradients
        pass through a vector-Jacobian product.
      time_sampler: a `sde_lib.TimeSampler`; by default `sde_lib.LikelihoodTimes(sde, eps)`, uniform
        in λ, with the least variance; with its option truncate, Huang et al.'s debiased one.
      probe: of the implicit form, 'rademacher' or 'gaussian'.
      lam: the member of the family of reverse SDEs: a factor c on everything.
      reduce_mean: per dimension; else their sum.
      continuous: whether the network takes continuous time.
    """
    check_process(sde, eps)
    if form not in FORMS:
        raise ValueError(f"form {form!r} of a bound is unknown; known: {', '.join(FORMS)}")
    times = time_sampler or sde_lib.LikelihoodTimes(sde, eps)
    factor, draw_probe = path_factor(lam), get_probe(probe)

    def per_image(model, batch, *, draws=None, **conditions):
        score_fn = get_score_fn(sde, model, train=train, continuous=continuous)
        t = times(len(batch), batch.device, draws)
        z = normal(batch, draws, "z")
        mean, std = sde.marginal_prob(batch, t)
        x = mean + expand(std, batch) * z

        def noise(y):
            return -expand(std, y) * score_fn(y, t, **conditions)

        if form == "score":
            integrand = torch.square(noise(x) - z)
        else:
            integrand = _implicit(noise, x, std, draw_probe(x, draws))
        flat = integrand.flatten(1)
        losses = flat.mean(dim=1) if reduce_mean else flat.sum(dim=1)
        sigma = sde_lib.alpha_sigma(sde, t, batch)[1]
        g = sde_lib.drift_diffusion(sde, t, batch)[1]
        weight = factor * g**2 / (2 * sigma**2) / times.density(t)
        return losses * weight.to(losses), t

    return ElboObjective(per_image)


def _implicit(noise: Callable, x, std, probe) -> torch.Tensor:
    """ε̂² + 1 − 2 σ v (∂ε̂/∂x)ᵀ v, (B, *), differentiable by the weights."""
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = noise(x)
        (vjp,) = torch.autograd.grad(
            value, x, probe, create_graph=recording, materialize_grads=True
        )
    result = value**2 + 1 - 2 * expand(std, x) * probe * vjp
    return result if recording else result.detach()
