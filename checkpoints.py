"""Checkpoints: written atomically, read without running code from them, never loaded in part."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.utils import unwrap

VERSION = 1


def save_checkpoint(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write optimizer, model, EMA and step of a training state to `path`.

    The file is complete or absent: it is written beside its place, flushed and renamed.
    """
    saved: dict[str, Any] = {"version": VERSION, "step": int(state["step"])}
    saved["model"] = unwrap(state["model"]).state_dict()
    for name in ("optimizer", "ema"):
        if name in state:
            saved[name] = state[name].state_dict()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def restore_checkpoint(path: str | os.PathLike, state: dict, device=None) -> dict:
    """Load `path` into the objects of `state` and return it; a missing file warns and changes
    nothing, which is how every training of score_sde's family starts.

    Raises: ValueError for a file that is no checkpoint, or that belongs to another network: its
      message lists the keys that differ. Nothing is loaded then.
    """
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        warnings.warn(f"no checkpoint at {path}; the state is returned as it was", stacklevel=2)
        return state
    saved = load_file(path, device)
    model = unwrap(state["model"])
    weights = {key.removeprefix("module."): value for key, value in saved["model"].items()}
    _check_weights(path, model.state_dict(), weights)
    for name in ("ema", "optimizer"):  # these check before they take over, so they go first
        if name in state and name in saved:
            state[name].load_state_dict(saved[name])
    model.load_state_dict(weights)
    state["step"] = int(saved["step"])
    return state


def load_file(path: str | os.PathLike, device=None) -> dict[str, Any]:
    """The content of a checkpoint file, on `device`, tensors and plain containers only."""
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged bytes fail in a dozen ways
        raise ValueError(
            f"{path} is not a checkpoint that can be read (truncated, or of another kind): {error}"
        ) from error
    if not isinstance(saved, dict) or not {"model", "step"} <= saved.keys():
        got = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path}: expected a checkpoint with 'model' and 'step', got {got}")
    for group in saved.get("optimizer", {}).get("param_groups", ()):
        group.update({k: v.item() for k, v in group.items() if isinstance(v, np.generic)})
    return saved


def _numpy_scalars() -> list:
    """What a NumPy float64 is pickled by, under NumPy 1 and 2: score_sde_pytorch saves its
    learning rate as one."""
    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [np.dtype, type(np.dtype(np.float64)), *((scalar, name) for name in names)]


def _check_weights(path, expected: Mapping, got: Mapping) -> None:
    missing = [key for key in expected if key not in got]
    unknown = [key for key in got if key not in expected]
    shapes = [
        f"{key}: {tuple(got[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in got and got[key].shape != expected[key].shape
    ]
    if missing or unknown or shapes:
        parts = [
            f"{len(keys)} {what}: {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}"
            for what, keys in (
                ("missing", missing),
                ("not of this network", unknown),
                ("of another shape", shapes),
            )
            if keys
        ]
        raise ValueError(f"{path} belongs to another network or configuration; {'; '.join(parts)}")
