"""NCSN (Song & Ermon 2019) and NCSNv2 (Song & Ermon 2020): RefineNets over noise levels."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from .layers import check_images, expand_to, get_act, group_norm, run_block
from .layers_refinenet import RefineBlock, ResidualBlock
from .normalization import get_normalization
from .utils import get_sigmas, register_model

# Stages from the finest: the names of their blocks on the way down and up, width in multiples of
# nf, and dilation. All but the first resample: they halve the size, or keep it where they dilate.
_STAGES_64 = (
    ("res1", "refine4", 1, 1),
    ("res2", "refine3", 2, 1),
    ("res3", "refine2", 2, 2),
    ("res4", "refine1", 2, 4),
)
_STAGES_128 = (
    ("res1", "refine5", 1, 1),
    ("res2", "refine4", 2, 1),
    ("res3", "refine3", 2, 1),
    ("res4", "refine2", 4, 2),
    ("res5", "refine1", 4, 4),
)
_STAGES_256 = (*_STAGES_128[:3], ("res31", "refine31", 2, 1), *_STAGES_128[3:])


class RefineNet(nn.Module):
    """A RefineNet: images (B, C, H, W), labels (B,) -> (B, C, H, W), of any height and width.

    Two residual blocks in each stage on the way down, a refinement block in each on the way up,
    which fuses the stage's features with those from below. The labels are the whole numbers
    0 … num_scales − 1, counting noise levels from the largest down. The output is divided by σ
    where `scale_by_sigma`. It has the type of the input, also under autocast.

    The parameters have the names, order and shapes of the authors' implementation.

    Subclasses choose the stages, and whether the normalisations are given the labels.

    Raises:
      ValueError: on building, training is continuous, or the options ask for class labels or for
        fewer than two features; on calling, the images or labels do not have the shapes above.
    """

    stages: tuple = _STAGES_64
    conditional = False
    recompute = False
    sigmas: torch.Tensor

    def __init__(self, config):
        super().__init__()
        self._check_options(config)
        self._check_size(config.data.image_size, config.data.image_size)
        self.config = config
        self.channels = config.data.num_channels
        self.centered = config.data.get("centered", False)
        self.scale_by_sigma = config.model.get("scale_by_sigma", not self.conditional)
        sigmas = torch.as_tensor(get_sigmas(config)).to(torch.float32)
        self.register_buffer("sigmas", sigmas, persistent=not self.conditional)
        self.act = get_act(config)

        nf, norm = config.model.nf, _norm(config, self.conditional)
        self.begin_conv = nn.Conv2d(self.channels, nf, 3, padding=1)
        self.normalizer = norm(nf)
        self.end_conv = nn.Conv2d(nf, self.channels, 3, padding=1)
        self._build_down(nf, norm)
        self._build_up(nf, norm if self.conditional else None)

    def _build_down(self, nf: int, norm) -> None:
        before, resample = nf, None
        for name, _, multiple, dilation in self.stages:
            block = partial(ResidualBlock, act=self.act, normalization=norm, dilation=dilation)
            width = multiple * nf
            blocks = (block(before, width, resample=resample), block(width, width))
            self.add_module(name, nn.ModuleList(blocks))
            before, resample = width, "down"

    def _build_up(self, nf: int, norm) -> None:
        widths = [multiple * nf for _, _, multiple, _ in self.stages]
        blocks, below = {}, []
        for level in reversed(range(len(widths))):
            features = widths[max(level - 1, 0)]
            planes = [widths[level], *below]
            blocks[self.stages[level][1]] = RefineBlock(
                planes, features, self.act, norm, end=level == 0
            )
            below = [features]
        for name in sorted(blocks):  # the original's order: refine31 runs before refine3
            self.add_module(name, blocks[name])

    def forward(self, x, labels):
        check_images(self, x, labels, self.channels)
        self._check_size(*x.shape[2:])
        index = labels.long()
        y = index if self.conditional else None
        h = self.begin_conv(x if self.centered else 2 * x - 1)
        maps = []
        for name, *_ in self.stages:
            for block in self.get_submodule(name).children():
                h = run_block(self, block, h, y)
            maps.append(h)
        below = []
        for _, name, *_ in reversed(self.stages):
            fused = maps.pop()
            h = self.get_submodule(name)([fused, *below], y, fused.shape[2:])
            below = [h]
        h = self.normalizer(h, y) if self.conditional else self.normalizer(h)
        h = self.end_conv(self.act(h)).to(x.dtype)
        if self.scale_by_sigma:
            h = h / expand_to(self.sigmas[index], h).to(h.dtype)
        return h

    @staticmethod
    def _check_options(config) -> None:
        name, model = config.model.get("name", "ncsnv2_64"), config.model
        if config.get("training", {}).get("continuous", False):
            raise ValueError(
                f"{name} needs training.continuous=False (its labels count the noise levels), got "
                "True; use the network 'ncsnpp'"
            )
        if model.get("num_classes", 0):
            raise ValueError(
                f"{name} takes no class labels: expected model.num_classes=0, got "
                f"{model.num_classes}; use the network 'ncsnpp' or 'ddpm'"
            )
        if model.nf < 2:  # one channel has no variance over channels
            raise ValueError(f"{name} needs model.nf >= 2, got {model.nf}; use 128")

    def _check_size(self, height: int, width: int) -> None:
        largest = 2 ** (sum(dilation == 1 for *_, dilation in self.stages) - 1)
        if max(height, width) <= largest:  # one pixel would be left, which no layer can normalise
            raise ValueError(
                f"{type(self).__name__} needs images more than {largest} pixels high or wide, got "
                f"{height} x {width}; use 'ncsnv2_64', or larger images"
            )


def _norm(config, conditional: bool):
    norm = get_normalization(config, conditional)
    return group_norm if norm is nn.GroupNorm else norm


@register_model(name="ncsn")
class NCSN(RefineNet):
    """NCSN (Song & Ermon 2019): the normalisations are conditioned on the noise level.

    Its output is divided by σ only where `scale_by_sigma` is True; the original never divides.
    """

    conditional = True


@register_model(name="ncsnv2_64")
class NCSNv2(RefineNet):
    """NCSNv2 for images below 96 pixels: one halving, then two dilated stages."""


@register_model(name="ncsnv2_128")
class NCSNv2_128(RefineNet):
    """NCSNv2 for images of 96 to 128 pixels: two halvings, then two dilated stages."""

    stages = _STAGES_128


@register_model(name="ncsnv2_256")
class NCSNv2_256(RefineNet):
    """NCSNv2 for images of up to 256 pixels: three halvings, then two dilated stages."""

    stages = _STAGES_256
