"""Checks of what callers hand over, so that a mistake is named where it is made, by its name, and
not by what torch stumbles over later."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch


class WrongTypeError(TypeError, ValueError):
    """An argument of a type that cannot be used: both kinds of error, so that whoever shows the
    messages of wrong values shows these."""


def _plain(value: Any) -> Any:
    """A number out of a NumPy scalar or a tensor without axes."""
    alone = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return (
        value.item() if alone and getattr(value, "device", None) != torch.device("meta") else value
    )


def _got(name: str, expected: str, value: Any) -> str:
    return f"{name}: expected {expected}, got {reprlib.repr(value)} of type {type(value).__name__}"


def number(**given) -> None:
    """Refuse what is no real number: TypeError, and ValueError for NaN; infinity passes."""
    for name, value in given.items():
        plain = _plain(value)
        if not isinstance(plain, numbers.Real):
            raise WrongTypeError(_got(name, "a number", value))
        if math.isnan(plain):
            raise ValueError(_got(name, "a number", value))


def real(**given) -> None:
    """Refuse what is no finite real number: TypeError, and ValueError for NaN and infinity."""
    number(**given)
    for name, value in given.items():
        if math.isinf(_plain(value)):
            raise ValueError(_got(name, "a finite number", value))


def whole(**given) -> None:
    """Refuse what is no integer: TypeError."""
    for name, value in given.items():
        plain = _plain(value)
        if isinstance(plain, bool) or not isinstance(plain, numbers.Integral):
            raise WrongTypeError(_got(name, "an integer", value))


def function(**given) -> None:
    """Refuse what cannot be called: TypeError."""
    for name, value in given.items():
        if not callable(value):
            raise WrongTypeError(_got(name, "a function", value))


def floating(**given) -> None:
    """Refuse what is no dtype of real floating-point numbers: TypeError."""
    for name, value in given.items():
        if not isinstance(value, torch.dtype) or not value.is_floating_point:
            raise WrongTypeError(_got(name, "a torch dtype such as torch.float32", value))


def numbers_of(**given) -> None:
    """Refuse what is no sequence of finite real numbers: TypeError, or ValueError as `real`."""
    for name, value in given.items():
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise WrongTypeError(_got(name, "numbers, such as (0.3, 0.7)", value))
        real(**{f"{name}[{i}]": number for i, number in enumerate(value)})


def optional(check: Callable, **given) -> None:
    """`check` of those that are not None."""
    check(**{name: value for name, value in given.items() if value is not None})


def usable_device(value: Any) -> torch.device:
    """The device that `value`, a name or a torch.device, means.

    Raises: ValueError where it means none, or one that is not here.
    """
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("its tensors have shapes and no numbers")
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {reprlib.repr(value)} cannot be used: {reason[:200]}; use 'cpu' or 'cuda'"
        ) from error
    return device
