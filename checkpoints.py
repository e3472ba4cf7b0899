"""Checkpoints: written atomically, read without running code from them, never loaded in part."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints_import import check_structure, for_state, from_list, reader
from files import write_atomically
from files_reading import load_torch
from models.utils import unwrap

VERSION = 1


def save_checkpoint(
    path: str | os.PathLike, state: Mapping[str, Any], *, keep_previous: bool = False
) -> None:
    """Write optimizer, model, EMA and step of a training state to `path`, atomically.

    With `keep_previous` the file that was at `path` stays beside it, as `previous(path)`.

    Raises: OSError where it cannot be written; what was at `path` is as it was.
    """
    saved = {"version": VERSION, **content_of(state)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = previous(path) if keep_previous else None
    write_atomically(path, lambda file: torch.save(saved, file), kept)


def previous(path: str | os.PathLike) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return Path(path).with_stem(f"{Path(path).stem}_previous")


def content_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of a training state holds: model, step, optimizer and ema if any, and the
    counts of steps that were not finite."""
    content: dict[str, Any] = {"step": int(state["step"])}
    content["model"] = unwrap(state["model"]).state_dict()
    content.update({k: state[k].state_dict() for k in ("optimizer", "ema") if k in state})
    content.update({k: int(state[k]) for k in _COUNTS if k in state})
    return content


_COUNTS = ("nonfinite", "nonfinite_in_a_row")


def restore_newest(path: str | os.PathLike, state: dict, device=None) -> Path | None:
    """Load `path`, or where it is damaged or missing the one before it, into `state`.

    A damaged file is named in a warning. Returns: the file that was loaded; None if there is none.

    Raises: ValueError where every file that is there is damaged, or belongs to another network.
    """
    there = [p for p in (Path(path), previous(path)) if p.exists()]
    for i, candidate in enumerate(there):
        try:
            saved = load_file(candidate, device)
        except ValueError as error:
            if i + 1 == len(there):
                raise
            warnings.warn(f"{error}. The one before it, {there[i + 1]}, is used", stacklevel=2)
            continue
        _adopt(candidate, saved, state)
        return candidate
    return None


def restore_checkpoint(path: str | os.PathLike, state: dict, device=None) -> dict:
    """Load `path` into the objects of `state` and return it; a missing file warns and changes
    nothing, which is how every training of score_sde's family starts.

    The file may be ours, or one of score_sde_pytorch, score_sde (JAX), NCSNv2, safetensors or
    diffusers, told apart by what they hold. An average that the file lacks starts at its weights.

    Raises: ValueError for a file that is no checkpoint, or that belongs to another network: its
      message lists the keys that differ. Nothing is loaded then.
    """
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        warnings.warn(f"no checkpoint at {path}; the state is returned as it was", stacklevel=2)
        return state
    return _adopt(path, load_file(path, device), state)


def _adopt(path: Path, saved: dict, state: dict) -> dict:
    """Load what `path` holds into the objects of `state`; all of it or nothing."""
    model = unwrap(state["model"])
    saved = for_state(path, saved, {**state, "model": model})
    parts = [name for name in ("ema", "optimizer") if name in state and name in saved]
    if "optimizer" in parts:
        _check_optimizer(path, state["optimizer"], saved["optimizer"])
    if "optimizer" in state and "optimizer" not in saved:
        warnings.warn(f"{path} holds no optimizer; its moments start at zero", stacklevel=2)
    for name in parts:  # the average checks before it takes over, so it goes first
        state[name].load_state_dict(saved[name])
    model.load_state_dict(saved["model"])
    state["step"] = int(saved["step"])
    state.update({name: int(saved[name]) for name in _COUNTS if name in saved})
    return state


def load_file(path: str | os.PathLike, device=None) -> dict[str, Any]:
    """The content of a checkpoint of any known format, under its own names: 'model', 'step', and
    'optimizer' and 'ema' where it has them; tensors and plain containers only."""
    read = reader(Path(path))
    saved = read(Path(path)) if read is not None else load_torch(path, device)
    if isinstance(saved, list):
        saved = from_list(path, saved)
    if not isinstance(saved, dict) or not {"model", "step"} <= saved.keys():
        got = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path}: expected a checkpoint with 'model' and 'step', got {got}")
    for name in ("model", "optimizer", "ema"):
        if not isinstance(saved.get(name, {}), dict):
            kind = type(saved[name]).__name__
            raise ValueError(f"{path}: expected {name!r} to be a state dict, got {kind}")
    if read is None:
        saved.pop("layout", None)  # for the readers of other formats to say
    if isinstance(version := saved.get("version"), int) and version > VERSION:
        raise ValueError(
            f"{path}: expected a checkpoint of version {VERSION} at most, got {version}; a newer "
            "score-sde wrote it: update this one"
        )
    check_structure(path, saved)
    for group in saved.get("optimizer", {}).get("param_groups", ()):
        group.update({k: v.item() for k, v in group.items() if isinstance(v, np.generic)})
    return saved


def _check_optimizer(path, optimizer: Any, got: Mapping) -> None:
    """Refuse what torch's load_state_dict takes and its step falls over."""
    expected, state = optimizer.state_dict(), got.get("state")
    groups = [d.get("param_groups", ()) for d in (expected, got)]
    sizes = [[len(group["params"]) for group in part] for part in groups]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{path}: expected an optimizer of parameter groups of {sizes[0]} parameters, "
            f"got {sizes[1]}"
        )
    needed = [name for name in ("lr", "betas", "eps", "weight_decay") if name in groups[0][0]]
    adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    moments = {"step", "exp_avg", "exp_avg_sq"} if adam else set()
    if any(group.get("amsgrad") for group in groups[1]):
        moments |= {"max_exp_avg_sq"}
    numbers = [number for group in groups[1] for number in group["params"]]
    if (
        not isinstance(state, Mapping)
        or len(set(numbers)) < len(numbers)
        or not {number for number in state if isinstance(number, int)} <= set(numbers)
        or not all(name in group for group in groups[1] for name in needed)
        or not all(moments <= m.keys() and _is_step(m.get("step", 0)) for m in state.values() if m)
    ):
        raise ValueError(
            f"{path}: expected an optimizer's state with {', '.join([*needed, *sorted(moments)])} "
            "of its parameters, got another; the file is damaged: use a copy that is whole"
        )


def _is_step(value: Any) -> bool:
    try:
        return not isinstance(value, str) and 0 <= float(value) < float("inf")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
