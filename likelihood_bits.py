"""What every estimator of the likelihood takes and returns, and bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import arguments
from sde_lib import double, sum_except_batch

#: Images are called discrete where chance would have all of their numbers on a grid of levels less
#: often than this.
_CHANCE = 1e-12


class Likelihood(NamedTuple):
    """An estimate of log p(x) for each x of a batch, or of a lower bound on it.

    logp: in nats, of the data as the network saw it, (B,).
    error: the standard error over the estimator's own draws (probes, times, paths), (B,); nan
      where there was one draw, 0 where the estimate has no randomness.
    code: x_T, where the estimator has one, of x's shape; else None.
    nfe: network evaluations that each image took, (B,), int64.
    terms: parts that add up to logp, by name, each (B,), such as 'prior', 'trace', 'offset'.
    """

    logp: torch.Tensor
    error: torch.Tensor
    code: torch.Tensor | None
    nfe: torch.Tensor
    terms: dict[str, torch.Tensor]


def bits_per_dim(logp: torch.Tensor, dim: int, inverse_scaler: Callable, levels: int = 256):
    """Bits per dimension of dequantised data from the log-density of scaled data in nats.

        bpd = −log p/(d ln 2) + log₂(levels) + log₂ |d inverse_scaler/dx|

    where inverse_scaler is affine, to [0, 1], cut into `levels` bins. For 256 levels this is
    score_sde's 7 − inverse_scaler(−1), for centred data and for data in [0, 1].
    """
    return -(logp + log_volume(dim, inverse_scaler, levels)) / (dim * math.log(2))


def log_volume(dim: int, inverse_scaler: Callable, levels: int) -> float:
    """log|det dx/du| of x = scaler((k + u)/L) in nats, for an affine scaler.

    inverse_scaler maps x to [0, 1].

    Raises: ValueError for a scaler that bends, which has another volume at every x.
    """
    at = (inverse_scaler(torch.tensor(x, dtype=torch.float64)) for x in (0.0, 0.5, 1.0))
    low, middle, high = (float(value) for value in at)
    if not abs(low - 2 * middle + high) <= 1e-6 * abs(high - low):
        raise ValueError(
            "expected an inverse_scaler that is affine, whose slope is the same everywhere, got "
            f"{low:.4g}, {middle:.4g}, {high:.4g} at 0, ½, 1; use log_volume_at(x, …)"
        )
    return -dim * (math.log(levels) + math.log(abs(high - low)))


def log_volume_at(x: torch.Tensor, inverse_scaler: Callable, levels: int) -> torch.Tensor:
    """log|det dx/du| at x = scaler((k + u)/L) in nats, (B,) in float64, for any elementwise scaler.

    By autograd, and differentiable in x where gradients are recorded.
    """
    grad = torch.is_grad_enabled() and x.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        at = x if grad else x.detach().clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(inverse_scaler(at).sum(), at, create_graph=grad)
    return -sum_except_batch(double(slope.abs().log()) + math.log(levels))


# --- what is refused ------------------------------------------------------------------------


def check_data(data: torch.Tensor) -> None:
    """Refuse data that have no density, have lost it in rounding, or are not finite."""
    if not torch.is_tensor(data):
        raise arguments.WrongTypeError(
            f"likelihood needs a tensor of data, got {type(data).__name__}; use torch.as_tensor"
        )
    if not data.is_floating_point():
        raise ValueError(
            f"likelihood needs dequantised data in floating point, got {data.dtype}; "
            "add uniform noise of one level's width and scale as in training"
        )
    if torch.finfo(data.dtype).bits < 32:
        raise ValueError(
            f"likelihood needs data of float32 or float64, got {data.dtype}, which rounds the "
            "noise of dequantisation away; use data.float(), and autocast for the network"
        )
    if not torch.isfinite(data).all():
        bad = int((~torch.isfinite(data)).flatten(1).any(dim=1).sum()) if data.ndim > 1 else 1
        raise ValueError(
            f"likelihood needs finite data, got {bad} of {len(data)} samples with NaN or infinity; "
            "look at the data, or at the inverse of their scaler"
        )


def refuse_nan(found: Likelihood) -> Likelihood:
    """`found`, where every image's number is one; −inf passes, of data outside of a prior's range.

    Raises: FloatingPointError, naming the first image that has none.
    """
    bad = torch.isnan(found.logp)
    if bad.any():
        terms = {name: term[bad][0].item() for name, term in found.terms.items()}
        raise FloatingPointError(
            f"the likelihood of image {int(bad.nonzero()[0])} of {int(bad.sum())} such is not a "
            f"number: {terms}; check the data, the network (untrained or diverged?) and eps"
        )
    return found


def refuse_discrete(x: torch.Tensor, inverse_scaler: Callable, levels: int) -> None:
    """Refuse images of discrete values, whose density means nothing.

    Refused are integers, and any image all of whose numbers, not all the same, are k/(L − 1) or k/L
    in [0, 1], as far as x's dtype can tell. Points of few numbers pass, which might be there by
    chance.

    Args:
      x: what a density is asked of, (B, *).
      inverse_scaler: from x to [0, 1].
      levels: L.

    Raises: ValueError that says how to dequantise.
    """
    check_data(x)
    tolerance = max(1e-4, 8 * torch.finfo(x.dtype).eps * levels)
    if not x.numel() or (4 * tolerance) ** x[0].numel() > _CHANCE:
        return
    unit = double(inverse_scaler(x.detach())).flatten(1)
    grids = [unit * (levels - 1), unit * levels]
    on = [((g - g.round()).abs() <= tolerance).all(dim=1) for g in grids]
    discrete = int(((on[0] | on[1]) & (unit != unit[:, :1]).any(dim=1)).sum())
    if discrete:
        raise ValueError(
            f"a likelihood needs dequantised data, got {discrete} of {len(x)} images of {levels} "
            "discrete values; add noise of one level's width as "
            "data_lib.prepare(images, config, dequantize=True) does"
        )
