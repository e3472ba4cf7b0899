"""What every linear measurement operator shares: shapes, pseudo-inverse, singular values, names."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import arguments

Tensor = torch.Tensor

#: Operators of at most so many numbers in and out get their singular values from a dense matrix.
DENSE = 1024


# --- constants that follow the data's device and dtype ----------------------------------------


class Constants:
    """Tensors kept in float64 on the CPU and handed out on the device and in the dtype of x."""

    def __init__(self, **tensors: Tensor):
        self._tensors = tensors
        self._copies: dict[tuple, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        kept = self._tensors[name]
        dtype = x.dtype if kept.is_floating_point() else kept.dtype
        if kept.is_complex():
            dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
        key = (name, x.device, dtype)
        if key not in self._copies:
            self._copies[key] = kept.to(x.device, dtype)
        return self._copies[key]


def shielded(fn: Callable) -> Callable:
    """fn(x) free of autocast, under which matrix products would be of half precision."""

    @functools.wraps(fn)
    def run(x: Tensor) -> Tensor:
        if not torch.amp.is_autocast_available(x.device.type):
            return fn(x)
        with torch.autocast(x.device.type, enabled=False):
            return fn(x)

    return run


# --- singular value decomposition -------------------------------------------------------------


@dataclass(frozen=True)
class SVD:
    """A = U diag(s) Vᵀ with r singular values; Uᵀ U = Vᵀ V = I_r.

    Coefficients are (B, r). `V` maps them to (B, *shape_in), `Vt` back; `U` maps them to
    (B, *shape_out), `Ut` back. `values`, s ≥ 0 in no order, is (r,), float64 on the CPU; `like(x)`
    gives it on x's device, in its dtype. Parts of x and y that no coefficient describes are in the
    null space of A and of Aᵀ.
    """

    values: Tensor
    V: Callable
    Vt: Callable
    U: Callable
    Ut: Callable

    def __post_init__(self):
        object.__setattr__(self, "_constants", Constants(s=self.values))
        for name in ("V", "Vt", "U", "Ut"):
            object.__setattr__(self, name, shielded(getattr(self, name)))

    def like(self, x: Tensor) -> Tensor:
        """The singular values on x's device, in its dtype."""
        constants: Constants = self._constants  # type: ignore[attr-defined]
        return constants("s", x)

    def inverse_values(self, x: Tensor) -> Tensor:
        """1/s, and 0 for what rounding cannot tell from 0."""
        s = self.like(x)
        return torch.where(self.nonzero(x), 1 / s.clamp(min=torch.finfo(s.dtype).tiny), 0.0)

    def nonzero(self, x: Tensor) -> Tensor:
        """Which singular values rounding can tell from 0: above 100 eps of the largest."""
        s = self.like(x)
        return s > 100 * torch.finfo(s.dtype).eps * s.max()


def dense_svd(matrix: Tensor, shape_in: Sequence[int], shape_out: Sequence[int]) -> SVD:
    """The decomposition of a matrix (n_out, n_in), its zero singular values left out."""
    U, s, Vh = torch.linalg.svd(matrix.double().cpu(), full_matrices=False)
    keep = s > max(matrix.shape) * torch.finfo(s.dtype).eps * s.max()
    parts = Constants(U=U[:, keep], Vh=Vh[keep])
    return SVD(
        s[keep],
        V=lambda c: (c @ parts("Vh", c)).reshape(len(c), *shape_in),
        Vt=lambda x: x.reshape(len(x), -1) @ parts("Vh", x).T,
        U=lambda c: (c @ parts("U", c).T).reshape(len(c), *shape_out),
        Ut=lambda y: y.reshape(len(y), -1) @ parts("U", y),
    )


# --- the abstract operator --------------------------------------------------------------------


class Operator:
    """A linear map A of x, (B, *shape_in), to y = A x, (B, *shape_out).

    A subclass defines `forward` and `transpose` of one batch axis, and `_svd` where it is cheap.
    Constants follow the device and dtype of the data, float32 or float64; half precision is
    computed in float32, and autocast is not heard. All maps are differentiable. Any number of
    leading axes goes.

    Args:
      shape_in, shape_out: of one sample.
    """

    #: Of conjugate gradients, where no singular values are at hand: relative residual and steps.
    tolerance: float = 1e-6
    iterations: int = 1000

    def __init__(self, shape_in: Sequence[int], shape_out: Sequence[int]):
        self.shape_in, self.shape_out = whole_shape(shape_in), whole_shape(shape_out)

    def __repr__(self):
        return f"{type(self).__name__}({self.shape_in} -> {self.shape_out})"

    def forward(self, x: Tensor) -> Tensor:
        """A x: (B, *shape_in) -> (B, *shape_out)."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(x)")

    def transpose(self, y: Tensor) -> Tensor:
        """Aᵀ y: (B, *shape_out) -> (B, *shape_in)."""
        raise NotImplementedError(f"{type(self).__name__} defines no transpose(y)")

    def _svd(self) -> SVD | None:
        if max(math.prod(self.shape_in), math.prod(self.shape_out)) > DENSE:
            return None
        return dense_svd(self.dense(), self.shape_in, self.shape_out)

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        return self._batched(self.forward, x, self.shape_in, "x")

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self._batched(self.transpose, y, self.shape_out, "y")

    def pinv(self, y: Tensor) -> Tensor:
        """A⁺ y, the least-squares solution of least norm: by singular values, else by
        conjugate gradients on AᵀA x = Aᵀ y from 0."""
        return self._batched(self._pinv, y, self.shape_out, "y")

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """The nearest point to x at which A x = y, or nearly so: x + A⁺ (y − A x)."""
        return x + self.pinv(y - self(x))

    @functools.cached_property
    def svd(self) -> SVD | None:
        """The singular value decomposition where it is cheap; else None."""
        return self._svd()

    def solve_gram(self, y: Tensor, r2: Any = 1.0, s2: Any = 0.0) -> Tensor:
        """(r2 A Aᵀ + s2 I)⁻¹ y, the pseudo-inverse where that is singular.

        Args:
          y: (B, *shape_out).
          r2, s2: numbers ≥ 0, or one for each sample, (B,).
        """
        empty = torch.is_tensor(y) and not y.numel()  # r2 and s2, of no samples, fit no other y

        def solve(y):
            return y if empty else self._solve_gram(y, r2, s2)

        return self._batched(solve, y, self.shape_out, "y")

    def _solve_gram(self, y: Tensor, r2: Any, s2: Any) -> Tensor:
        r2, s2 = (torch.as_tensor(v, dtype=y.dtype, device=y.device) for v in (r2, s2))
        if self.svd is None:
            return self._solve_gram_by_cg(y, r2, s2)
        svd, r2, s2 = self.svd, r2.reshape(-1, 1), s2.reshape(-1, 1)
        c = svd.Ut(y)
        s = torch.where(svd.nonzero(y), svd.like(y), 0.0)
        solved = svd.U(c * _inverse(r2 * s**2 + s2))
        if len(s) == math.prod(self.shape_out):
            return solved
        return solved + _rows(_inverse(s2), y) * (y - svd.U(c))

    def dense(self) -> Tensor:
        """A as a matrix (n_out, n_in), float64 on the CPU; for small shapes."""
        eye = torch.eye(math.prod(self.shape_in), dtype=torch.float64)
        return self(eye.reshape(-1, *self.shape_in)).reshape(len(eye), -1).T.contiguous()

    def __matmul__(self, other: Operator) -> Operator:
        """A @ B: x -> A(B(x))."""
        return Composition(self, other)

    # --- parts ---

    def _batched(self, fn: Callable, x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        self._check(x, shape, name)
        lead, fn = x.shape[: x.ndim - len(shape)], shielded(fn)
        # Transforms and sparse matrices know no half precision.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if 0 in lead:  # reshape(0, -1) says nothing of the rest
            return x.new_zeros(*lead, *fn(wide.new_zeros(1, *shape)).shape[1:])
        out = fn(wide.reshape(-1, *shape))
        return out.reshape(*lead, *out.shape[1:]).to(x.dtype)

    def _check(self, x: Tensor, shape: tuple[int, ...], name: str) -> None:
        if not torch.is_tensor(x):
            raise arguments.WrongTypeError(
                f"{type(self).__name__} expected a tensor {name}, got {type(x).__name__}"
            )
        if tuple(x.shape[x.ndim - len(shape) :]) != shape or x.ndim < len(shape):
            raise ValueError(
                f"{self!r} expected {name} of shape (B, {', '.join(map(str, shape))}), got "
                f"{tuple(x.shape)}; make the operator for the shape of one sample"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} expected floating-point {name}, got {x.dtype}; "
                "use x.float()"
            )

    def _pinv(self, y: Tensor) -> Tensor:
        if self.svd is not None:
            return self.svd.V(self.svd.Ut(y) * self.svd.inverse_values(y))
        return self._conjugate_gradients(self._normal, self.transpose(y))

    def _normal(self, x: Tensor) -> Tensor:
        return self.transpose(self.forward(x))

    def _solve_gram_by_cg(self, y, r2, s2):
        if bool((s2 == 0).any()):  # what is outside the range of A has no preimage
            y = torch.where(_rows(s2 == 0, y), self.forward(self._pinv(y)), y)
        r2, s2 = _rows(r2, y), _rows(s2, y)
        return self._conjugate_gradients(lambda w: r2 * self.forward(self.transpose(w)) + s2 * w, y)

    def _conjugate_gradients(self, matvec: Callable, b: Tensor) -> Tensor:
        tol = max(self.tolerance, 10 * torch.finfo(b.dtype).eps)
        w, residual = conjugate_gradients(matvec, b, self.iterations, tol)
        worst = float(residual.max())
        if not worst <= 1e3 * tol:  # NaN too
            warnings.warn(
                f"{self!r}: conjugate gradients left a relative residual of {worst:.2g} after "
                f"{self.iterations} steps; raise .iterations or .tolerance",
                RuntimeWarning,
                stacklevel=2,
            )
        return w


class Composition(Operator):
    """A @ B, x -> A(B(x)); its pseudo-inverse by dense singular values where small, else by
    conjugate gradients, since (A B)⁺ is not B⁺ A⁺."""

    def __init__(self, outer: Operator, inner: Operator):
        if outer.shape_in != inner.shape_out:
            raise ValueError(
                f"A @ B needs A.shape_in = B.shape_out, got {outer.shape_in} and {inner.shape_out}"
            )
        super().__init__(inner.shape_in, outer.shape_out)
        self.outer, self.inner = outer, inner

    def forward(self, x):
        return self.outer.forward(self.inner.forward(x))

    def transpose(self, y):
        return self.inner.transpose(self.outer.transpose(y))


def conjugate_gradients(
    matvec: Callable, b: Tensor, iterations: int, tol: float
) -> tuple[Tensor, Tensor]:
    """w (B, *) with matvec(w) ≈ b, from w = 0, and ‖b − matvec(w)‖/‖b‖ (B,) by its recursion
    (Hestenes and Stiefel 1952). Each sample is solved by itself: none sees another.

    A sample is done when that is at most `tol`, or where the matrix shows a direction of no
    positive curvature, as the Jacobian of an inexact network may.
    """
    w, r, p = torch.zeros_like(b), b, b
    size = rr = _dot(r, r)
    active = rr > tol**2 * size
    for _ in range(iterations):
        if not bool(active.any()):
            break
        q = matvec(p)
        curvature = _dot(p, q)
        active = active & (curvature > 0)
        step = torch.where(active, rr / _nonzero(curvature), 0.0)
        w, r = w + _rows(step, w) * p, r - _rows(step, r) * q
        new = _dot(r, r)
        p = r + _rows(torch.where(active, new / _nonzero(rr), 0.0), p) * p
        rr = new
        active = active & (rr > tol**2 * size)
    return w, (rr / _nonzero(size)).sqrt()


def _rows(v: Tensor, x: Tensor) -> Tensor:
    """A number or (B,) or (B, 1), so that it multiplies x (B, *)."""
    return v if v.ndim == 0 else v.reshape(-1, *([1] * (x.ndim - 1)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(1)


def _nonzero(v: Tensor) -> Tensor:
    return torch.where(v > 0, v, torch.ones_like(v))


def _inverse(v: Tensor) -> Tensor:
    return torch.where(v > 0, 1 / _nonzero(v), torch.zeros_like(v))


# --- registry ---------------------------------------------------------------------------------

_OPERATORS: dict[str, Callable[..., Operator]] = {}


def register_operator(cls=None, *, name: str):
    """Register a class or function of (shape, **options) that makes an Operator."""

    def register(cls):
        if name in _OPERATORS:
            raise ValueError(f"an operator named {name!r} is already registered")
        _OPERATORS[name] = cls
        return cls

    return register if cls is None else register(cls)


def registered() -> dict[str, Callable[..., Operator]]:
    """Every operator by name."""
    return dict(_OPERATORS)


def whole_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as a tuple; refused where it is not one of integers >= 1."""
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise arguments.WrongTypeError(f"expected the shape of one sample, got {shape!r}")
    arguments.whole(**{f"shape[{i}]": n for i, n in enumerate(shape)})
    if not shape or min(shape) < 1:
        raise ValueError(f"expected a shape of integers ≥ 1, of one sample, got {tuple(shape)}")
    return tuple(int(n) for n in shape)


def mask_tensor(mask: Any) -> Tensor:
    """A mask, true where known, on the CPU, of anything that torch makes a tensor of."""
    try:
        return torch.as_tensor(mask).cpu() != 0
    except (TypeError, ValueError, RuntimeError) as error:
        raise arguments.WrongTypeError(
            f"mask: expected a tensor, an array, or the name of a pattern, got {mask!r}"
        ) from error


def image_shape(shape: Sequence[int], name: str) -> tuple[int, int, int]:
    """`shape` as (C, H, W).

    Raises: ValueError where it is none.
    """
    shape = whole_shape(shape)
    if len(shape) != 3:
        raise ValueError(f"{name} expected the shape (C, H, W) of one image, got {shape}")
    return shape  # type: ignore[return-value]
