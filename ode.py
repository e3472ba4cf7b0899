"""Integration of ordinary differential equations on states of several tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

import arguments
from ode_adaptive import Adaptive, SolverError, real_dtype
from ode_tableaus import TABLEAUS, State, Tableau, derivative, refuse_nonfinite, step

#: SciPy's solvers, the reference: on the host, one step size for the whole batch.
METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")

#: The most evaluations of a sample: a solve that takes more has met something that is wrong.
MAX_NFE = 20_000


class Solution(NamedTuple):
    """What `solve` returns.

    state: y at t1, tensors like the state given.
    nfe: evaluations of fn that each sample took part in while under way, (B,), int64.
    rejected: steps that were refused, of each sample, (B,), int64.
    calls: of fn, which is the largest nfe.
    """

    state: State
    nfe: torch.Tensor
    rejected: torch.Tensor
    calls: int


def solve(
    fn: Callable,
    state: Sequence[torch.Tensor],
    t0,
    t1,
    *,
    args: Sequence[torch.Tensor] = (),
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    steps: int | None = None,
    max_nfe: int = MAX_NFE,
    drop: bool = True,
    callback: Callable | None = None,
) -> Solution:
    """Integrate dy/dt = fn(t, y) from t0 to t1, each sample by steps of its own.

    The state stays on its device, in its dtype; times are float64. A sample's result does not
    depend on its neighbours, beyond what their number changes in fn's last bits. Every step looks
    at the device once.

    Args:
      fn: takes t (b,) float64, a tuple of tensors (b, *), and `args`; returns the tuple of the
        derivatives. With `drop` it must work on any rows, as finished ones leave the batch.
      state: y at t0, tensors (B, *).
      t0, t1: numbers, or (B,); in either order. SciPy's solvers take numbers.
      args: tensors (B, *), whose rows stay with their samples.
      rtol, atol: a step is accepted where its error is at most atol + rtol max(|y|, |y_new|), in
        the root mean square over the sample's numbers of each tensor of the state. atol = 0 needs
        a state without zeros.
      method: "dopri5" or "bosh3" of adaptive steps; these, "rk4" or "heun" with fixed `steps`; a
        solver of SciPy, in which the whole batch is one system.
      steps: number of equal steps.
      max_nfe: the most evaluations a sample may take, or the batch, with a solver of SciPy.
      drop: whether finished samples leave the batch; else they run along, unchanged.
      callback: called at the start and after every step (of SciPy's at every evaluation), as
        callback(calls, share, t, state), with the share of the way and the time of the sample that
        is furthest behind.

    Raises: FloatingPointError, naming sample and t, where a derivative is not finite; SolverError
      where max_nfe is reached or a step falls below the resolution of time.
    """
    y = tuple(state)
    check_options(method, rtol, atol, steps, max_nfe)
    _check_rows(y, tuple(args))
    t, end = _times(t0, t1, y)
    if steps is None and atol == 0 and any((v == 0).any() for v in y):
        raise ValueError("atol=0 allows no error to the state's numbers that are 0; use atol > 0")
    with torch.no_grad():
        if method in METHODS:
            options = {"rtol": rtol, "atol": atol, "method": method}
            return _by_scipy(fn, y, t0, t1, tuple(args), max_nfe, callback, options)
        tableau = TABLEAUS[method]
        if steps is not None:
            return _fixed(tableau, fn, t, end, y, tuple(args), steps, callback)
        run = Adaptive(tableau, fn, rtol, atol, max_nfe, drop, callback).run
        return Solution(*run(t, end, y, tuple(args)))


def _times(t0, t1, y: State) -> list[torch.Tensor]:
    """t0 and t1 as vectors (B,) on the state's device, in float64 where it has that."""
    device = y[0].device
    times = [torch.as_tensor(t, dtype=real_dtype(device), device=device) for t in (t0, t1)]
    return [t.expand(len(y[0])).clone() for t in times]


def check_options(
    method: str, rtol: float, atol: float, steps: int | None = None, max_nfe: float = MAX_NFE
) -> None:
    """Refuse what `solve` would refuse; before other long work."""
    arguments.number(rtol=rtol, atol=atol, max_nfe=max_nfe)
    arguments.optional(arguments.whole, steps=steps)
    known = (*TABLEAUS, *METHODS)
    if method not in known:
        raise ValueError(f"ODE method {method!r} is unknown; known: {', '.join(known)}")
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"an ODE needs rtol, atol ≥ 0, not both zero; got {rtol} and {atol}")
    if steps is not None and (method in METHODS or steps < 1):
        known = ", ".join(TABLEAUS)
        raise ValueError(f"steps={steps} with {method!r}; expected at least 1, and one of {known}")
    if steps is None and method in TABLEAUS and not TABLEAUS[method].error:
        raise ValueError(f"{method!r} does not choose its own steps; give steps=, or use 'dopri5'")


def _check_rows(y: State, args: State) -> None:
    lengths = [len(v) for v in (*y, *args)]
    if len(set(lengths)) != 1:
        raise ValueError(f"an ODE's state and args need one first dimension, got {lengths}")
    if not all(v.is_floating_point() for v in y):
        kinds = [str(v.dtype) for v in y]
        raise ValueError(f"an ODE's state needs floating-point numbers, got {kinds}")


def _fixed(tableau: Tableau, fn, t0, t1, y: State, args: State, steps: int, callback) -> Solution:
    """`steps` equal steps of every sample."""
    index = torch.arange(len(t0), device=t0.device)
    calls, k = 0, None
    _report(callback, 0, 0.0, t0, y)
    for i in range(steps):
        t, s = (t0 + (t1 - t0) * (j / steps) for j in (i, i + 1))
        if k is None or not tableau.fsal:
            k, calls = derivative(fn, t, y, args), calls + 1
        y, ks = step(tableau, fn, t, s, y, k, args)
        calls, k = calls + len(ks) - 1, ks[-1]
        if not torch.stack([torch.isfinite(v).all() for v in y]).all():
            for c, stage in zip(tableau.c, ks, strict=True):
                refuse_nonfinite(index, t + c * (s - t), stage)
        _report(callback, calls, (i + 1) / steps, s, y)
    nfe = torch.full((len(t0),), calls, device=t0.device)
    return Solution(y, nfe, torch.zeros_like(nfe), calls)


def _report(callback: Callable | None, calls: int, share: float, t: torch.Tensor, y: State) -> None:
    if callback is not None and len(t):
        callback(calls, share, t[0].item(), y)


def _by_scipy(fn, y: State, t0, t1, args: State, max_nfe, callback, options: dict) -> Solution:
    """The whole batch as one system."""
    B, device, calls, method = len(y[0]), y[0].device, 0, options["method"]
    if any(torch.is_tensor(t) and t.ndim for t in (t0, t1)):
        raise ValueError(f"{method!r} takes t0 and t1 as numbers; use 'dopri5' for times (B,)")
    t0, t1 = float(t0), float(t1)

    def rhs(t, state):
        nonlocal calls
        if calls >= max_nfe:
            raise SolverError(
                f"{method} is at t = {t:.6g}, on its way to {t1:g}, after {calls} evaluations; "
                f"raise max_nfe = {max_nfe}, loosen rtol = {options['rtol']:g} and atol = "
                f"{options['atol']:g}, or check the network"
            )
        if callback is not None:
            callback(calls, (t - t0) / (t1 - t0) if t1 != t0 else 1.0, t, state)
        calls += 1
        return fn(torch.full((B,), t, dtype=torch.float64, device=device), state, *args)

    state, n = solve_scipy(rhs, y, t0, t1, **options)
    nfe = torch.full((B,), n, device=device)
    return Solution(state, nfe, torch.zeros_like(nfe), n)


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

    Raises: FloatingPointError, naming t, where a derivative is not finite; SolverError where
      the solver gives up.
    """
    import scipy.integrate

    if method not in METHODS:
        raise ValueError(f"ODE method {method!r} is unknown; known: {', '.join(METHODS)}")
    sizes, calls = np.cumsum([s.numel() for s in state])[:-1], 0

    def unpack(flat: np.ndarray):
        parts = np.split(flat, sizes)
        return tuple(
            torch.from_numpy(part).to(s.device, s.dtype).reshape(s.shape)
            for part, s in zip(parts, state, strict=True)
        )

    def pack(tensors) -> np.ndarray:
        return np.concatenate([s.detach().reshape(-1).cpu().double().numpy() for s in tensors])

    def flat_fn(t: float, flat: np.ndarray) -> np.ndarray:
        nonlocal calls  # SciPy's own count leaves out what its implicit solvers spend on Jacobians
        calls += 1
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
            raise SolverError(f"{method} failed at t = {solver.t:.6g}: {message}")
    return unpack(solver.y), calls
