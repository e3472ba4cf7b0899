"""Log-likelihood by the probability-flow ODE, in nats and in bits per dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch

import ode
import sde_lib
from divergence import get_probe, value_and_divergence
from likelihood_bits import Likelihood, bits_per_dim
from models.utils import get_score_fn

__all__ = ["Likelihood", "bits_per_dim", "get_div_fn", "get_likelihood_fn", "get_log_likelihood_fn"]


def get_div_fn(fn: Callable) -> Callable:
    """div_fn(x, t, probe), the Hutchinson estimate of the divergence of `fn(x, t)`: (B,)."""

    def div_fn(x, t, eps):
        return value_and_divergence(lambda y: fn(y, t), x, eps)[1]

    return div_fn


def get_log_likelihood_fn(
    sde,
    hutchinson_type: str = "Rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-5,
    *,
    continuous: bool = True,
) -> Callable:
    """log_likelihood(model, data, *, draws=None) -> (log p in nats (B,), code z, evaluations).

        log p_eps(x) = log π(z) + ∫_eps^T ∇·f̃(x_t, t) dt,   z = x_T

    along the probability-flow ODE with drift f̃ (Song et al. 2021, eq. 39), the divergence by
    one probe that is fixed along the trajectory (eq. 40), each image's own where `draws` (a
    `randomness.Draws` of them) says so. One forward and one vector-Jacobian product per evaluation.

    Args:
      sde: the forward process.
      hutchinson_type: "Rademacher" or "Gaussian".
      rtol, atol: tolerances of the ODE, over the whole batch.
      method: a solver of SciPy.
      eps: the time of the data, in [0, T), where σ(eps) > 0.
      continuous: whether the network was trained with continuous time.

    Raises: FloatingPointError, naming t, where the network's output is not finite.
    """
    draw_probe = get_probe(hutchinson_type)
    if not 0 <= eps < sde.T or not sde_lib.alpha_sigma(sde, torch.tensor([eps]))[1].item() > 0:
        raise ValueError(
            f"likelihood needs 0 < eps < {sde.T}, with σ(eps) > 0, got {eps}; use 1e-5"
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def log_likelihood(model, data, *, draws=None):
        if not data.is_floating_point():
            raise ValueError(
                f"likelihood needs dequantised data in floating point, got {data.dtype}; "
                "add uniform noise of one level's width and scale as in training"
            )
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        rsde = sde.reverse(_watched(score_fn), probability_flow=True)
        probe = draw_probe(data, draws)

        def rhs(t, state):
            vec_t = torch.full((len(data),), t, dtype=data.dtype, device=data.device)
            return value_and_divergence(lambda x: rsde.sde(x, vec_t)[0], state[0], probe)

        start = (data, torch.zeros(len(data), dtype=data.dtype, device=data.device))
        (z, delta), nfe = ode.solve_scipy(
            rhs, start, eps, float(sde.T), rtol=rtol, atol=atol, method=method
        )
        return sde.prior_logp(z) + delta, z, nfe

    return log_likelihood


def _watched(score_fn: Callable) -> Callable:
    """`score_fn`, refused where autograd cannot see that it depends on x: the divergence would
    silently lack its part."""

    def watched(x, t):
        score = score_fn(x, t)
        if not score.requires_grad and not torch.equal(score, score_fn(x + 0.1, t)):
            raise ValueError(
                "the network's output depends on x but carries no gradient, which the likelihood "
                "needs; remove torch.no_grad or detach from its forward"
            )
        return score

    return watched


def get_likelihood_fn(
    sde,
    inverse_scaler: Callable,
    hutchinson_type: str = "Rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-5,
    *,
    continuous: bool = True,
    levels: int = 256,
) -> Callable:
    """likelihood_fn(model, data, *, draws=None) -> (bits/dim (B,), latent code z, evaluations).

    The arguments are those of `get_log_likelihood_fn` and `bits_per_dim`. The data must be
    dequantised and scaled as the network was trained; discrete values have no density.
    """
    log_likelihood = get_log_likelihood_fn(
        sde, hutchinson_type, rtol, atol, method, eps, continuous=continuous
    )

    def likelihood_fn(model, data, *, draws=None):
        logp, z, nfe = log_likelihood(model, data, draws=draws)
        return bits_per_dim(logp, data[0].numel(), inverse_scaler, levels), z, nfe

    return likelihood_fn
