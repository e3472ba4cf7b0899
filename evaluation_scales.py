"""Advice on a process's noise scales from the data: σ_max, and NCSNv2's number of scales."""

from __future__ import annotations

import math

import torch

from evaluation import Array, _subset
from evaluation_metrics import _squared_distances


def largest_pairwise_distance(
    images: Array, *, subset: int = 10000, levels: int = 256, seed: int = 0
) -> float:
    """Largest Euclidean distance between two of the images: the advice for σ_max.

    σ_1 as large as the maximum of |x_i − x_j| lets Langevin dynamics pass from any image to any
    other (Song and Ermon 2020, technique 1). Of `subset` images drawn by `seed` where there are
    more: a lower bound then, quickly close.

    Shapes: (n, *). Units: images in [0, 1]; uint8 is divided by levels − 1, floats are taken as
    they are (for data.centered, twice as large). Memory: blocks; time: subset² distances.
    Errors: ValueError for fewer than 2 images.
    """
    images = torch.as_tensor(images)
    if len(images) < 2:
        raise ValueError(f"expected at least 2 images, got {len(images)}")
    scale = 1 if images.is_floating_point() else levels - 1
    x = _subset(images.flatten(1), subset, seed).float()
    best, pair = -1.0, (0, 0)
    for start, distances in _squared_distances(x, x):
        value, index = distances.flatten().max(0)
        if float(value) > best:
            row, column = divmod(int(index), len(x))
            best, pair = float(value), (start + row, column)
    a, b = x[pair[0]].double(), x[pair[1]].double()
    return float((a - b).norm()) / scale


def ncsnv2_ratio(dimensions: int) -> float:
    """Ratio γ = σ_i/σ_{i+1} of neighbouring noise scales, for data of D dimensions.

    Φ(√(2D)(γ − 1) + 3γ) − Φ(√(2D)(γ − 1) − 3γ) = ½: half of the points of one scale are within
    three standard deviations of the next. Source: Song and Ermon 2020, technique 2.

    Errors: ValueError for D < 1.
    """
    if dimensions < 1:
        raise ValueError(f"expected at least 1 dimension, got {dimensions}")
    root = math.sqrt(2 * dimensions)

    def overlap(gamma: float) -> float:
        middle = root * (gamma - 1)
        return _normal_cdf(middle + 3 * gamma) - _normal_cdf(middle - 3 * gamma)

    low, high = 1.0, 2.0
    while overlap(high) > 0.5:
        high *= 2
        if high > 1e6:  # D < 4.5: the second term never wins
            raise ValueError(f"no ratio has half overlap in {dimensions} dimensions; use D >= 5")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle) > 0.5 else (low, middle)
    return (low + high) / 2


def ncsnv2_num_scales(sigma_max: float, sigma_min: float, dimensions: int) -> int:
    """Number L of scales from σ_max to σ_min at NCSNv2's ratio: 1 + ⌈log(σ_max/σ_min)/log γ⌉.

    Errors: ValueError unless 0 < σ_min < σ_max.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return 1 + math.ceil(math.log(sigma_max / sigma_min) / math.log(ncsnv2_ratio(dimensions)))


def _normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2
