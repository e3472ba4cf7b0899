"""What every sampler shares: options by keyword, where samples live, progress, and callbacks."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import arguments
from models.utils import get_score_fn
from sampling_steps import Corrector, LangevinCorrector, Predictor


def class_of(maker) -> Any:
    """The class that `maker`, a class or a functools.partial of one, makes objects of."""
    return maker.func if isinstance(maker, functools.partial) else maker


def check_kind(maker, kind: str) -> None:
    """Refuse what makes no predictor or corrector, as `kind` says: TypeError."""
    cls, base = class_of(maker), {"predictor": Predictor, "corrector": Corrector}[kind]
    other = Corrector if base is Predictor else Predictor
    steps = getattr(cls, "update_fn", None) or getattr(cls, "step", None)
    if not callable(cls) or (isinstance(cls, type) and (not steps or issubclass(cls, other))):
        raise arguments.WrongTypeError(
            f"{kind}: expected a class of {base.__name__}s, or a functools.partial of one, got "
            f"{maker!r}; sampling.get_{kind}(name) gives those with a name"
        )


def check_common(inverse_scaler, dtype=None, **functions) -> None:
    """Refuse what no sampler can call, TypeError, and what `check_dtype` does."""
    arguments.function(inverse_scaler=inverse_scaler)
    arguments.optional(arguments.function, **functions)
    check_dtype(dtype)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that no sampler integrates in.

    Raises: TypeError; ValueError for half precision, in which short steps round to nothing: on VE
      a standard deviation of 0.24 for 0.30.
    """
    arguments.optional(arguments.floating, dtype=dtype)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"dtype: samplers integrate in torch.float32 or torch.float64, got {dtype}, in which "
            "short steps round to nothing; leave the network in it, whose output is cast"
        )


def with_options(maker: Callable, options: Mapping[str, Any], label: str = "") -> Callable:
    """`maker` with keyword options bound; an option that it does not know is refused.

    Args:
      maker: a class or a function.
      options: from `config.sampling.solver`, say.
      label: the name that the error uses.
    """
    if not options:
        return maker
    known = _option_names(class_of(maker))
    unknown = sorted(set(options) - known)
    if unknown:
        name = label or getattr(class_of(maker), "__name__", repr(maker))
        has = f"its options are {', '.join(sorted(known))}" if known else "it has none"
        raise ValueError(f"{name} has no option {', '.join(map(repr, unknown))}; {has}")
    return functools.partial(maker, **options)


#: What samplers and their callers hand over themselves.
_OWN = {"self", "sde", "score_fn", "probability_flow", "shape", "inverse_scaler"} | {
    *("denoise", "eps", "device", "continuous", "dtype", "generator", "seeds", "callback"),
    "progress",
}


def _option_names(maker) -> set[str]:
    """Names that may be given by keyword, following **kwargs up a class's ancestors."""
    chain = maker.__mro__ if isinstance(maker, type) else ()
    constructors = [vars(c)["__init__"] for c in chain if "__init__" in vars(c)]
    names: set[str] = set()
    for fn in constructors or [maker]:
        parameters = inspect.signature(fn).parameters.values()
        keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names |= {p.name for p in parameters if p.kind in keyword}
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return names - _OWN


def solver_options(config) -> dict[str, Any]:
    """`config.sampling.solver` as a plain dictionary; empty where a config has none."""
    return dict(getattr(config.sampling, "solver", None) or {})


def is_continuous(config) -> bool:
    """Whether a config trains on continuous times; one that does not say so does."""
    return getattr(getattr(config, "training", None), "continuous", True)


def check_seeds(seeds: Sequence[int] | None, shape, corrector=None, what: str = "sample") -> None:
    """Refuse seeds that are not one for each `what` of a batch, or that a corrector cannot obey."""
    if seeds is None:
        return
    if isinstance(seeds, str) or not hasattr(seeds, "__len__"):
        raise arguments.WrongTypeError(
            f"seeds: expected {shape[0]} integers, one per {what}, got {seeds!r}"
        )
    if len(seeds) != shape[0]:
        raise ValueError(f"expected {shape[0]} seeds, one per {what}, got {len(seeds)}")
    arguments.whole(**{f"seeds[{i}]": seed for i, seed in enumerate(seeds)})
    if not all(-(2**63) <= int(seed) < 2**64 for seed in seeds):
        raise ValueError(f"seeds: expected integers of 64 bits, got {list(seeds)}")
    numbers, cls = math.prod(shape[1:]), class_of(corrector)
    langevin = isinstance(cls, type) and issubclass(cls, LangevinCorrector)
    if langevin and numbers < LangevinCorrector.MIN_NUMBERS:
        raise ValueError(
            f"'langevin' with seeds= uses each sample's own norms, and {numbers} numbers a sample "
            f"(fewer than {LangevinCorrector.MIN_NUMBERS}) make them blow up; use corrector 'ald', "
            "or generator= in place of seeds="
        )


def score_and_device(sde, model, continuous: bool, device):
    """A network's score, and where its samples live: `device`, else where its parameters are."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    return score_fn, arguments.usable_device(device or score_fn.device or "cpu")


class FiniteWatch:
    """Remember the first step after which the state is not finite, without synchronising a GPU."""

    def __init__(self, grid: torch.Tensor):
        self.grid = grid
        self.first: torch.Tensor | None = None

    def __call__(self, i: int, x: torch.Tensor) -> None:
        bad = torch.where(torch.isfinite(x).all(), len(self.grid), i)
        self.first = bad if self.first is None else torch.minimum(self.first, bad)
        if x.device.type == "cpu":
            self.check()

    def last(self, x: torch.Tensor) -> None:
        """Watch what is returned, which may be no state of the loop but its mean or D."""
        self(len(self.grid) - 1, x)
        self.check()

    def check(self) -> None:
        """Raise FloatingPointError, naming t, if a state was not finite."""
        i = len(self.grid) if self.first is None else int(self.first)
        if i < len(self.grid):
            raise FloatingPointError(
                f"the state is not finite after step {i} of {len(self.grid)}, "
                f"at t = {float(self.grid[i]):.6g}; check the network, snr and the number of steps"
            )


def step_bar(iterable, show: bool):
    """A progress bar over steps, where `show` asks for one."""
    if not show:
        return iterable
    return steady_bar()(iterable, desc="sampling", unit="step", **_quiet())


@functools.cache
def steady_bar() -> Any:
    """tqdm by a clock that nobody sets, which its own is not: one set back an hour would keep the
    bar silent for an hour."""
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # a thread that looks at the other clock

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if not self.disable:
                self._time = time.monotonic
                self.start_t = self.last_print_t = self._time()

    return Bar


def _quiet() -> dict[str, Any]:
    """A bar for a person at a terminal; in a log a line now and then, and none of short work."""
    terminal = sys.stderr.isatty()
    waits = {"mininterval": 0.2 if terminal else 30.0, "delay": 0 if terminal else 30.0}
    return {"leave": False, "dynamic_ncols": True, "miniters": 0, **waits}


class FractionBar:
    """A progress bar of methods that set their own steps: the share that is done, 0 to 1."""

    def __init__(self, show: bool, label: str):
        self.bar: Any = None
        self.seen, self.shown = 0.0, show
        if show:
            form = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
            self.bar = steady_bar()(total=1.0, desc=label, bar_format=form, **_quiet())

    def __call__(self, done: float) -> None:
        if self.bar is not None and done > self.seen:
            self.bar.update(done - self.seen)
            self.seen = done

    def close(self) -> None:
        """Close the bar, if there is one."""
        if self.bar is not None:
            self.bar.close()


class Trajectory:
    """A callback that keeps the states a sampler passes through: `callback=Trajectory()`.

    Copies stay on the samples' device until `states` is read, so no step waits for the host.

    Args:
      every: keep one call in so many, from the first.
      samples: keep the first so many samples; by default all.
      mean: keep x_mean in place of x.
    """

    def __init__(self, every: int = 1, samples: int | None = None, mean: bool = False):
        if every < 1:
            raise ValueError(f"a trajectory needs every ≥ 1, got {every}")
        self.every, self.samples, self.mean = every, samples, mean
        self._times: list[float] = []
        self._states: list[torch.Tensor] = []
        self._calls = 0

    def __call__(self, i: int, t: float, x: torch.Tensor, x_mean: torch.Tensor) -> None:
        if self._calls % self.every == 0:
            self._times.append(float(t))
            self._states.append((x_mean if self.mean else x)[: self.samples].detach().clone())
        self._calls += 1

    @property
    def times(self) -> torch.Tensor:
        """The times of the states kept, (n,)."""
        return torch.tensor(self._times, dtype=torch.float64)

    @property
    def states(self) -> torch.Tensor:
        """The states kept, (n, B, *), on the CPU."""
        if not self._states:
            raise ValueError("no state was kept; pass the trajectory as callback= and sample first")
        return torch.stack(self._states).cpu()
