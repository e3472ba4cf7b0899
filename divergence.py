"""Trace of a Jacobian, which is the divergence of a vector field: by probes, or exactly.

With A = ∂f/∂x of each sample and probes v of mean 0 and covariance I, E vᵀ A v = tr A
(Hutchinson 1990). Every estimator gives columns (B, c): their mean is the estimate, their spread
its error.

    rademacher   v of ±1       Var vᵀAv = 2 (‖A_s‖² − Σ_i A_ii²),   A_s = (A + Aᵀ)/2, Frobenius norm
    gaussian     v ~ N(0, I)   Var vᵀAv = 2 ‖A_s‖²
    hutch++      a sketch of A's range is traced exactly, probes see the rest (Meyer et al. 2021)
    exact        one product for each of the d coordinates
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad

import arguments
from randomness import normal
from sde_lib import sum_except_batch


def rademacher(x: torch.Tensor, draws=None) -> torch.Tensor:
    """A probe of ±1, of x's shape and dtype; zero variance where the Jacobian is diagonal."""
    if draws is None:
        return torch.randint_like(x, low=0, high=2) * 2 - 1
    return (draws.rand("probe", x.shape[1:]) < 0.5).to(x) * 2 - 1


def gaussian(x: torch.Tensor, draws=None, stream: str = "probe") -> torch.Tensor:
    """A probe of standard normal numbers, of x's shape and dtype."""
    return normal(x, draws, stream)


#: Probe distributions by name; each has mean 0 and covariance I. Called as probe(x, draws), with
#: a `randomness.Draws` of the images, or None for torch's own generator.
PROBES: dict[str, Callable] = {"rademacher": rademacher, "gaussian": gaussian}


def get_probe(name: str) -> Callable:
    """The probe distribution `name`, in any case of letters."""
    key = str(name).lower()
    if key not in PROBES:
        raise ValueError(f"hutchinson_type {name!r} is unknown; known: {sorted(PROBES)}")
    return PROBES[key]


def value_and_divergence(fn: Callable, x: torch.Tensor, probe: torch.Tensor):
    """f(x) and vᵀ (∂f/∂x) v by one forward and one backward pass; no gradient of weights.

    Shapes: x, probe and f(x) are (B, *), the divergence is (B,).
    """
    jacobian = ReverseJacobian(fn, x)
    return jacobian.value, sum_except_batch(jacobian.products(probe.unsqueeze(0))[0] * probe)


def watched(fn: Callable) -> Callable:
    """`fn`, refused where its output depends on x but derivatives cannot see that: the divergence
    would silently lack its part."""

    def checked(x, *args, **conditions):
        value = fn(x, *args, **conditions)
        seen = _in_graph_of(value, x) or forward_ad.unpack_dual(value).tangent is not None
        if not seen and not torch.equal(value, fn(x + 0.1, *args, **conditions)):
            raise ValueError(
                "the network's output depends on x but carries no gradient, which the likelihood "
                "needs; remove torch.no_grad or detach from its forward"
            )
        return value

    return checked


def _in_graph_of(value: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether x is among what `value` was computed from: weights alone give it a graph too."""
    if not (value.requires_grad and x.requires_grad):
        return False
    source, last = (torch.autograd.graph.get_gradient_edge(v).node for v in (x, value))
    seen, ahead = set(), [last]
    while ahead:
        node = ahead.pop()
        if node is source:
            return True
        if node not in seen:
            seen.add(node)
            ahead.extend(before for before, _ in node.next_functions if before is not None)
    return False


# --- products with the Jacobian ---------------------------------------------------------------


def _plain(x: torch.Tensor) -> torch.Tensor:
    """x outside of any graph and of inference mode, in which derivatives are not recorded."""
    return (x.clone() if x.is_inference() else x).detach()


class ReverseJacobian:
    """f(x) and products Aᵀ v: one forward pass, one vector-Jacobian product per v.

    `value` is f(x), without a graph. Memory: the activations of one forward pass, and `chunk`
    backward passes at once.
    """

    def __init__(self, fn: Callable, x: torch.Tensor, chunk: int = 1):
        self.chunk = chunk
        with torch.inference_mode(False), torch.enable_grad():
            self._x = _plain(x).requires_grad_(True)
            self._value = fn(self._x)
        self.value = self._value.detach()

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """Aᵀ v for each of c vectors: (c, B, *) -> (c, B, *)."""
        if not self._value.requires_grad:
            return torch.zeros_like(vectors, dtype=self.value.dtype)
        vectors = vectors.to(self.value.dtype)
        with torch.inference_mode(False):
            if self.chunk == 1 or len(vectors) == 1:
                return torch.stack([self._product(v) for v in vectors])
            return torch.cat([self._products(part) for part in vectors.split(self.chunk)])

    def _product(self, v: torch.Tensor, batched: bool = False) -> torch.Tensor:
        (product,) = torch.autograd.grad(
            self._value,
            self._x,
            v,
            retain_graph=True,
            is_grads_batched=batched,
            materialize_grads=True,
        )
        return product

    def _products(self, vectors: torch.Tensor) -> torch.Tensor:
        try:
            return self._product(vectors, batched=True)
        except RuntimeError as error:  # a backward pass that vmap does not know
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.chunk = 1
            return torch.stack([self._product(v) for v in vectors])


class ForwardJacobian:
    """f(x) and products A v: each v takes one pass that carries value and derivative together.

    Nothing is kept for a backward pass. `value` is known after the first product.
    """

    value: torch.Tensor

    def __init__(self, fn: Callable, x: torch.Tensor, chunk: int = 1):
        self.fn, self.chunk = fn, chunk
        self._x = _plain(x)

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """A v for each of c vectors: (c, B, *) -> (c, B, *)."""
        vectors = vectors.to(self._x.dtype)
        with torch.inference_mode(False), torch.no_grad():
            if self.chunk == 1 or len(vectors) == 1:
                return torch.stack([self._product(v) for v in vectors])
            return torch.cat([self._products(part) for part in vectors.split(self.chunk)])

    def _product(self, v: torch.Tensor) -> torch.Tensor:
        with forward_ad.dual_level():
            value, tangent = forward_ad.unpack_dual(self.fn(forward_ad.make_dual(self._x, v)))
            self.value = value.detach()
            return torch.zeros_like(value) if tangent is None else tangent.clone()

    def _products(self, vectors: torch.Tensor) -> torch.Tensor:
        def product(v):
            return torch.func.jvp(self.fn, (self._x,), (v,))

        try:
            self.value, tangents = torch.func.vmap(product, out_dims=(None, 0))(vectors)  # type: ignore[arg-type]
        except RuntimeError as error:  # such as a derivative taken within f
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.chunk = 1
            return torch.stack([self._product(v) for v in vectors])
        return tangents


# --- estimators ---------------------------------------------------------------------------------

MODES = ("auto", "reverse", "forward")

#: Products per call from which on mode 'auto' times both modes. Below it is reverse: on DDPM++ and
#: on multilayer perceptrons one product took 2.1 to 2.6 forward passes of time in reverse mode and
#: 3.8 to 5.8 in forward mode (one core).
MEASURE_FROM = 8


class Trace:
    """An estimator of tr ∂f/∂x for each sample of a batch; see `get_trace`.

    Draw a probe once and keep it along a trajectory, so that what is integrated is smooth in time:

        probe = trace.draw(x, draws)             (B, …), its rows belong to those of x
        value, columns = trace(fn, x, probe)     f(x) like x, and (B, c)
    """

    #: Whether the columns are random. If not, there is one column, and it has no error.
    stochastic = True
    #: Whether forward and reverse mode give the same number; else 'auto' means reverse.
    symmetric = True

    def __init__(self, probes: int, mode: str, chunk: int):
        self.probes, self.mode, self.chunk = probes, mode, chunk
        self._measured: dict[tuple, str] = {}

    @property
    def width(self) -> int:
        """c, the number of columns."""
        return self.probes

    def draw(self, x: torch.Tensor, draws=None) -> torch.Tensor:
        """Random numbers for x, (B, *): (B, k, *), or (B, 0) where none are needed."""
        raise NotImplementedError

    def columns(self, jacobian, x: torch.Tensor, probe: torch.Tensor) -> torch.Tensor:
        """Estimates, (B, c), whose mean over c is the estimate of the trace."""
        raise NotImplementedError

    def products(self, x: torch.Tensor) -> int:
        """How many products with the Jacobian a call takes."""
        return self.probes

    def __call__(self, fn: Callable, x: torch.Tensor, probe: torch.Tensor):
        kind = JACOBIANS[self._mode(fn, x)]
        jacobian = kind(fn, x, self.chunk)
        columns = self.columns(jacobian, x, probe)
        return jacobian.value, columns

    def _mode(self, fn: Callable, x: torch.Tensor) -> str:
        if self.mode != "auto":
            return self.mode
        count = min(self.products(x), self.chunk)
        if not self.symmetric or self.products(x) < MEASURE_FROM:
            return "reverse"
        key = (x.shape[1:], x.dtype, x.device)
        if key not in self._measured:
            self._measured[key] = faster_mode(fn, x, count)
        return self._measured[key]


class _Hutchinson(Trace):
    """vᵀ A v, one column per probe."""

    def __init__(self, name: str, probes: int, mode: str, chunk: int):
        super().__init__(probes, mode, chunk)
        self._probe = get_probe(name)

    def draw(self, x, draws=None):
        return self._probe(_copies(x, self.probes), draws)

    def columns(self, jacobian, x, probe):
        probe = probe.transpose(0, 1)
        return _dot(probe, jacobian.products(probe)).T


class _HutchPP(Trace):
    """tr QᵀAQ + (3/m) Σ_j g_jᵀ (I − QQᵀ) A (I − QQᵀ) g_j with Q = orth(A S), G of m/3 signs.

    One column per g_j, each with the whole first part. Meyer et al. 2021, algorithm 1. In reverse
    mode the sketch is of Aᵀ, whose trace is A's. S is normal: of signs, few dimensions have equal
    columns, a Q that rounding chooses, and so no smooth estimate along a trajectory.
    """

    symmetric = False

    @property
    def width(self):
        return self.probes // 3

    def draw(self, x, draws=None):
        like = _copies(x, self.probes // 3)
        return torch.cat([gaussian(like, draws, "sketch"), rademacher(like, draws)], dim=1)

    def columns(self, jacobian, x, probe):
        sketch, rest = probe.transpose(0, 1).chunk(2)
        images = _matrices(jacobian.products(sketch))
        Q = torch.linalg.qr(images)[0]
        G = _matrices(rest)
        G = G - Q @ (Q.mT @ G)
        both = _vectors(torch.cat([Q, G], dim=2), x)
        values = _dot(both, jacobian.products(both)).T
        inside, outside = values.split([Q.shape[2], G.shape[2]], dim=1)
        return inside.sum(dim=1, keepdim=True) + outside


class _Exact(Trace):
    """Σ_i e_iᵀ A e_i, in one column."""

    stochastic = False

    def draw(self, x, draws=None):
        return x.new_empty(len(x), 0)

    def products(self, x):
        return x.shape[1:].numel()

    def columns(self, jacobian, x, probe):
        d, total = self.products(x), x.new_zeros(len(x))
        for first in range(0, d, self.chunk):
            index = torch.arange(first, min(first + self.chunk, d), device=x.device)
            basis = torch.nn.functional.one_hot(index, d).to(x)
            basis = basis.reshape(len(index), 1, *x.shape[1:]).expand(-1, *x.shape)
            total = total + _dot(basis, jacobian.products(basis)).sum(dim=0)
        return total.unsqueeze(1)


JACOBIANS = {"reverse": ReverseJacobian, "forward": ForwardJacobian}

TRACES: dict[str, Callable[..., Trace]] = {
    "rademacher": lambda *options: _Hutchinson("rademacher", *options),
    "gaussian": lambda *options: _Hutchinson("gaussian", *options),
    "hutch++": _HutchPP,
    "exact": _Exact,
}


def get_trace(name: str, probes: int = 1, *, mode: str = "auto", chunk: int = 16) -> Trace:
    """The estimator of the trace `name`, in any case of letters.

    Args:
      name: 'rademacher', 'gaussian', 'hutch++' or 'exact'.
      probes: k, the number of products with the Jacobian per evaluation; for 'hutch++' a multiple
        of 3, exact where the rank of the Jacobian is at most k/3; for 'exact' left 1.
      mode: 'reverse', one forward pass and k vector-Jacobian products; 'forward', k passes that
        carry a derivative along, which keep no activations; 'auto', reverse, or from
        `MEASURE_FROM` products on the faster of the two at the first call for a shape of samples.
      chunk: how many products are taken at once (vmap); fewer need less memory.
    """
    key = str(name).lower()
    arguments.whole(probes=probes, chunk=chunk)
    if key not in TRACES:
        raise ValueError(f"trace {name!r} is unknown; known: {sorted(TRACES)}")
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} of a trace is unknown; known: {', '.join(MODES)}")
    if probes < 1 or chunk < 1:
        raise ValueError(f"a trace needs probes ≥ 1 and chunk ≥ 1, got {probes} and {chunk}")
    if key == "hutch++" and probes % 3:
        raise ValueError(f"hutch++ needs probes in multiples of 3, got {probes}; use 3, 6, 9, …")
    if key == "exact" and probes != 1:
        raise ValueError(f"the exact trace takes no probes, got probes={probes}; leave it 1")
    return TRACES[key](probes, mode, chunk)


def mean_and_error(columns: torch.Tensor, stochastic: bool = True):
    """The mean over columns (B, c) and its standard error, each (B,).

    The error is nan for a single random column, and 0 where nothing is random.
    """
    mean, count = columns.mean(dim=1), columns.shape[1]
    if not stochastic:
        return mean, torch.zeros_like(mean)
    if count == 1:
        return mean, torch.full_like(mean, float("nan"))
    return mean, columns.std(dim=1) / count**0.5


def faster_mode(fn: Callable, x: torch.Tensor, count: int = 1) -> str:
    """'forward' or 'reverse', whichever takes `count` products with ∂f/∂x at once in less time.

    The second of two passes is timed. 'reverse' where forward mode fails, or disagrees.
    """
    own = torch.Generator(x.device).manual_seed(0)  # torch's own state stays as it is
    vectors = torch.rand((count, *x.shape), device=x.device, generator=own).to(x.dtype)

    def timed(kind):
        kind(fn, x, count).products(vectors)
        _wait(x.device)
        start = time.perf_counter()
        products = kind(fn, x, count).products(vectors)
        _wait(x.device)
        return time.perf_counter() - start, _dot(vectors, products)

    reverse, wanted = timed(ReverseJacobian)
    try:
        forward, got = timed(ForwardJacobian)
    except Exception:  # whatever a network does that has no forward derivative
        return "reverse"
    agree = torch.allclose(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    return "forward" if agree and forward < reverse else "reverse"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copies(x: torch.Tensor, count: int) -> torch.Tensor:
    """A template of `count` numbers for each of x's: (B, *) -> (B, count, *)."""
    return x.detach().unsqueeze(1).expand(-1, count, *x.shape[1:])


def _dot(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Inner products of vectors (c, B, *): (c, B)."""
    return (v * w).flatten(2).sum(dim=2) if v.ndim > 2 else v * w


def _matrices(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (c, B, *) as the columns of matrices (B, d, c)."""
    return vectors.reshape(*vectors.shape[:2], vectors.shape[2:].numel()).permute(1, 2, 0)


def _vectors(matrices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The columns of matrices (B, d, c) as vectors (c, B, *)."""
    return matrices.permute(2, 0, 1).reshape(matrices.shape[2], *x.shape)
