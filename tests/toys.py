"""Small stand-ins that several tests share."""

from __future__ import annotations

import torch

import sde_lib
from sde_lib import expand


def all_sdes(N: int = 1000):
    """Every built-in process, by name."""
    return {
        "ve": sde_lib.VESDE(0.01, 50, N),
        "vp": sde_lib.VPSDE(0.1, 20, N),
        "subvp": sde_lib.subVPSDE(0.1, 20, N),
    }


class UserSDE(sde_lib.SDE):
    """An Ornstein–Uhlenbeck process as a user of score_sde would write it: five methods, images."""

    def __init__(self, theta=4.0, N=100):
        super().__init__(N)
        self.theta = theta
        self.sigma = "a user's attribute may have any name"

    @property
    def T(self):
        return 1

    def sde(self, x, t):
        drift = -self.theta * x
        diffusion = torch.ones_like(t) * (2 * self.theta) ** 0.5
        return drift, diffusion

    def marginal_prob(self, x, t):
        decay = torch.exp(-self.theta * t)
        return decay[:, None, None, None] * x, torch.sqrt(1.0 - decay**2)

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        n = z[0].numel()
        log_2pi = torch.log(torch.tensor(2 * torch.pi))
        return -n / 2.0 * log_2pi - torch.sum(z**2, dim=(1, 2, 3)) / 2.0


class LongSDE(UserSDE):
    """An Ornstein–Uhlenbeck process on [0, 5]."""

    def __init__(self, N=100):
        super().__init__(theta=0.8, N=N)

    @property
    def T(self):
        return 5


def gaussian_score(sde, mean, std):
    """The exact score of x_t when the data are N(mean, std²) in each coordinate."""

    def score(x, t):
        a, s = (expand(c, x) for c in sde_lib.alpha_sigma(sde, t, x))
        return -(x - a * mean) / (a**2 * std**2 + s**2)

    return score


class AsModel:
    """A score function dressed as a network of score_sde's conventions, continuous time."""

    def __init__(self, sde, score):
        self.sde, self.score = sde, score

    def __call__(self, x, labels):
        if isinstance(self.sde, sde_lib.VESDE):  # labels are σ
            t = self.sde.inverse_lambda(-torch.log(labels.double())).to(x.dtype)
            return self.score(x, t)
        t = labels * (self.sde.T / 999)
        sigma = sde_lib.alpha_sigma(self.sde, t, x)[1]
        return -expand(sigma, x) * self.score(x, t)
