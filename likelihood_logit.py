"""The logit transform of data in [0, 1] to the whole line, with its log-determinant."""

from __future__ import annotations

import math

import torch

from sde_lib import double, sum_except_batch


class Logit:
    """y = logit(a + (1 − 2a) x) for data x in [0, 1], after which no probability lies outside.

        log p(x) = log p(y) + log |dy/dx|,   d y/dx = (1 − 2a)/(u (1 − u)),   u = a + (1 − 2a) x

    Dinh et al. 2017 (RealNVP), section 4.1; a > 0 keeps the ends finite. Numbers of any shape.

    Args:
      alpha: a, in (0, ½).
    """

    def __init__(self, alpha: float = 0.05):
        if not 0 < alpha < 0.5:
            raise ValueError(f"a logit transform needs 0 < alpha < 0.5, got {alpha}; use 0.05")
        self.alpha = alpha

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y of x.

        Raises: ValueError where x leaves [0, 1].
        """
        if x.numel() and (x.min() < 0 or x.max() > 1):
            raise ValueError(
                f"a logit transform needs data in [0, 1], got {x.min().item():.4g} to "
                f"{x.max().item():.4g}; leave the scaler at [0, 1] (data.centered=False)"
            )
        return torch.logit(self._inside(x))

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """x of y, within [0, 1]: what lies beyond is cut."""
        return ((torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)).clamp(0, 1)

    def log_det(self, x: torch.Tensor) -> torch.Tensor:
        """log |det dy/dx| at data x, in nats: (B, *) -> (B,), in float64."""
        u = self._inside(double(x))
        slope = math.log(1 - 2 * self.alpha) - torch.log(u) - torch.log1p(-u)
        return sum_except_batch(slope)

    def _inside(self, x):
        return self.alpha + (1 - 2 * self.alpha) * x
