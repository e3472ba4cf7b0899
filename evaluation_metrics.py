"""Metrics in feature space: FID, KID, Inception Score, precision, recall, density, coverage.

Every number comes with the numbers of images that it is made of and a standard error. Sums are in
float64; memory is bounded by blocks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import distributed
from evaluation import Array, _double, _factor, _require_finite, _subset, frechet_distance

#: What `eval.metrics` may name, and the fewest samples that each needs.
METRICS = {"fid": 2, "kid": 4, "is": 20, "prdc": 6}
#: Fewer images than this make FID mostly bias.
FID_IMAGES = 2048
GROUPS = 10
_BLOCK_BYTES = 128 * 2**20


class Moments:
    """Number, mean and scatter of features seen so far, in float64.

    With n, μ and S = Σ_i (f_i − μ)(f_i − μ)ᵀ of two parts a and b, and δ = μ_b − μ_a, those of both
    are n_a + n_b, μ_a + δ n_b/n and S_a + S_b + δδᵀ n_a n_b/n: no large sums cancel, and parts may
    be merged in any order. Source: Chan, Golub and LeVeque 1979.

    Shapes: features (B, d); `mu` (d,); `sigma` (d, d), the unbiased covariance S/(n − 1).
    """

    def __init__(self, d: int, device: torch.device | str = "cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device  # mps has no float64
        self.n = 0
        self.mu = torch.zeros(d, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(d, d, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Array, block: int = 8192) -> Moments:
        """Those of features (n, d), read in blocks."""
        features = torch.as_tensor(features)
        moments = cls(features.shape[-1], features.device)
        for part in features.split(block):
            moments.update(part)
        return moments

    @property
    def sigma(self) -> torch.Tensor:
        """The unbiased covariance, (d, d)."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}")
        return self.scatter / (self.n - 1)

    def update(self, features: Array) -> Moments:
        """See more features (B, d); none are allowed."""
        f = _double(features).to(self.mu.device)
        if f.ndim != 2 or f.shape[1] != len(self.mu):
            raise ValueError(f"expected features (B, {len(self.mu)}), got {tuple(f.shape)}")
        if not len(f):
            return self
        _require_finite(f, "features")
        mu = f.mean(0)
        return self._add(len(f), mu, (f - mu).T @ (f - mu))

    def merge(self, other: Moments) -> Moments:
        """See what another has seen."""
        device = self.mu.device
        return (
            self._add(other.n, other.mu.to(device), other.scatter.to(device)) if other.n else self
        )

    def _add(self, n: int, mu: torch.Tensor, scatter: torch.Tensor) -> Moments:
        total, delta = self.n + n, mu - self.mu
        self.scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mu += delta * (n / total)
        self.n = total
        return self

    def reduce(self) -> Moments:
        """What all processes have seen, in each of them; itself where there is one."""
        if distributed.world_size() == 1:
            return self
        device = self.mu.device
        result = Moments(len(self.mu), device)
        result.n = int(distributed.all_sum(torch.tensor(self.n, device=device)))
        if result.n:
            result.mu = distributed.all_sum(self.mu * (self.n / result.n))
            delta = self.mu - result.mu
            result.scatter = distributed.all_sum(
                self.scatter + torch.outer(delta, delta) * float(self.n)
            )
        return result


def grouped_moments(features: Array, groups: int = GROUPS) -> list[Moments]:
    """Moments of `groups` parts of the features: image i is in group i mod `groups`."""
    features = torch.as_tensor(features)
    return [Moments.of(features[g::groups]) for g in range(min(groups, len(features)))]


def _merged(parts: Sequence[Moments]) -> Moments:
    total = Moments(len(parts[0].mu), parts[0].mu.device)
    for part in parts:
        total.merge(part)
    return total


def _jackknife(values: Sequence[float]) -> float:
    """Standard error of a statistic from its values with one of G equal groups left out.

    √((G − 1)/G Σ_g (θ_g − θ̄)²): Quenouille 1956, Tukey 1958.
    """
    x = np.asarray(values)
    return math.sqrt((len(x) - 1) / len(x) * float(np.square(x - x.mean()).sum()))


# FID


def frechet_inception_distance(
    samples: Sequence[Moments], mu: Array, sigma: Array
) -> dict[str, Any]:
    """Fréchet distance between Gaussians fitted to the features of samples and of data.

    `samples` are the moments of groups of samples (`grouped_moments`): together they give `fid`,
    and leaving one out in turn `fid_se`, the jackknife's standard error: how far another set of as
    many samples may fall. It says nothing of the bias, which is of order 1/n and positive: FID of
    different numbers of samples must not be compared. The reference counts as exact.

    Shapes: μ (d,), Σ (d, d). Returns also `fid_num_samples`.
    Source: Heusel et al. 2017; bias: Chong and Forsyth 2020.
    """
    total = _merged(samples)
    mu, sigma = (_double(x).to(total.mu.device) for x in (mu, sigma))
    result = {"fid": frechet_distance(total.mu, total.sigma, mu, sigma)}
    if len(samples) > 1 and min(total.n - part.n for part in samples) >= 2:
        root = _factor(sigma)
        left_out = [
            _distance_to(_merged([p for p in samples if p is not part]), mu, sigma, root)
            for part in samples
        ]
        result["fid_se"] = _jackknife(left_out)
    return {**result, "fid_num_samples": total.n}


def _distance_to(x: Moments, mu: torch.Tensor, sigma: torch.Tensor, root: torch.Tensor) -> float:
    """frechet_distance to (μ, Σ = L Lᵀ) by the eigenvalues of LᵀΣ_x L: quicker, good to 1e-5."""
    cross = torch.linalg.eigvalsh(root.T @ x.sigma @ root).clamp(min=0).sqrt().sum()
    return float((x.mu - mu).square().sum() + x.sigma.trace() + sigma.trace() - 2 * cross)


def fid_notes(num_samples: int, d: int) -> list[str]:
    """Sentences on what makes FID of so many samples doubtful."""
    notes = []
    if num_samples < FID_IMAGES:
        notes.append(
            f"FID of {num_samples} samples is mostly bias: use at least {FID_IMAGES}, and 50,000 "
            "to compare with published numbers."
        )
    if num_samples <= d:
        notes.append(
            f"FID of {num_samples} samples in {d} dimensions: the covariance is singular; use more "
            f"than {d} samples."
        )
    return notes


# KID


def kernel_inception_distance(
    samples: Array,
    reference: Array,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> dict[str, Any]:
    """Squared maximum mean discrepancy of features, unbiased: mean over random subsets.

    KID = Σ_{i≠j} [k(x_i, x_j) + k(y_i, y_j)]/(m(m − 1)) − 2 Σ_{ij} k(x_i, y_j)/m²,
    k(x, y) = (xᵀy/d + 1)³, of m samples x and m images y

    A subset has `subset_size` of each, but at most half of the smaller set. `kid` is the mean over
    the subsets and `kid_std` their standard deviation, as published. `kid_se` is the standard error
    of the mean: √((m/(n − m) + 1/subsets)) kid_std with n the size of the smaller set, by the
    delete-d jackknife and the finite number of subsets. Subsets are those of torch-fidelity for the
    same seed, so that it gives the same number.

    Shapes: samples (n, d), reference (n', d). Memory: three m × m matrices.
    Errors: ValueError for fewer than 4 features. Source: Bińkowski et al. 2018; Shao and Wu 1989.
    """
    x, y = _pair(samples, reference)
    n = min(len(x), len(y))
    m = min(subset_size, n // 2)
    if m < 2 or subsets < 2:
        raise ValueError(
            f"KID needs at least 4 features a set and 2 subsets, got {n} and {subsets}"
        )
    rng = np.random.RandomState(seed)  # the stream that torch-fidelity draws from

    def draw(f: torch.Tensor) -> torch.Tensor:
        chosen = torch.from_numpy(rng.choice(len(f), m, replace=False))
        return _double(f[chosen.to(f.device)])

    values = np.asarray([_polynomial_mmd(draw(x), draw(y)) for _ in range(subsets)])
    std = float(values.std())
    return {
        "kid": float(values.mean()),
        "kid_std": std,
        "kid_se": std * math.sqrt(m / (n - m) + 1 / subsets),
        "kid_subset_size": m,
        "kid_num_subsets": subsets,
        "kid_seed": seed,
        "kid_num_samples": len(x),
        "kid_num_reference": len(y),
    }


def _polynomial_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    m, d = x.shape

    def kernel(a, b):
        return (a @ b.T / d + 1) ** 3

    def off_diagonal(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (m * (m - 1))

    return float(off_diagonal(x) + off_diagonal(y) - 2 * kernel(x, y).mean())


def _pair(samples: Array, reference: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features (n, d) on one device, of one d, finite."""
    x, y = torch.as_tensor(samples).detach(), torch.as_tensor(reference).detach()
    x = x.cpu() if x.device.type == "mps" else x
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"expected features (n, d) of one d, got {tuple(x.shape)} and {tuple(y.shape)}; "
            "compute both with one extractor"
        )
    for name, f in (("samples", x), ("reference", y)):
        _require_finite(f, name)
    return x, y.to(x.device)


# Inception Score


def inception_score(logits: Array, splits: int = GROUPS) -> dict[str, Any]:
    """exp of the mean Kullback-Leibler divergence of p(class | image) from its mean over images.

    IS = exp(E_x KL(p(y|x) ‖ E_x p(y|x)))

    `is` is that of all images (one split, as the paper's 50,000) and `is_se` its jackknife
    standard error; `is_splits` and `is_splits_std` are mean and standard deviation over `splits`
    consecutive parts (the older custom, with a bias of its own). IS needs no reference, and says
    little about images that are not ImageNet's.

    Shapes: logits (n, classes). Errors: ValueError for fewer than 2·splits images.
    Source: Salimans et al. 2016; Barratt and Sharma 2018.
    """
    logits = torch.as_tensor(logits).detach()
    n = len(logits)
    if logits.ndim != 2 or n < 2 * splits or splits < 2:
        raise ValueError(
            f"expected logits (n, classes) of n >= {2 * splits} images for {splits} splits (at "
            f"least 2), got shape {tuple(logits.shape)}"
        )
    parts = [_entropies(logits[n * i // splits : n * (i + 1) // splits]) for i in range(splits)]
    scores = [_score([part]) for part in parts]
    left_out = [_score([p for p in parts if p is not part]) for part in parts]
    return {
        "is": _score(parts),
        "is_se": _jackknife(left_out),
        "is_splits": float(np.mean(scores)),
        "is_splits_std": float(np.std(scores)),
        "is_num_splits": splits,
        "is_num_samples": n,
    }


def _entropies(logits: torch.Tensor) -> tuple[int, torch.Tensor, float]:
    """Their number n, Σ_x p(y|x) and Σ_x Σ_y p(y|x) log p(y|x)."""
    total = torch.zeros(logits.shape[1], dtype=torch.float64)
    negative_entropy = 0.0
    for part in logits.split(4096):
        log_p = _double(part).log_softmax(1).cpu()
        _require_finite(log_p, "logits")
        p = log_p.exp()
        total += p.sum(0)
        negative_entropy += float((p * log_p).sum())
    return len(logits), total, negative_entropy


def _score(parts: Sequence[tuple[int, torch.Tensor, float]]) -> float:
    n = sum(part[0] for part in parts)
    mean = torch.stack([part[1] for part in parts]).sum(0) / n
    return math.exp(sum(part[2] for part in parts) / n - float(torch.xlogy(mean, mean).sum()))


# Precision, recall, density, coverage


def precision_recall_density_coverage(
    samples: Array,
    reference: Array,
    *,
    k_precision: int = 3,
    k_density: int = 5,
    groups: int = GROUPS,
) -> dict[str, Any]:
    """Fidelity and diversity from nearest neighbours in feature space.

    With B_k(z) the closed ball around z that reaches to its k-th nearest neighbour in its own set,
    n samples x and m images y:
    - precision = share of x in ∪_y B_3(y); recall = share of y in ∪_x B_3(x)
    - density = Σ_x Σ_y 1[x ∈ B_5(y)]/(5n); coverage = share of y with some x in B_5(y)

    Standard errors `…_se` are the standard deviations of the values of `groups` disjoint parts of
    both sets, over √groups; left out where a part would have 2 k_density features or fewer.
    The values depend on n and m: compare equal numbers only.

    Shapes: samples (n, d), reference (m, d). Memory: blocks of 128 MiB; time: n² + m² + nm
    distances, in float64. Errors: ValueError for k or fewer features.
    Source: Kynkäänniemi et al. 2019; Naeem et al. 2020.
    """
    x, y = _pair(samples, reference)
    k = (k_precision, k_density)
    if min(len(x), len(y)) <= max(k):
        raise ValueError(
            f"expected more than {max(k)} features a set, got {len(x)} and {len(y)}; use more "
            "images or a smaller k"
        )
    names = ("precision", "recall", "density", "coverage")
    result: dict[str, Any] = dict(zip(names, _prdc(x, y, *k)))
    if min(len(x), len(y)) // groups > 2 * max(k):
        parts = np.asarray([_prdc(x[g::groups], y[g::groups], *k) for g in range(groups)])
        for name, error in zip(names, parts.std(0, ddof=1) / math.sqrt(groups)):
            result[f"{name}_se"] = float(error)
    return {**result, "prdc_num_samples": len(x), "prdc_num_reference": len(y)}


def _prdc(x: torch.Tensor, y: torch.Tensor, k3: int, k5: int) -> tuple[float, float, float, float]:
    around_x, around_y = _radii(x, (k3,))[0], _radii(y, (k3, k5))
    recalled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    covered = recalled.clone()
    precise = inside = 0
    for start, distances in _squared_distances(x, y):
        radius = around_x[start : start + len(distances)].unsqueeze(1)
        recalled |= (distances <= radius).any(0)
        within = distances <= around_y[1]
        covered |= within.any(0)
        inside += int(within.sum())
        precise += int((distances <= around_y[0]).any(1).sum())
    return (
        precise / len(x),
        float(recalled.double().mean()),
        inside / (k5 * len(x)),
        float(covered.double().mean()),
    )


def _radii(x: torch.Tensor, ks: Sequence[int]) -> list[torch.Tensor]:
    """Squared distances of each point to its k-th nearest other point, for each k.

    A part in 1e9 larger, so that rounding puts no neighbour outside of the closed ball.
    """
    found = []
    for start, distances in _squared_distances(x, x):
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, rows + start] = math.inf
        found.append(distances.topk(max(ks), dim=1, largest=False).values)
    nearest = torch.cat(found) * (1 + 1e-9)
    return [nearest[:, k - 1] for k in ks]


def _squared_distances(x: torch.Tensor, y: torch.Tensor):
    """Yield (first row, squared distances of a block of rows of x to all of y), in float64.

    |x|² + |y|² − 2xy around a common origin; what is below its rounding counts as a copy, at 0.
    """
    columns = max(1, min(4096, _BLOCK_BYTES // (8 * y.shape[1])))
    rows = max(1, min(_BLOCK_BYTES // (16 * len(y)), columns))
    near = y[:4096]
    origin = torch.stack([_double(part).sum(0) for part in near.split(columns)]).sum(0) / len(near)
    for start in range(0, len(x), rows):
        a = _double(x[start : start + rows]) - origin
        squares = a.square().sum(1, keepdim=True)
        block = torch.empty(len(a), len(y), dtype=torch.float64, device=a.device)
        for first in range(0, len(y), columns):
            b = _double(y[first : first + columns]) - origin
            size = squares + b.square().sum(1)
            part = torch.addmm(size, a, b.T, alpha=-2)
            block[:, first : first + columns] = part.masked_fill_(part < 1e-12 * size, 0.0)
        yield start, block


# All together


def check_metrics(
    metrics: Sequence[str], num_samples: int, *, has_logits: bool, has_features: bool
) -> None:
    """Refuse, before any sampling, metrics that are unknown or lack what they need.

    KID and precision/recall compare single features: the reference statistics must hold some.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"eval.metrics: expected some of {tuple(METRICS)}, got {metric!r}")
        if num_samples < METRICS[metric]:
            raise ValueError(
                f"eval.num_samples: {metric!r} needs at least {METRICS[metric]}, got {num_samples}"
            )
        if metric == "is" and not has_logits:
            raise ValueError(
                "eval.metrics: 'is' needs an extractor that classifies (legacy_tensorflow, clean, "
                "legacy_pytorch); leave it out"
            )
        if metric in ("kid", "prdc") and not has_features:
            raise ValueError(
                f"eval.metrics: {metric!r} compares single features, and the reference statistics "
                "hold none; make them with features kept (--mode stats), or leave it out"
            )


def feature_metrics(
    samples: Array,
    logits: Array | None,
    reference: Any,
    metrics: Sequence[str] = tuple(METRICS),
    *,
    seed: int = 2020,
) -> dict[str, Any]:
    """The asked-for METRICS of features (n, d) of samples against reference statistics.

    `reference` has `mu`, `sigma`, `n` and `features` (evaluation_stats.Statistics). For precision
    and recall the larger set is cut, at random by `seed`, to the size of the smaller.
    Returns numbers, and under `notes` sentences on what is doubtful; each is also a warning.
    """
    has_features = reference.features is not None
    check_metrics(metrics, len(samples), has_logits=logits is not None, has_features=has_features)
    result: dict[str, Any] = {}
    notes: list[str] = []
    if "fid" in metrics:
        parts = grouped_moments(samples)
        result.update(frechet_inception_distance(parts, reference.mu, reference.sigma))
        result["fid_num_reference"] = int(reference.n)
        notes += fid_notes(len(samples), len(reference.mu))
    if "kid" in metrics:
        result.update(kernel_inception_distance(samples, reference.features, seed=seed))
    if "is" in metrics and logits is not None:
        result.update(inception_score(logits))
    if "prdc" in metrics:
        n = min(len(samples), len(reference.features))
        result.update(
            precision_recall_density_coverage(
                _subset(torch.as_tensor(samples), n, seed),
                _subset(torch.as_tensor(reference.features), n, seed),
            )
        )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return {**result, "notes": notes}
