"""Names of the solvers of linear inverse problems, and what all of them share.

    sampler = get_inverse_solver(name)(sde, shape, operator, y, noise=σ_y, **options)
    samples, evaluations = sampler(model)

Every one draws, or tries to, from p(x_0 | y) with y = A x_0 + σ_y z. How near each comes is in
docs/inverse_problems.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

import arguments
from controllable_generation_loop import check_finite
from sampling import get_corrector, get_pc_sampler, get_predictor
from sampling_loop import class_of, score_and_device, with_options
from sampling_steps import add_to, load, look_up

#: By name: functions of (sde, shape, operator, y, *, noise, steps, schedule, rho, eps, continuous,
#: generator, seeds, progress, **options) that return sampler(model) -> (samples, evaluations).
METHODS: dict[str, Callable] = {}

#: Modules that register methods, loaded when a name is asked for.
_PROVIDERS = tuple(f"controllable_generation_{part}" for part in ("projection", "posterior", "smc"))


def register_inverse_solver(fn=None, *, name: str):
    """Register a solver of inverse problems under `name`; see METHODS for its signature."""
    return add_to(METHODS, "inverse solver", fn, name)


def get_inverse_solver(name: str) -> Callable:
    """The solver registered under `name`."""
    return look_up(METHODS, "inverse solver", name, _PROVIDERS)


def load_inverse_solvers() -> dict[str, Callable]:
    """METHODS, with every module of this room that registers some loaded."""
    load(_PROVIDERS)
    return METHODS


# --- what is checked before the long work -----------------------------------------------------


def check_problem(shape, operator, y: torch.Tensor, noise: float) -> float:
    """σ_y as a float, after the check that samples, operator and measurement fit one another.

    Raises: ValueError naming what does not.
    """
    if tuple(shape[1:]) != tuple(operator.shape_in):
        raise ValueError(
            f"samples of shape {tuple(shape[1:])} do not fit {operator!r}; make the operator for "
            "the shape of one sample"
        )
    check_measurement(operator, y, shape[0])
    check_finite(y, "measurements")
    return check_noise(noise)


def check_measurement(operator, y: torch.Tensor, n: int) -> None:
    """Refuse what is no measurement of n samples by `operator`, one for all or one each."""
    if not torch.is_tensor(y) or not y.is_floating_point():
        kind = y.dtype if torch.is_tensor(y) else type(y).__name__
        raise arguments.WrongTypeError(
            f"y: expected a measurement, a tensor in floating point, got {kind}; operator(x) makes "
            "one"
        )
    out = tuple(operator.shape_out)
    if tuple(y.shape[1:]) != out or len(y) not in (1, n):
        raise ValueError(
            f"expected a measurement of shape (1 or {n}, *{out}) for {n} samples, got "
            f"{tuple(y.shape)}; give one y for all samples, or one each"
        )


def check_noise(noise: float) -> float:
    """σ_y as a float; refused where it is no standard deviation."""
    arguments.number(noise=noise)
    if not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"expected the standard deviation of the noise, ≥ 0, got {noise}")
    return float(noise)


def need_svd(operator, method: str):
    """The singular values of `operator`, or an error that names a method without."""
    if operator.svd is None:
        raise ValueError(
            f"{method} needs singular values, and those of {operator!r} are not cheap; use a "
            "smaller shape, or a method that goes by A and its adjoint, such as 'mmps' or 'ddnm'"
        )
    return operator.svd


# --- a method that is a wrapper of the denoiser -----------------------------------------------


def chosen_predictor(predictor: Any, solver: dict | None = None) -> Any:
    """A predictor, by its name or a class, with the options `solver`."""
    predictor = get_predictor(predictor) if isinstance(predictor, str) else predictor
    if not solver:
        return predictor
    return with_options(predictor, solver, f"predictor {class_of(predictor).__name__}")


def method_sampler(
    name: str, wrap: Callable, sde, shape, own: dict[str, Any], options: dict[str, Any]
) -> Callable:
    """`get_wrapped_sampler` of the method `name`, by its `own` arguments and a caller's `options`.

    Raises: ValueError for an option that there is not, and for one that the method sets itself.
    """
    known = set()
    for fn in (get_wrapped_sampler, get_pc_sampler):
        parameters = inspect.signature(fn).parameters.values()
        known |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    known -= own.keys()
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"{name} has no option {', '.join(map(repr, unknown))}; besides those of its own it "
            f"has {', '.join(sorted(known))}"
        )
    return get_wrapped_sampler(wrap, sde, shape, **own, **options)


def get_wrapped_sampler(
    wrap: Callable,
    sde,
    shape,
    *,
    predictor: Any = "ancestral_sampling",
    corrector: Any = None,
    snr: float = 0.16,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = True,
    denoise: bool = True,
    eps: float | None = None,
    device=None,
    solver: dict | None = None,
    **options: Any,
) -> Callable:
    """A sampler of the score `wrap(score_fn)`, under any predictor and corrector.

    Args:
      wrap: from the network's ScoreFunction to another.
      predictor, corrector: classes, or their registered names.
      eps: where sampling ends; by default `sde.sampling_eps`.
      solver: options of the predictor, by name.
      options: of `sampling.get_pc_sampler`: steps, schedule, rho, dtype, generator, seeds,
        callback, progress, constrain, start.
      The others are those of `sampling.get_pc_sampler`.
    """
    predictor = chosen_predictor(predictor, solver)
    corrector = get_corrector(corrector) if isinstance(corrector, str) else corrector
    inner = get_pc_sampler(
        sde,
        shape,
        predictor,
        corrector,
        lambda x: x,
        snr,
        n_steps,
        probability_flow,
        continuous,
        denoise,
        sde.sampling_eps if eps is None else eps,
        device,
        **options,
    )

    def sampler(model):
        return inner(wrap(score_and_device(sde, model, continuous, device)[0]))

    return sampler
