"""Names of score_sde's `models.layers` for networks written against it; found through `layers`."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import nn

from . import layers_refinenet, layerspp
from .layers import group_norm
from .layers_refinenet import ConvMeanPool, ResidualBlock, ncsn_conv1x1, ncsn_conv3x3
from .normalization import ConditionalInstanceNorm2dPlus

_norm = partial(group_norm, preferred=32)
_RELU, _ELU = nn.ReLU(), nn.ELU()


# DDPM


class AttnBlock(layerspp.AttnBlockpp):
    """DDPM's self-attention: a GroupNorm of 32 groups, and a plain sum."""

    def __init__(self, channels):
        super().__init__(channels, norm=_norm)


class ResnetBlockDDPM(layerspp.ResnetBlockDDPMpp):
    """DDPM's residual block: GroupNorms of 32 groups, and a plain sum."""

    def __init__(self, act, in_ch, out_ch=None, temb_dim=None, conv_shortcut=False, dropout=0.1):
        super().__init__(act, in_ch, out_ch, temb_dim, conv_shortcut, dropout, norm=_norm)


class Upsample(layerspp.Upsample):
    """Repetition by two, and a 3x3 convolution where `with_conv`."""

    def __init__(self, channels, with_conv=False):
        super().__init__(channels, with_conv=with_conv)


class Downsample(layerspp.Downsample):
    """Averaging by two, or a strided 3x3 convolution where `with_conv`."""

    def __init__(self, channels, with_conv=False):
        super().__init__(channels, with_conv=with_conv)


# NCSN and NCSNv2


def _labelled(normalizer, num_classes, **options):
    """What makes a normalisation with labels of so many channels; a count bound before stays."""
    if isinstance(normalizer, partial) and "num_classes" in normalizer.keywords:
        return partial(normalizer, **options)
    return lambda features: normalizer(features, num_classes, **options)


class CRPBlock(layers_refinenet.CRPBlock):
    """Chained residual pooling, by the maximum of 5x5 pixels or, without `maxpool`, their mean."""

    def __init__(self, features, n_stages, act=_RELU, maxpool=True):
        super().__init__(features, n_stages, act)
        if not maxpool:
            self.pool = nn.AvgPool2d(5, stride=1, padding=2)


class CondCRPBlock(layers_refinenet.CRPBlock):
    """Chained residual pooling, each pool preceded by a normalisation with labels."""

    def __init__(self, features, n_stages, num_classes, normalizer, act=_RELU):
        super().__init__(features, n_stages, act, _labelled(normalizer, num_classes, bias=True))


class RCUBlock(layers_refinenet.RCUBlock):
    """Residual convolution units."""

    def __init__(self, features, n_blocks, n_stages, act=_RELU):
        super().__init__(features, n_blocks, n_stages, act)


class CondRCUBlock(layers_refinenet.RCUBlock):
    """Residual convolution units, each activation preceded by a normalisation with labels."""

    def __init__(
        self,
        features,
        n_blocks,
        n_stages,
        num_classes,
        normalizer,
        act=_RELU,
    ):
        norm = _labelled(normalizer, num_classes, bias=True)
        super().__init__(features, n_blocks, n_stages, act, norm)


class MSFBlock(layers_refinenet.MSFBlock):
    """Multi-resolution fusion."""

    def __init__(self, in_planes, features):
        super().__init__(in_planes, features)

    def forward(self, xs, shape):
        return super().forward(xs, None, shape)


class CondMSFBlock(layers_refinenet.MSFBlock):
    """Multi-resolution fusion of maps that are first normalised with labels."""

    def __init__(self, in_planes, features, num_classes, normalizer):
        super().__init__(in_planes, features, _labelled(normalizer, num_classes, bias=True))


class RefineBlock(layers_refinenet.RefineBlock):
    """RefineNet's block without normalisation; it pools by the mean without `maxpool`."""

    def __init__(
        self,
        in_planes,
        features,
        act=_RELU,
        start=False,
        end=False,
        maxpool=True,
    ):
        super().__init__(in_planes, features, act, end=end, start=start)
        if not maxpool:
            self.crp.pool = nn.AvgPool2d(5, stride=1, padding=2)

    def forward(self, xs, output_shape):
        return super().forward(xs, None, output_shape)


class CondRefineBlock(layers_refinenet.RefineBlock):
    """RefineNet's block whose normalisations take labels."""

    def __init__(
        self,
        in_planes,
        features,
        num_classes,
        normalizer,
        act=_RELU,
        start=False,
        end=False,
    ):
        norm = _labelled(normalizer, num_classes, bias=True)
        super().__init__(in_planes, features, act, norm, end=end, start=start)


class ConditionalResidualBlock(ResidualBlock):
    """The residual block whose normalisations take labels.

    Without `resample` or `dilation` it keeps the size and does not dilate; the original's defaults
    of these, 1 and None, raise there.
    """

    def __init__(
        self,
        input_dim,
        output_dim,
        num_classes,
        resample=None,
        act=_ELU,
        normalization=ConditionalInstanceNorm2dPlus,
        adjust_padding=False,
        dilation=None,
    ):
        norm = _labelled(normalization, num_classes)
        super().__init__(input_dim, output_dim, resample, act, norm, adjust_padding, dilation or 1)


class MeanPoolConv(nn.Module):
    """The mean of 2x2 pixels, then a convolution: (B, in, H, W) -> (B, out, ⌊H/2⌋, ⌊W/2⌋)."""

    def __init__(self, input_dim, output_dim, kernel_size=3, biases=True):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(input_dim, output_dim, kernel_size, padding=padding, bias=biases)

    def forward(self, inputs):
        return self.conv(F.avg_pool2d(inputs, 2))


class UpsampleConv(nn.Module):
    """Four copies of the channels shuffled to twice the size, then a convolution.

    (B, in, H, W) -> (B, out, 2H, 2W). As in the original, pixel (i, j) of a 2x2 square of channel c
    is channel (4c + 2i + j) mod C of the input, which repeats pixels only where C = 1.
    """

    def __init__(self, input_dim, output_dim, kernel_size=3, biases=True):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(input_dim, output_dim, kernel_size, padding=padding, bias=biases)

    def forward(self, inputs):
        return self.conv(F.pixel_shuffle(inputs.repeat(1, 4, 1, 1), 2))


__all__ = [
    "AttnBlock",
    "CRPBlock",
    "CondCRPBlock",
    "CondMSFBlock",
    "CondRCUBlock",
    "CondRefineBlock",
    "ConditionalInstanceNorm2dPlus",
    "ConditionalResidualBlock",
    "ConvMeanPool",
    "Downsample",
    "MSFBlock",
    "MeanPoolConv",
    "RCUBlock",
    "RefineBlock",
    "ResidualBlock",
    "ResnetBlockDDPM",
    "Upsample",
    "UpsampleConv",
    "ncsn_conv1x1",
    "ncsn_conv3x3",
]
