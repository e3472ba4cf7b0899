"""One step of training or evaluation: precision, micro-batches, several processes, and a guard
that keeps numbers which are not finite from weights, optimizer and average."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

import arguments
import distributed
import sde_lib
from losses_optim import gradient_norm

PRECISIONS = ("", "fp32", "tf32", "bf16")


class Objective:
    """loss_fn(model, batch, *, draws=None, **conditions): the mean of `per_image`'s losses.

    `per_image(model, batch, *, draws=None, **conditions)` gives the losses of the images and the
    times they were taken at, both (B,).

    Raises: ValueError for a batch that is not of scaled data, (B, *) in floating point; TypeError
      for what is no tensor.
    """

    def __init__(self, per_image: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        self._per_image = per_image

    def per_image(self, model, batch, *, draws=None, **conditions):
        """The losses and their times, (B,)."""
        if not torch.is_tensor(batch):
            raise arguments.WrongTypeError(
                f"an objective needs a batch as one tensor, got {type(batch).__name__}; "
                "use torch.as_tensor"
            )
        if batch.ndim < 2 or not batch.is_floating_point():
            raise ValueError(
                "an objective needs a batch (B, *) in floating point, scaled for the network, got "
                f"{tuple(batch.shape)} of {batch.dtype}; use data_lib.prepare(images, config)"
            )
        return self._per_image(model, batch, draws=draws, **conditions)

    def __call__(self, model, batch, *, draws=None, **conditions) -> torch.Tensor:
        return self.per_image(model, batch, draws=draws, **conditions)[0].mean()


@contextlib.contextmanager
def float32_precision(name: str, device: torch.device):
    """Within this context float32 products on a GPU are exact ('fp32') or in TF32 ('tf32').

    torch's own setting is TF32 in convolutions and not in matrix products. Its flags are put back
    on leaving; other names, and other devices, leave them as they are.

    Raises: ValueError where `fp32_precision`, torch's newer setting, has been set otherwise: the
      two cannot be mixed.
    """
    if name not in ("fp32", "tf32") or device.type != "cuda":
        yield
        return
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    try:
        before = [place.allow_tf32 for place in places]
    except RuntimeError as error:
        raise ValueError(
            f"precision {name!r} sets torch's allow_tf32, and its fp32_precision has been set "
            "before, which torch does not mix; use precision '' to keep your own setting"
        ) from error
    try:
        for place in places:
            place.allow_tf32 = name == "tf32"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def autocast(name: str, device: torch.device):
    """Under 'bf16', convolutions and matrix products run in bfloat16, which are the network's
    alone: the objective's arithmetic is pointwise, and stays in float32 and float64."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16")


class _Step:
    """What both kinds of step share; `info` describes the last one."""

    def __init__(self, sde, loss_fn: Objective, precision: str):
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision {precision!r} is unknown; use 'fp32', 'tf32' or 'bf16', or '' for "
                "torch's own settings"
            )
        self.sde, self.loss_fn, self.precision = sde, loss_fn, precision
        self._last: dict[str, Any] = {}

    def _losses(self, model, batch, draws, conditions):
        with autocast(self.precision, batch.device):
            return self.loss_fn.per_image(model, batch, draws=draws, **conditions)

    @property
    def info(self) -> dict[str, Any]:
        """Of the last step: `losses`, `t` and `lambda` = log(α/σ) of this process's images, each
        (B,); after training also `grad_norm` and `lr`. Empty before the first."""
        if not self._last:
            return {}
        return self._last | {"lambda": sde_lib.half_log_snr(self.sde, self._last["t"])}


class TrainingStep(_Step):
    """step_fn(state, batch, *, draws=None, **conditions) -> loss: see `losses.get_step_fn`."""

    def __init__(self, sde, loss_fn, optimize_fn, *, max_nonfinite, precision, accumulate):
        super().__init__(sde, loss_fn, precision)
        arguments.whole(accumulate=accumulate, max_nonfinite=max_nonfinite)
        if accumulate < 1:
            raise ValueError(f"expected accumulate ≥ 1 micro-batches, got {accumulate}; use 1")
        self.optimize_fn, self.max_nonfinite = optimize_fn, max_nonfinite
        self.accumulate = accumulate
        self.takes_norm = (
            bool(optimize_fn) and "grad_norm" in inspect.signature(optimize_fn).parameters
        )

    def __call__(self, state, batch, *, draws=None, **conditions) -> torch.Tensor:
        if self.optimize_fn is None:
            raise ValueError("training needs optimize_fn; use losses.optimization_manager(config)")
        if not len(batch):
            raise ValueError("training needs a batch of at least one image, got none")
        model, optimizer = state["model"], state["optimizer"]
        optimizer.zero_grad()
        with float32_precision(self.precision, batch.device):
            losses, t = self._backward(model, batch, draws, conditions)
        norm = gradient_norm(model.parameters())
        mean = losses.mean()
        # One number for all processes, so that they decide alike; and one synchronisation.
        both = distributed.all_sum(torch.stack([mean, norm.to(mean)])) / distributed.world_size()
        at, slope = both.tolist()
        if math.isfinite(at) and math.isfinite(slope):
            extra = {"grad_norm": norm} if self.takes_norm else {}
            self.optimize_fn(optimizer, model.parameters(), step=state["step"], **extra)
            state["ema"].update(model.parameters())
            state["nonfinite_in_a_row"] = 0
        else:
            _count_nonfinite(state, at, slope, self.max_nonfinite)
        lr = optimizer.param_groups[0]["lr"]
        self._last = {"losses": losses, "t": t, "grad_norm": slope, "lr": lr}
        state["step"] += 1
        return both[0]

    def _backward(self, model, batch, draws, conditions):
        """Losses and times, (B,), whose mean's gradients are in the parameters."""
        count = len(batch)
        n = min(self.accumulate, count)
        parts = [slice(count * i // n, count * (i + 1) // n) for i in range(n)]
        found = []
        for part in parts:
            with contextlib.ExitStack() as stack:
                if part is not parts[-1] and hasattr(model, "no_sync"):
                    stack.enter_context(model.no_sync())  # one reduction for all micro-batches
                rows = None if draws is None else draws.rows(part.start, part.stop)
                losses, t = self._losses(model, batch[part], rows, _rows(conditions, part, count))
                (losses.mean() * (len(losses) / count)).backward()
            found.append((losses.detach(), t.detach()))
        return (torch.cat(values) for values in zip(*found, strict=True))


def _rows(conditions: dict, part: slice, count: int) -> dict:
    """Of every condition that has one row per image the rows of a micro-batch."""
    if part == slice(0, count):
        return conditions
    return {
        name: value[part] if torch.is_tensor(value) and value.shape[:1] == (count,) else value
        for name, value in conditions.items()
    }


class EvaluationStep(_Step):
    """step_fn(state, batch, *, draws=None, **conditions) -> the loss of the averaged weights."""

    @torch.no_grad()
    def __call__(self, state, batch, *, draws=None, **conditions) -> torch.Tensor:
        ema, model = state["ema"], state["model"]
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        try:
            with float32_precision(self.precision, batch.device):
                losses, t = self._losses(model, batch, draws, conditions)
        finally:
            ema.restore(model.parameters())
        self._last = {"losses": losses, "t": t}
        return losses.mean()


def _count_nonfinite(state, loss: float, norm: float, limit: int) -> None:
    state["nonfinite"] = state.get("nonfinite", 0) + 1
    state["nonfinite_in_a_row"] = state.get("nonfinite_in_a_row", 0) + 1
    if state["nonfinite_in_a_row"] >= limit:
        raise FloatingPointError(
            f"loss {loss} or gradient norm {norm} was not finite {limit} steps in a row, the last "
            f"at step {state['step']}; weights are as before them. Try a smaller optim.lr, "
            "a longer optim.warmup, or look at the data"
        )
