"""Steps that choose their own size, for every sample of a batch by itself.

All samples take a step together, one network evaluation for each stage; what differs by sample is
the time it stands at, the size of its step, and whether the step is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch

from ode_tableaus import (
    State,
    Tableau,
    derivative,
    moved,
    per_row,
    refuse_nonfinite,
    step,
    weighted,
)

#: A step is this share of the one whose error would just be accepted, and changes at most by these
#: factors (Hairer, Nørsett & Wanner 1993, II.4).
SAFETY, SLOWEST, FASTEST = 0.9, 0.2, 10.0
#: Rows leave the batch when no more than this share of it is still under way.
DROP_BELOW = 0.75


class SolverError(FloatingPointError, RuntimeError):
    """A solver of steps that it chooses itself gives up: too many evaluations, or too short steps.

    It is handled like a state that is not finite: both come of a network, or of tolerances.
    """


@dataclass(frozen=True)
class Rows:
    """The samples in the batch, a row each: every field is a tensor (b, *) or a tuple of them.

    index: which samples they are; t, end: where each stands and goes, in float64; span: end − t at
    the start; h: the next step, signed; y: the state; k: dy/dt there; args: what else fn takes;
    again: whether the last step was refused; nfe, rejected: evaluations and refused steps so far.
    """

    index: torch.Tensor
    t: torch.Tensor
    end: torch.Tensor
    span: torch.Tensor
    h: torch.Tensor
    y: State
    k: State
    args: State
    again: torch.Tensor
    nfe: torch.Tensor
    rejected: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Rows:
        def chosen(value) -> Any:
            return tuple(v[rows] for v in value) if isinstance(value, tuple) else value[rows]

        return Rows(*(chosen(getattr(self, field.name)) for field in fields(self)))

    @property
    def under_way(self) -> torch.Tensor:
        """Whether a row has not come to its end yet, (B,)."""
        return self.t != self.end


@dataclass(frozen=True)
class Trial:
    """A step that was tried: to which times, every stage's derivative, and its error norm."""

    s: torch.Tensor
    ks: list[State]
    error: torch.Tensor


@dataclass(frozen=True)
class Adaptive:
    """An adaptive integration: the method, its tolerances, and what the error of a step means.

        ‖e‖ = max over the state's tensors of  rms_j  e_j/(atol + rtol max(|y_j|, |y_new,j|))

    for each sample, over all its numbers of a tensor; a step is accepted where ‖e‖ ≤ 1.
    `callback(calls, share, t, state)` is called at the start and after every step, with the share
    of the way and the time of the sample that is furthest behind.
    """

    tableau: Tableau
    fn: Callable
    rtol: float
    atol: float
    max_nfe: int
    drop: bool
    callback: Callable | None

    def run(self, t, end, y: State, args: State):
        """From t to end, (B,) in float64: the state, evaluations and refused steps of each sample,
        and the calls of fn."""
        rows = self._rows(t, end, y, args)
        out = (*y, rows.nfe, rows.rejected)
        calls, under_way = 0, int(rows.under_way.sum())
        self._report(calls, rows, out)
        if under_way:
            rows, calls = self._start(rows), 2
        while under_way:
            if self.drop and under_way <= DROP_BELOW * len(rows.t):
                out = _written(out, rows)
                rows = rows[rows.under_way]
            if calls + self.tableau.evaluations > self.max_nfe:
                self._refuse_more(rows)
            trial, new = self._try(rows)
            calls += self.tableau.evaluations
            rows, stuck = self._judge(rows, trial, new)
            under_way, failed = _counts(rows.under_way, stuck | ~torch.isfinite(trial.error))
            if failed:
                self._examine(rows, trial, stuck)
            self._report(calls, rows, out)
        *state, nfe, rejected = _written(out, rows)
        return tuple(state), nfe, rejected, calls

    def _rows(self, t, end, y: State, args: State) -> Rows:
        none = torch.zeros(len(t), dtype=torch.long, device=t.device)
        index = torch.arange(len(t), device=t.device)
        return Rows(index, t, end, end - t, end - t, y, y, args, none != 0, none, none)

    def _start(self, rows: Rows) -> Rows:
        """The first derivative and the first step (Hairer, Nørsett & Wanner 1993, II.4)."""
        t, y, length = rows.t, rows.y, rows.span.abs()
        k = derivative(self.fn, t, y, rows.args)
        refuse_nonfinite(rows.index, t, k)
        scale = self._scale(y, y)
        d0, d1 = self._norm(y, scale), self._norm(k, scale)
        small = torch.full_like(d0, 1e-6)
        h0 = _coarse(torch.where((d0 < 1e-5) | (d1 < 1e-5), small, 0.01 * d0 / d1)).minimum(length)
        s = torch.where(h0 == length, rows.end, t + h0 * rows.span.sign())
        ahead = derivative(self.fn, s, moved(y, s - t, k), rows.args)
        refuse_nonfinite(rows.index, s, ahead)
        d2 = self._norm(tuple(a - b for a, b in zip(ahead, k, strict=True)), scale) / h0
        d = torch.maximum(d1, d2)
        h1 = torch.where(d <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), _root(0.01 / d, self._exponent))
        h = _coarse(torch.minimum(100 * h0, h1)).minimum(length) * rows.span.sign()
        h = torch.where(rows.under_way, h, 0)  # a way of length zero made it nan
        return replace(rows, h=h, k=k, nfe=2 * rows.under_way.long())

    def _try(self, rows: Rows) -> tuple[Trial, State]:
        """One step of every row; those at their end take one of length zero."""
        left = rows.end - rows.t
        last = left.abs() <= 1.01 * rows.h.abs()
        # Two equal steps to the end rather than a long one and a short one.
        h = torch.where(left.abs() < 2 * rows.h.abs(), left / 2, rows.h)
        s = torch.where(last, rows.end, rows.t + h)
        new, ks = step(self.tableau, self.fn, rows.t, s, rows.y, rows.k, rows.args)
        e = tuple(v.mul_(per_row(s - rows.t, v)) for v in weighted(self.tableau.error, ks))
        error = self._norm(e, self._scale(rows.y, new))
        return Trial(s, ks, torch.where(torch.isnan(error), torch.inf, error)), new

    def _judge(self, rows: Rows, trial: Trial, new: State) -> tuple[Rows, torch.Tensor]:
        """The rows after a trial, and which of them have no step left that is small enough."""
        accept, moving = trial.error <= 1, rows.under_way
        # A second refusal in a row says that the error falls slower than the method's order has it,
        # as at the kink of σ ∝ √t: then by first order.
        exponent = torch.where(rows.again & ~accept, 1.0, self._exponent)
        factor = SAFETY * _root(1 / trial.error, exponent)
        most = torch.where(rows.again, torch.ones_like(factor), torch.full_like(factor, FASTEST))
        h = (trial.s - rows.t) * _coarse(factor.clamp(min=SLOWEST).minimum(most))
        least = 50 * torch.finfo(h.dtype).eps * torch.maximum(rows.span.abs(), rows.t.abs())
        return replace(
            rows,
            t=torch.where(accept, trial.s, rows.t),
            h=h,
            y=_where(accept, new, rows.y),
            k=_where(accept, trial.ks[-1], rows.k),
            again=~accept,
            nfe=rows.nfe + self.tableau.evaluations * moving,
            rejected=rows.rejected + ~accept,
        ), ~accept & (h.abs() < least)

    @property
    def _exponent(self) -> float:
        return 1 / self.tableau.order  # the embedded method's order is one less

    def _scale(self, y: State, new: State) -> State:
        """The error allowed in each number."""
        pairs = zip(y, new, strict=True)
        largest = (torch.maximum(a.abs(), b.abs()) for a, b in pairs)
        return tuple(v.mul_(self.rtol).add_(self.atol) for v in largest)

    def _norm(self, e: Sequence[torch.Tensor], scale: State) -> torch.Tensor:
        """‖e‖ of each sample, summed in float64: (b,)."""
        rms = []
        for v, s in zip(e, scale, strict=True):
            squares = (v / s).square_().reshape(len(v), -1)
            total = squares.sum(dim=1, dtype=real_dtype(v.device))
            rms.append(torch.sqrt(total / max(squares.shape[1], 1)))
        return torch.stack(rms).amax(dim=0)

    def _report(self, calls: int, rows: Rows, out: State) -> None:
        if self.callback is None or not len(rows.t):
            return
        # A span of zero has nothing left; any other number than 0 below the fraction bar will do.
        left = (rows.end - rows.t) / torch.where(rows.span == 0, 1, rows.span)
        behind = left.argmax()
        share, t = (1 - left[behind]).item(), rows.t[behind].item()
        self.callback(calls, share, t, _written(out, rows)[:-2])

    # --- failures -------------------------------------------------------------------------

    def _examine(self, rows: Rows, trial: Trial, stuck: torch.Tensor) -> None:
        """Raise what is wrong. A step that overflowed with finite derivatives is tried shorter."""
        for c, k in zip(self.tableau.c, trial.ks, strict=True):
            refuse_nonfinite(rows.index, rows.t + c * (trial.s - rows.t), k)
        if not stuck.any():
            return
        i = int(stuck.nonzero()[0])
        raise SolverError(
            f"the ODE's step of sample {int(rows.index[i])} fell to {float(rows.h[i].abs()):.3g} "
            f"at t = {float(rows.t[i]):.6g}, below what float64 times resolve: its right-hand side "
            f"jumps there or is noisier than rtol = {self.rtol:g} and atol = {self.atol:g} ask "
            f"for in {rows.y[0].dtype}; loosen the tolerances, use a state of float64, or check "
            "the network (TF32, bf16?)"
        )

    def _refuse_more(self, rows: Rows) -> NoReturn:
        left = torch.where(rows.under_way, (rows.end - rows.t) / rows.span, rows.t - rows.t)
        i = int(left.argmax())
        raise SolverError(
            f"the ODE of sample {int(rows.index[i])} is at t = {float(rows.t[i]):.6g}, on its way "
            f"to {float(rows.end[i]):g}, after {int(rows.nfe[i])} evaluations, with steps of "
            f"{float(rows.h[i].abs()):.3g} and {int(rows.rejected[i])} refused; "
            f"{int(rows.under_way.sum())} samples are under way. Raise max_nfe = {self.max_nfe}, "
            f"loosen rtol = {self.rtol:g} and atol = {self.atol:g}, or check the network"
        )


def _counts(*masks: torch.Tensor) -> list[int]:
    """How many are set in each mask: the one look at the device that a step takes."""
    return torch.stack(masks).sum(dim=1).tolist()


def _written(out: State, rows: Rows) -> State:
    """`out`, a tensor of all samples for each result, with the rows' present values in place."""
    values = (*rows.y, rows.nfe, rows.rejected)
    return tuple(o.index_copy(0, rows.index, v) for o, v in zip(out, values, strict=True))


def _where(mask: torch.Tensor, a: State, b: State) -> State:
    return tuple(
        torch.where(mask.reshape(len(mask), *(1,) * (x.ndim - 1)), x, y)
        for x, y in zip(a, b, strict=True)
    )


def real_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _root(x: torch.Tensor, exponent: float | torch.Tensor) -> torch.Tensor:
    # torch.pow differs in the last bit between the bulk and the tail of a vector; exp does not.
    return torch.exp(exponent * torch.log(x))


def _coarse(x: torch.Tensor) -> torch.Tensor:
    """x > 0 rounded to a power of e^(1/32): sums of a row may differ in the last bits with the size
    of the batch, and steps must not."""
    return torch.exp(torch.round(32 * torch.log(x)) / 32)
