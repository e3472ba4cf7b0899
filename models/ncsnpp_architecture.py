"""The options of NCSN++, DDPM++ and DDPM, checked, and the layers that they choose."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass
from typing import Any

from torch import nn

from .layers import get_act, group_norm
from .layerspp import (
    AttnBlockpp,
    Downsample,
    ResnetBlockBigGANpp,
    ResnetBlockDDPMpp,
    Upsample,
)

_CHOICES = {
    "resblock_type": ("biggan", "ddpm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "embedding_type": ("positional", "fourier"),
}


@dataclass(frozen=True)
class Architecture:
    """The checked options of a network, and the layers that they choose."""

    channels: int
    image_size: int
    nf: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resblock_type: str
    progressive: str
    progressive_input: str
    progressive_combine: str
    embedding_type: str
    conditional: bool
    dropout: float
    fir: bool
    fir_kernel: tuple
    fourier_scale: float
    init_scale: float
    resamp_with_conv: bool
    skip_rescale: bool
    num_classes: int
    label_dropout: float
    act: nn.Module
    groups: int

    @classmethod
    def from_config(cls, config, **fixed) -> Architecture:
        """Read and check `config.model` and `config.data`; missing options are DDPM++'s.

        `fixed` replaces options of `config.model`, for a network that does not have them.
        """
        model, data = ChainMap(fixed, config.model), config.data
        names = {key: _choice(model, key) for key in _CHOICES}
        arch = cls(
            channels=data.num_channels,
            image_size=data.image_size,
            nf=model["nf"],
            ch_mult=tuple(model["ch_mult"]),
            num_res_blocks=model["num_res_blocks"],
            attn_resolutions=tuple(model["attn_resolutions"]),
            **names,
            conditional=model.get("conditional", True),
            dropout=model.get("dropout", 0.1),
            fir=model.get("fir", False),
            fir_kernel=tuple(model.get("fir_kernel", (1, 3, 3, 1))),
            fourier_scale=model.get("fourier_scale", 16),
            init_scale=model.get("init_scale", 0.0),
            resamp_with_conv=model.get("resamp_with_conv", True),
            skip_rescale=model.get("skip_rescale", True),
            num_classes=model.get("num_classes", 0),
            label_dropout=model.get("label_dropout", 0.0),
            act=get_act(config),
            groups=0,
        )
        arch._check(config)
        return arch

    def _check(self, config) -> None:
        name = config.model.get("name", "ncsnpp")
        if self.nf < 4 or not self.ch_mult or self.num_res_blocks < 1:
            raise ValueError(
                f"{name} needs nf >= 4, a non-empty ch_mult and num_res_blocks >= 1, got "
                f"{self.nf}, {self.ch_mult} and {self.num_res_blocks}"
            )
        if self.image_size % self.stride:
            raise ValueError(
                f"{name} halves the images {len(self.ch_mult) - 1} times and needs a "
                f"data.image_size divisible by {self.stride}, got {self.image_size}; shorten "
                "model.ch_mult or pad the images"
            )
        continuous = config.get("training", {}).get("continuous", True)
        if self.embedding_type == "fourier" and not continuous:
            raise ValueError(
                "model.embedding_type 'fourier' needs training.continuous=True (its labels are "
                "noise levels), got False; use 'positional'"
            )
        norm = config.model.get("normalization", "GroupNorm")
        if norm != "GroupNorm":
            raise ValueError(f"{name} needs model.normalization 'GroupNorm', got {norm!r}; use it")
        if self.num_classes and not self.conditional:
            raise ValueError(
                "model.num_classes adds class labels to the time embedding, which "
                "model.conditional=False leaves out; set it to True"
            )

    @property
    def stride(self) -> int:
        """What heights and widths must be divisible by."""
        return 2 ** (len(self.ch_mult) - 1)

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of a level attend, by the size that training images have there."""
        return self.image_size // 2**level in self.attn_resolutions

    def block(self, in_ch: int, out_ch: int, **resampling) -> nn.Module:
        """A residual block; `up=True` or `down=True` (BigGAN's only) resamples."""
        options: dict[str, Any] = {
            "temb_dim": 4 * self.nf,
            "dropout": self.dropout,
            "skip_rescale": self.skip_rescale,
            "init_scale": self.init_scale,
        }
        if self.resblock_type == "ddpm":
            return ResnetBlockDDPMpp(self.act, in_ch, out_ch, norm=self.norm, **options)
        options.update(fir=self.fir, fir_kernel=self.fir_kernel, **resampling)
        return ResnetBlockBigGANpp(self.act, in_ch, out_ch, **options)

    def resample_block(self, ch: int, up: bool) -> nn.Module:
        """What stands between two levels: BigGAN's block, or DDPM's plain resampling."""
        if self.resblock_type == "biggan":
            return self.block(ch, ch, **({"up": True} if up else {"down": True}))
        return WithoutEmbedding(self.resample(up, self.resamp_with_conv, ch))

    def resample(self, up: bool, with_conv: bool, in_ch=None, out_ch=None) -> nn.Module:
        """Upsampling or downsampling by two, with or without a convolution."""
        cls = Upsample if up else Downsample
        return cls(in_ch, out_ch, with_conv=with_conv, fir=self.fir, fir_kernel=self.fir_kernel)

    def attention(self, ch: int) -> nn.Module:
        """Self-attention over all pixels of `ch` channels."""
        return AttnBlockpp(ch, self.skip_rescale, self.init_scale, norm=self.norm)

    def norm(self, ch: int) -> nn.Module:
        """Group normalisation of `ch` channels."""
        return group_norm(ch, self.groups)


def _choice(model, key: str) -> str:
    choices = _CHOICES[key]
    name = str(model.get(key, choices[0])).lower()
    if name not in choices:
        raise ValueError(f"model.{key} needs one of {list(choices)}, got {model[key]!r}")
    return name


class WithoutEmbedding(nn.Module):
    """Calls a layer that takes no embedding where a block stands elsewhere."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, temb):
        return self.layer(x)
