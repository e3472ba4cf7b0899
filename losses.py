"""Training: objectives, the optimizer, and one step that a non-finite number cannot spoil."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch

import sde_lib
from models.utils import get_model_fn, get_score_fn
from sde_lib import expand


def get_optimizer(config, params) -> torch.optim.Optimizer:
    """The optimizer that `config.optim` describes: Adam with β_2 = 0.999."""
    o = config.optim
    if o.optimizer != "Adam":
        raise ValueError(f"optim.optimizer {o.optimizer!r} is unknown; known: Adam")
    params = list(params)
    fused = bool(params) and all(p.is_floating_point() for p in params)
    return torch.optim.Adam(
        params, lr=o.lr, betas=(o.beta1, 0.999), eps=o.eps, weight_decay=o.weight_decay, fused=fused
    )


def optimization_manager(config) -> Callable:
    """optimize_fn(optimizer, params, step): warm-up, clipping, and one step of the optimizer.

        lr ← lr · min((step + 1)/warmup, 1);   g ← g · min(grad_clip/‖g‖, 1)

    The original's first step has lr = 0; counting from one mends it. A negative grad_clip
    turns clipping off.
    """
    o = config.optim

    def optimize_fn(
        optimizer, params, step, lr=o.lr, warmup=o.warmup, grad_clip=o.grad_clip, *, grad_norm=None
    ):
        if warmup > 0:
            for group in optimizer.param_groups:
                group["lr"] = float(lr * min((step + 1) / warmup, 1.0))
        if grad_clip >= 0:
            params = list(params)
            norm = _grad_norm(params) if grad_norm is None else grad_norm
            torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
        optimizer.step()

    return optimize_fn


def _grad_norm(params) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])


def _reduce(losses: torch.Tensor, reduce_mean: bool) -> torch.Tensor:
    """Mean, or half the sum, over all axes but the first: (B, *) -> (B,)."""
    flat = losses.reshape(losses.shape[0], -1)
    return flat.mean(dim=1) if reduce_mean else 0.5 * flat.sum(dim=1)


def get_sde_loss_fn(
    sde,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
) -> Callable:
    """loss_fn(model, batch, **conditions): denoising score matching, for any process.

        E_t E_z w(t) ‖s(x_t, t) + z/σ_t‖²,   t ~ U(eps, T)

    with w = σ² (Song et al. 2021, eq. 7), or w = g² which bounds the negative log-likelihood
    (Song, Durkan, Murray & Ermon 2021). `conditions`, such as class labels y, go to the network.

    Args:
      sde: the forward process.
      train: whether the network runs in training mode.
      reduce_mean: mean over a sample's numbers; else half their sum.
      continuous: whether the network takes continuous time.
      likelihood_weighting: use w = g².
      eps: the smallest time.
    """
    if not 0 <= eps < sde.T:
        raise ValueError(f"the loss needs 0 ≤ eps < {sde.T}, got {eps}; use 1e-5")

    def loss_fn(model, batch, **conditions):
        score_fn = get_score_fn(sde, model, train=train, continuous=continuous)
        t = torch.rand(batch.shape[0], device=batch.device) * (sde.T - eps) + eps
        z = torch.randn_like(batch)
        mean, std = sde.marginal_prob(batch, t)
        std = expand(std, batch)
        score = score_fn(mean + std * z, t, **conditions)
        if not likelihood_weighting:
            return _reduce(torch.square(score * std + z), reduce_mean).mean()
        g2 = sde.sde(torch.zeros_like(batch), t)[1] ** 2
        return (_reduce(torch.square(score + z / std), reduce_mean) * g2).mean()

    return loss_fn


def get_smld_loss_fn(vesde, train: bool, reduce_mean: bool = False) -> Callable:
    """loss_fn(model, batch, **conditions): SMLD's loss over N noise levels (Song & Ermon 2019)."""
    if not isinstance(vesde, sde_lib.VESDE):
        raise ValueError(
            f"SMLD training needs a VESDE, got {type(vesde).__name__}; use continuous=True"
        )
    # Labels run from the largest σ down; their range is bound here, as the table is.
    sigmas, N = torch.flip(vesde.discrete_sigmas, dims=(0,)), vesde.N

    def loss_fn(model, batch, **conditions):
        labels = torch.randint(0, N, (batch.shape[0],), device=batch.device)
        sigma = expand(sde_lib.lookup(sigmas, labels), batch)
        noise = torch.randn_like(batch) * sigma
        score = get_model_fn(model, train=train)(batch + noise, labels, **conditions)
        return _reduce(torch.square(score * sigma + noise / sigma), reduce_mean).mean()

    return loss_fn


def get_ddpm_loss_fn(vpsde, train: bool, reduce_mean: bool = True) -> Callable:
    """loss_fn(model, batch, **conditions): DDPM's loss over N times (Ho et al. 2020, eq. 14)."""
    if not isinstance(vpsde, sde_lib.VPSDE):
        raise ValueError(
            f"DDPM training needs a VPSDE, got {type(vpsde).__name__}; use continuous=True"
        )
    alpha, sigma, N = vpsde.sqrt_alphas_cumprod, vpsde.sqrt_1m_alphas_cumprod, vpsde.N

    def loss_fn(model, batch, **conditions):
        labels = torch.randint(0, N, (batch.shape[0],), device=batch.device)
        a, s = (expand(sde_lib.lookup(table, labels), batch) for table in (alpha, sigma))
        noise = torch.randn_like(batch)
        x = a * batch + s * noise
        predicted = get_model_fn(model, train=train)(x, labels, **conditions)
        return _reduce(torch.square(predicted - noise), reduce_mean).mean()

    return loss_fn


def get_loss_fn(
    sde, train: bool, reduce_mean: bool, continuous: bool, likelihood_weighting: bool, eps: float
) -> Callable:
    """The loss that these settings name: continuous, or SMLD's or DDPM's for VE or VP."""
    if continuous:
        return get_sde_loss_fn(sde, train, reduce_mean, True, likelihood_weighting, eps)
    if likelihood_weighting:
        raise ValueError("likelihood_weighting needs continuous=True; SMLD and DDPM have no g²")
    if isinstance(sde, sde_lib.VESDE):
        return get_smld_loss_fn(sde, train, reduce_mean)
    if isinstance(sde, sde_lib.VPSDE):
        return get_ddpm_loss_fn(sde, train, reduce_mean)
    raise ValueError(
        f"discrete training needs VESDE or VPSDE, got {type(sde).__name__}; use continuous=True"
    )


def get_step_fn(
    sde,
    train: bool,
    optimize_fn: Callable | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
    *,
    eps: float = 1e-5,
    max_nonfinite: int = 100,
) -> Callable:
    """step_fn(state, batch, **conditions) -> loss: one training step, or the EMA weights' loss.

    `state` has `model`, `optimizer`, `ema` and `step`. A loss or gradient that is not finite
    leaves weights, optimizer and average as they were; it is counted in state['nonfinite'],
    and `max_nonfinite` of them in a row end the run.

    Args:
      sde, reduce_mean, continuous, likelihood_weighting, eps: as `get_sde_loss_fn`.
      train: training or evaluation.
      optimize_fn: of `optimization_manager`, or one's own.

    Raises: FloatingPointError when non-finite steps persist.
    """
    loss_fn = get_loss_fn(sde, train, reduce_mean, continuous, likelihood_weighting, eps)
    takes_norm = bool(optimize_fn) and "grad_norm" in inspect.signature(optimize_fn).parameters

    def train_step(state, batch, **conditions):
        if optimize_fn is None:
            raise ValueError("training needs optimize_fn; use losses.optimization_manager(config)")
        model, optimizer = state["model"], state["optimizer"]
        optimizer.zero_grad()
        loss = loss_fn(model, batch, **conditions)
        loss.backward()
        norm = _grad_norm(model.parameters())
        at, slope = torch.stack([loss.detach(), norm.to(loss)]).tolist()  # one synchronisation
        if math.isfinite(at) and math.isfinite(slope):
            extra = {"grad_norm": norm} if takes_norm else {}
            optimize_fn(optimizer, model.parameters(), step=state["step"], **extra)
            state["ema"].update(model.parameters())
            state["nonfinite_in_a_row"] = 0
        else:
            _count_nonfinite(state, at, slope, max_nonfinite)
        state["step"] += 1
        return loss.detach()

    @torch.no_grad()
    def eval_step(state, batch, **conditions):
        ema, model = state["ema"], state["model"]
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        try:
            return loss_fn(model, batch, **conditions)
        finally:
            ema.restore(model.parameters())

    return train_step if train else eval_step


def _count_nonfinite(state, loss: float, norm: float, limit: int) -> None:
    state["nonfinite"] = state.get("nonfinite", 0) + 1
    state["nonfinite_in_a_row"] = state.get("nonfinite_in_a_row", 0) + 1
    if state["nonfinite_in_a_row"] >= limit:
        raise FloatingPointError(
            f"loss {loss} or gradient norm {norm} was not finite {limit} steps in a row, the last "
            f"at step {state['step']}; weights are as before them. Try a smaller optim.lr, "
            "a longer optim.warmup, or look at the data"
        )
