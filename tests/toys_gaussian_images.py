"""Gaussian images: exact scores of any process, conditionals in closed form."""

from __future__ import annotations

import torch

import sde_lib
from parametrization import as_score_function
from sde_lib import expand


class GaussianImages:
    """x_0 ~ N(m, C) with m of shape (C, H, W) and C (d, d) over its d numbers, in float64.

    p_t = N(α m, α² C + σ² I), whose score needs the eigenvectors of C alone.
    """

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor):
        self.shape, self.mean = tuple(mean.shape), mean.double()
        self.covariance = covariance.double()
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def score_fn(self, sde):
        def score(x, t):
            alpha, sigma = (c.reshape(-1, 1) for c in sde_lib.alpha_sigma(sde, t, x))
            y = sde_lib.origin(sde, x)
            mean = expand(alpha, x) * self.mean
            mean = mean if y is None else mean + expand(1 - alpha, x) * y
            centred = (x - mean).double().reshape(len(x), -1) @ self.vectors
            variance = alpha**2 * self.values + sigma**2
            return -((centred / variance) @ self.vectors.T).reshape(x.shape).to(x.dtype)

        return as_score_function(score, sde)

    def sample(self, n: int, generator=None) -> torch.Tensor:
        z = torch.randn(n, len(self.values), dtype=torch.float64, generator=generator)
        x = (z * self.values.sqrt()) @ self.vectors.T
        return self.mean + x.reshape(n, *self.shape)

    def given(self, A: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (d,) and covariance (d, d) of x_0 given A x_0 = y."""
        gain = self.covariance @ A.T @ torch.linalg.inv(A @ self.covariance @ A.T)
        mean = self.mean.reshape(-1)
        return mean + gain @ (y - A @ mean), self.covariance - gain @ A @ self.covariance
