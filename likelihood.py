"""Log-likelihood by the probability-flow ODE, in nats and in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import arguments
import ode
import sde_lib
from divergence import (
    Trace,
    get_probe,
    get_trace,
    mean_and_error,
    value_and_divergence,
    watched,
)
from likelihood_bits import Likelihood, bits_per_dim, check_data, log_volume_at, refuse_discrete
from models.utils import get_score_fn, rows_are_free
from parametrization import flow_drift

__all__ = [
    "Likelihood",
    "bits_per_dim",
    "get_div_fn",
    "get_likelihood_fn",
    "get_log_likelihood_fn",
    "get_ode_likelihood_fn",
]


def get_ode_likelihood_fn(
    sde,
    *,
    trace: str | Trace = "rademacher",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    eps: float = 1e-5,
    continuous: bool = True,
    max_nfe: int = ode.MAX_NFE,
) -> Callable:
    """likelihood(model, data, *, draws=None) -> Likelihood of each image, whose terms add up to

        log p_eps(x) = log π(z) + ∫_eps^T ∇·f̃(x_t, t) dt = 'prior' + 'trace',   z = x_T

    along the probability-flow ODE with drift f̃ (Song et al. 2021, eq. 39), the divergence by
    probes that are fixed along the trajectory (eq. 40), each image's own where `draws` (a
    `randomness.Draws` of them) says so. Every image takes steps of its own ("dopri5", "bosh3"),
    so its value does not depend on the batch; one forward pass per evaluation.

    The error of a step is that of x and that of the integral in nats per dimension, whichever is
    the larger share of `atol + rtol |·|`. (SciPy's solvers hold the batch's numbers together to
    it, the integral in nats, as score_sde does.)

    Args:
      sde: the forward process.
      trace: "rademacher", "gaussian", "hutch++" or "exact", or what `divergence.get_trace` gives.
      probes: how many; from two on the result has a standard error.
      rtol, atol, method, max_nfe: of `ode.solve`.
      eps: the time of the data, in [0, T), where σ(eps) > 0.
      continuous: whether the network was trained with continuous time.

    Raises: FloatingPointError, naming t, where the network's output is not finite; SolverError
      where the solver gives up.
    """
    sde_lib.check_process(sde)
    arguments.real(eps=eps)
    trace = trace if isinstance(trace, Trace) else get_trace(trace, probes)
    if not 0 <= eps < sde.T or not sde_lib.alpha_sigma(sde, torch.tensor([eps]))[1].item() > 0:
        raise ValueError(
            f"likelihood needs 0 < eps < {sde.T}, with σ(eps) > 0, got {eps}; use 1e-5"
        )
    ode.check_options(method, rtol, atol, max_nfe=max_nfe)

    @torch.inference_mode(False)
    @torch.no_grad()
    def likelihood(model, data, *, draws=None) -> Likelihood:
        check_data(data)
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        drift_fn = flow_drift(sde, score_fn, watched)
        d = 1 if method in ode.METHODS else data.shape[1:].numel()

        def rhs(t, state, probe):
            vec_t = t.to(data.dtype)
            drift, columns = trace(lambda x: drift_fn(x, vec_t), state[0], probe)
            return drift, columns / d

        (z, integral), nfe, *_ = ode.solve(
            rhs,
            (data, sde_lib.double(data.new_zeros(len(data), trace.width))),
            eps,
            float(sde.T),
            args=(trace.draw(data, draws),),
            rtol=rtol,
            atol=atol,
            method=method,
            max_nfe=max_nfe,
            drop=rows_are_free(sde, model),
        )
        prior = sde.prior_logp(z) if len(z) else z.new_zeros(0)
        mean, error = ((d * v).to(prior) for v in mean_and_error(integral, trace.stochastic))
        return Likelihood(prior + mean, error, z, nfe, {"prior": prior, "trace": mean})

    return likelihood


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
    method: str = "dopri5",
    eps: float = 1e-5,
    *,
    continuous: bool = True,
) -> Callable:
    """log_likelihood(model, data, *, draws=None) -> (log p in nats (B,), code z, evaluations).

    score_sde's, with one probe of `hutchinson_type`, "Rademacher" or "Gaussian"; the other
    arguments are those of `get_ode_likelihood_fn`, whose result says more. `method` is one of its
    or of SciPy's, in which the batch is one system.
    """
    get_probe(hutchinson_type)
    options = {"rtol": rtol, "atol": atol, "method": method, "eps": eps, "continuous": continuous}
    likelihood = get_ode_likelihood_fn(sde, trace=hutchinson_type, **options)

    def log_likelihood(model, data, *, draws=None):
        found = likelihood(model, data, draws=draws)
        return found.logp, found.code, int(found.nfe.max()) if len(data) else 0

    return log_likelihood


def get_likelihood_fn(
    sde,
    inverse_scaler: Callable,
    hutchinson_type: str = "Rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    eps: float = 1e-5,
    *,
    continuous: bool = True,
    levels: int = 256,
) -> Callable:
    """likelihood_fn(model, data, *, draws=None) -> (bits/dim (B,), latent code z, evaluations).

    The arguments are those of `get_log_likelihood_fn`, and

      inverse_scaler: elementwise and differentiable, from the network's range to [0, 1], cut into
        `levels` bins.

    The data must be dequantised and scaled as the network was trained.

    Raises: ValueError for images of discrete values, which have no density.
    """
    log_likelihood = get_log_likelihood_fn(
        sde, hutchinson_type, rtol, atol, method, eps, continuous=continuous
    )

    def likelihood_fn(model, data, *, draws=None):
        refuse_discrete(data, inverse_scaler, levels)
        logp, z, nfe = log_likelihood(model, data, draws=draws)
        nats = logp + log_volume_at(data, inverse_scaler, levels)
        return (-nats / (data.shape[1:].numel() * math.log(2))).to(logp), z, nfe

    return likelihood_fn
