"""How far points are from points, or from a density: numbers for data of few dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

#: The protocol of `compare`: points of a comparison, directions, and how many comparisons; and the
#: points of a discrepancy, whose cost is quadratic.
POINTS, DIRECTIONS, REPEATS, MMD_POINTS = 2000, 256, 5, 1000


def _pair(a, b) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(
            f"expected points of shapes (n, d) and (m, d), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}; flatten others with .flatten(1)"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("expected finite points, got NaN or infinity; check the sampler")
    return a, b


def sliced_wasserstein(a, b, directions: int = DIRECTIONS, *, seed: int = 0, p: float = 2) -> float:
    """The sliced Wasserstein distance of equally many points a and b, (n, d).

        SW_p = (E_θ W_p^p(θᵀa, θᵀb))^{1/p},   θ uniform on the unit sphere

    over as many random `directions`; in one dimension W_p^p is the mean of |a_(i) − b_(i)|^p over
    the sorted points. The standard deviation of the points in the same units says what is large.

    Errors: ValueError for shapes that differ. Source: Bonneel et al. 2015.
    """
    a, b = _pair(a, b)
    if len(a) != len(b):
        raise ValueError(f"expected equally many points, got {len(a)} and {len(b)}; cut both")
    theta = torch.randn(
        a.shape[1], directions, dtype=a.dtype, generator=torch.Generator().manual_seed(seed)
    )
    theta = theta / theta.norm(dim=0)
    gaps = (a @ theta).sort(dim=0).values - (b @ theta).sort(dim=0).values
    return float((gaps.abs() ** p).mean() ** (1 / p))


def mmd2(a, b, scales: tuple[float, ...] = (0.1, 0.3, 1.0)) -> float:
    """The squared maximum mean discrepancy of points a (n, d) and b (m, d), unbiased.

        E k(a, a') + E k(b, b') − 2 E k(a, b),   k(x, y) = mean over s of exp(−‖x − y‖²/(2 s²))

    with the `scales` s in units of the data; 0 on average where the distributions agree, and so
    below 0 as often.

    Errors: ValueError for fewer than 2 points. Source: Gretton et al. 2012, eq. 3.
    """
    a, b = _pair(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least 2 points of each, got {len(a)} and {len(b)}")

    def kernel(x, y):
        squares = torch.cdist(x, y) ** 2
        return torch.stack([torch.exp(-squares / (2 * s**2)) for s in scales]).mean(dim=0)

    def within(x):
        k, n = kernel(x, x), len(x)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def grid(half_side: float, size: int) -> tuple[torch.Tensor, float]:
    """The centres of size × size equal cells of [-half_side, half_side]², row by row from the
    bottom, (size², 2) in float64, and the area of a cell."""
    step = 2 * half_side / size
    centres = -half_side + step * (torch.arange(size, dtype=torch.float64) + 0.5)
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2), step**2


def kl_on_grid(log_p: torch.Tensor, log_q: torch.Tensor, cell: float) -> dict[str, float]:
    """KL(p‖q) = Σ p (log p − log q) · cell in nats, from log-densities at the centres of a grid.

    `mass_p` and `mass_q` say how much of both lies on the grid, and whether it is fine enough:
    both should be 1.
    """
    p, q = (torch.exp(v.double()) * cell for v in (log_p, log_q))
    terms = torch.where(p > 0, p * (log_p.double() - log_q.double()), torch.zeros_like(p))
    return {"kl": float(terms.sum()), "mass_p": float(p.sum()), "mass_q": float(q.sum())}


def compare(samples, truth: Callable[[int, int], torch.Tensor], seed: int = 0) -> dict[str, Any]:
    """Distances of samples (n, d) to true points, beside those of true points to others.

    Each of REPEATS comparisons takes POINTS samples of their own (drawn anew from them where there
    are fewer than all comparisons want) and two true sets of as many; the numbers are means over
    the comparisons with their standard errors, and `ratio` is the quotient of the two means. At a
    finite number of points the distance of the truth to itself is above 0; a ratio of 1 cannot be
    told apart from it.

    Args:
      truth: truth(n, seed) gives n true points.
    """
    samples = torch.as_tensor(samples).detach().cpu().double()
    rng = np.random.RandomState(seed)
    order = torch.from_numpy(rng.permutation(len(samples)))
    disjoint = len(samples) >= POINTS * REPEATS
    if len(samples) < POINTS:
        raise ValueError(f"expected at least {POINTS} samples, got {len(samples)}; draw more")
    rows: dict[str, list[float]] = {}
    for i in range(REPEATS):
        chosen = order[i * POINTS :] if disjoint else torch.from_numpy(rng.permutation(len(order)))
        own = samples[chosen[:POINTS]]
        first, second = (truth(POINTS, 1000 * (seed + 1) + 2 * i + j) for j in (0, 1))
        for ending, points in (("", own), ("_true", second)):
            distance = sliced_wasserstein(points, first, seed=i)
            rows.setdefault(f"sliced_wasserstein{ending}", []).append(distance)
            discrepancy = mmd2(points[:MMD_POINTS], first[:MMD_POINTS])
            rows.setdefault(f"mmd2{ending}", []).append(discrepancy)
    found: dict[str, Any] = {}
    for name, values in rows.items():
        found[name] = float(np.mean(values))
        found[f"{name}_se"] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    found["sliced_wasserstein_ratio"] = (
        found["sliced_wasserstein"] / found["sliced_wasserstein_true"]
    )
    found["protocol"] = (
        f"{POINTS} points against {POINTS} true ones, {DIRECTIONS} directions, p = 2, mean of "
        f"{REPEATS} comparisons" + ("" if disjoint else ", which share samples")
    )
    return found
