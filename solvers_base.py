"""What the modern predictors share: points in (α, σ, λ), φ-functions, exponential quadrature.

With x_t = α_t x_0 + σ_t z, λ = log(α/σ), D = E[x_0 | x_t] and ε̂ = E[z | x_t], every member of the
reverse family from t to s, h = λ_s − λ_t > 0, is solved by (Lu et al. 2022a, Prop. 3.1, and
2022b, Prop. 4.1; Xue et al. 2023, Prop. 4.2)

    x_s = (σ_s/σ_t) e^{−τ²h} x_t + α_s (1+τ²) ∫_0^h e^{−(1+τ²)(h−u)} D du + σ_s √(1 − e^{−2τ²h}) z
    x_s = (α_s/α_t) x_t − σ_s ∫_0^h e^{h−u} ε̂ du                                       (τ = 0)

so a solver is a rule for D or ε̂ under the integral.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import arguments
import sde_lib
from parametrization import Point, as_score_function
from sampling_steps import Predictor, batch_time

Tensor = torch.Tensor


@dataclass(frozen=True)
class Node:
    """A time and its coefficients, all 0-dim float64 on the CPU.

    `origin` is m_t, the mean of x_t for x_0 = 0, of x's shape where a process moves it, else None.
    Solvers work on x − m_t = α x_0 + σ z.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor
    origin: Tensor | None = None

    @property
    def rho(self) -> Tensor:
        """σ/α, the noise level of x/α."""
        return torch.exp(-self.lam)

    def centre(self, x: Tensor) -> Tensor:
        """x − y where the process is bound to y, else x."""
        return x if self.origin is None else x - self.origin

    def restore(self, x: Tensor) -> Tensor:
        """x + y where the process is bound to y, else x."""
        return x if self.origin is None else x + self.origin


class Solver(Predictor):
    """A predictor given by α, σ and λ alone; a subclass defines `advance`, free of the origin.

    Args:
      sde, score_fn, probability_flow: as `Predictor`.

    Raises: ValueError for a process that is not affine in x, and at `start` for a grid on which
      λ is infinite.
    """

    stochastic = False

    def __init__(self, sde, score_fn, probability_flow: bool = False):
        super().__init__(sde, score_fn, probability_flow)
        if not sde_lib.is_affine(sde):
            raise ValueError(
                f"{type(self).__name__} needs λ = log(α/σ), and the drift or mean of "
                f"{type(sde).__name__} is not affine in x; use euler_maruyama, reverse_diffusion "
                "or tau_euler"
            )
        self.score = as_score_function(score_fn, sde)
        self.length: int | None = None

    def start(self, times: Tensor) -> None:
        lam = sde_lib.half_log_snr(self.sde, times)
        if not torch.isfinite(lam).all():
            t = float(times[~torch.isfinite(lam)][0])
            raise ValueError(
                f"{type(self).__name__} needs a finite λ = log(α/σ) at every time, and "
                f"{type(self.sde).__name__} has none at t = {t:g}; start the schedule where "
                "λ = −10 and end it before σ = 0"
            )
        falls = lam.diff() < -1e-9  # more than rounding
        if falls.any():
            raise ValueError(
                f"{type(self).__name__} goes by λ = log(α/σ), which must rise from time to time of "
                f"the grid, and that of {type(self.sde).__name__} falls after "
                f"t = {float(times[:-1][falls][0]):g}; data are at t = 0, noise at t = T"
            )
        self.length = len(times)

    def step(self, x, t, s):
        before, after = self.node(t, x), self.node(s, x)
        x, x_mean = self.advance(before.centre(x), before, after)
        return after.restore(x), after.restore(x_mean)

    def advance(self, x, t: Node, s: Node):
        """From t to s: (x, x_mean), all measured from the origin."""
        raise NotImplementedError(f"{type(self).__name__} defines no advance(x, t, s)")

    def finish(self, x, t):
        node = self.node(t, x)
        return x, self.data(node.centre(x), node)

    def node(self, t, x: Tensor) -> Node:
        """The coefficients at time t, for a state of x's shape."""
        point = Point(self.sde, torch.as_tensor(t, dtype=torch.float64), x)
        lam = torch.log(point.alpha) - torch.log(point.sigma)
        if sde_lib.is_declared_affine(self.sde):  # which may know it more exactly
            lam = sde_lib.half_log_snr(self.sde, point.t)
        return Node(point.t, point.alpha, point.sigma, lam, point.shift)

    def node_at(self, lam: Tensor, x: Tensor) -> Node:
        """The coefficients at half log-SNR λ."""
        return self.node(sde_lib.time_of_half_log_snr(self.sde, lam), x)

    def data(self, x, node: Node) -> Tensor:
        """D(x) for a state measured from the origin."""
        return self.score.denoise(node.restore(x), batch_time(x, node.t))

    def eps(self, x, node: Node) -> Tensor:
        """ε̂(x) for a state measured from the origin."""
        return self.score.noise(node.restore(x), batch_time(x, node.t))


def choose_tau(
    tau: float | None, probability_flow: bool, default: float, name: str = "tau"
) -> float:
    """τ of the reverse family: 0 for the probability flow, else as given, else the default."""
    if tau is None:
        return 0.0 if probability_flow else default
    arguments.number(**{name: tau})
    if tau < 0:
        raise ValueError(f"expected {name} ≥ 0, got {tau}")
    if probability_flow and tau > 0:
        raise ValueError(
            f"the probability flow is {name} = 0, got {name} = {tau}; leave one of the two out"
        )
    return float(tau)


# --- quadrature against the exponential ------------------------------------------------------


#: Coefficients of Taylor's series of φ_1 to φ_5: 1/(j + k)!.
_TAYLOR = torch.tensor(
    [[1 / math.factorial(j + k) for j in range(20)] for k in range(1, 6)], dtype=torch.float64
)


def phi(n: int, z: Tensor) -> Tensor:
    """φ_1(z), …, φ_n(z), n ≤ 5, of a 0-dim float64 z, as a tensor (n,).

        φ_k(z) = ∫_0^1 e^{(1−v)z} v^{k−1}/(k−1)! dv,   φ_1 = expm1(z)/z,   φ_{k+1} = (φ_k − 1/k!)/z

    By Taylor's series for |z| < 1, where the recursion cancels.
    """
    small = z.abs() < 1
    series = _TAYLOR[:n] @ torch.where(small, z, 0.0) ** torch.arange(20, dtype=torch.float64)
    divisor = torch.where(small, 1.0, z)
    values = [torch.expm1(divisor) / divisor]
    for k in range(1, n):
        values.append((values[-1] - 1 / math.factorial(k)) / divisor)
    return torch.where(small, series, torch.stack(values))


def lagrange_weights(offsets: Sequence[Tensor], h: Tensor, kappa) -> Tensor:
    """w_j = ∫_0^h e^{−κ(h−u)} ℓ_j(u) du, ℓ_j Lagrange's polynomials of the nodes u_j (q,).

    Exact for polynomials of degree q − 1, whose moments are ∫ e^{−κ(h−u)} (u/h)^n du =
    h n! φ_{n+1}(−κh).
    """
    q = len(offsets)
    factorials = torch.tensor([math.factorial(n) for n in range(q)], dtype=torch.float64)
    moments = h * factorials * phi(q, -kappa * h)
    degrees = torch.arange(q, dtype=torch.float64).unsqueeze(1)
    return torch.linalg.solve((torch.stack(list(offsets)) / h) ** degrees, moments)


def combine(weights, values: Sequence[Tensor]) -> Tensor:
    """Σ_j w_j v_j."""
    return functools.reduce(torch.add, (w * v for w, v in zip(weights, values, strict=True)))
