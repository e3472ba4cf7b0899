"""DDPM's U-Net (Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B)."""

from __future__ import annotations

import dataclasses

from .ncsnpp import NCSNpp
from .ncsnpp_architecture import Architecture
from .utils import register_model

# Where it differs from DDPM++, which grew out of it.
_OPTIONS = {
    "resblock_type": "ddpm",
    "progressive": "none",
    "progressive_input": "none",
    "embedding_type": "positional",
    "fir": False,
    "skip_rescale": False,
    "init_scale": 0.0,
}
_GROUPS = 32


@register_model(name="ddpm")
class DDPM(NCSNpp):
    """DDPM's U-Net: images (B, C, H, W), labels (B,) -> (B, C, H, W).

    It is NCSN++ with DDPM's residual blocks and plain resampling between levels, with neither
    pyramids nor rescaled sums, and with GroupNorms of 32 groups (where 32 does not divide the
    channels, as many as NCSN++ takes; with 32 channels or fewer, groups of one channel would undo
    the time embedding). The parameters stand in the order of score_sde_pytorch's, with its shapes,
    so that its checkpoints load by order.

    Of `config.model` it reads `nf`, `ch_mult`, `num_res_blocks`, `attn_resolutions`, `dropout`,
    `resamp_with_conv`, `nonlinearity`, `conditional`, `scale_by_sigma`, `num_classes` and
    `label_dropout`. Labels are times in 0 … num_scales − 1, whole or not, embedded by sinusoids
    whatever `embedding_type` says (the published configs say 'fourier'). With `conditional=False`
    they are ignored, but still choose the σ that divides the output where `scale_by_sigma`.

    Raises: ValueError as NCSNpp.
    """

    @classmethod
    def architecture(cls, config) -> Architecture:
        """The options of `config` as this network understands them."""
        arch = Architecture.from_config(config, **_OPTIONS)
        return dataclasses.replace(arch, groups=_GROUPS)
