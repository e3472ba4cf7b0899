"""What inverse problems are measured on: Gaussians and a mixture whose posteriors are closed forms.

A sampler whose steps are affine in the state and in its noise keeps Gaussians Gaussian, and
`exact_noise` lets its own loop say which one, without Monte Carlo: the batch is an orthogonal
design. Column j of Hadamard's matrix (n, n) has mean 0 and mean square 1, and no two columns are
correlated, so rows that use other columns for x_T and for every draw of noise have exactly the
mean and covariance of the sampler's law.
"""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import torch

import sde_lib
from parametrization import Point, as_score_function
from sampling_noise import NoiseSource, Stepper

Tensor = torch.Tensor


def matrix_of(operator) -> Tensor:
    """A as a matrix (measurements, numbers), float64, from its action on unit vectors."""
    d = math.prod(operator.shape_in)
    unit = torch.eye(d, dtype=torch.float64).reshape(d, *operator.shape_in)
    return operator(unit).reshape(d, -1).T


class GaussianBed:
    """Data N(mean, cov): exact score on any process, closed-form posterior and evidence.

    Args:
      sde: the forward process.
      mean: of the data's shape, without a batch axis.
      cov: (d, d), d numbers a sample; any covariance.
    """

    def __init__(self, sde, mean: Tensor, cov: Tensor):
        self.sde, self.mean, self.cov = sde, mean.double(), cov.double()
        self.shape, self.d = tuple(mean.shape), mean.numel()
        self.values, self.vectors = torch.linalg.eigh(self.cov)

    def score(self, x, t):
        """−(α² C + σ²)⁻¹ (x − m_t − α m)."""
        point = Point(self.sde, t, x)
        alpha, sigma = (c.reshape(-1, 1) for c in (point.alpha, point.sigma))
        shift = 0 if point.shift is None else point.shift.reshape(len(x), -1)
        off = x.reshape(len(x), -1).double() - shift - alpha * self.mean.reshape(1, -1)
        precision = 1 / (alpha**2 * self.values + sigma**2)
        return -((off @ self.vectors * precision) @ self.vectors.T).reshape(x.shape).to(x.dtype)

    @property
    def score_fn(self):
        return as_score_function(self.score, self.sde)

    def posterior(self, operator, y, noise: float, mean=None, cov=None):
        """Mean (d,) and covariance (d, d) given y = A x_0 + σ_y z.

            m + G (y − A m),   C − G A C,   G = C Aᵀ (A C Aᵀ + σ_y²)⁻¹

        Args:
          mean, cov: of another Gaussian prior.
        """
        m, C, A, S = self._parts(operator, noise, mean, cov)
        G = torch.linalg.lstsq(S, A @ C).solution.T if noise > 0 else C @ A.T @ _pinv(S)
        return m + G @ (y.reshape(-1).double() - A @ m), C - G @ A @ C

    def log_evidence(self, operator, y, noise: float, mean=None, cov=None) -> float:
        """log N(y; A m, A C Aᵀ + σ_y²)."""
        m, _, A, S = self._parts(operator, noise, mean, cov)
        law = torch.distributions.MultivariateNormal(A @ m, S)
        return law.log_prob(y.reshape(-1).double()).item()

    def flow_law(self, eps: float):
        """Mean and covariance of D(x_eps) where x_T ~ N(m_T, prior_std²) follows the exact flow.

            x_eps = μ_eps + √(v_eps/v_T) (x_T − μ_T),   v = α² c² + σ², along each eigenvector

        What an exact solver of the probability flow gives: it never forgets that the prior is not
        p_T, and D at eps has lost the variance of x_0 given x_eps.
        """
        ends = torch.tensor([float(self.sde.T), eps], dtype=torch.float64)
        (a_T, a), (s_T, s) = sde_lib.alpha_sigma(self.sde, ends)
        v_T, v = (alpha**2 * self.values + sigma**2 for alpha, sigma in ((a_T, s_T), (a, s)))
        m = self.mean.reshape(-1) @ self.vectors
        slope = a * self.values / v * torch.sqrt(v / v_T)  # of D at eps by x_T
        std = float(getattr(self.sde, "prior_std", 1.0))
        cov = self.vectors * (slope * std) ** 2 @ self.vectors.T
        return self.vectors @ (m - slope * a_T * m), cov

    def _parts(self, operator, noise, mean, cov):
        m = self.mean.reshape(-1) if mean is None else mean.reshape(-1)
        C, A = self.cov if cov is None else cov, matrix_of(operator)
        return m, C, A, A @ C @ A.T + noise**2 * torch.eye(len(A), dtype=torch.float64)


def _pinv(S: Tensor) -> Tensor:
    return torch.linalg.pinv(S, hermitian=True, rtol=1e-10)


def stationary(shape, length: float, var: float = 1.0) -> Tensor:
    """The covariance (d, d) of an image (C, H, W) whose pixels correlate as exp(−r²/2 length²)."""
    c, h, w = shape
    place = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (h, w)))
    r2 = (place[:, None] - place[None]).square().sum(2)
    pixels = torch.exp(-r2 / (2 * length**2)) + 1e-3 * torch.eye(h * w, dtype=torch.float64)
    return var * torch.kron(torch.eye(c, dtype=torch.float64), pixels)


# --- moments without Monte Carlo ----------------------------------------------------------------


class Design:
    """Columns of Hadamard's matrix, handed out in order: `take(d)` is (n, d) with entries ±1."""

    def __init__(self, n: int):
        if n & (n - 1):
            raise ValueError(f"expected a power of two, got {n}")
        self.n, self.next = n, 1

    def take(self, d: int) -> Tensor:
        if self.next + d > self.n:
            raise ValueError(f"the design of {self.n} rows is used up; take more rows")
        columns = torch.arange(self.next, self.next + d)
        self.next += d
        bits = torch.arange(self.n)[:, None] & columns[None]
        for shift in (16, 8, 4, 2, 1):  # parity of the bits that rows and columns share
            bits = bits ^ (bits >> shift)
        return 1.0 - 2.0 * (bits & 1).double()


def rows_for(d: int, draws: int) -> int:
    """Rows of a design for x_T and `draws` draws of noise, of d numbers each."""
    return 2 ** math.ceil(math.log2(1 + d * (1 + draws)))


@contextlib.contextmanager
def exact_noise(n: int):
    """While this lasts, samplers of n rows draw x_T and their noise from a Design, in float64."""
    design = Design(n)

    def randn(_, x):
        return design.take(x[0].numel()).reshape(x.shape)

    def prior(_, sde, shape):
        return getattr(sde, "prior_std", 1.0) * randn(None, torch.empty(shape))

    with contextlib.ExitStack() as stack:
        for owner, name, fn in (
            (NoiseSource, "randn_like", randn),
            (NoiseSource, "prior", prior),
            (Stepper, "randn_like", randn),
        ):
            stack.enter_context(mock.patch.object(owner, name, fn))
        yield design


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of rows (n, *)."""
    flat = x.reshape(len(x), -1).double()
    mean = flat.mean(0)
    return mean, (flat - mean).T @ (flat - mean) / len(flat)


def distance(mean, cov, truth_mean, truth_cov) -> tuple[float, float, float]:
    """How far N(mean, cov) is from the truth, in the truth's own units.

    Returns: the error of the mean in standard deviations, root mean square over directions; the
      least and the largest ratio of standard deviations in any direction. Directions in which the
      truth has no spread are left out.
    """
    values, vectors = torch.linalg.eigh(truth_cov)
    kept = values > 1e-8 * values.max()
    whiten = vectors[:, kept] / values[kept].sqrt()
    off = (mean - truth_mean) @ whiten
    ratios = torch.linalg.eigvalsh(whiten.T @ cov @ whiten).clamp(min=0).sqrt()
    return off.square().mean().sqrt().item(), ratios.min().item(), ratios.max().item()


# --- a mixture in two dimensions ------------------------------------------------------------------


class MixtureBed:
    """A mixture of isotropic Gaussians in two dimensions; its posterior is a mixture again.

    Args:
      sde: the forward process.
      means: (k, 2).
      stds, weights: (k,).
    """

    shape = (2,)

    def __init__(self, sde, means: Tensor, stds: Tensor, weights: Tensor):
        self.sde, self.means, self.stds = sde, means.double(), stds.double()
        self.log_weights = torch.log(weights.double() / weights.sum())

    def score(self, x, t):
        """∇ log Σ_k w_k N(x; α μ_k, α² s_k² + σ²)."""
        point = Point(self.sde, t, x)
        alpha, sigma = (c.reshape(-1, 1) for c in (point.alpha, point.sigma))
        var = (alpha * self.stds) ** 2 + sigma**2
        pull = alpha[..., None] * self.means - x.double()[:, None]
        log_w = self.log_weights - 0.5 * pull.square().sum(2) / var - torch.log(var)
        total = torch.softmax(log_w, 1)[..., None] * pull / var[..., None]
        return total.sum(1).to(x.dtype)

    @property
    def score_fn(self):
        return as_score_function(self.score, self.sde)

    def posterior(self, operator, y, noise: float):
        """Weights (k,), means (k, 2) and covariances (k, 2, 2) of x_0 given y."""
        parts = [
            GaussianBed(self.sde, m, s**2 * torch.eye(2, dtype=torch.float64))
            for m, s in zip(self.means, self.stds, strict=True)
        ]
        log_w = self.log_weights + torch.tensor(
            [p.log_evidence(operator, y, noise) for p in parts], dtype=torch.float64
        )
        means, covs = zip(*(p.posterior(operator, y, noise) for p in parts), strict=True)
        return torch.softmax(log_w, 0), torch.stack(means), torch.stack(covs)

    def log_evidence(self, operator, y, noise: float) -> float:
        parts = [
            GaussianBed(self.sde, m, s**2 * torch.eye(2, dtype=torch.float64))
            for m, s in zip(self.means, self.stds, strict=True)
        ]
        each = torch.tensor([p.log_evidence(operator, y, noise) for p in parts])
        return torch.logsumexp(self.log_weights + each, 0).item()


def density_on(grid: Tensor, mixture) -> Tensor:
    """Density of a mixture (weights, means, covs) at points (n, 2)."""
    weights, means, covs = mixture
    law = torch.distributions.MultivariateNormal(means, covs)
    return (law.log_prob(grid[:, None]).exp() * weights).sum(1)


def total_variation(points, log_weights, mixture, edges: Tensor) -> float:
    """½ Σ |p̂ − p| over square cells of a histogram; points (n, 2), log_weights (n,) or None."""
    n = len(edges) - 1
    w = torch.softmax(log_weights, 0) if log_weights is not None else None
    cell = torch.bucketize(points.double().contiguous(), edges) - 1
    inside = ((cell >= 0) & (cell < n)).all(1)
    w = torch.full((len(points),), 1 / len(points)) if w is None else w
    flat = cell[inside, 0] * n + cell[inside, 1]
    share = torch.zeros(n * n, dtype=torch.float64).index_add_(0, flat, w[inside].double())
    fine = 8  # sub-cells a side: the truth's share of a cell by the midpoint rule
    width = (edges[-1] - edges[0]) / (n * fine)
    middle = edges[0] + width * (torch.arange(n * fine, dtype=torch.float64) + 0.5)
    truth = density_on(torch.cartesian_prod(middle, middle), mixture) * width**2
    truth = truth.reshape(n, fine, n, fine).sum((1, 3)).reshape(-1)
    outside = (1 - share.sum()).abs() + (1 - truth.sum()).abs()
    return (0.5 * ((share - truth).abs().sum() + outside)).item()
