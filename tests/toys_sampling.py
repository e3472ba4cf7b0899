"""Every process with closed forms for Gaussian data, for the tests of samplers."""

from __future__ import annotations

import torch
import toys

import sde_lib
import sde_lib_base
from parametrization import as_score_function


def processes():
    """Every built-in process with its defaults, by name, and a user's."""
    ours = {n: c for n, c in sde_lib_base._SDES.items() if c.__module__.startswith("sde_lib")}
    return {**{name: cls() for name, cls in ours.items()}, "user": toys.UserSDE()}


class Gaussian:
    """Data N(mean, diag(std²)): the exact score, moments and probability flow of a process."""

    def __init__(self, sde, mean, std):
        self.sde = sde
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.std = torch.as_tensor(std, dtype=torch.float64)

    def moments(self, t, x):
        """Mean and variance of x_t, shaped like x."""
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        alpha, sigma = (sde_lib.expand(c, x.double()) for c in sde_lib.alpha_sigma(self.sde, t, x))
        shift = 0.0
        if sde_lib.origin(self.sde, x) is not None:
            shift = (1 - alpha) * sde_lib.origin(self.sde, x)
        return shift + alpha * self.mean, (alpha * self.std) ** 2 + sigma**2

    def score(self, x, t):
        mean, var = self.moments(t, x)
        return (-(x - mean) / var).to(x.dtype)

    def model(self):
        return as_score_function(self.score, self.sde)

    def flow(self, x, t, s):
        """The exact map of the probability-flow ODE from t to s."""
        (m0, v0), (m1, v1) = self.moments(t, x), self.moments(s, x)
        return m1 + (v1 / v0).sqrt() * (x - m0)
