"""NCSN++ and DDPM++ (Song et al. 2021, "Score-Based Generative Modeling through SDEs", app. H)."""

from __future__ import annotations

import torch
from torch import nn

from .layers import (
    LabelEmbedding,
    activated,
    at_least_float32,
    check_images,
    dense,
    expand_to,
    get_timestep_embedding,
    run_block,
    without_autocast,
)
from .layerspp import Combine, GaussianFourierProjection, conv3x3, merge
from .ncsnpp_architecture import Architecture
from .utils import get_sigmas, register_model


class NoiseEmbedding(nn.Module):
    """Labels (B,) -> embedding (B, 4·nf), or None for a network that is not noise-conditional.

    Fourier features of log σ, or sinusoids of the time label; then two linear layers, which keep
    the type of their weights under autocast.
    """

    def __init__(self, arch: Architecture):
        super().__init__()
        nf = arch.nf
        self.fourier = self.Dense_0 = self.Dense_1 = None
        features = nf
        if arch.embedding_type == "fourier":
            self.fourier = GaussianFourierProjection(nf, scale=arch.fourier_scale)
            features = 2 * nf
        if arch.conditional:
            self.Dense_0 = dense(features, 4 * nf)
            self.Dense_1 = dense(4 * nf, 4 * nf)
        self.nf = nf
        self.act = arch.act

    def forward(self, labels):
        if self.Dense_0 is None or self.Dense_1 is None:
            return None
        if self.fourier is None:
            features = get_timestep_embedding(labels, self.nf)
        else:
            features = self.fourier(torch.log(_as_noise_level(labels)))
        with without_autocast(labels.device):
            h = self.Dense_0(features.to(self.Dense_0.weight.dtype))
            return self.Dense_1(self.act(h))


def _as_noise_level(labels):
    return at_least_float32(labels) if labels.is_floating_point() else labels.float()


class AttendingBlock(nn.Module):
    """A residual block, and attention after it where the level has it."""

    def __init__(self, arch: Architecture, in_ch: int, out_ch: int, level: int):
        super().__init__()
        self.block = arch.block(in_ch, out_ch)
        self.attention = arch.attention(out_ch) if arch.has_attention(level) else None

    def forward(self, h, temb):
        h = self.block(h, temb)
        return h if self.attention is None else self.attention(h)


class DownStage(nn.Module):
    """The blocks of one level; on all but the last, halving and the input pyramid.

    `in_ch`, `pyramid_ch`: channels of the features and of the pyramid on entry; `out_ch`, and
    `pyramid_out_ch` on exit. `skip_chs` are the channels of the skip connections that it adds.
    """

    recompute = False

    def __init__(self, arch: Architecture, level: int, in_ch: int, pyramid_ch: int):
        super().__init__()
        ch = arch.nf * arch.ch_mult[level]
        self.blocks = nn.ModuleList(
            AttendingBlock(arch, ch if i else in_ch, ch, level) for i in range(arch.num_res_blocks)
        )
        self.skip_chs = [ch] * arch.num_res_blocks
        self.downsample = self.pyramid_downsample = self.combine = None
        self.progressive_input = arch.progressive_input
        self.skip_rescale = arch.skip_rescale
        self.out_ch, self.pyramid_out_ch = ch, pyramid_ch
        if level == len(arch.ch_mult) - 1:
            return
        self.downsample = arch.resample_block(ch, up=False)
        if arch.progressive_input == "input_skip":
            self.pyramid_downsample = arch.resample(up=False, with_conv=False)
            self.combine = Combine(pyramid_ch, ch, method=arch.progressive_combine)
            self.out_ch = 2 * ch if arch.progressive_combine == "cat" else ch
        elif arch.progressive_input == "residual":
            self.pyramid_downsample = arch.resample(False, True, pyramid_ch, ch)
            self.pyramid_out_ch = ch
        self.skip_chs.append(self.out_ch)

    def forward(self, h, temb, pyramid, skips: list):
        for block in self.blocks:
            h = run_block(self, block, h, temb)
            skips.append(h)
        if self.downsample is None:
            return h, pyramid
        h = run_block(self, self.downsample, h, temb)
        if self.pyramid_downsample is not None:
            pyramid = self.pyramid_downsample(pyramid)
            if self.combine is not None:
                h = self.combine(pyramid, h)
            else:
                h = pyramid = merge(pyramid, h, self.skip_rescale)
        skips.append(h)
        return h, pyramid


class MiddleStage(nn.Module):
    """Block, attention, block at the smallest size."""

    recompute = False

    def __init__(self, arch: Architecture, ch: int):
        super().__init__()
        self.block_in = arch.block(ch, ch)
        self.attention = arch.attention(ch)
        self.block_out = arch.block(ch, ch)

    def forward(self, h, temb):
        h = run_block(self, self.block_in, h, temb)
        h = run_block(self, self.attention, h)
        return run_block(self, self.block_out, h, temb)


class Head(nn.Module):
    """Conv3x3(act(GroupNorm(h)))."""

    def __init__(self, arch: Architecture, in_ch: int, out_ch: int, init_scale: float):
        super().__init__()
        self.GroupNorm_0 = arch.norm(in_ch)
        self.Conv_0 = conv3x3(in_ch, out_ch, init_scale=init_scale)
        self.act = arch.act

    def forward(self, h):
        return self.Conv_0(activated(self.GroupNorm_0, self.act, h))


def _joined(block, h, skip, temb):
    return block(torch.cat([h, skip], dim=1), temb)


class UpStage(nn.Module):
    """The blocks of one level on the way up, the output pyramid; on all but the first, doubling.

    The pyramid is a sum of images, one from each level ('output_skip'), or of features
    ('residual'), which then also replace h.
    """

    recompute = False

    def __init__(self, arch: Architecture, level: int, in_ch: int, skip_chs: list, pyramid_ch: int):
        super().__init__()
        ch = arch.nf * arch.ch_mult[level]
        self.blocks = nn.ModuleList(
            arch.block((ch if i else in_ch) + skip_chs.pop(), ch)
            for i in range(arch.num_res_blocks + 1)
        )
        self.attention = arch.attention(ch) if arch.has_attention(level) else None
        self.head = self.pyramid_upsample = self.upsample = None
        self.residual = arch.progressive == "residual"
        self.skip_rescale = arch.skip_rescale
        self.out_ch = self.pyramid_out_ch = ch
        is_first = level == len(arch.ch_mult) - 1
        if arch.progressive == "output_skip":
            self.head = Head(arch, ch, arch.channels, arch.init_scale)
            self.pyramid_upsample = None if is_first else arch.resample(up=True, with_conv=False)
        elif self.residual and is_first:
            self.head = Head(arch, ch, ch, init_scale=1.0)
        elif self.residual:
            self.pyramid_upsample = arch.resample(True, True, pyramid_ch, ch)
        if level > 0:
            self.upsample = arch.resample_block(ch, up=True)

    def forward(self, h, temb, pyramid, skips: list):
        for block in self.blocks:
            h = run_block(self, _joined, block, h, skips.pop(), temb)
        if self.attention is not None:
            h = run_block(self, self.attention, h)
        h, pyramid = self._climb(h, pyramid)
        if self.upsample is not None:
            h = run_block(self, self.upsample, h, temb)
        return h, pyramid

    def _climb(self, h, pyramid):
        if self.pyramid_upsample is not None:
            pyramid = self.pyramid_upsample(pyramid)
        if self.head is not None:
            own = run_block(self, self.head, h)
            return h, own if pyramid is None else pyramid + own
        if self.residual:
            h = pyramid = merge(pyramid, h, self.skip_rescale)
        return h, pyramid


@register_model(name="ncsnpp")
class NCSNpp(nn.Module):
    """The U-Net of NCSN++ and DDPM++: images (B, C, H, W), labels (B,) -> (B, C, H, W).

    Every option of the published configs is read from `config.model`: `fir`, `skip_rescale`,
    `resblock_type`, `progressive`, `progressive_input`, `progressive_combine`, `embedding_type`,
    `conditional`, `scale_by_sigma` and the rest. The parameters stand in the order of
    score_sde_pytorch's, with its shapes, so that its checkpoints load by order.

    Labels are noise levels σ for the Fourier embedding, times in 0 … num_scales − 1, whole or
    not, for the positional one. The output is divided by σ where `scale_by_sigma`. It has the
    type of the input, also under autocast.

    Attention stands on the levels where images of `data.image_size` have a size in
    `attn_resolutions`; images of any other size, square or not, go through the same layers.
    A network with `conditional=False` ignores its labels but keeps the blocks' `Dense_0`
    parameters, as the original does.

    With `num_classes` > 0 it also takes class labels y (B,) in 0 … num_classes, of which the last,
    like y=None, is the unconditional score; their embedding is added to that of the time, and its
    table is the last parameter. `label_dropout` is the share of labels dropped in training.

    Raises:
      ValueError: on building, an option is unknown or impossible with the others; on calling,
        the images or labels do not have the shapes above, or do not halve cleanly. Impossible is
        `scale_by_sigma` of a positional embedding with continuous training, whose labels count no
        noise levels.
    """

    recompute = False
    sigmas: torch.Tensor

    def __init__(self, config):
        super().__init__()
        arch = self.architecture(config)
        self.config = config
        self.register_buffer("sigmas", torch.as_tensor(get_sigmas(config)).to(torch.float32))
        self.channels, self.stride = arch.channels, arch.stride
        self.centered = config.data.get("centered", False)
        self.scale_by_sigma = config.model.get("scale_by_sigma", False)
        self.labels_are_sigmas = arch.embedding_type == "fourier"
        continuous = config.get("training", {}).get("continuous", False)
        if self.scale_by_sigma and continuous and not self.labels_are_sigmas:
            raise ValueError(
                f"{type(self).__name__} with model.scale_by_sigma=True and a positional embedding "
                "of the time needs training.continuous=False (its labels count the noise levels), "
                "got True; set model.scale_by_sigma=False, or use 'ncsnpp' with "
                "model.embedding_type='fourier'"
            )
        self.has_input_pyramid = arch.progressive_input != "none"

        self.embedding = NoiseEmbedding(arch)
        self.conv_in = conv3x3(arch.channels, arch.nf)
        levels = range(len(arch.ch_mult))
        ch, pyramid_ch, skip_chs = arch.nf, arch.channels, [arch.nf]
        self.down = nn.ModuleList()
        for level in levels:
            stage = DownStage(arch, level, ch, pyramid_ch)
            ch, pyramid_ch = stage.out_ch, stage.pyramid_out_ch
            skip_chs += stage.skip_chs
            self.down.append(stage)
        self.middle = MiddleStage(arch, ch)
        self.up = nn.ModuleList()
        for level in reversed(levels):
            stage = UpStage(arch, level, ch, skip_chs, pyramid_ch)
            ch, pyramid_ch = stage.out_ch, stage.pyramid_out_ch
            self.up.append(stage)
        has_pyramid_of_images = arch.progressive == "output_skip"
        self.out = None if has_pyramid_of_images else Head(arch, ch, arch.channels, arch.init_scale)
        self.label_embedding = None
        if arch.num_classes:
            options = (arch.num_classes, 4 * arch.nf, arch.label_dropout)
            self.label_embedding = LabelEmbedding(*options)

    @classmethod
    def architecture(cls, config) -> Architecture:
        """The options of `config` as this network understands them."""
        return Architecture.from_config(config)

    def forward(self, x, time_cond, y=None):
        check_images(self, x, time_cond, self.channels, self.stride)
        temb = self.embedding(time_cond)
        if y is not None:
            temb = temb + self._embed_labels(y, len(x))
        images = x if self.centered else 2 * x - 1
        pyramid = images if self.has_input_pyramid else None

        h = self.conv_in(images)
        skips = [h]
        for stage in self.down:
            h, pyramid = stage(h, temb, pyramid, skips)

        h = self.middle(h, temb)

        pyramid = None
        for stage in self.up:
            h, pyramid = stage(h, temb, pyramid, skips)

        h = pyramid if self.out is None else run_block(self, self.out, h)
        h = h.to(x.dtype)  # type: ignore[union-attr]
        if self.scale_by_sigma:
            sigma = time_cond if self.labels_are_sigmas else self.sigmas[time_cond.long()]
            h = h / expand_to(sigma, h).to(h.dtype)
        return h

    def _embed_labels(self, y, batch: int):
        if self.label_embedding is None:
            raise ValueError("class labels y need model.num_classes > 0, got 0; set it, or omit y")
        if y.shape != (batch,):
            raise ValueError(
                f"expected one class label per image, shape ({batch},), got {tuple(y.shape)}; use "
                "y.expand(len(x))"
            )
        return self.label_embedding(y)
