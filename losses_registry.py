"""The names of objectives."""

from __future__ import annotations

from collections.abc import Callable

_OBJECTIVES: dict[str, Callable] = {}


def register_objective(fn=None, *, name: str):
    """Register an objective, to be chosen by `config.training.objective`: a function of
    (config, sde, train) that returns an `Objective`, or anything with its call and `per_image`."""

    def register(fn):
        if name in _OBJECTIVES:
            raise ValueError(
                f"an objective named {name!r} is already registered: {_OBJECTIVES[name]!r}"
            )
        _OBJECTIVES[name] = fn
        return fn

    return register if fn is None else register(fn)


def get_objective(name: str) -> Callable:
    """The function registered under `name`: objective(config, sde, train)."""
    if name not in _OBJECTIVES:
        raise ValueError(
            f"training.objective={name!r} is unknown; registered: {sorted(_OBJECTIVES)}, and '' "
            "for denoising score matching over all times"
        )
    return _OBJECTIVES[name]
