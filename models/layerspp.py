"""Layers of NCSN++ and DDPM++ (Song et al. 2021, appendix H)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import up_or_down_sampling as resampling
from .layers import (
    NIN,
    Dropout,
    activated,
    attention,
    ddpm_conv1x1,
    ddpm_conv3x3,
    default_init,
    dense,
    expand_to,
    group_norm,
    linear_of_pixels,
)

conv1x1 = ddpm_conv1x1
conv3x3 = ddpm_conv3x3


def merge(x: torch.Tensor, h: torch.Tensor, rescale: bool) -> torch.Tensor:
    """x + h, divided by √2 where `rescale`, which keeps the variance of independent terms."""
    y = x + h
    return y.mul_(math.sqrt(0.5)) if rescale else y


class GaussianFourierProjection(nn.Module):
    """Random Fourier features of log noise levels, (B,) -> (B, 2·embedding_size).

    [sin(2π W x), cos(2π W x)] with frequencies W ~ N(0, scale²) that are never trained
    (Tancik et al. 2020).
    """

    def __init__(self, embedding_size=256, scale=1.0):
        super().__init__()
        self.W = nn.Parameter(torch.randn(embedding_size) * scale, requires_grad=False)

    def forward(self, x):
        phases = torch.outer(x, self.W.to(x.dtype)) * (2 * math.pi)
        return torch.cat([phases.sin(), phases.cos()], dim=-1)


class Combine(nn.Module):
    """Bring the input pyramid x (B, dim1, H, W) into the features y (B, dim2, H, W).

    Conv1x1(x) + y for the method 'sum'; [Conv1x1(x), y], of 2·dim2 channels, for 'cat'.

    Raises:
      ValueError: the method is unknown.
    """

    def __init__(self, dim1, dim2, method="cat"):
        super().__init__()
        if method not in ("cat", "sum"):
            raise ValueError(f"Combine needs method 'cat' or 'sum', got {method!r}; use 'sum'")
        self.Conv_0 = conv1x1(dim1, dim2)
        self.method = method

    def forward(self, x, y):
        h = self.Conv_0(x)
        return torch.cat([h, y], dim=1) if self.method == "cat" else h + y


class AttnBlockpp(nn.Module):
    """Self-attention over all pixels with one head of C channels, (B, C, H, W) to the same.

    x + NIN_3(attention(NIN_0 h, NIN_1 h, NIN_2 h)) with h = GroupNorm(x), divided by √2 where
    `skip_rescale` (Ho et al. 2020). `norm` makes the normalisation of so many channels.
    """

    def __init__(self, channels, skip_rescale=False, init_scale=0.0, norm=group_norm):
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        self.NIN_0 = NIN(channels, channels)
        self.NIN_1 = NIN(channels, channels)
        self.NIN_2 = NIN(channels, channels)
        self.NIN_3 = NIN(channels, channels, init_scale=init_scale)
        self.skip_rescale = skip_rescale

    def forward(self, x):
        qkv = (self.NIN_0, self.NIN_1, self.NIN_2)
        weight = torch.cat([layer.W for layer in qkv], dim=1)
        bias = torch.cat([layer.b for layer in qkv])
        h = linear_of_pixels(self.GroupNorm_0(x), weight, bias)
        q, k, v = h.flatten(2).transpose(1, 2).chunk(3, dim=-1)
        h = attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        h = linear_of_pixels(h, self.NIN_3.W, self.NIN_3.b)
        return merge(x, h, self.skip_rescale)


def _resampling_conv(in_ch, out_ch, fir_kernel, up=False, down=False):
    return resampling.Conv2d(
        in_ch,
        out_ch,
        kernel=3,
        up=up,
        down=down,
        resample_kernel=fir_kernel,
        kernel_init=default_init(),
    )


class Upsample(nn.Module):
    """Double the height and width, (B, in_ch, H, W) -> (B, out_ch, 2H, 2W).

    By repetition, or by a FIR filter where `fir`; with a 3x3 convolution where `with_conv`
    (`Conv_0`, with FIR `Conv2d_0`), else the channels stay.
    """

    def __init__(
        self, in_ch=None, out_ch=None, with_conv=False, fir=False, fir_kernel=(1, 3, 3, 1)
    ):
        super().__init__()
        out_ch = out_ch or in_ch
        if with_conv and fir:
            self.Conv2d_0 = _resampling_conv(in_ch, out_ch, fir_kernel, up=True)
        elif with_conv:
            self.Conv_0 = conv3x3(in_ch, out_ch)
        self.fir = fir
        self.with_conv = with_conv
        self.fir_kernel = tuple(fir_kernel)
        self.out_ch = out_ch

    def forward(self, x):
        if self.with_conv and self.fir:
            return self.Conv2d_0(x)
        if self.with_conv:
            return resampling.naive_upsample_conv_2d(x, self.Conv_0.weight, self.Conv_0.bias)
        return _resample(x, self.fir_kernel if self.fir else None, up=True)


class Downsample(nn.Module):
    """Halve the height and width, (B, in_ch, H, W) -> (B, out_ch, H/2, W/2).

    By averaging, or by a FIR filter where `fir`; with a 3x3 convolution where `with_conv`
    (`Conv_0`, strided and then without averaging; with FIR `Conv2d_0`), else the channels stay.
    """

    def __init__(
        self, in_ch=None, out_ch=None, with_conv=False, fir=False, fir_kernel=(1, 3, 3, 1)
    ):
        super().__init__()
        out_ch = out_ch or in_ch
        if with_conv and fir:
            self.Conv2d_0 = _resampling_conv(in_ch, out_ch, fir_kernel, down=True)
        elif with_conv:
            self.Conv_0 = conv3x3(in_ch, out_ch, stride=2, padding=0)
        self.fir = fir
        self.with_conv = with_conv
        self.fir_kernel = tuple(fir_kernel)
        self.out_ch = out_ch

    def forward(self, x):
        if self.with_conv and self.fir:
            return self.Conv2d_0(x)
        if self.with_conv:
            return self.Conv_0(F.pad(x, (0, 1, 0, 1)))  # TensorFlow's SAME for even sizes
        return _resample(x, self.fir_kernel if self.fir else None, up=False)


def _resample(x, fir_kernel, up: bool):
    """Double or halve the size, by a FIR filter or, where that is None, naively."""
    if fir_kernel is None:
        return resampling.naive_upsample_2d(x) if up else resampling.naive_downsample_2d(x)
    return (resampling.upsample_2d if up else resampling.downsample_2d)(x, fir_kernel)


class ResnetBlockDDPMpp(nn.Module):
    """DDPM's residual block, (B, in_ch, H, W) and the embedding (B, temb_dim) -> (B, out_ch, H, W).

    h = Conv_0(act(GroupNorm_0(x))) + Dense_0(act(temb)); h = Conv_1(Dropout(act(GroupNorm_1(h))));
    the result is x + h, x going through `Conv_2` or `NIN_0` where the channels change, divided by
    √2 where `skip_rescale` (Ho et al. 2020). `norm` makes the normalisation of so many channels.
    """

    def __init__(
        self,
        act,
        in_ch,
        out_ch=None,
        temb_dim=None,
        conv_shortcut=False,
        dropout=0.1,
        skip_rescale=False,
        init_scale=0.0,
        norm=group_norm,
    ):
        super().__init__()
        out_ch = out_ch or in_ch
        self.GroupNorm_0 = norm(in_ch)
        self.Conv_0 = conv3x3(in_ch, out_ch)
        if temb_dim is not None:
            self.Dense_0 = dense(temb_dim, out_ch)
        self.GroupNorm_1 = norm(out_ch)
        self.Dropout_0 = Dropout(dropout)
        self.Conv_1 = conv3x3(out_ch, out_ch, init_scale=init_scale)
        if in_ch != out_ch and conv_shortcut:
            self.Conv_2 = conv3x3(in_ch, out_ch)
        elif in_ch != out_ch:
            self.NIN_0 = NIN(in_ch, out_ch)
        self.act = act
        self.in_ch = in_ch
        self.out_ch = out_ch
        self.conv_shortcut = conv_shortcut
        self.skip_rescale = skip_rescale

    def forward(self, x, temb=None):
        h = self.Conv_0(activated(self.GroupNorm_0, self.act, x))
        if temb is not None:
            h += expand_to(self.Dense_0(self.act(temb)), h)
        h = self.Conv_1(self.Dropout_0(activated(self.GroupNorm_1, self.act, h)))
        if self.in_ch != self.out_ch:
            x = self.Conv_2(x) if self.conv_shortcut else self.NIN_0(x)
        return merge(x, h, self.skip_rescale)


class ResnetBlockBigGANpp(nn.Module):
    """BigGAN's residual block, which can also resample (Brock et al. 2019, Song et al. 2021).

    As `ResnetBlockDDPMpp`, with x and act(GroupNorm_0(x)) both doubled (`up`) or halved (`down`)
    in height and width, by a FIR filter where `fir`; x goes through the 1x1 `Conv_2` where the
    channels or the size change.
    """

    def __init__(
        self,
        act,
        in_ch,
        out_ch=None,
        temb_dim=None,
        up=False,
        down=False,
        dropout=0.1,
        fir=False,
        fir_kernel=(1, 3, 3, 1),
        skip_rescale=True,
        init_scale=0.0,
    ):
        super().__init__()
        out_ch = out_ch or in_ch
        self.GroupNorm_0 = group_norm(in_ch)
        self.Conv_0 = conv3x3(in_ch, out_ch)
        if temb_dim is not None:
            self.Dense_0 = dense(temb_dim, out_ch)
        self.GroupNorm_1 = group_norm(out_ch)
        self.Dropout_0 = Dropout(dropout)
        self.Conv_1 = conv3x3(out_ch, out_ch, init_scale=init_scale)
        if in_ch != out_ch or up or down:
            self.Conv_2 = conv1x1(in_ch, out_ch)
        self.act = act
        self.in_ch = in_ch
        self.out_ch = out_ch
        self.up = up
        self.down = down
        self.fir = fir
        self.fir_kernel = tuple(fir_kernel)
        self.skip_rescale = skip_rescale

    def forward(self, x, temb=None):
        h = self._first_conv(activated(self.GroupNorm_0, self.act, x))
        if temb is not None:
            h += expand_to(self.Dense_0(self.act(temb)), h)
        h = self.Conv_1(self.Dropout_0(activated(self.GroupNorm_1, self.act, h)))
        return merge(self._shortcut(x), h, self.skip_rescale)

    def _first_conv(self, h):
        if self.up and not self.fir:
            return resampling.naive_upsample_conv_2d(h, self.Conv_0.weight, self.Conv_0.bias)
        if self.up or self.down:
            h = _resample(h, self.fir_kernel if self.fir else None, self.up)
        return self.Conv_0(h)

    def _shortcut(self, x):
        fir_kernel = self.fir_kernel if self.fir else None
        if self.up:
            # Resampling commutes with a 1x1 convolution, which is cheaper at the small size; not
            # with its bias, since a FIR filter darkens the border.
            y = _resample(F.conv2d(x, self.Conv_2.weight), fir_kernel, up=True)
            bias: torch.Tensor = self.Conv_2.bias  # type: ignore[assignment]
            return y.add_(bias.reshape(-1, 1, 1))
        if self.down:
            x = _resample(x, fir_kernel, up=False)
        return self.Conv_2(x) if self.in_ch != self.out_ch or self.down else x
