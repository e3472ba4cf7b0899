"""Evaluation in feature space and in pixel space: how close are samples to the data?

Fréchet distance between Gaussians, the nearest-neighbour two-sample test, exact nearest
neighbours, and the metrics of low-dimensional images that need no feature network.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch

Array = torch.Tensor | np.ndarray

MAX_FRECHET_PIXELS = 1024
MAX_BOOTSTRAP_PIXELS = 256
_CHUNK_BYTES = 64 * 2**20


def _double(x: Array) -> torch.Tensor:
    """x as a detached float64 tensor on its own device, or on the CPU where that has no float64."""
    x = torch.as_tensor(x).detach()
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def _require_finite(x: torch.Tensor, name: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(
            f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} NaN or "
            "infinite entries; find and drop what produced them first"
        )


def _require_symmetric(x: torch.Tensor, name: str) -> None:
    if not torch.allclose(x, x.T, rtol=1e-5, atol=1e-6 * float(x.abs().max())):
        raise ValueError(
            f"{name} must be symmetric, got a difference of {float((x - x.T).abs().max()):.3g} to "
            "its transpose; it is no covariance: use gaussian_stats, or make the statistics again"
        )


def _points(x: Array, name: str) -> torch.Tensor:
    """(n, *) as (n, d) float64, checked."""
    x = _double(x)
    if x.ndim < 1 or x.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one point, got shape {tuple(x.shape)}")
    _require_finite(x, name)
    return x.reshape(x.shape[0], -1)


# ---------------------------------------------------------------------------------------------
# Fréchet distance


def _factor(sigma: torch.Tensor) -> torch.Tensor:
    """L with L Lᵀ = Σ, for positive semi-definite Σ; eigenvalues below 0 are rounding."""
    values, vectors = torch.linalg.eigh(sigma)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians.

    d² = |μ1 - μ2|² + tr Σ1 + tr Σ2 - 2 tr (Σ1 Σ2)^½

    The last trace is the sum of the roots of the eigenvalues of Σ1^½ Σ2 Σ1^½, that is of the
    singular values of L1ᵀL2 with Σ = L Lᵀ, L from a symmetric eigendecomposition in float64. They
    are accurate to 1e-16, where the root of an eigenvalue near 0 is accurate to 1e-8 only: the
    distance of a singular covariance to itself is 0 to 12 digits.

    Shapes: μ (d,), Σ (d, d). Units: those of the features, squared.
    Errors: ValueError for shapes that do not match, entries that are not finite and a Σ that is
    not symmetric. Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    mu1, sigma1, mu2, sigma2 = (_double(x) for x in (mu1, sigma1, mu2, sigma2))
    d = mu1.numel()
    for name, x, shape in (
        ("mu1", mu1, (d,)),
        ("sigma1", sigma1, (d, d)),
        ("mu2", mu2, (d,)),
        ("sigma2", sigma2, (d, d)),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with mu1, got "
                f"{tuple(x.shape)}; use gaussian_stats on features of one kind"
            )
        _require_finite(x, name)
    _require_symmetric(sigma1, "sigma1")
    _require_symmetric(sigma2, "sigma2")
    cross = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(float(distance), 0.0)


def gaussian_stats(features: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased covariance of features, in float64 on their device.

    μ = Σ_i f_i / n,  Σ = Σ_i (f_i - μ)(f_i - μ)ᵀ / (n - 1)

    Shapes: features (n, d), μ (d,), Σ (d, d).
    Errors: ValueError for other shapes, n < 2 and features that are not finite.
    """
    f = _double(features)
    if f.ndim != 2 or f.shape[0] < 2:
        raise ValueError(
            f"features must have shape (n, d) with n >= 2, got {tuple(f.shape)}; "
            "flatten images with .flatten(1)"
        )
    _require_finite(f, "features")
    mu = f.mean(0)
    centred = f - mu
    return mu, centred.T @ centred / (f.shape[0] - 1)


def frechet_distance_from_samples(a: Array, b: Array) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features.

    Biased upwards at a finite number of features: compare values of equal sizes only.

    Shapes: a (n, d), b (m, d). Units and errors: as frechet_distance and gaussian_stats.
    """
    return frechet_distance(*gaussian_stats(a), *gaussian_stats(b))


def _bootstrap_frechet(a: torch.Tensor, b: torch.Tensor, resamples: int, seed: int) -> float:
    """Standard deviation of the distance when both sets are drawn anew with replacement."""
    rng = np.random.default_rng(seed)

    def draw(x: torch.Tensor) -> torch.Tensor:
        return x[torch.from_numpy(rng.integers(0, len(x), len(x))).to(x.device)]

    return float(
        np.std([frechet_distance_from_samples(draw(a), draw(b)) for _ in range(resamples)], ddof=1)
    )


# ---------------------------------------------------------------------------------------------
# Nearest neighbours


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Differences, not |x|² + |y|² - 2xy: copies are at distance 0 exactly, and no entry depends
    # on the size of the block that it was computed in.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def nearest_neighbors(
    queries: Array, references: Array, k: int = 1, *, chunk_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest references of each query, by exact search in Euclidean distance.

    Distances are computed in float64 from differences, in blocks of `chunk_size` queries (by
    default as many as 64 MiB of distances hold); the result does not depend on the block.

    Shapes: queries (n, *), references (m, *), both flattened to d; distances and indices (n, k),
    nearest first. Cost: n·m·d; tensors on a GPU are searched there.
    Errors: ValueError for d that differ, k outside [1, m] and entries that are not finite.
    """
    q, r = _points(queries, "queries"), _points(references, "references")
    if q.shape[1] != r.shape[1]:
        raise ValueError(
            f"queries and references must have one dimension, got {q.shape[1]} and "
            f"{r.shape[1]}; pass images of equal shape"
        )
    if not 1 <= k <= len(r):
        raise ValueError(f"k must be between 1 and {len(r)} (the references), got {k}")
    size = chunk_size or max(1, _CHUNK_BYTES // (8 * len(r)))
    found = [_distances(block, r).topk(k, dim=1, largest=False) for block in q.split(size)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


class TwoSampleTest(NamedTuple):
    """Outcome of nearest_neighbor_accuracy: accuracies in [0, 1], 0.5 where nothing differs."""

    accuracy: float
    standard_error: float
    real: float
    fake: float


def _leave_one_out(own: torch.Tensor, other: torch.Tensor, chunk_size: int | None):
    """Per point of `own`: the outcome (1, ½ or 0) and the pooled index of its neighbour."""
    n = len(own)
    size = chunk_size or max(1, _CHUNK_BYTES // (8 * n))
    outcomes, neighbours = [], []
    for start in range(0, n, size):
        block = own[start : start + size]
        inside = _distances(block, own)
        rows = torch.arange(len(block), device=own.device)
        inside[rows, rows + start] = math.inf
        d_own, i_own = inside.min(1)
        d_other, i_other = _distances(block, other).min(1)
        outcomes.append((d_own < d_other).double() + 0.5 * (d_own == d_other))
        neighbours.append(torch.where(d_own <= d_other, i_own, n + i_other))
    return torch.cat(outcomes), torch.cat(neighbours)


def nearest_neighbor_accuracy(
    a: Array, b: Array, *, chunk_size: int | None = None
) -> TwoSampleTest:
    """Leave-one-out accuracy of a 1-nearest-neighbour classifier that tells a from b.

    0.5: indistinguishable. Towards 1: two different distributions. Towards 0: one set copies the
    other. `real` is the accuracy on a, `fake` on b: fake high with real low means that b is the
    more concentrated of the two (mode collapse), the reverse that it is the more spread out.

    A point whose nearest own and nearest other point are at the same distance counts ½ (so a
    point with a copy in both sets counts ½, one with a copy in the other set alone 0): the
    expectation of breaking the tie at random, without the randomness.

    The standard error is √(p(1 - p)(1 + m)/2n) with m the share of points that are their
    neighbour's neighbour: such pairs have one outcome between them, all others are uncorrelated
    if the distributions agree (p is taken as (correct + 1)/(2n + 2), which keeps the error of
    p = 0 and p = 1 above zero).

    Shapes: a, b (n, *) of equal n, flattened to d. Cost: 4·n²·d, in float64.
    Errors: ValueError for sizes that differ, n < 2 and entries that are not finite.
    Source: Lopez-Paz and Oquab 2017; Xu et al. 2018; variance: Schilling 1986.
    """
    x, y = _points(a, "a"), _points(b, "b")
    if x.shape != y.shape or len(x) < 2:
        raise ValueError(
            f"a and b must be equally many (at least 2) points of one dimension, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}; cut both to the smaller size "
            "(unequal sizes move the 0.5)"
        )
    n = len(x)
    real, to_x = _leave_one_out(x, y, chunk_size)
    fake, to_y = _leave_one_out(y, x, chunk_size)
    neighbour = torch.cat([to_x, (to_y + n) % (2 * n)])  # y's own points are the second half
    mutual = float((neighbour[neighbour] == torch.arange(2 * n, device=x.device)).double().mean())
    outcomes = torch.cat([real, fake])
    p = (float(outcomes.sum()) + 1) / (2 * n + 2)
    error = math.sqrt(p * (1 - p) * (1 + mutual) / (2 * n))
    return TwoSampleTest(float(outcomes.mean()), error, float(real.mean()), float(fake.mean()))


# ---------------------------------------------------------------------------------------------
# Low-dimensional images


def _images(x: Array, name: str) -> torch.Tensor:
    """Images (n, C, H, W) in [0, 1] as (n, d) float64, checked."""
    x = torch.as_tensor(x)
    if x.ndim != 4 or x.shape[0] < 2 or not x.is_floating_point():
        raise ValueError(
            f"{name} must be at least 2 float images (n, C, H, W) in [0, 1], got "
            f"{x.dtype} of shape {tuple(x.shape)}; divide uint8 images by 255"
        )
    points = _points(x, name)
    low, high = float(points.min()), float(points.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"{name} must lie in [0, 1], got [{low:.3g}, {high:.3g}]; "
            "apply the inverse scaler and clamp(0, 1)"
        )
    return points


def _subset(x: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """`size` of the points, drawn without replacement by `seed`; all of them in order if equal."""
    if size >= len(x):
        return x
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:size].to(x.device)]


def _mean_and_error(key: str, values: torch.Tensor) -> dict[str, float]:
    n = values.numel()
    return {key: float(values.mean()), f"{key}_se": float(values.std() / math.sqrt(n))}


def _pixel_frechet(
    s: torch.Tensor,
    r: torch.Tensor,
    t: torch.Tensor | None,
    bootstrap: int,
    seed: int,
    notes: list[str],
) -> dict[str, float]:
    """The entries of the pixel Fréchet distance; says in `notes` what it leaves out or doubts."""
    d = s.shape[1]
    if d > MAX_FRECHET_PIXELS:
        notes.append(
            f"No pixel Fréchet distance: {d} dimensions are more than "
            f"{MAX_FRECHET_PIXELS}; use FID."
        )
        return {}
    fewest = min(len(s), len(r))
    if fewest <= d:
        notes.append(
            f"The pixel Fréchet distance is unreliable: {fewest} images for {d} "
            "dimensions, so a covariance is singular; use more images."
        )
    result = {"frechet_distance_pixels": frechet_distance_from_samples(s, r)}
    if bootstrap >= 2 and d <= MAX_BOOTSTRAP_PIXELS:
        result["frechet_distance_pixels_se"] = _bootstrap_frechet(s, r, bootstrap, seed)
    elif bootstrap >= 2:
        notes.append(
            f"No standard error of the pixel Fréchet distance: {d} dimensions are more "
            f"than the {MAX_BOOTSTRAP_PIXELS} for which a bootstrap is quick."
        )
    if t is not None and len(t) >= len(s):
        result["frechet_distance_pixels_train"] = frechet_distance_from_samples(
            _subset(t, len(s), seed), r
        )
    return result


def _pixel_one_nn(
    s: torch.Tensor, r: torch.Tensor, t: torch.Tensor | None, seed: int
) -> dict[str, float]:
    """The entries of the nearest-neighbour test, on sets cut to one size."""
    n = min(len(s), len(r))
    r = _subset(r, n, seed)
    test = nearest_neighbor_accuracy(r, _subset(s, n, seed))
    result = {
        "one_nn_accuracy": test.accuracy,
        "one_nn_accuracy_se": test.standard_error,
        "one_nn_accuracy_real": test.real,
        "one_nn_accuracy_fake": test.fake,
    }
    if t is not None and len(t) >= n:
        result["one_nn_accuracy_train"] = nearest_neighbor_accuracy(r, _subset(t, n, seed)).accuracy
    return result


def low_dimensional_metrics(
    samples: Array,
    reference: Array,
    train: Array | None = None,
    *,
    bootstrap: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Distances between samples and held-out images that need no feature network.

    - `frechet_distance_pixels` on raw pixels, with a bootstrap standard error `…_se` (both sets
      drawn anew) up to 256 dimensions. Above 1024 dimensions it is left out.
    - `one_nn_accuracy`, `…_se`, `…_real`, `…_fake`: nearest_neighbor_accuracy, with the larger
      set cut at random (by `seed`) to the smaller.
    - with `train`, `nearest_train_distance` of the samples beside
      `nearest_train_distance_reference` of the held-out images, each a mean with `…_se`: samples
      much nearer to the training set than real images are suspect of being copies. And, where the
      training images suffice, `frechet_distance_pixels_train` and `one_nn_accuracy_train`: what
      as many training images as there are samples would score, the value of a perfect model.
    - `num_samples`, `num_reference`, and `notes`: sentences on what was left out or is doubtful;
      each is also a warning.

    Shapes: (n, C, H, W) float images in [0, 1], one C, H, W; units: pixels of that range.
    Errors: ValueError for other shapes, types and ranges, and fewer than 2 images.
    """
    shapes = {tuple(x.shape[1:]) for x in (samples, reference, train) if x is not None}
    if len(shapes) > 1:
        raise ValueError(f"samples, reference and train must be images of one shape, got {shapes}")
    s = _images(samples, "samples")
    r = _images(reference, "reference").to(s.device)
    t = None if train is None else _images(train, "train").to(s.device)
    notes: list[str] = []
    result: dict[str, Any] = {"num_samples": len(s), "num_reference": len(r)}
    result.update(_pixel_frechet(s, r, t, bootstrap, seed, notes))
    result.update(_pixel_one_nn(s, r, t, seed))
    if t is not None:
        for key, x in (("", s), ("_reference", r)):
            result.update(
                _mean_and_error(f"nearest_train_distance{key}", nearest_neighbors(x, t)[0])
            )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return {**result, "notes": notes}
