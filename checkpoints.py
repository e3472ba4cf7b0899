"""Checkpoints: written atomically, read without running code from them, never loaded in part."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints_import import for_state, from_list, reader
from models.utils import unwrap

VERSION = 1


def save_checkpoint(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write optimizer, model, EMA and step of a training state to `path`, atomically."""
    saved = {"version": VERSION, **content_of(state)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(saved, file))


def content_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of a training state holds: model, step, and optimizer and ema if any."""
    content: dict[str, Any] = {"step": int(state["step"])}
    content["model"] = unwrap(state["model"]).state_dict()
    content.update({k: state[k].state_dict() for k in ("optimizer", "ema") if k in state})
    return content


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """`write(file)` beside `path`, flush, and rename: the file is complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    model = unwrap(state["model"])
    saved = for_state(path, load_file(path, device), {**state, "model": model})
    parts = [name for name in ("ema", "optimizer") if name in state and name in saved]
    if "optimizer" in parts:
        _check_groups(path, state["optimizer"].state_dict(), saved["optimizer"])
    if "optimizer" in state and "optimizer" not in saved:
        warnings.warn(f"{path} holds no optimizer; its moments start at zero", stacklevel=2)
    for name in parts:  # the average checks before it takes over, so it goes first
        state[name].load_state_dict(saved[name])
    model.load_state_dict(saved["model"])
    state["step"] = int(saved["step"])
    return state


def load_file(path: str | os.PathLike, device=None) -> dict[str, Any]:
    """The content of a checkpoint of any known format, under its own names: 'model', 'step', and
    'optimizer' and 'ema' where it has them; tensors and plain containers only."""
    read = reader(Path(path)) or (lambda path: _torch_load(path, device))
    saved = read(Path(path))
    if isinstance(saved, list):
        saved = from_list(path, saved)
    if not isinstance(saved, dict) or not {"model", "step"} <= saved.keys():
        got = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path}: expected a checkpoint with 'model' and 'step', got {got}")
    for name in ("model", "optimizer", "ema"):
        if not isinstance(saved.get(name, {}), dict):
            kind = type(saved[name]).__name__
            raise ValueError(f"{path}: expected {name!r} to be a state dict, got {kind}")
    for group in saved.get("optimizer", {}).get("param_groups", ()):
        group.update({k: v.item() for k, v in group.items() if isinstance(v, np.generic)})
    return saved


def _torch_load(path, device) -> Any:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged bytes fail in a dozen ways
        raise ValueError(
            f"{path} is not a checkpoint that can be read (truncated, or of another kind): {error}"
        ) from error


def _numpy_scalars() -> list:
    """What a NumPy float64 is pickled by, under NumPy 1 and 2: score_sde_pytorch saves its
    learning rate as one."""
    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [np.dtype, type(np.dtype(np.float64)), *((scalar, name) for name in names)]


def _check_groups(path, expected: Mapping, got: Mapping) -> None:
    sizes = [[len(g["params"]) for g in d.get("param_groups", ())] for d in (expected, got)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{path}: expected an optimizer of parameter groups of {sizes[0]} parameters, "
            f"got {sizes[1]}"
        )
