"""The optimizer, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

OPTIMIZERS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def get_optimizer(config, params) -> torch.optim.Optimizer:
    """The optimizer that `config.optim` describes: Adam, whose weight decay is an L2 penalty, or
    AdamW, which decays the weights themselves (Loshchilov & Hutter 2019).

    Raises: ValueError for another name.
    """
    o = config.optim
    if o.optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"optim.optimizer {o.optimizer!r} is unknown; known: {known}")
    params = list(params)
    fused = bool(params) and all(torch.is_tensor(p) and p.is_floating_point() for p in params)
    return OPTIMIZERS[o.optimizer](
        params,
        lr=o.lr,
        betas=(o.beta1, o.get("beta2", 0.999)),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=fused,
    )


def _constant(step: int, warmup: int, n_iters: int) -> float:
    return 1.0


def _cosine(step: int, warmup: int, n_iters: int) -> float:
    progress = (step - warmup) / max(n_iters - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def _inverse_sqrt(step: int, warmup: int, n_iters: int) -> float:
    return math.sqrt(warmup / max(step + 1, warmup))


#: Decay of the learning rate after the warm-up, a function of the step alone:
#: none; ½(1 + cos π(k − warmup)/(n_iters − warmup)); √(warmup/(k + 1)).
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
}


def optimization_manager(config) -> Callable:
    """optimize_fn(optimizer, params, step): learning rate, clipping, one step of the optimizer.

        lr ← lr · min((step + 1)/warmup, 1) · decay(step);   g ← g · min(grad_clip/‖g‖, 1)

    with the decay that `optim.schedule` names in SCHEDULES. The learning rate depends on nothing
    but the step, so that a resumed run goes on exactly. The original's first step has lr = 0;
    counting from one mends it. A negative grad_clip turns clipping off; without warm-up or decay
    the learning rate is the optimizer's own.

    Raises: ValueError for an unknown schedule, or one that needs a warm-up and has none.
    """
    o = config.optim
    schedule = o.get("schedule", "constant")
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"optim.schedule {schedule!r} is unknown; known: {known}")
    if schedule == "inverse_sqrt" and o.warmup < 1:
        raise ValueError(
            f"optim.schedule 'inverse_sqrt' falls as √(warmup/step) and needs optim.warmup ≥ 1, "
            f"got {o.warmup}; set it to the step at which the decay begins"
        )
    n_iters = 0 if schedule == "constant" else config.training.n_iters
    decay = SCHEDULES[schedule]

    def optimize_fn(
        optimizer, params, step, lr=o.lr, warmup=o.warmup, grad_clip=o.grad_clip, *, grad_norm=None
    ):
        if warmup > 0 or schedule != "constant":
            rise = min((step + 1) / warmup, 1.0) if warmup > 0 else 1.0
            for group in optimizer.param_groups:
                group["lr"] = float(lr * rise * decay(int(step), warmup, n_iters))
        if grad_clip >= 0:
            params = list(params)
            norm = gradient_norm(params) if grad_norm is None else grad_norm
            torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
        optimizer.step()

    return optimize_fn


def gradient_norm(params) -> torch.Tensor:
    """The 2-norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
