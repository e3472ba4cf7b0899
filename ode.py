"""Integration of ordinary differential equations on states of several tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")


def solve_scipy(
    fn: Callable,
    state: Sequence[torch.Tensor],
    t0: float,
    t1: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
):
    """Integrate dy/dt = fn(t, y) from t0 to t1 by SciPy, on the host in float64.

    Args:
      fn: takes t, a float, and a tuple of tensors; returns the tuple of their derivatives.
      state: y at t0. The error norm runs over all numbers of all tensors together.
      method: a solver of `scipy.integrate.solve_ivp`.

    Returns: y at t1, as a tuple of tensors like `state`, and the number of evaluations of fn.

    Raises: FloatingPointError, naming t, where a derivative is not finite; RuntimeError where
      the solver gives up.
    """
    import scipy.integrate

    if method not in METHODS:
        raise ValueError(f"ODE method {method!r} is unknown; known: {', '.join(METHODS)}")
    sizes = np.cumsum([s.numel() for s in state])[:-1]

    def unpack(flat: np.ndarray):
        parts = np.split(flat, sizes)
        return tuple(
            torch.from_numpy(part).to(s.device, s.dtype).reshape(s.shape)
            for part, s in zip(parts, state, strict=True)
        )

    def pack(tensors) -> np.ndarray:
        return np.concatenate([s.detach().reshape(-1).cpu().double().numpy() for s in tensors])

    def flat_fn(t: float, flat: np.ndarray) -> np.ndarray:
        derivative = pack(fn(float(t), unpack(flat)))
        if not np.isfinite(derivative).all():
            raise FloatingPointError(
                f"the ODE's right-hand side is not finite at t = {t:.6g}; "
                "check the network (untrained or diverged?) and eps"
            )
        return derivative

    solver = getattr(scipy.integrate, method)(flat_fn, t0, pack(state), t1, rtol=rtol, atol=atol)
    while solver.status == "running":
        message = solver.step()
        if solver.status == "failed":
            raise RuntimeError(f"{method} failed at t = {solver.t:.6g}: {message}")
    return unpack(solver.y), solver.nfev
