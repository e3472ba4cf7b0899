"""Super-resolution: average-pooling and antialiased bicubic down-sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from operators_base import SVD, Constants, Operator, image_shape


def _small_shape(shape: Sequence[int], factor: int, name: str) -> tuple[int, int, int]:
    C, H, W = image_shape(shape, name)
    if factor != int(factor) or factor < 1 or H % factor or W % factor:
        raise ValueError(
            f"{name} needs a whole factor ≥ 1 that divides height and width, got factor {factor} "
            f"for {H} x {W}"
        )
    return C, H // int(factor), W // int(factor)


class AveragePool(Operator):
    """The mean of blocks of s x s pixels, (B, C, H/s, W/s). A Aᵀ = I/s².

    Args:
      shape: (C, H, W).
      factor: s; it divides H and W.
    """

    def __init__(self, shape: Sequence[int], factor: int = 4):
        super().__init__(shape, _small_shape(shape, factor, "average-pooling"))
        self.factor = int(factor)

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, self.factor)

    def transpose(self, y):
        s = self.factor
        return y.repeat_interleave(s, -2).repeat_interleave(s, -1) / s**2

    def _svd(self):
        s = self.factor
        return SVD(
            torch.full((math.prod(self.shape_out),), 1 / s, dtype=torch.float64),
            V=lambda c: s * self.transpose(c.reshape(len(c), *self.shape_out)),
            Vt=lambda x: s * self.forward(x).reshape(len(x), -1),
            U=lambda c: c.reshape(len(c), *self.shape_out),
            Ut=lambda y: y.reshape(len(y), -1),
        )


def cubic(u: torch.Tensor, a: float = -0.5) -> torch.Tensor:
    """Keys's cubic convolution kernel (Keys 1981, eq. 15), of support [−2, 2]."""
    u = u.abs()
    inner = (a + 2) * u**3 - (a + 3) * u**2 + 1
    outer = a * (u**3 - 5 * u**2 + 8 * u - 4)
    return torch.where(u < 1, inner, torch.where(u < 2, outer, torch.zeros_like(u)))


def bicubic_matrix(size: int, factor: int) -> torch.Tensor:
    """One axis of antialiased cubic down-sampling, (size/s, size), float64.

    The kernel is stretched by s, centred on each output pixel, cut at the border, and its weights
    sum to 1, as in Pillow and in torch's interpolate(antialias=True).
    """
    centres = (torch.arange(size // factor, dtype=torch.float64) + 0.5) * factor - 0.5
    offsets = torch.arange(size, dtype=torch.float64) - centres.unsqueeze(1)
    weights = cubic(offsets / factor)
    return weights / weights.sum(1, keepdim=True)


class Bicubic(Operator):
    """Antialiased bicubic down-sampling by s, (B, C, H/s, W/s): y_c = R x_c Qᵀ, a = −0.5.

    Args:
      shape: (C, H, W).
      factor: s; it divides H and W.
    """

    def __init__(self, shape: Sequence[int], factor: int = 4):
        super().__init__(shape, _small_shape(shape, factor, "bicubic super-resolution"))
        R, Q = (bicubic_matrix(n, int(factor)) for n in self.shape_in[1:])
        (Ur, self._sr, Vr), (Uq, self._sq, Vq) = (
            torch.linalg.svd(m, full_matrices=False) for m in (R, Q)
        )
        self._constants = Constants(R=R, Q=Q, Ur=Ur, Uq=Uq, Vr=Vr.T, Vq=Vq.T)

    def _apply(self, left: str, x, right: str, transposed: bool):
        L, Q = self._constants(left, x), self._constants(right, x)
        return L.T @ x @ Q if transposed else L @ x @ Q.T

    def forward(self, x):
        return self._apply("R", x, "Q", False)

    def transpose(self, y):
        return self._apply("R", y, "Q", True)

    def _svd(self):
        # The singular values of a Kronecker product are the products of its factors'.
        one = self._sr.unsqueeze(1) * self._sq
        C = self.shape_in[0]

        def box(c):
            return c.reshape(len(c), *self.shape_out)

        return SVD(
            one.expand(C, *one.shape).reshape(-1),
            V=lambda c: self._apply("Vr", box(c), "Vq", False),
            Vt=lambda x: self._apply("Vr", x, "Vq", True).reshape(len(x), -1),
            U=lambda c: self._apply("Ur", box(c), "Uq", False),
            Ut=lambda y: self._apply("Ur", y, "Uq", True).reshape(len(y), -1),
        )
