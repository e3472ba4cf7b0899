"""Distributions of points whose density, and score, are exact at every noise level.

    x_t = α x_0 + σ z,   p_t(x) = ∫ p_0(x_0) N(x; α x_0, σ² I) dx_0

is a finite sum for the kinds here: Gaussians, curves traced by many equal ones, and pixels.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch

_CHUNK_NUMBERS = 2**20


class Density(Protocol):
    """A distribution of points (B, 2); `alpha` and `sigma` are numbers or (B,), in float64."""

    def sample(self, n: int, seed: int) -> torch.Tensor:
        """n points (n, 2) of p_0 in float64, always the same for a seed."""
        ...

    def log_density(self, x: torch.Tensor, alpha=1.0, sigma=0.0) -> torch.Tensor:
        """log p_t(x) in nats, (B,), in float64."""
        ...

    def score(self, x: torch.Tensor, alpha=1.0, sigma=0.0) -> torch.Tensor:
        """∇ log p_t(x), (B, 2), in float64."""
        ...


def _column(value, x: torch.Tensor) -> torch.Tensor:
    """A number or (B,) as (B, 1) in float64."""
    return torch.as_tensor(value, dtype=torch.float64, device=x.device).expand(len(x))[:, None]


def _in_chunks(fn, rows: int, x, alpha, sigma) -> torch.Tensor:
    """`fn(x, α, σ)` on parts of x, for which `rows` numbers a point are held at a time."""
    x = x.double()
    parts = zip(
        *(
            v.split(max(1, _CHUNK_NUMBERS // rows))
            for v in (x, _column(alpha, x), _column(sigma, x))
        )
    )
    return torch.cat([fn(*part) for part in parts]) if len(x) else fn(x, x[:, :1], x[:, :1])


def _normalized(weights, count: int) -> torch.Tensor:
    """Weights (K,) that sum to 1; equal ones for None."""
    w = torch.ones(count) if weights is None else torch.as_tensor(weights)
    if w.shape != (count,) or not (w >= 0).all() or not w.sum() > 0:
        raise ValueError(f"expected {count} weights of at least 0, not all 0, got {w.tolist()}")
    return w.double() / w.double().sum()


class Gaussians:
    """A mixture of K Gaussians: p_t = Σ_k w_k N(α m_k, α² C_k + σ² I).

    Args:
      means: (K, 2).
      covariances: (K, 2, 2).
      weights: (K,), of any sum; None = equal.
    """

    def __init__(self, means, covariances, weights=None):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.covariances = torch.as_tensor(covariances, dtype=torch.float64)
        k, d = self.means.shape
        if self.covariances.shape != (k, d, d):
            raise ValueError(
                f"{k} means of {d} numbers need covariances of shape {(k, d, d)}, got "
                f"{tuple(self.covariances.shape)}"
            )
        self.weights = _normalized(weights, k)
        # C_k = Σ_i l_i u_i u_iᵀ has the eigenvectors of α² C_k + σ² I.
        self.values, self.vectors = torch.linalg.eigh(self.covariances)
        if not (self.values > 0).all():
            raise ValueError(
                "expected positive definite covariances, got an eigenvalue of 0 or less"
            )

    def sample(self, n: int, seed: int) -> torch.Tensor:
        """n points (n, 2) of p_0 in float64, always the same for a seed."""
        rng = np.random.RandomState(seed)  # its stream is frozen
        which = torch.from_numpy(rng.choice(len(self.weights), n, p=self.weights.numpy()))
        z = torch.from_numpy(rng.standard_normal((n, self.means.shape[1])))
        z = torch.einsum("nij,nj->ni", self.vectors[which], self.values[which].sqrt() * z)
        return self.means[which] + z

    def log_density(self, x, alpha=1.0, sigma=0.0):
        """log p_t(x) in nats, (B,), in float64."""

        def part(x, alpha, sigma):
            return torch.logsumexp(self._terms(x, alpha, sigma)[0], dim=1)

        return _in_chunks(part, self.means.numel(), x, alpha, sigma)

    def score(self, x, alpha=1.0, sigma=0.0):
        """∇ log p_t(x), (B, 2), in float64."""

        def part(x, alpha, sigma):
            log_terms, y, variances = self._terms(x, alpha, sigma)
            each = -torch.einsum("kij,nkj->nki", self.vectors.to(x.device), y / variances)
            return torch.einsum("nk,nki->ni", log_terms.softmax(dim=1), each)

        return _in_chunks(part, self.means.numel(), x, alpha, sigma)

    def _terms(self, x, alpha, sigma):
        """log w_k N_k(x), (B, K); coordinates along the eigenvectors, and variances, (B, K, 2)."""
        means, vectors, values, weights = (
            v.to(x.device) for v in (self.means, self.vectors, self.values, self.weights)
        )
        variances = alpha[..., None] ** 2 * values + sigma[..., None] ** 2
        y = torch.einsum("kij,nki->nkj", vectors, x[:, None] - alpha[..., None] * means)
        squares = (y**2 / variances + torch.log(2 * math.pi * variances)).sum(dim=-1)
        return torch.log(weights) - 0.5 * squares, y, variances


class EqualGaussians:
    """K round Gaussians of one size: p_t = Σ_k w_k N(α m_k, (α² s² + σ²) I).

    Where neighbours are at most s apart they are a curve of thickness s, even to nine digits.

    Args:
      means: (K, 2).
      std: s.
      weights: (K,), of any sum; None = equal.
    """

    def __init__(self, means, std: float, weights=None):
        self.means, self.std = torch.as_tensor(means, dtype=torch.float64), std
        self.weights = _normalized(weights, len(self.means))

    def sample(self, n: int, seed: int) -> torch.Tensor:
        """n points (n, 2) of p_0 in float64, always the same for a seed."""
        rng = np.random.RandomState(seed)  # its stream is frozen
        which = torch.from_numpy(rng.choice(len(self.weights), n, p=self.weights.numpy()))
        return self.means[which] + self.std * torch.from_numpy(rng.standard_normal((n, 2)))

    def log_density(self, x, alpha=1.0, sigma=0.0):
        """log p_t(x) in nats, (B,), in float64."""

        def part(x, alpha, sigma):
            log_terms, variance = self._terms(x, alpha, sigma)
            return torch.logsumexp(log_terms, dim=1) - torch.log(2 * math.pi * variance[:, 0])

        return _in_chunks(part, len(self.means), x, alpha, sigma)

    def score(self, x, alpha=1.0, sigma=0.0):
        """∇ log p_t(x), (B, 2), in float64."""

        def part(x, alpha, sigma):
            log_terms, variance = self._terms(x, alpha, sigma)
            return (alpha * (log_terms.softmax(dim=1) @ self.means.to(x.device)) - x) / variance

        return _in_chunks(part, len(self.means), x, alpha, sigma)

    def _terms(self, x, alpha, sigma):
        """log w_k − ‖x − α m_k‖²/(2v), (B, K), and v = α² s² + σ², (B, 1)."""
        means, weights = self.means.to(x.device), self.weights.to(x.device)
        variance = (alpha * self.std) ** 2 + sigma**2
        squares = (x**2).sum(1, True) - 2 * alpha * (x @ means.T) + alpha**2 * (means**2).sum(1)
        return torch.log(weights) - 0.5 * squares / variance, variance


class Pixels:
    """Uniform on rectangles of a grid, each with a probability in proportion to its weight.

    With a_j(x) the marginal of column j, and b_i(y) of row i,

        p_t(x, y) = Σ_ij w_ij a_j(x) b_i(y),   a_j(x) = [Φ((x − α l_j)/σ) − Φ((x − α r_j)/σ)]/(α w)

    for a column from l_j to r_j of width w; at σ = 0 it is 1/w inside and 0 outside.

    Args:
      weights: (rows, columns), the first row on top.
      half_side: the longer side reaches from −half_side to half_side, and pixels are squares.
    """

    def __init__(self, weights, half_side: float):
        w = torch.as_tensor(weights, dtype=torch.float64)
        if w.ndim != 2 or not (w >= 0).all() or not w.sum() > 0:
            raise ValueError(
                f"expected weights of shape (rows, columns), at least 0 and not all 0, got shape "
                f"{tuple(w.shape)} and sum {float(w.sum()):.3g}"
            )
        self.weights = w.flip(0) / w.sum()  # rows now from the bottom, as y
        rows, columns = w.shape
        self.width = 2 * half_side / max(rows, columns)
        self.left, self.bottom = (
            (torch.arange(n, dtype=torch.float64) - n / 2) * self.width for n in (columns, rows)
        )

    def sample(self, n: int, seed: int) -> torch.Tensor:
        """n points (n, 2) of p_0 in float64, always the same for a seed."""
        rng = np.random.RandomState(seed)  # its stream is frozen
        which = rng.choice(self.weights.numel(), n, p=self.weights.flatten().numpy())
        row, column = (torch.from_numpy(i) for i in divmod(which, self.weights.shape[1]))
        corner = torch.stack([self.left[column], self.bottom[row]], dim=1)
        return corner + self.width * torch.from_numpy(rng.random_sample((n, 2)))

    def log_density(self, x, alpha=1.0, sigma=0.0):
        """log p_t(x) in nats, (B,), in float64."""

        def part(x, alpha, sigma):
            (a, _, log_a), (b, _, log_b) = self._sides(x, alpha, sigma)
            return torch.log(torch.einsum("nj,ij,ni->n", a, self._w(x), b)) + log_a + log_b

        return _in_chunks(part, sum(self.weights.shape), x, alpha, sigma)

    def score(self, x, alpha=1.0, sigma=0.0):
        """∇ log p_t(x), (B, 2), in float64."""

        def part(x, alpha, sigma):
            if not (sigma > 0).all():
                raise ValueError(
                    "a density that is constant on pixels has no score at σ = 0; ask at σ > 0"
                )
            (a, da, _), (b, db, _) = self._sides(x, alpha, sigma)
            wa, wb = a @ self._w(x).T, b @ self._w(x)
            p = (wa * b).sum(dim=1)
            return torch.stack([(da * wb).sum(dim=1) / p, (wa * db).sum(dim=1) / p], dim=1)

        return _in_chunks(part, sum(self.weights.shape), x, alpha, sigma)

    def _w(self, x):
        return self.weights.to(x.device)

    def _sides(self, x, alpha, sigma):
        """For both coordinates the marginals of the strips and their derivatives, (B, n), divided
        by e^m, and m (B,), which keeps them from underflow."""
        return [
            self._strips(x[:, i : i + 1], edges.to(x.device), alpha, sigma)
            for i, edges in enumerate((self.left, self.bottom))
        ]

    def _strips(self, x, low, alpha, sigma):
        alpha = torch.maximum(alpha, 1e-9 * sigma / self.width)  # at 0 a strip has no width
        high, width = alpha * (low + self.width), alpha * self.width
        low, sharp = alpha * low, sigma <= 0
        inside = ((x >= low) & (x < high)).double() / width
        sigma = torch.where(sharp, width, sigma)  # any number: those rows are `inside`
        # Φ(u) − Φ(v) = Φ(−v) − Φ(−u): taken in the lower tail, where nothing cancels.
        u, v = (x - low) / sigma, (x - high) / sigma
        above = v > 0
        u, v = torch.where(above, -v, u), torch.where(above, -u, v)
        log_u, log_v = torch.special.log_ndtr(u), torch.special.log_ndtr(v)
        log_a = log_u + torch.log(-torch.expm1(log_v - log_u)) - torch.log(width)
        m = log_a.max(dim=1, keepdim=True).values
        slope = (_bell(u, m) - _bell(v, m)) / (sigma * width)
        slope = torch.where(above, -slope, slope)
        m = torch.where(sharp, 0.0, m)
        return torch.where(sharp, inside, torch.exp(log_a - m)), slope, m[:, 0]


def _bell(u, m):
    """The standard normal density at u, divided by e^m."""
    return torch.exp(-0.5 * u**2 - m) / math.sqrt(2 * math.pi)
