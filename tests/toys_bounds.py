"""Gaussian data of any covariance, scores that are wrong by a factor, and random numbers that are
a quadrature: closed forms for the bounds on the likelihood."""

import copy
import math

import numpy as np
import torch
import toys
import toys_paths
from scipy.integrate import quad

import sde_lib
from parametrization import as_score_function

D = 3
NAMES = sorted(toys_paths.every_sde())
#: Covariances of data: isotropic, of independent coordinates, correlated.
COVARIANCES = {
    "isotropic": 0.25 * np.eye(D),
    "anisotropic": np.diag([0.09, 0.25, 1.2]),
    "correlated": np.array([[0.5, 0.3, -0.1], [0.3, 0.4, 0.05], [-0.1, 0.05, 0.2]]),
}
MEAN = np.array([0.3, -0.2, 0.1])


def every_sde():
    return toys_paths.every_sde()


def eps_of(sde) -> float:
    """A time at which σ is about 0.01, or 0.03."""
    late = isinstance(sde, sde_lib.LinearVE | toys.UserSDE)
    return 1e-5 if late else max(sde.sampling_eps, 1e-3)


def alpha_sigma(sde, t: float):
    a, s = sde_lib.alpha_sigma(sde, torch.tensor([t], dtype=torch.float64), torch.zeros(1, 1, 1, D))
    return a.item(), s.item()


def at_lambda(sde, lam: float):
    """α and σ at λ, to all digits also where λ is inverted by bisection."""
    t = sde_lib.time_of_half_log_snr(sde, torch.tensor([lam], dtype=torch.float64))
    a, _ = alpha_sigma(sde, t.item())
    return a, a * math.exp(-lam)


def lambdas(sde, eps: float):
    return [math.log(a / s) for a, s in (alpha_sigma(sde, float(sde.T)), alpha_sigma(sde, eps))]


def log_normal(x, mean, cov) -> float:
    r = np.asarray(x) - mean
    sign, logdet = np.linalg.slogdet(cov)
    assert sign > 0
    return -0.5 * (r @ np.linalg.solve(cov, r) + logdet + len(r) * math.log(2 * math.pi))


class Bed:
    """The model of score γ ∇log p_t, p_0 = N(MEAN, C), with the exact p_T as its prior or its own.

    γ = 1 is the exact score.
    """

    def __init__(self, sde, covariance="correlated", gamma=1.0, exact_prior=True):
        self.C, self.gamma = COVARIANCES[covariance], gamma
        self.sde = copy.copy(sde)
        a, s = alpha_sigma(sde, float(sde.T))
        if exact_prior:
            self.m_T, self.S_T = a * MEAN, a**2 * self.C + s**2 * np.eye(D)
            self.sde.prior_logp = self._prior_logp
        else:
            std = getattr(sde, "prior_std", 1.0)
            self.m_T, self.S_T = np.zeros(D), std**2 * np.eye(D)
        self.calls = 0

    def _prior_logp(self, z):
        mean, cov = (torch.from_numpy(v).to(z) for v in (self.m_T, self.S_T))
        return torch.distributions.MultivariateNormal(mean, cov).log_prob(z.flatten(1))

    def model(self):
        C, mean = torch.from_numpy(self.C), torch.from_numpy(MEAN)

        def score(x, t):
            self.calls += 1
            a, s = (c.reshape(-1, 1, 1) for c in sde_lib.alpha_sigma(self.sde, t, x))
            cov = a**2 * C + s**2 * torch.eye(D, dtype=torch.float64)
            r = (x.flatten(1) - a[:, 0] * mean).to(cov)
            return -self.gamma * torch.linalg.solve(cov, r).to(x).reshape(x.shape)

        return as_score_function(score, self.sde)

    # --- the model's density, closed form in the eigenbasis of C ---------------------------------

    def density(self, lam_t: float, tau: float):
        """Mean and covariance of p_t of the member τ of the plug-in family at λ = lam_t.

        In y = x/α and V = e^{−2λ}, with p = γ(1 + τ²) and c an eigenvalue of C, the reverse SDE
        dy = −½ p (y − m)/(c + V) dV + τ dW, V falling, keeps Gaussians:
        mean − m ∝ (c + V)^{p/2}, S = (c + V)^p [S_T/(c + V_T)^p + τ² ∫ (c + v)^{−p} dv].
        """
        values, U = np.linalg.eigh(self.C)
        lam_T = lambdas(self.sde, eps_of(self.sde))[0]
        V, V_T, p = math.exp(-2 * lam_t), math.exp(-2 * lam_T), self.gamma * (1 + tau**2)
        a_T = alpha_sigma(self.sde, float(self.sde.T))[0]
        ratio = (values + V) / (values + V_T)
        low, high = values + V, values + V_T
        spread = np.log(high / low) if p == 1 else (low ** (1 - p) - high ** (1 - p)) / (p - 1)
        S_T = U.T @ self.S_T @ U / a_T**2
        half = ratio ** (p / 2)
        S = half[:, None] * S_T * half[None] + np.diag(tau**2 * low**p * spread)
        mean = MEAN + U @ (half * (U.T @ (self.m_T / a_T - MEAN)))
        a = at_lambda(self.sde, lam_t)[0]
        return a * mean, a**2 * U @ S @ U.T

    def log_p_eps(self, x, eps, tau=1.0) -> float:
        return log_normal(x, *self.density(lambdas(self.sde, eps)[1], tau))

    def log_p_eps_given(self, x_0, eps, tau=1.0) -> float:
        """E[log p_eps(x_eps) | x_0]."""
        a, s = alpha_sigma(self.sde, eps)
        mean, cov = self.density(lambdas(self.sde, eps)[1], tau)
        return log_normal(a * x_0, mean, cov) - 0.5 * s**2 * np.trace(np.linalg.inv(cov))

    # --- the bound, by adaptive quadrature -------------------------------------------------------

    def _precision(self, a, s):
        return self.gamma * np.linalg.inv(a**2 * self.C + s**2 * np.eye(D))

    def error2(self, x_0, lam) -> float:
        """E ‖ε̂ − z‖² at λ, with ε̂ = σ K (x − α m)."""
        a, s = at_lambda(self.sde, lam)
        K = self._precision(a, s)
        return np.sum((s * a * K @ (x_0 - MEAN)) ** 2) + np.sum((s**2 * K - np.eye(D)) ** 2)

    def bound(self, x_0, eps, factor=1.0) -> float:
        """E log π(x_T) + d log(σ_T/σ_eps) − c ∫ E ‖ε̂ − z‖² dλ."""
        (a_T, s_T), (_, s) = alpha_sigma(self.sde, float(self.sde.T)), alpha_sigma(self.sde, eps)
        inverse = np.linalg.inv(self.S_T)
        prior = log_normal(a_T * x_0, self.m_T, self.S_T) - 0.5 * s_T**2 * np.trace(inverse)
        low, high = lambdas(self.sde, eps)
        path = quad(lambda lam: self.error2(x_0, lam), low, high, epsabs=1e-9, limit=200)[0]
        return prior + D * math.log(s_T / s) - factor * path

    def offset(self, x_0, eps) -> float:
        """E[log p(x_0 | x_eps) − log p(x_eps | x_0)]."""
        a, s = alpha_sigma(self.sde, eps)
        K = self._precision(a, s)
        left = np.sum((s * a * K @ (x_0 - MEAN)) ** 2) + np.sum((s**2 * K - np.eye(D)) ** 2)
        return D * math.log(a) + 0.5 * (D - left)

    def gap(self, x_0, eps) -> float:
        """∫ E ‖σ (s − ∇log p_t)‖² dλ, p_t the model's own, along the process from x_0."""

        def integrand(lam):
            a, s = at_lambda(self.sde, lam)
            mean, cov = self.density(lam, 1.0)
            K, P = self._precision(a, s), np.linalg.inv(cov)
            shift = -K @ (a * (x_0 - MEAN)) + P @ (a * x_0 - mean)
            return s**2 * (np.sum(shift**2) + s**2 * np.sum((P - K) ** 2))

        return quad(integrand, *lambdas(self.sde, eps), epsabs=1e-10, limit=200)[0]


class Design:
    """Random numbers that make a mean over the batch an exact mean over z, and over the points the
    midpoint rule in time.

    The 2D rows of `batch(x_0)` get ±√D e_i for z, whose mean and covariance are those of N(0, I):
    exact for what is quadratic in z.
    """

    def __init__(self):
        basis = math.sqrt(D) * torch.eye(D, dtype=torch.float64)
        self.z = torch.cat([basis, -basis])

    def batch(self, x_0, dtype=torch.float64):
        x = torch.as_tensor(x_0, dtype=dtype).reshape(1, 1, 1, D)
        return x.expand(2 * D, 1, 1, D).clone()

    def rand(self, stream, shape=(), dtype=torch.float64):
        number = int(stream.split()[0])
        return torch.full((2 * D, *shape), 0.25 + 0.5 * (number % 2), dtype=dtype)

    def randn(self, stream, shape=(), dtype=torch.float64):
        return self.z.reshape(2 * D, *shape).to(dtype)


def points(n=4, seed=0):
    """Data x_0 to look at, (n, D)."""
    generator = np.random.default_rng(seed)
    return MEAN + 0.6 * generator.standard_normal((n, D))
