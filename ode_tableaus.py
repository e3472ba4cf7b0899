"""Runge–Kutta methods: their coefficients as data, and one step of any of them, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

State = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Tableau:
    """One explicit Runge–Kutta method:

        k_i = f(t + c_i h, y + h Σ_j a_ij k_j),   y_new = y + h Σ_i b_i k_i

    Where the last row of `a` is `b` (first same as last), the last k is the next step's first.

    Attributes:
      order: of y_new.
      a: rows of the stages but the first.
      error: b − b̂, so that h Σ error_i k_i estimates the error of an embedded method of order
        `order` − 1; empty for a method of fixed steps.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] = ()

    @property
    def fsal(self) -> bool:
        """Whether the last stage is evaluated at the new state."""
        return bool(self.a) and (*self.a[-1], 0.0) == self.b

    @property
    def evaluations(self) -> int:
        """Evaluations that a step takes, but for the first."""
        return len(self.b) - self.fsal


#: Dormand & Prince 1980, 5(4) with seven stages.
_DOPRI5 = Tableau(
    order=5,
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    error=(71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)

#: Bogacki & Shampine 1989, 3(2) with four stages.
_BOSH3 = Tableau(
    order=3,
    c=(0, 1 / 2, 3 / 4, 1),
    a=((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
)

#: Kutta 1901, the classical method of order 4.
_RK4 = Tableau(
    order=4,
    c=(0, 1 / 2, 1 / 2, 1),
    a=((1 / 2,), (0, 1 / 2), (0, 0, 1)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)

#: Heun 1900, the trapezoidal rule with Euler's method as its guess.
_HEUN = Tableau(order=2, c=(0, 1), a=((1,),), b=(1 / 2, 1 / 2))

#: Methods by name; those with an error estimate choose their own steps.
TABLEAUS = {"dopri5": _DOPRI5, "bosh3": _BOSH3, "rk4": _RK4, "heun": _HEUN}


def derivative(fn: Callable, t: torch.Tensor, y: State, args: Sequence[torch.Tensor]) -> State:
    """fn(t, y, *args) in the dtypes of y.

    Raises: ValueError where a derivative is missing or of another shape than its tensor.
    """
    k = tuple(fn(t, y, *args))
    shapes = [tuple(tuple(v.shape) for v in tensors) for tensors in (y, k)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the ODE's right-hand side returned shapes {shapes[1]} for a state of {shapes[0]}; "
            "expected one derivative for each tensor, of its shape"
        )
    return tuple(v.detach().to(s.dtype) for v, s in zip(k, y, strict=True))


def per_row(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A number per sample, (b,), shaped and cast to multiply x, (b, *)."""
    return v.to(x.dtype).reshape(len(v), *(1,) * (x.ndim - 1))


def weighted(weights: Sequence[float], ks: Sequence[State]) -> State:
    """Σ w_i k_i, tensor by tensor."""
    terms = [(float(w), k) for w, k in zip(weights, ks, strict=True) if w]
    sums = tuple(v * terms[0][0] for v in terms[0][1])
    for w, k in terms[1:]:
        for total, v in zip(sums, k, strict=True):
            total.add_(v, alpha=w)
    return sums


def moved(y: State, h: torch.Tensor, slope: State) -> State:
    """y + h · slope, with a step h per row."""
    return tuple(torch.addcmul(s, per_row(h, s), k) for s, k in zip(y, slope, strict=True))


def step(
    tableau: Tableau,
    fn: Callable,
    t: torch.Tensor,
    s: torch.Tensor,
    y: State,
    k: State,
    args: Sequence[torch.Tensor] = (),
) -> tuple[State, list[State]]:
    """From t (b,) to s (b,), with k = fn(t, y): the new state, and every stage's derivative."""
    h, ks, new = s - t, [k], y
    for c, a in zip(tableau.c[1:], tableau.a, strict=True):
        new = moved(y, h, weighted(a, ks))
        ks.append(derivative(fn, s if c == 1 else t + c * h, new, args))
    if not tableau.fsal:
        new = moved(y, h, weighted(tableau.b, ks))
    return new, ks


def refuse_nonfinite(index: torch.Tensor, t: torch.Tensor, k: State) -> None:
    """Raise FloatingPointError, naming sample and t, where a derivative is not finite."""
    good = torch.stack([torch.isfinite(v).reshape(len(v), -1).all(dim=1) for v in k]).all(dim=0)
    if good.all():
        return
    bad = int((~good).nonzero()[0])
    raise FloatingPointError(
        f"the ODE's right-hand side is not finite at t = {float(t[bad]):.6g}, in sample "
        f"{int(index[bad])} of {int((~good).sum())} such; "
        "check the network (untrained or diverged?) and eps"
    )
