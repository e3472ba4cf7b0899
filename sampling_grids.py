"""The times that a sampler visits, and the checks of shape and end time that all samplers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral

import torch

import arguments
import sde_lib
from sde_lib import alpha_sigma, check_process

#: Karras et al. 2022, section 3: 5 to 10 all do well.
RHO = 7.0


def time_grid(
    sde,
    eps: float,
    steps: int,
    schedule: str | Callable = "uniform",
    *,
    rho: float = RHO,
    start: float | None = None,
) -> torch.Tensor:
    """`steps` falling times from T to eps, float64 on the CPU: steps − 1 intervals and a last call.

    Args:
      schedule: "uniform" in t; "quadratic", uniform in √t; "logsnr", uniform in λ; "karras",
        uniform in (σ/α)^{1/ρ} (Karras et al. 2022, eq. 5); or a function of (sde, eps, steps).
      rho: the ρ of "karras".
      start: of a schedule by name, in place of T.
    """
    arguments.whole(steps=steps)
    arguments.real(eps=eps, rho=rho)
    if steps < 1:
        raise ValueError(f"sampling needs steps ≥ 1, got {steps}")
    first = float(sde.T) if start is None else start
    ends = torch.tensor([first, eps], dtype=torch.float64)
    if callable(schedule):
        return _checked(_as_times(schedule(sde, eps, steps), steps), sde, steps)
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(f"schedule {schedule!r} is unknown; known: {known}, or a function")
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    times = SCHEDULES[schedule](sde, ends, u, rho)
    times[0], times[1:][-1:] = ends[0], ends[1]  # free of rounding
    return _checked(times, sde, steps)


def _as_times(values, steps: int) -> torch.Tensor:
    try:
        return torch.as_tensor(values).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the schedule must give {steps} falling times, got {values!r} of type "
            f"{type(values).__name__}; return a tensor or a list of numbers"
        ) from error


def _line(ends: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return ends[0] + u * (ends[1] - ends[0])


def _uniform(sde, ends, u, rho):
    return _line(ends, u)


def _quadratic(sde, ends, u, rho):
    return _line(ends.sqrt(), u) ** 2


def _logsnr(sde, ends, u, rho):
    return sde_lib.time_of_half_log_snr(sde, _line(_lambda(sde, ends, "logsnr"), u))


def _karras(sde, ends, u, rho):
    if not rho > 0:
        raise ValueError(f"schedule 'karras' needs rho > 0, got {rho}; the published value is 7")
    root = torch.exp(-_lambda(sde, ends, "karras") / rho)
    return sde_lib.time_of_half_log_snr(sde, -rho * torch.log(_line(root, u)))


def _lambda(sde, ends, schedule):
    if not sde_lib.is_affine(sde):
        raise ValueError(
            f"schedule {schedule!r} needs λ(t), and the drift or mean of {type(sde).__name__} "
            "is not affine in x; use uniform or quadratic"
        )
    return sde_lib.half_log_snr(sde, ends)


#: By name: times from the ends (T, eps), u in [0, 1] and ρ.
SCHEDULES: dict[str, Callable] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "karras": _karras,
}


def _checked(times: torch.Tensor, sde, steps: int) -> torch.Tensor:
    if (
        times.shape != (steps,)
        or not (times.diff() < 0).all()
        or not 0 <= times[-1] <= times[0] <= sde.T
    ):
        raise ValueError(
            f"the schedule must give {steps} falling times in [0, {sde.T}], got {times}"
        )
    return times


def check_eps(sde, eps: float, shape) -> None:
    """Refuse an end time outside [0, T) or at which the process has no noise left."""
    check_process(sde)
    arguments.real(eps=eps)
    if (
        not 0 <= eps < sde.T
        or not alpha_sigma(sde, torch.tensor([eps]), torch.zeros((1,) * len(shape)))[1].item() > 0
    ):
        raise ValueError(
            f"{type(sde).__name__} needs 0 < eps < {sde.T}, with σ(eps) > 0, got {eps}; "
            f"use {sde.sampling_eps:g}"
        )


def check_shape(shape) -> tuple[int, ...]:
    """`shape` as a tuple; refused where it is not (B, *) of positive numbers."""
    numbers = tuple(shape) if isinstance(shape, Iterable) else ()
    whole = all(isinstance(n, Integral) or getattr(n, "ndim", None) == 0 for n in numbers)
    if len(numbers) < 2 or not whole or min(numbers) < 1:
        raise ValueError(f"expected a shape (B, *) of positive integers, got {shape!r}")
    return tuple(int(n) for n in numbers)
