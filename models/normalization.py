"""Normalisation layers by name, with and without labels (Song & Ermon 2019, appendix A)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .layers import at_least_float32, expand_to

_EPS = 1e-5


def get_normalization(config, conditional: bool = False):
    """What makes the normalisation named by `config.model.normalization`, of so many channels.

    Args:
      config: its `model.normalization` is the name (default GroupNorm).
      conditional: whether the layer also takes labels, `layer(x, y)`: as many as
        `model.num_classes`, or as `model.num_scales` where that is 0.

    Raises:
      ValueError: no (conditional) normalisation has that name.
    """
    name = config.model.get("normalization", "GroupNorm")
    known = _CONDITIONAL_NORMS if conditional else _NORMS
    if name not in known:
        kind = "conditional normalisation" if conditional else "normalisation"
        raise ValueError(
            f"model.normalization needs the name of a {kind}, one of {sorted(known)}, "
            f"got {name!r}; see models/normalization.py"
        )
    if not conditional:
        return known[name]
    labels = config.model.get("num_classes", 0) or config.model.num_scales
    return partial(known[name], num_classes=labels)


def variance_norm(x: torch.Tensor) -> torch.Tensor:
    """x / std, by the unbiased variance over the pixels of each channel; the mean stays.

    Here and in `normalised_means` x has at least 32 bits: its moments need them.
    """
    return x / torch.sqrt(x.var(dim=(2, 3), keepdim=True) + _EPS)


def normalised_means(x: torch.Tensor) -> torch.Tensor:
    """The channels' means, normalised over the channels: (B, C, H, W) -> (B, C, 1, 1)."""
    means = x.mean(dim=(2, 3), keepdim=True)
    centred = means - means.mean(dim=1, keepdim=True)
    return centred / torch.sqrt(means.var(dim=1, keepdim=True) + _EPS)


class NoneNorm2d(nn.Module):
    """The identity, built as a normalisation is."""

    def __init__(self, num_features, bias=True):
        super().__init__()

    def forward(self, x):
        return x


class InstanceNorm2d(nn.InstanceNorm2d):
    """torch's InstanceNorm, which rounds the moments of an input of 16 bits, in float32."""

    def forward(self, input):
        return super().forward(at_least_float32(input)).to(input.dtype)


class VarianceNorm2d(nn.Module):
    """α x / std, by the variance over the pixels of each channel; the mean stays."""

    def __init__(self, num_features, bias=False):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(num_features).normal_(1, 0.02))

    def forward(self, x):
        h = self.alpha.reshape(-1, 1, 1) * variance_norm(at_least_float32(x))
        return h.to(x.dtype)


class InstanceNorm2dPlus(nn.Module):
    """InstanceNorm++: γ (InstanceNorm(x) + α m) + β (Song & Ermon 2019, appendix A.1).

    m are the channels' means, normalised over the channels: InstanceNorm alone forgets them, and
    with them the colours. β only where `bias`.
    """

    def __init__(self, num_features, bias=True):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(num_features).normal_(1, 0.02))
        self.gamma = nn.Parameter(torch.empty(num_features).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.zeros(num_features)) if bias else None

    def forward(self, x):
        alpha, gamma = (p.reshape(-1, 1, 1) for p in (self.alpha, self.gamma))
        wide = at_least_float32(x)
        h = gamma * (F.instance_norm(wide, eps=_EPS) + alpha * normalised_means(wide))
        h = h if self.beta is None else h + self.beta.reshape(-1, 1, 1)
        return h.to(x.dtype)


class ConditionalNorm2d(nn.Module):
    """γ_y normalise(x) + β_y, by labels y (B,) in 0 … num_classes − 1; β only where `bias`.

    γ starts uniform on (0, 1) and β at zero. This class itself does not normalise.
    """

    scales = 1  # vectors per label besides β

    def __init__(self, num_features, num_classes, bias=True):
        super().__init__()
        self.bias = bias
        self.embed = nn.Embedding(num_classes, num_features * (self.scales + bias))
        scale, shift = self.embed.weight.detach().split(
            [num_features * self.scales, num_features * bias], dim=1
        )
        self.init_scale_(scale)
        nn.init.zeros_(shift)

    @staticmethod
    def init_scale_(scale):
        """Fill the scales γ in place."""
        nn.init.uniform_(scale)

    def normalise(self, x, *scales):
        """The normalised x; `scales` are the label's vectors between γ and β, (B, C, 1, 1)."""
        return x

    def forward(self, x, y):
        vectors = expand_to(self.embed(y), x).chunk(self.scales + self.bias, dim=1)
        h = vectors[0] * self.normalise(at_least_float32(x), *vectors[1 : self.scales])
        return (h + vectors[-1] if self.bias else h).to(x.dtype)


class ConditionalNoneNorm2d(ConditionalNorm2d):
    """γ_y x + β_y."""


class ConditionalBatchNorm2d(ConditionalNorm2d):
    """γ_y BatchNorm(x) + β_y (Dumoulin et al. 2017)."""

    def __init__(self, num_features, num_classes, bias=True):
        super().__init__(num_features, num_classes, bias)
        self.bn = nn.BatchNorm2d(num_features, affine=False)

    def normalise(self, x, *scales):
        return self.bn(x)


class ConditionalInstanceNorm2d(ConditionalNorm2d):
    """γ_y InstanceNorm(x) + β_y (Dumoulin et al. 2017)."""

    def normalise(self, x, *scales):
        return F.instance_norm(x, eps=_EPS)


class ConditionalVarianceNorm2d(ConditionalNorm2d):
    """γ_y x / std, by the variance over the pixels of each channel; never with β."""

    def __init__(self, num_features, num_classes, bias=False):
        super().__init__(num_features, num_classes, bias=False)

    @staticmethod
    def init_scale_(scale):
        """Fill the scales γ in place: N(1, 0.02²)."""
        nn.init.normal_(scale, 1, 0.02)

    def normalise(self, x, *scales):
        return variance_norm(x)


class ConditionalInstanceNorm2dPlus(ConditionalNorm2d):
    """Conditional InstanceNorm++: γ_y (InstanceNorm(x) + α_y m) + β_y.

    m as in `InstanceNorm2dPlus`; γ and α start as N(1, 0.02²) (Song & Ermon 2019, appendix A.1).
    """

    scales = 2

    @staticmethod
    def init_scale_(scale):
        """Fill the scales γ in place: N(1, 0.02²)."""
        nn.init.normal_(scale, 1, 0.02)

    def normalise(self, x, *scales):
        return F.instance_norm(x, eps=_EPS) + scales[0] * normalised_means(x)


_NORMS = {
    "BatchNorm": nn.BatchNorm2d,
    "GroupNorm": nn.GroupNorm,
    "InstanceNorm": InstanceNorm2d,
    "InstanceNorm++": InstanceNorm2dPlus,
    "NoneNorm": NoneNorm2d,
    "VarianceNorm": VarianceNorm2d,
}
_CONDITIONAL_NORMS = {
    "BatchNorm": ConditionalBatchNorm2d,
    "InstanceNorm": ConditionalInstanceNorm2d,
    "InstanceNorm++": ConditionalInstanceNorm2dPlus,
    "NoneNorm": ConditionalNoneNorm2d,
    "VarianceNorm": ConditionalVarianceNorm2d,
}
