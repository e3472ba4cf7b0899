"""Posterior steps by singular values: the measurement in A's own basis, DDRM and DDNM+.

In the direction of singular value s_i > 0 the measurement says x̄_i = (Uᵀ y)_i / s_i with noise of
standard deviation σ_y/s_i, beside σ_t/α_t of the state; a direction of s_i = 0 is not measured.
"""

from __future__ import annotations

import math

import torch

from controllable_generation_methods import need_svd
from solvers_base import Solver

Tensor = torch.Tensor


class Spectrum:
    """A measurement by singular values: x̄_i = (Uᵀ y)_i / s_i, of standard deviation σ_y / s_i.

    Args:
      operator: A, with singular values.
      y: (1 or B, *shape_out).
      noise: σ_y.
    """

    def __init__(self, operator, y: Tensor, noise: float, method: str):
        self.svd, self.y, self.noise = need_svd(operator, method), y, noise
        self._at: tuple = (None, ())

    def at(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """On x's device, in its dtype: x̄ (1 or B, r), its standard deviation (r,), and which
        directions are measured at all (r,)."""
        key = (x.device, x.dtype)
        if self._at[0] != key:
            inverse = self.svd.inverse_values(x)
            values = self.svd.Ut(self.y.to(x)) * inverse, self.noise * inverse, inverse > 0
            self._at = key, values
        return self._at[1]

    def noisiest(self, x: Tensor) -> float:
        """The largest σ_y/s of a direction that is measured, in x's dtype as `at` has it."""
        s = self.svd.values.to(x.dtype)
        return self.noise / s[self.svd.nonzero(s)].min().item()

    def move(self, x: Tensor, where: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
        """x with its coefficients `where` moved to `target`, the rest of it left."""
        shift = torch.where(where, target - self.svd.Vt(x), torch.zeros_like(target))
        return x + weight * self.svd.V(shift)


class DDRMPredictor(Solver):
    """DDRM's update (Kawar et al. 2022) of x̄ = x/α, with ρ = σ/α and D = E[x_0 | x_t]:

        unmeasured    x̄_s = D + √(1 − η²) ρ_s (x̄_t − D)/ρ_t + η ρ_s z
        ρ_s < σ_y/s   x̄_s = D + √(1 − η²) ρ_s (ȳ − D)/(σ_y/s) + η ρ_s z
        ρ_s ≥ σ_y/s   x̄_s = (1 − η_b) D + η_b ȳ + √(ρ_s² − η_b² σ_y²/s²) z

    in each direction of singular value s. Without noise or unmeasured directions, and η_b = 1, the
    end is ȳ itself.
    """

    stochastic = True

    def __init__(
        self,
        sde,
        score_fn,
        probability_flow=False,
        *,
        spectrum: Spectrum,
        eta: float = 0.85,
        eta_b: float = 1.0,
    ):
        super().__init__(sde, score_fn, probability_flow)
        self.spectrum, self.eta, self.eta_b = spectrum, eta, eta_b

    def advance(self, x, t, s):
        D, z, keep = self.data(x, t), self.randn_like(x), math.sqrt(1 - self.eta**2)
        ybar, std, known = self.spectrum.at(x)
        Vt = self.spectrum.svd.Vt
        d, e = Vt(D), Vt(z)
        free = D + keep * s.rho / t.rho * (x / t.alpha - D)
        noisier = s.rho < std
        pull = keep * s.rho / torch.where(noisier, std, 1.0)
        mean = torch.where(noisier, d + pull * (ybar - d), self._mix(d, ybar))
        room = (s.rho**2 - (self.eta_b * std) ** 2).clamp(min=0).sqrt()
        spread = torch.where(noisier, self.eta * s.rho.to(std), room)
        x_mean = self.spectrum.move(free, known, mean)
        moved = self.spectrum.move(free + self.eta * s.rho * z, known, mean + spread * e)
        return s.alpha * moved, s.alpha * x_mean

    def finish(self, x, t):
        node = self.node(t, x)
        D = self.data(node.centre(x), node)
        ybar, std, known = self.spectrum.at(x)
        d = self.spectrum.svd.Vt(D)
        return x, self.spectrum.move(D, known & (std == 0), self._mix(d, ybar))

    def _mix(self, d, ybar):
        return (1 - self.eta_b) * d + self.eta_b * ybar

    def begin(self, x):
        """The state at T from the prior's draw: x̄ ~ N(ȳ, ρ_T² − σ_y²/s²) where measured."""
        node = self.node(torch.as_tensor(float(self.sde.T), dtype=torch.float64), x)
        ybar, std, known = self.spectrum.at(x)
        left = (1 - (std / node.rho) ** 2).clamp(min=0).sqrt()
        x = node.centre(x)
        target = node.alpha * ybar + left * self.spectrum.svd.Vt(x)
        return node.restore(self.spectrum.move(x, known & (std <= node.rho), target))


class DDNMPlusPredictor(Solver):
    """DDNM+ (Wang et al. 2023): DDIM's step with a denoiser drawn to the measurement as far as the
    noise that this brings has room in the noise of the state.

        x_s = b x_t + a D̂ + √(w_s − b² w_t) z,   D̂ = D + λ (ȳ − D),
        κ_s = b κ_t + a λ,   w_s = σ_s² − κ_s² σ_y²/s²,   λ ≤ 1 the largest with w_s ≥ b² w_t

    in each direction of singular value s, with DDIM's a, b and σ̃ for x_s = b x_t + a D + σ̃ z. κ is
    how often the noise of y is in the state. The paper hides it step by step, as if it were drawn
    anew in each; but it is the same in all, and adds up: with small singular values to nothing but
    noise.
    """

    stochastic = True
    multistep = True  # κ and w belong to the state of the last step

    def __init__(
        self, sde, score_fn, probability_flow=False, *, spectrum: Spectrum, eta: float = 0.85
    ):
        super().__init__(sde, score_fn, probability_flow)
        self.spectrum, self.eta = spectrum, eta

    def start(self, times):
        super().start(times)
        self.brought: tuple | None = None

    def advance(self, x, t, s):
        h = s.lam - t.lam
        removed = -(self.eta**2) * torch.expm1(-2 * h)
        half = 0.5 * torch.log1p(-removed)
        a, b = -s.alpha * torch.expm1(half - h), s.sigma / t.sigma * torch.exp(half)
        D, z = self.data(x, t), self.randn_like(x)
        ybar, std, known = self.spectrum.at(x)
        zero = torch.zeros_like(std)
        kappa, w = self.brought or (zero, zero + t.sigma**2)
        most = (s.sigma**2 - b**2 * w).clamp(min=0).sqrt() / torch.where(known, std, 1.0)
        share = ((most - b * kappa) / a).clamp(0, 1)
        kappa = b * kappa + a * share
        total = (s.sigma**2 - (kappa * std) ** 2).clamp(min=0)
        fresh = (total - b**2 * w).clamp(min=0).sqrt()
        self.brought = kappa, total
        d, e = self.spectrum.svd.Vt(D), self.spectrum.svd.Vt(z)
        D = self.spectrum.move(D, known, d + share * (ybar - d))
        x_mean = b * x + a * D
        return x_mean + self.spectrum.move(s.sigma * removed.sqrt() * z, known, fresh * e), x_mean
