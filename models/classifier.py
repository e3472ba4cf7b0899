"""A noise-conditional classifier p(y | x_t) (Song et al. 2021, App. I.1), and how it is asked."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from parametrization import SIGMA_DATA, Parametrization

from .layers import activated, at_least_float32, check_images, dense
from .layerspp import conv3x3
from .ncsnpp import DownStage, NoiseEmbedding
from .ncsnpp_architecture import Architecture
from .utils import get_model_fn, register_model, unwrap


@register_model(name="classifier")
class NoiseConditionalClassifier(nn.Module):
    """The first half of a DDPM++ network: images (B, C, H, W), labels (B,) -> logits (B, classes).

    Residual blocks and attention as `config.model` says (`nf`, `ch_mult`, `num_res_blocks`,
    `attn_resolutions`, `dropout`, `resblock_type`), GroupNorm, the mean over all pixels, and a
    linear layer. Images and labels are those of `get_classifier_fn`, so that one network serves
    every process that reaches the same noise levels.

    Raises: ValueError for `config.model.num_classes` below 2, and as `NCSNpp` does.
    """

    def __init__(self, config):
        super().__init__()
        fixed = {"embedding_type": "positional", "conditional": True, "progressive_input": "none"}
        arch = Architecture.from_config(config, **fixed)
        if arch.num_classes < 2:
            raise ValueError(
                f"a classifier needs model.num_classes ≥ 2, got {arch.num_classes}; set it to the "
                "number of classes of the data"
            )
        self.config, self.channels, self.stride = config, arch.channels, arch.stride
        self.num_classes = arch.num_classes
        self.sigma_data = config.model.get("sigma_data", SIGMA_DATA)
        self.embedding = NoiseEmbedding(arch)
        self.conv_in = conv3x3(arch.channels, arch.nf)
        ch = arch.nf
        self.down = nn.ModuleList()
        for level in range(len(arch.ch_mult)):
            stage = DownStage(arch, level, ch, arch.channels)
            ch = stage.out_ch
            self.down.append(stage)
        self.norm, self.act = arch.norm(ch), arch.act
        self.out = dense(ch, arch.num_classes)

    def forward(self, x, labels):
        check_images(self, x, labels, self.channels, self.stride)
        temb = self.embedding(labels)
        h = self.conv_in(x)
        for stage in self.down:
            h, _ = stage(h, temb, None, [])
        h = activated(self.norm, self.act, h).mean(dim=(2, 3))
        return at_least_float32(self.out(h))


def get_classifier_fn(sde, classifier, train: bool = False) -> Callable:
    """logits(x, t) -> (B, classes) of images x (B, *) at times t (B,) of `sde`.

    A network is asked in EDM's variables, which know of no process (Karras et al. 2022, Table 1):

        classifier(c_in (x_t − m_t)/α_t, ¼ ln σ̃),   σ̃ = σ_t/α_t,   c_in = 1/√(σ̃² + σ_data²)

    Any other function is one of (x, t) already. A network of other conventions is wrapped: that of
    the JAX version of score_sde is `lambda x, t: net(x, sde.marginal_prob(x, t)[1])`.
    """
    if not isinstance(classifier, nn.Module):
        return classifier
    model_fn = get_model_fn(classifier, train)
    sigma_data = getattr(unwrap(classifier), "sigma_data", SIGMA_DATA)
    inputs = Parametrization("preconditioned", "log_sigma/4", sigma_data=sigma_data)

    def logits(x, t):
        point = inputs.point(sde, t, x)
        return model_fn(inputs.network_input(point), inputs.labels(point))

    return logits
