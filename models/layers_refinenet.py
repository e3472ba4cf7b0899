"""Layers of NCSN and NCSNv2: residual blocks and RefineNet's (Lin et al. 2017).

Both come in two kinds. NCSN's normalise by layers that take the noise level's label y (Song &
Ermon 2019); NCSNv2's take no label, and its refinement does not normalise (Song & Ermon 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import nn

from .layers import run_block


def ncsn_conv1x1(
    in_planes, out_planes, stride=1, bias=True, dilation=1, init_scale=1.0, padding=0
) -> nn.Conv2d:
    """A 1x1 convolution; PyTorch's initialisation times `init_scale`, 0 standing for 1e-10."""
    conv = nn.Conv2d(in_planes, out_planes, 1, stride, padding, dilation, bias=bias)
    return _scale_(conv, init_scale)


def ncsn_conv3x3(
    in_planes, out_planes, stride=1, bias=True, dilation=1, init_scale=1.0, padding=None
) -> nn.Conv2d:
    """A 3x3 convolution; PyTorch's initialisation times `init_scale`, 0 standing for 1e-10.

    Without `padding` it pads by the dilation, which keeps the size where the stride is 1.
    """
    padding = dilation if padding is None else padding
    conv = nn.Conv2d(in_planes, out_planes, 3, stride, padding, dilation, bias=bias)
    return _scale_(conv, init_scale)


def _scale_(conv: nn.Conv2d, scale: float) -> nn.Conv2d:
    if scale != 1:
        for parameter in conv.parameters():
            parameter.data.mul_(scale or 1e-10)
    return conv


def _normalise(norm: nn.Module, x, y):
    return norm(x) if y is None else norm(x, y)


class ConvMeanPool(nn.Module):
    """A convolution, then the mean of 2x2 pixels: (B, in, H, W) -> (B, out, ⌈H/2⌉, ⌈W/2⌉).

    An odd height or width first gets a row or column of zeros on the top or left. With
    `adjust_padding` the convolution is the second layer of `conv`, as in the original.
    """

    def __init__(self, input_dim, output_dim, kernel_size=3, biases=True, adjust_padding=False):
        super().__init__()
        padding = kernel_size // 2
        conv = nn.Conv2d(input_dim, output_dim, kernel_size, padding=padding, bias=biases)
        self.pointwise = kernel_size == 1
        self.conv = nn.Sequential(nn.Identity(), conv) if adjust_padding else conv

    def forward(self, x):
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            x = F.pad(x, (width % 2, 0, height % 2, 0))
        if self.pointwise:  # commutes with the mean, and is cheaper after it
            return self.conv(F.avg_pool2d(x, 2))
        return F.avg_pool2d(self.conv(x), 2)


class ResidualBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W), or half that size where it resamples without dilation.

    x + conv2(act(normalize2(conv1(act(normalize1(x)))))), x going through `shortcut` where the
    channels change or where it resamples. `normalization` makes a layer of so many channels.

    Args:
      resample: None, or 'down', which halves the size, or keeps it where `dilation` > 1 stands for
        a smaller size (Yu et al. 2017).

    Raises:
      ValueError: `resample` is something else.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        resample: str | None = None,
        act: nn.Module | None = None,
        normalization: Callable = nn.InstanceNorm2d,
        adjust_padding: bool = False,
        dilation: int = 1,
    ):
        super().__init__()
        if resample not in (None, "down"):
            raise ValueError(f"ResidualBlock needs resample None or 'down', got {resample!r}")
        middle = output_dim if resample is None else input_dim
        conv = partial(ncsn_conv3x3, dilation=dilation)
        halves = resample == "down" and dilation == 1
        pool = partial(ConvMeanPool, adjust_padding=adjust_padding)
        if halves:
            shortcut = partial(pool, kernel_size=1)
        else:
            shortcut = conv if dilation > 1 else partial(nn.Conv2d, kernel_size=1)
        self.conv1 = conv(input_dim, middle)
        self.normalize2 = normalization(middle)
        self.conv2 = (pool if halves else conv)(middle, output_dim)
        has_shortcut = input_dim != output_dim or resample is not None
        self.shortcut = shortcut(input_dim, output_dim) if has_shortcut else None
        self.normalize1 = normalization(input_dim)
        self.act = act or nn.ELU()

    def forward(self, x, y=None):
        h = self.conv1(self.act(_normalise(self.normalize1, x, y)))
        h = self.conv2(self.act(_normalise(self.normalize2, h, y)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class RCUBlock(nn.Module):
    """Residual convolution units: `n_blocks` times x + (act, conv), repeated `n_stages` times.

    With a `norm` each activation is preceded by one.
    """

    def __init__(self, features, n_blocks, n_stages, act, norm: Callable | None = None):
        super().__init__()
        self.units = [
            [f"{block}_{stage}" for stage in range(1, n_stages + 1)]
            for block in range(1, n_blocks + 1)
        ]
        for name in (name for unit in self.units for name in unit):
            if norm is not None:
                self.add_module(f"{name}_norm", norm(features))
            self.add_module(f"{name}_conv", ncsn_conv3x3(features, features, bias=False))
        self.normalises, self.act = norm is not None, act

    def forward(self, x, y=None):
        for unit in self.units:
            h = x
            for name in unit:
                if self.normalises:
                    h = self.get_submodule(f"{name}_norm")(h, y)
                h = self.get_submodule(f"{name}_conv")(self.act(h))
            x = x + h
        return x


class MSFBlock(nn.Module):
    """Multi-resolution fusion: convolve each map, resize it to `shape` bilinearly, and add."""

    def __init__(self, in_planes: Sequence[int], features, norm: Callable | None = None):
        super().__init__()
        self.convs = nn.ModuleList(ncsn_conv3x3(planes, features) for planes in in_planes)
        self.norms = None if norm is None else nn.ModuleList(norm(planes) for planes in in_planes)

    def forward(self, xs, y, shape):
        if self.norms is not None:
            xs = [norm(x, y) for norm, x in zip(self.norms, xs, strict=True)]
        maps = [conv(x) for conv, x in zip(self.convs, xs, strict=True)]
        return sum(F.interpolate(h, shape, mode="bilinear", align_corners=True) for h in maps)


class CRPBlock(nn.Module):
    """Chained residual pooling: h = act(x), then `n_stages` times p = conv(pool(p)), h = h + p.

    Pools by the maximum of 5x5 pixels; with a `norm`, which precedes each pool, by their mean.
    """

    def __init__(self, features, n_stages, act, norm: Callable | None = None):
        super().__init__()
        stages = range(n_stages)
        self.convs = nn.ModuleList(ncsn_conv3x3(features, features, bias=False) for _ in stages)
        self.norms = None if norm is None else nn.ModuleList(norm(features) for _ in stages)
        pool = nn.MaxPool2d if norm is None else nn.AvgPool2d
        self.pool = pool(5, stride=1, padding=2)
        self.act = act

    def forward(self, x, y=None):
        h = path = self.act(x)
        for i, conv in enumerate(self.convs):
            if self.norms is not None:
                path = self.norms[i](path, y)
            path = conv(self.pool(path))
            h = h + path
        return h


class RefineBlock(nn.Module):
    """RefineNet's block: several maps (B, C_i, H_i, W_i) -> one (B, features, *output_shape).

    Residual units on each map, fusion where there is more than one, chained pooling, and residual
    units on the result: three where it is the last block (`end`), else one. A block of one map has
    a fusion that it never uses where `start` is False.

    Raises:
      ValueError: `start`, which makes a block without fusion, and several maps.
    """

    recompute = False

    def __init__(
        self,
        in_planes: Sequence[int],
        features: int,
        act: nn.Module,
        norm: Callable | None = None,
        end: bool = False,
        start: bool | None = None,
    ):
        super().__init__()
        start = len(in_planes) == 1 if start is None else start
        if start and len(in_planes) > 1:
            raise ValueError(f"RefineBlock with start=True needs one map, got {len(in_planes)}")
        self.adapt_convs = nn.ModuleList(RCUBlock(planes, 2, 2, act, norm) for planes in in_planes)
        self.output_convs = RCUBlock(features, 3 if end else 1, 2, act, norm)
        self.msf = None if start else MSFBlock(in_planes, features, norm)
        self.crp = CRPBlock(features, 2, act, norm)

    def forward(self, xs, y, output_shape):
        hs = [run_block(self, adapt, x, y) for adapt, x in zip(self.adapt_convs, xs, strict=True)]
        h = hs[0] if self.msf is None or len(hs) == 1 else self.msf(hs, y, output_shape)
        return run_block(self, self.output_convs, run_block(self, self.crp, h, y), y)
