"""Sampling by the probability-flow ODE, and its inverse: latent codes of data, and their mixtures.

The ODE's map from x_T to x_eps is one to one, so data have codes: `encode` finds them, `decode`
goes back, and `slerp` walks from one code to another (Song et al. 2021, section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import arguments
import ode
import sde_lib
from models.utils import get_score_fn, rows_are_free
from parametrization import flow_drift
from sampling_grids import check_eps, check_shape
from sampling_loop import (
    FiniteWatch,
    FractionBar,
    check_common,
    check_seeds,
    is_continuous,
    score_and_device,
    solver_options,
    with_options,
)
from sampling_noise import NoiseSource
from sampling_steps import (
    ReverseDiffusionPredictor,
    batch_time,
    refuse_bad_tables,
    register_sampler,
)


def get_ode_sampler(
    sde,
    shape,
    inverse_scaler,
    denoise: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    eps: float = 1e-3,
    device=None,
    *,
    continuous: bool = True,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    callback: Callable | None = None,
    progress: bool = False,
    steps: int | None = None,
    max_nfe: int = ode.MAX_NFE,
) -> Callable:
    """A sampler that solves the probability-flow ODE: ode_sampler(model, z=None) -> (samples, NFE).

    With "dopri5" and "bosh3" every sample takes steps of its own, so it does not depend on the
    batch; with a solver of SciPy the batch is one system.

    Args as `get_pc_sampler`, and:
      denoise: end with the x_mean of one reverse-diffusion update at eps.
      rtol, atol, method, steps, max_nfe: of `ode.solve`.
      callback: called at the start and after every step (with SciPy at every evaluation), as
        callback(evaluations, t, x, x), with the t of the sample that is furthest behind and every
        sample's x where it has come to.
      z: of the returned function, a latent code to decode; by default drawn from the prior.

    Raises: FloatingPointError, naming t, where the drift is not finite; SolverError where the
      solver gives up.
    """
    shape = check_shape(shape)
    check_eps(sde, eps, shape)
    check_seeds(seeds, shape)
    ode.check_options(method, rtol, atol, steps, max_nfe)
    check_common(inverse_scaler, callback=callback)
    options = dict(rtol=rtol, atol=atol, method=method, steps=steps, max_nfe=max_nfe)
    if denoise:
        refuse_bad_tables(sde, sde_lib.VPSDE)

    @torch.no_grad()
    def ode_sampler(model, z=None):
        score_fn, target = score_and_device(sde, model, continuous, device)
        before = score_fn.nfe
        if z is None:
            x = NoiseSource(generator, seeds).prior(sde, shape).to(target, torch.float32)
        else:
            _check_state("ode_sampler", z)
            x = z.to(target)
        bar = FractionBar(progress, "ODE")

        def watch(calls, share, t, state):
            bar(share)
            if callback is not None:
                callback(score_fn.nfe - before, t, state[0], state[0])

        watched = watch if progress or callback is not None else None
        x = _flow(sde, model, score_fn, x, float(sde.T), eps, callback=watched, **options)
        bar.close()
        if denoise:
            p = ReverseDiffusionPredictor(sde, score_fn)
            x = p.update_fn(x, batch_time(x, eps))[1]
            FiniteWatch(torch.tensor([eps])).last(x)
        return inverse_scaler(x), score_fn.nfe - before

    return ode_sampler


def _flow(sde, model, score_fn, x, t0: float, t1: float, **options) -> torch.Tensor:
    """The probability-flow ODE dx = [f − ½ g² s] dt from t0 to t1."""
    drift = flow_drift(sde, score_fn)

    def rhs(t, state):
        return (drift(state[0], t.to(x.dtype)),)

    return ode.solve(rhs, (x,), t0, t1, drop=rows_are_free(sde, model), **options).state[0]


@register_sampler(name="ode")
def _ode_from_config(config, sde, shape, inverse_scaler, eps, **options):
    sampler = with_options(get_ode_sampler, solver_options(config), "sampling.method 'ode'")
    return sampler(
        sde,
        shape,
        inverse_scaler,
        denoise=getattr(config.sampling, "noise_removal", True),
        eps=eps,
        device=getattr(config, "device", None),
        continuous=is_continuous(config),
        **options,
    )


# --- latent codes ---------------------------------------------------------------------------


@torch.no_grad()
def encode(
    sde,
    model,
    x: torch.Tensor,
    *,
    eps: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    steps: int | None = None,
    max_nfe: int = ode.MAX_NFE,
    continuous: bool = True,
):
    """The latent code z = x_T of data x (B, *) along the probability-flow ODE: (z, evaluations).

    Args:
      model: a network, or a ScoreFunction.
      x: data in the network's range, taken to be at time `eps`, by default the process's own.
      rtol, atol, method, steps, max_nfe: of `ode.solve`.
      continuous: whether the network was trained with continuous time.

    Raises: as `get_ode_sampler`; TypeError for an x that is no tensor in floating point.
    """
    _check_state("encode", x)
    eps = sde.sampling_eps if eps is None else eps
    check_eps(sde, eps, check_shape(x.shape))
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    before = score_fn.nfe
    options = dict(rtol=rtol, atol=atol, method=method, steps=steps, max_nfe=max_nfe)
    z = _flow(sde, model, score_fn, x, eps, float(sde.T), **options)
    return z, score_fn.nfe - before


def decode(sde, model, z: torch.Tensor, *, eps: float | None = None, **options):
    """The data x = x_eps of a latent code z: (x in the network's range, evaluations).

    Options and errors as in `encode`.
    """
    _check_state("decode", z)
    eps = sde.sampling_eps if eps is None else eps
    sampler = get_ode_sampler(sde, z.shape, lambda x: x, eps=eps, device=z.device, **options)
    return sampler(model, z)


def _check_state(name: str, x) -> None:
    """Refuse what is no state of the ODE, such as the pair that the other direction returned."""
    if not torch.is_tensor(x) or not x.is_floating_point():
        kind = x.dtype if torch.is_tensor(x) else type(x).__name__
        raise arguments.WrongTypeError(
            f"{name} needs a tensor in floating point, scaled as the network knows it, "
            f"got {kind}; of the pair that encode and decode return it takes the first"
        )


def round_trip_error(sde, model, x: torch.Tensor, **options) -> torch.Tensor:
    """Root mean square of decode(encode(x)) − x, for each sample: (B,). Options as in `encode`."""
    z, _ = encode(sde, model, x, **options)
    again, _ = decode(sde, model, z, **options)
    return (again - x).reshape(len(x), -1).square().mean(dim=1).sqrt()


def slerp(a: torch.Tensor, b: torch.Tensor, weight) -> torch.Tensor:
    """Spherical interpolation of codes a and b (B, *), sample by sample:

        [sin((1 − w) θ) a + sin(w θ) b]/sin θ,   cos θ = ⟨a, b⟩/(|a| |b|)     (Shoemake 1985)

    so that mixtures of two codes of the prior have a code's norm; a straight line where a and b
    are (nearly) parallel.

    Args:
      weight: w, a number for (B, *), or a vector (n,) for the path (n, B, *).
    """
    if a.shape != b.shape:
        raise ValueError(
            f"slerp needs codes of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    u, v = (sde_lib.double(c.flatten(1)) for c in (a, b))
    p, q = (torch.nn.functional.normalize(c, dim=1) for c in (u, v))
    theta = 2 * torch.atan2((p - q).norm(dim=1), (p + q).norm(dim=1))  # acos loses half the digits
    w = torch.as_tensor(weight, dtype=u.dtype, device=u.device)[..., None]
    straight = torch.sin(theta) < 1e-6
    sine = torch.where(straight, torch.ones_like(theta), torch.sin(theta))
    first = torch.where(straight, 1 - w, torch.sin((1 - w) * theta) / sine)
    second = torch.where(straight, w, torch.sin(w * theta) / sine)
    mixed = first[..., None] * u + second[..., None] * v
    return mixed.reshape(*w.shape[:-1], *a.shape).to(a.dtype)
