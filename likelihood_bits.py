"""What every estimator of the likelihood returns, and bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


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

    where inverse_scaler maps to [0, 1], cut into `levels` bins. For 256 levels this is
    score_sde's 7 − inverse_scaler(−1), for centred data and for data in [0, 1].
    """
    slope = abs(float(inverse_scaler(torch.tensor(1.0)) - inverse_scaler(torch.tensor(0.0))))
    return -logp / (dim * math.log(2)) + math.log2(levels) + math.log2(slope)
