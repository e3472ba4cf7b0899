"""Checkpoints: written atomically, read without running code from them, never loaded in part."""

from __future__ import annotations

import contextlib
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints_import import for_state, from_list, reader
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


def write_atomically(path: Path, write: Callable[[Any], Any], kept: Path | None = None) -> None:
    """`write(file)` beside `path`, flush, and rename: the file is complete or absent.

    What was at `path` moves to `kept`, if given, once the new file is complete.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    watched = None
    try:
        try:
            with open(temporary, "wb") as file:
                watched = _Watched(file)
                write(watched)
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:  # torch.save, and closing, hide the reason behind one of theirs
            reason = (watched and watched.error) or error
            if isinstance(reason, OSError):
                raise _unwritable(path, reason) from error
            raise
        if kept is not None and path.exists():
            os.replace(path, kept)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class _Watched:
    """A file that remembers the error of a write."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name):
        return getattr(self.file, name)


def _unwritable(path: Path, error: OSError) -> OSError:
    there = "the file that was there is as it was" if path.exists() else "nothing is there"
    return OSError(
        error.errno, f"{path} cannot be written: {error.strerror or error}; {there}. Make room, "
        "and start again with the same command"
    )  # fmt: skip


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
        _check_groups(path, state["optimizer"].state_dict(), saved["optimizer"])
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
        _check_bytes(path)
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged bytes fail in a dozen ways
        raise ValueError(
            f"{path} is not a checkpoint that can be read (truncated, damaged, or of another "
            f"kind): {str(error) or type(error).__name__}"
        ) from error


def _check_bytes(path) -> None:
    """Compare the CRC-32 that torch.save wrote with every tensor, which torch.load does not; and
    what it believes without one: the sizes, and that an entry is no folder."""
    if not zipfile.is_zipfile(path):
        return  # of an old torch.save, or another format
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if not any(entry.CRC for entry in entries):
            return  # saved under torch.serialization.set_crc32_options(False)
        damaged = [
            entry.filename
            for entry in entries
            if entry.file_size != entry.compress_size or entry.external_attr & 0x10
        ] or list(filter(None, [archive.testzip()]))
    if damaged:
        raise ValueError(f"the checksum of {damaged[0]} does not fit its bytes")


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
