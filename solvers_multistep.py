"""Multistep predictors: one evaluation a step, higher order from the values of earlier steps.

They start at order 1 and gain an order a step; `start` drops the history, and so do `forget`, which
whoever else moves the state calls, and a step that does not begin where the last one ended. A
corrector of the Predictor–Corrector loop would move the state off the history, so `multistep` asks
for none. Formulas in the notation of `solvers_base.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import arguments
from sampling_steps import register_predictor
from sde_lib import half_log_snr
from solvers_base import (
    Node,
    Solver,
    Tensor,
    choose_tau,
    combine,
    lagrange_weights,
    phi,
)

#: With fewer times than this the last steps lower their order (Lu et al. 2022b, App. A).
FEW_STEPS = 15

#: A step so many times as long as the one before cannot be extrapolated to.
LONGEST_STEP = 1000.0


class Multistep(Solver):
    """A solver that remembers; a subclass defines `predict` and says how many values it wants.

    Args:
      lower_order_final: on a grid of fewer than 15 times let the order of the last steps fall to
        1, which `finish`, the step to σ = 0, has: fewer artefacts where steps are long.
    """

    multistep = True
    #: How many values of the network `predict` uses at most.
    memory = 1

    def __init__(self, sde, score_fn, probability_flow=False, *, lower_order_final=True):
        super().__init__(sde, score_fn, probability_flow)
        self.lower_order_final = lower_order_final
        self.forget()
        self.left = 0

    def forget(self) -> None:
        """Drop the history: the next step begins at order 1."""
        self.history: list[tuple[Node, Tensor]] = []
        self.expected: float | None = None
        #: What the next value of the network makes of the state that was predicted.
        self.correct: Callable[[Tensor], Tensor] | None = None

    def start(self, times):
        super().start(times)
        self.forget()
        self.left = len(times)
        if self.memory > 1:
            self._check_steps(times)

    def _check_steps(self, times) -> None:
        h = half_log_snr(self.sde, times).diff()
        leap = h[1:] > LONGEST_STEP * h[:-1]
        if leap.any():
            raise ValueError(
                f"{type(self).__name__} extrapolates over earlier steps, and the step from "
                f"t = {float(times[1:-1][leap][0]):.6g} is more than {LONGEST_STEP:g} times as "
                "long in λ as the one before; space the times more evenly, or use a predictor of "
                "one step such as 'ddim' or 'heun'"
            )

    def value(self, x, t: Node) -> Tensor:
        """What is remembered and extrapolated: D unless a subclass knows better."""
        return self.data(x, t)

    def predict(self, x, t: Node, s: Node, q: int):
        """From t to s by the first q entries of `history`, newest first: (x, x_mean)."""
        raise NotImplementedError(f"{type(self).__name__} defines no predict(x, t, s, q)")

    def advance(self, x, t, s):
        x = self._observe(x, t)
        few = self.lower_order_final and self.length is not None and self.length < FEW_STEPS
        q = min(self.memory, len(self.history), max(self.left, 1) if few else self.memory)
        self.left -= 1
        self.expected = float(s.t)
        return self.predict(x, t, s, q)

    def finish(self, x, t):
        node = self.node(t, x)
        x = self._observe(node.centre(x), node)
        return node.restore(x), self._as_data(x, node)

    def _observe(self, x, t: Node) -> Tensor:
        """Evaluate the network at (x, t), remember the value, and correct x by it."""
        if self.expected != float(t.t):
            self.forget()
        value = self.value(x, t)
        if self.correct is not None:
            x, self.correct = self.correct(value), None
        self.history = [(t, value), *self.history][: self.memory]
        return x

    def _as_data(self, x, t: Node) -> Tensor:
        return self.history[0][1]

    def _past(self, t: Node, q: int) -> tuple[list[Tensor], list[Tensor]]:
        """λ − λ_t and the values of the newest q entries."""
        return [n.lam - t.lam for n, _ in self.history[:q]], [v for _, v in self.history[:q]]


# --- DPM-Solver++ ---------------------------------------------------------------------------


def _second_order_data(history, h: Tensor) -> Tensor:
    """D_0 + (D_0 − D_1)/2r, r = h_prev/h."""
    (t, D_0), (before, D_1) = history[:2]
    return D_0 + h / (2 * (t.lam - before.lam)) * (D_0 - D_1)


@register_predictor(name="dpmpp_2m")
class DPMpp2MPredictor(Multistep):
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2). Order 2.

    x_s = (σ_s/σ_t) x + α_s (1 − e^{−h}) [D_0 + (D_0 − D_1)/2r],   r = h_prev/h
    """

    order = 2
    memory = 2

    def predict(self, x, t, s, q):
        h = s.lam - t.lam
        D = self.history[0][1] if q == 1 else _second_order_data(self.history, h)
        x = s.sigma / t.sigma * x - s.alpha * torch.expm1(-h) * D
        return x, x


@register_predictor(name="dpmpp_2m_sde")
class DPMpp2MSDEPredictor(Multistep):
    """SDE-DPM-Solver++(2M) on the reverse family (Lu et al. 2022b, App. B). Weak order 2.

        x_s = (σ_s/σ_t) e^{−τ²h} x + α_s (1 − e^{−(1+τ²)h}) [D_0 + (D_0 − D_1)/2r]
              + σ_s √(1 − e^{−2τ²h}) z

    Args:
      tau: τ ≥ 0; 1, as published, by default, and 0, which is `dpmpp_2m`, for the probability
        flow. k-diffusion's eta is τ².
    """

    order = 2
    stochastic = True
    memory = 2

    def __init__(
        self,
        sde,
        score_fn,
        probability_flow=False,
        *,
        tau: float | None = None,
        lower_order_final=True,
    ):
        super().__init__(sde, score_fn, probability_flow, lower_order_final=lower_order_final)
        self.tau2 = choose_tau(tau, probability_flow, 1.0) ** 2
        self.stochastic = self.tau2 > 0

    def predict(self, x, t, s, q):
        h = s.lam - t.lam
        D = self.history[0][1] if q == 1 else _second_order_data(self.history, h)
        x_mean = s.sigma / t.sigma * torch.exp(-self.tau2 * h) * x
        x_mean = x_mean - s.alpha * torch.expm1(-(1 + self.tau2) * h) * D
        if not self.stochastic:
            return x_mean, x_mean
        std = s.sigma * torch.sqrt(-torch.expm1(-2 * self.tau2 * h))
        return x_mean + std * self.randn_like(x), x_mean


@register_predictor(name="dpmpp_3m")
class DPMpp3MPredictor(Multistep):
    """DPM-Solver++(3M). Order 3.

        x_s = (σ_s/σ_t) x + α_s h [φ_1(−h) D_0 + φ_2(−h) D' + φ_3(−h) D'']
        D_{01} = (D_0 − D_1)/r_0,   D_{12} = (D_1 − D_2)/r_1,   r_i = h_i/h
        D' = D_{01} + r_0/(r_0 + r_1) (D_{01} − D_{12}),   D'' = 2 (D_{01} − D_{12})/(r_0 + r_1)

    The published code and its descendants leave out the 2 in D'', which makes them order 2.

    Args:
      legacy_3m: leave it out too, for parity.
    """

    order = 3
    memory = 3

    def __init__(
        self,
        sde,
        score_fn,
        probability_flow=False,
        *,
        legacy_3m: bool = False,
        lower_order_final=True,
    ):
        super().__init__(sde, score_fn, probability_flow, lower_order_final=lower_order_final)
        self.factor = 1.0 if legacy_3m else 2.0
        self.order = 2 if legacy_3m else 3

    def predict(self, x, t, s, q):
        h = s.lam - t.lam
        x = s.sigma / t.sigma * x
        if q < 3:
            D = self.history[0][1] if q == 1 else _second_order_data(self.history, h)
            x = x - s.alpha * torch.expm1(-h) * D
            return x, x
        (_, D_0), (one, D_1), (two, D_2) = self.history
        r_0, r_1 = (t.lam - one.lam) / h, (one.lam - two.lam) / h
        D_01, D_12 = (D_0 - D_1) / r_0, (D_1 - D_2) / r_1
        bend = (D_01 - D_12) / (r_0 + r_1)
        weights = s.alpha * h * phi(3, -h)
        x = x + combine(weights, (D_0, D_01 + r_0 * bend, self.factor * bend))
        return x, x


# --- exponential Adams–Bashforth ------------------------------------------------------------


def _check_order(name: str, value: int, lowest: int = 1) -> int:
    if value not in range(lowest, 5):
        raise ValueError(f"expected {name} from {lowest} to 4, got {value}; 2 or 3 are usual")
    return int(value)


@register_predictor(name="exp_ab")
class ExponentialAdamsBashforthPredictor(Multistep):
    """Exponential Adams–Bashforth of order q (Hochbruck & Ostermann 2010, 2.7). Order q.

        data form:   x_s = (σ_s/σ_t) x + α_s Σ_j w_j D_j,   w_j = ∫_0^h e^{−(h−u)} ℓ_j(u) du
        noise form:  x_s = (α_s/α_t) x − σ_s Σ_j w_j ε̂_j,   w_j = ∫_0^h e^{h−u} ℓ_j(u) du

    ℓ_j are Lagrange's polynomials of the last q values in λ. Multistep DPM-Solver++ and DPM-Solver;
    DEIS (Zhang & Chen 2022) is the noise form with polynomials in other variables.

    Args:
      order: q, 1 to 4.
      form: "data" or "noise".
    """

    order = 3

    def __init__(
        self,
        sde,
        score_fn,
        probability_flow=False,
        *,
        order: int = 3,
        form: str = "data",
        lower_order_final=True,
    ):
        super().__init__(sde, score_fn, probability_flow, lower_order_final=lower_order_final)
        if form not in ("data", "noise"):
            raise ValueError(f"exp_ab has the forms 'data' and 'noise', got {form!r}")
        self.order = self.memory = _check_order("order", order)
        self.form = form
        self.multistep = order > 1

    def value(self, x, t):
        return self.data(x, t) if self.form == "data" else self.eps(x, t)

    def _as_data(self, x, t):
        value = self.history[0][1]
        return value if self.form == "data" else (x - t.sigma * value) / t.alpha

    def predict(self, x, t, s, q):
        h = s.lam - t.lam
        offsets, values = self._past(t, q)
        if self.form == "data":
            weights = s.alpha * lagrange_weights(offsets, h, 1.0)
            x = s.sigma / t.sigma * x + combine(weights, values)
        else:
            weights = -s.sigma * lagrange_weights(offsets, h, -1.0)
            x = s.alpha / t.alpha * x + combine(weights, values)
        return x, x


# --- predictors that correct their own last step ---------------------------------------------


@register_predictor(name="unipc")
class UniPCPredictor(Multistep):
    """UniPC-p in data form (Zhao et al. 2023, alg. 5 to 8). Order p + 1, without corrector p.

        x_s = (σ_s/σ_t) x + α_s (1 − e^{−h}) D_0 − α_s B Σ_k ρ_k D_k,
        D_k = (D(λ_k) − D_0)/r_k,   r_k = (λ_k − λ_t)/h,   R ρ = b,   R_{jk} = r_k^{j−1},
        b_j = j! (−h) φ_{j+1}(−h)/B,   B = e^{−h} − 1 ("bh2") or −h ("bh1")

    λ_k are the p − 1 earlier values; the corrector adds D at the predicted point, r = 1, which is
    also the next step's D_0, so that it costs no evaluation. `finish` corrects the last step. With
    one unknown ρ = ½, as published: only there does B matter, and with more B cancels.

    Args:
      order: p, 1 to 4; published are 3 unconditionally and 2 under guidance.
      variant: "bh1" or "bh2".
      corrector: whether to correct.
    """

    order = 4

    def __init__(
        self,
        sde,
        score_fn,
        probability_flow=False,
        *,
        order: int = 3,
        variant: str = "bh2",
        corrector: bool = True,
        lower_order_final=True,
    ):
        super().__init__(sde, score_fn, probability_flow, lower_order_final=lower_order_final)
        if variant not in ("bh1", "bh2"):
            raise ValueError(f"unipc has the variants 'bh1' and 'bh2', got {variant!r}")
        self.memory = _check_order("order", order)
        self.order = order + 1 if corrector else order
        self.variant, self.corrector = variant, corrector
        self.multistep = corrector or order > 1

    def predict(self, x, t, s, q):
        h = s.lam - t.lam
        offsets, values = self._past(t, q)
        D_0, r = values[0], [offset / h for offset in offsets[1:]]
        slopes = [(v - D_0) / r_k for v, r_k in zip(values[1:], r, strict=True)]
        base = s.sigma / t.sigma * x - s.alpha * torch.expm1(-h) * D_0

        def correct(D):
            return base + combine(s.alpha * self._rho([*r, h / h], h), [*slopes, D - D_0])

        self.correct = correct if self.corrector else None
        x = base + combine(s.alpha * self._rho(r, h), slopes) if slopes else base
        return x, x

    def _rho(self, r: list[Tensor], h: Tensor) -> Tensor:
        """−B ρ for the nodes r (n,)."""
        n = len(r)
        B = -h if self.variant == "bh1" else torch.expm1(-h)
        if n == 1:
            return -0.5 * B.reshape(1)
        k = torch.arange(1, n + 1, dtype=torch.float64)
        b = torch.exp(torch.lgamma(k + 1)) * h * phi(n + 1, -h)[1:]
        return torch.linalg.solve(torch.stack(r) ** (k - 1).unsqueeze(1), b)


@register_predictor(name="sa_solver")
class SASolverPredictor(Multistep):
    """SA-Solver: stochastic Adams in the reverse family (Xue et al. 2023, sections 4 and 5).

        x_s = (σ_s/σ_t) e^{−τ²h} x + α_s Σ_j b_j D_j + σ_s √(1 − e^{−2τ²h}) z
        b_j = (1+τ²) ∫_0^h e^{−(1+τ²)(h−u)} ℓ_j(u) du

    ℓ_j are Lagrange's polynomials of the last q values in λ; the corrector repeats the step from
    the last c of them and D at the predicted point, with the same z and no new evaluation. Order q,
    or min(q, c) + 1 corrected, where τ = 0; with noise weak order 2 at most.

    Args:
      predictor_order: q, 1 to 4; published are 3 unconditionally and 2 under guidance.
      corrector_order: c, 0 (no corrector) to 4.
      tau: τ on `interval`, 0 elsewhere; or a function τ(t), which is constant over a step. 1 by
        default, 0 for the probability flow.
      interval: first and last time of the noise, as fractions of T; as published for VP.
    """

    order = 2
    stochastic = True

    def __init__(
        self,
        sde,
        score_fn,
        probability_flow=False,
        *,
        predictor_order: int = 3,
        corrector_order: int = 3,
        tau: float | Callable[[float], float] | None = None,
        interval: tuple[float, float] = (0.2, 0.8),
        lower_order_final=True,
    ):
        super().__init__(sde, score_fn, probability_flow, lower_order_final=lower_order_final)
        self.q = _check_order("predictor_order", predictor_order)
        self.c = _check_order("corrector_order", corrector_order, 0)
        self.memory = max(self.q, self.c)
        if not isinstance(interval, tuple | list) or len(interval) != 2:
            raise ValueError(f"sa_solver needs an interval (first, last), got {interval!r}")
        arguments.number(first=interval[0], last=interval[1])
        low, high = (float(v) * float(sde.T) for v in interval)
        if not low <= high:
            raise ValueError(f"sa_solver needs an interval (first, last), got {interval}")
        constant = choose_tau(1.0 if callable(tau) else tau, probability_flow, 1.0)
        self.tau = tau if callable(tau) else lambda t: constant if low <= t <= high else 0.0
        self.stochastic = constant > 0
        order = min(self.q, self.c) + 1 if self.c else self.q
        self.order = min(order, 2) if self.stochastic else order
        self.multistep = self.memory > 1 or self.c > 0

    def predict(self, x, t, s, q):
        h, tau2 = s.lam - t.lam, float(self.tau(float(t.t))) ** 2
        kappa = 1 + tau2
        drive = s.sigma / t.sigma * torch.exp(-tau2 * h) * x
        noise = 0.0
        if tau2 > 0:
            noise = s.sigma * torch.sqrt(-torch.expm1(-2 * tau2 * h)) * self.randn_like(x)

        def integral(offsets, values):
            weights = s.alpha * kappa * lagrange_weights(offsets, h, kappa)
            return drive + combine(weights, values)

        offsets, values = self._past(t, min(q, self.c))

        def correct(D):
            return integral([h, *offsets], [D, *values]) + noise

        self.correct = correct if self.c else None
        x_mean = integral(*self._past(t, min(q, self.q)))
        return x_mean + noise, x_mean
