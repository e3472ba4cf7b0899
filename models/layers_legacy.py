"""Names of score_sde's `models.layers` for networks written against it; found through `layers`."""

from __future__ import annotations

from functools import partial

from . import layerspp
from .layers import group_norm
from .layers_refinenet import CRPBlock, MSFBlock, RCUBlock, RefineBlock, ResidualBlock, ncsn_conv3x3

_norm = partial(group_norm, preferred=32)

ConditionalResidualBlock = ResidualBlock
CondRefineBlock = RefineBlock


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


__all__ = [
    "AttnBlock",
    "CRPBlock",
    "CondRefineBlock",
    "ConditionalResidualBlock",
    "Downsample",
    "MSFBlock",
    "RCUBlock",
    "RefineBlock",
    "ResidualBlock",
    "ResnetBlockDDPM",
    "Upsample",
    "ncsn_conv3x3",
]
