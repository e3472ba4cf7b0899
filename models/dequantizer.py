"""The noise q(u | image) of variational dequantisation: a conditional flow on the unit cube.

Ho et al. 2019 (Flow++, section 3.1), with rational-quadratic splines (Durkan et al. 2019, "Neural
Spline Flows") in place of mixtures of logistics between a logit and a sigmoid. They map [0, 1] onto
itself, so nothing is infinite at its ends; they are the identity where the last layer's weights are
zero, so that training starts at uniform noise exactly; and their inverse has a closed form.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .utils import register_model

#: Smallest width and height of a bin, and smallest slope at a knot.
_LEAST = 1e-3
#: A slope of 1 at the knots: softplus(_UNIT_SLOPE) + _LEAST = 1.
_UNIT_SLOPE = math.log(math.expm1(1 - _LEAST))


def spline(u: torch.Tensor, raw: torch.Tensor, inverse: bool = False):
    """A monotone rational-quadratic spline of [0, 1] onto itself, and the log of its slope.

    In bin k of width w, height h and mean slope s = h/w, with slopes d_k, d_{k+1} at its ends and
    ξ = (u − u_k)/w (Gregory & Delbourgo 1982; Durkan et al. 2019, eq. 4 and 5),

        v(u)  = v_k + h [s ξ² + d_k ξ(1−ξ)] / D,    D = s + (d_k + d_{k+1} − 2s) ξ(1−ξ)
        v'(u) = s² [d_{k+1} ξ² + 2s ξ(1−ξ) + d_k (1−ξ)²] / D²

    Args:
      u: numbers in [0, 1], (*).
      raw: 3K + 1 numbers for each: of K widths, K heights and K + 1 slopes, (*, 3K + 1); zeros give
        the identity.
      inverse: solve v(ξ) = u for ξ instead; the logarithm is then that of the inverse's slope.
    """
    bins = (raw.shape[-1] - 1) // 3
    widths, heights, slopes = raw.split([bins, bins, bins + 1], dim=-1)
    slopes = F.softplus(slopes + _UNIT_SLOPE) + _LEAST
    left, bottom = _knots(widths), _knots(heights)
    inner = (bottom if inverse else left)[..., 1:-1]
    k = (u.unsqueeze(-1) >= inner).sum(-1, keepdim=True)

    def at(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return table.gather(-1, index).squeeze(-1)

    u_k, v_k, d_0, d_1 = at(left, k), at(bottom, k), at(slopes, k), at(slopes, k + 1)
    w, h = at(left, k + 1) - u_k, at(bottom, k + 1) - v_k
    s = h / w
    bend = d_0 + d_1 - 2 * s
    if inverse:
        rise = u - v_k
        a, b, c = h * (s - d_0) + rise * bend, h * d_0 - rise * bend, -s * rise
        xi = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
        xi = xi.clamp(0, 1)  # rounding may lead out of the bin, where the slope has no logarithm
    else:
        xi = (u - u_k) / w
    rest = xi * (1 - xi)
    divisor = s + bend * rest
    log_slope = 2 * (s.log() - divisor.log())
    log_slope = log_slope + (d_1 * xi * xi + 2 * s * rest + d_0 * (1 - xi) ** 2).log()
    if inverse:
        return u_k + w * xi, -log_slope
    return v_k + h * (s * xi * xi + d_0 * rest) / divisor, log_slope


def _knots(raw: torch.Tensor) -> torch.Tensor:
    """Knots from 0 to 1 whose distances are at least _LEAST: (*, K) -> (*, K + 1)."""
    bins = raw.shape[-1]
    widths = _LEAST + (1 - bins * _LEAST) * raw.softmax(-1)
    inner = widths[..., :-1].cumsum(-1)
    return torch.cat([torch.zeros_like(inner[..., :1]), inner, torch.ones_like(inner[..., :1])], -1)


class _Block(nn.Module):
    """x + two convolutions of it, the second zero at first."""

    def __init__(self, features: int):
        super().__init__()
        self.first = nn.Conv2d(features, features, 3, padding=1)
        self.second = nn.Conv2d(features, features, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class _Coupling(nn.Module):
    """Splines of the numbers outside `given`, their parameters by a network of those in it and of
    the image's features; each coordinate's derivative is then the spline's slope."""

    given: torch.Tensor

    def __init__(self, given: torch.Tensor, features: int, bins: int):
        super().__init__()
        channels = len(given)
        self.register_buffer("given", given, persistent=False)
        self.enter = nn.Conv2d(channels, features, 3, padding=1)
        self.block = _Block(features)
        self.leave = nn.Conv2d(features, channels * (3 * bins + 1), 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, u: torch.Tensor, context: torch.Tensor, inverse: bool = False):
        known = torch.where(self.given, 2 * u - 1, 0.0)
        raw = self.leave(F.silu(self.block(context + self.enter(known))))
        raw = raw.unflatten(1, (u.shape[1], -1)).movedim(2, -1).to(u.dtype)
        moved, log_slope = spline(u, raw, inverse)
        u = torch.where(self.given, u, moved)
        return u, torch.where(self.given, 0.0, log_slope).flatten(1).sum(1)


@register_model(name="dequantizer")
class Dequantizer(nn.Module):
    """network(images, e) -> (u, log q(u | images)): uniform noise e to the noise of dequantisation.

    Couplings alternate between the halves of a checkerboard and, where the images have several
    channels, the halves of the channels. Every image is treated by itself.

    Shapes: images of integer levels, e and u in [0, 1) are (B, C, H, W); log_q is (B,).

    Reads of a configuration `data.num_channels`, `image_size` and `levels`, and `model.nf` (width
    of the convolutions), `num_res_blocks` (of the image's features), `couplings`, `spline_bins`.
    """

    def __init__(self, config):
        super().__init__()
        data, m = config.data, config.model
        self.levels, self.shape = data.levels, (data.num_channels, data.image_size, data.image_size)
        self.features = nn.Sequential(
            nn.Conv2d(data.num_channels, m.nf, 3, padding=1),
            *(_Block(m.nf) for _ in range(m.num_res_blocks)),
        )
        splits = _splits(*self.shape)
        self.couplings = nn.ModuleList(
            _Coupling(splits[i % len(splits)], m.nf, m.spline_bins) for i in range(m.couplings)
        )

    def forward(self, images: torch.Tensor, e: torch.Tensor):
        context, u, log_q = self._context(images, e), e, 0.0
        for coupling in self.couplings:
            u, log_slope = coupling(u, context)
            log_q = log_q - log_slope
        return u.clamp(0, 1 - torch.finfo(u.dtype).eps / 2), log_q

    def inverse(self, images: torch.Tensor, u: torch.Tensor):
        """(e, log q(u | images)) of noise u in [0, 1), (B, C, H, W)."""
        context, e, log_q = self._context(images, u), u, 0.0
        for coupling in reversed(self.couplings):
            e, log_slope = coupling(e, context, inverse=True)
            log_q = log_q + log_slope
        return e, log_q

    def _context(self, images: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Features of the images; refuses what this network was not made for."""
        if tuple(images.shape[1:]) != self.shape or images.shape != e.shape:
            raise ValueError(
                f"a dequantizer of images of shape (B, {', '.join(map(str, self.shape))}) takes "
                f"them and noise of their shape, got {tuple(images.shape)} and {tuple(e.shape)}; "
                "it is no score model, but serves one's bits/dim as config.eval.dequantizer"
            )
        return self.features((2 * images.to(e.dtype) + 1) / self.levels - 1)


def _splits(channels: int, height: int, width: int) -> list[torch.Tensor]:
    """What each coupling in turn is given: boolean, (C, H, W)."""
    checkers = (torch.arange(height).unsqueeze(1) + torch.arange(width)) % 2 == 0
    checkers = checkers.expand(channels, height, width)
    splits = [~checkers, checkers]
    if channels > 1:
        half = (torch.arange(channels) < channels // 2).view(-1, 1, 1)
        half = half.expand(channels, height, width)
        splits += [half, ~half]
    return [split.clone() for split in splits]
