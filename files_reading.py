"""Files from elsewhere, read without trust in what they hold.

No code is run from them (no pickle but torch's `weights_only`, and of that only what makes tensors,
numbers and containers); they are held to their checksums where they have any, and never believed
about a size that their bytes do not have.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

#: What reading a damaged .npz or JSON file raises.
UNREADABLE = (
    *(OSError, ValueError, LookupError, EOFError, TypeError, ArithmeticError, MemoryError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, struct.error),
)
#: Largest ratio of a .npz's arrays to its bytes, beyond the first 64 MiB.
MOST_EXPANSION, FREE_EXPANSION = 100, 2**26

# --- JSON -----------------------------------------------------------------------------------


def read_json(path: Path, what: str = "JSON") -> dict[str, Any]:
    """The object in a JSON file.

    Raises: ValueError, naming the file, where it is damaged or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what}, got a damaged file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected {what}, got a {type(content).__name__}")
    return content


# --- .npz -----------------------------------------------------------------------------------


class Npz:
    """The arrays of a .npz by name, each read when asked for.

    Raises: ValueError, naming the file, for what is no .npz, is damaged, holds Python objects, or
      whose arrays are of other sizes than its bytes are (10^12 numbers in a small file).
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._check_sizes(archive.infolist())
                self.about = {
                    entry.filename.removesuffix(".npy"): self._header(archive, entry)
                    for entry in archive.infolist()
                }
        except UNREADABLE as error:
            raise self._damaged(error) from error

    @property
    def files(self) -> list[str]:
        """The names of the arrays."""
        return list(self.about)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array, which is not read."""
        return self.about[name][0]

    def kind(self, name: str) -> str:
        """The kind of an array's numbers, NumPy's letter: f, i, u …"""
        return self.about[name][1]

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
        except UNREADABLE as error:
            raise self._damaged(error) from error

    def _check_sizes(self, entries: list[zipfile.ZipInfo]) -> None:
        total, size = sum(entry.file_size for entry in entries), self.path.stat().st_size
        if total > FREE_EXPANSION + MOST_EXPANSION * size:
            raise ValueError(f"it would grow from {size:,} bytes to {total:,}")
        if not all(entry.filename.endswith(".npy") for entry in entries):
            raise ValueError("not all of its entries are arrays")

    def _header(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple, str]:
        with archive.open(entry) as file:
            shape, _, dtype = array_header(file)
            rest = entry.file_size - file.tell()
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds Python objects, which are never loaded")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != rest:
            raise ValueError(f"{entry.filename} claims {shape} of {dtype} and has {rest:,} bytes")
        return shape, dtype.kind

    def _damaged(self, error: Exception) -> ValueError:
        reason = str(error)[:300] or type(error).__name__  # zipfile quotes the whole file
        return ValueError(
            f"{self.path}: expected a .npz of plain arrays, got a file that cannot be read "
            f"(truncated, damaged, or of another kind): {reason}; make or fetch it again"
        )


def array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape of the .npy that begins here, whether it lies column by column, and its numbers."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    return read(file)


# --- torch.save -----------------------------------------------------------------------------

#: What the pickle of a checkpoint may name: makers of tensors, numbers and containers.
_GLOBALS = {
    "collections": ("OrderedDict", "defaultdict", "Counter"),
    "builtins": ("set", "dict", "list", "complex"),
    "__builtin__": ("set", "dict", "list", "complex"),
    "_codecs": ("encode",),
    "numpy": ("dtype",),
    "numpy.core.multiarray": ("scalar",),
    "numpy._core.multiarray": ("scalar",),
    "torch.nn.parameter": ("Parameter",),
    "torch._utils": (
        *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"),
        *("_rebuild_parameter", "_rebuild_parameter_with_state"),
    ),
    "torch.storage": ("UntypedStorage",),
    "torch": (
        *("Size", "device"),
        *(k for k, v in vars(torch).items() if isinstance(v, torch.dtype) or k.endswith("Storage")),
    ),
}
_PICKLES = 5  # of a file of the old torch.save, before the numbers


def load_torch(path: str | os.PathLike, device=None, *, mmap=False, what="checkpoint") -> Any:
    """What torch.save wrote: tensors, numbers, strings and containers of these, nothing else.

    Every checksum of the file is held to. With `mmap` the tensors are mapped from it.

    Raises: ValueError, naming the file, where it is damaged or holds anything else.
    """
    try:
        sizes = _check_archive(path)
        with torch.serialization.safe_globals(_numpy_scalars()):
            loaded = torch.load(path, map_location=device, weights_only=True, mmap=mmap or None)
        if sizes is not None:
            _check_storages(loaded, sizes)
    except torch.OutOfMemoryError:  # of the device: nothing is wrong with the file
        raise
    except Exception as error:  # damaged bytes fail in a dozen ways
        raise ValueError(
            f"{path} is not a {what} that can be read (truncated, damaged, or of another "
            f"kind): {_reason(error)}; use a copy that is whole"
        ) from error
    return loaded


def _check_archive(path) -> set[int] | None:
    """Compare the CRC-32 that torch.save wrote with every tensor, which torch.load does not; and
    what it believes without one: the sizes, and that an entry is no folder. Refuse a pickle that
    names more than tensors need.

    Returns: the sizes of the tensors' records; None for a file of the old torch.save.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            _check_globals(file, _PICKLES)
        return None  # of an old torch.save, or another format
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any("/code/" in entry.filename for entry in entries):
            raise ValueError("it is a TorchScript program")
        if sum(entry.compress_size for entry in entries) > os.path.getsize(path):
            raise ValueError("its records overlap")
        damaged = [
            entry.filename
            for entry in entries
            if entry.file_size != entry.compress_size or entry.external_attr & 0x10
        ]
        summed = any(entry.CRC for entry in entries)
        if summed and not damaged:
            damaged = list(filter(None, [archive.testzip()]))
        if damaged:
            raise ValueError(f"the checksum of {damaged[0]} does not fit its bytes")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if not summed:  # saved under torch.serialization.set_crc32_options(False)
                    del entry.CRC
                _check_globals(io.BytesIO(archive.read(entry)), 1)
        return {entry.file_size for entry in entries}


def _check_globals(file: BinaryIO, pickles: int) -> None:
    """Raise ValueError where one of the pickles in `file` names what is not in _GLOBALS."""
    for _ in range(pickles):
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    if name not in _GLOBALS.get(module, ()):
                        raise _Code(f"{module}.{name}")
        except _Code:
            raise
        except Exception as error:  # of what is no pickle
            raise ValueError("it is no file of torch.save, or its pickle is damaged") from error


class _Code(ValueError):
    """A pickle names an object that is none of tensors, numbers and containers."""

    def __str__(self):
        return (
            f"it holds an object of {self.args[0]}, and objects can run code when they are loaded; "
            "save it as tensors, numbers, strings, dicts and lists only"
        )


def _check_storages(loaded: Any, sizes: set[int]) -> None:
    """Every tensor must have the bytes of a record; older torch believes its pickle instead."""
    for value in _leaves(loaded):
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() not in sizes:
            raise ValueError(f"a tensor claims {value.untyped_storage().nbytes():,} bytes")


def _leaves(tree: Any) -> Iterator[Any]:
    """What is in nested dicts, lists and tuples, which may be deep, or hold themselves."""
    ahead, seen = [tree], set()
    while ahead:
        value = ahead.pop()
        if not isinstance(value, dict | list | tuple):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            ahead.extend(value.values() if isinstance(value, dict) else value)


def _reason(error: Exception) -> str:
    """The error's first sentence, without torch's advice to load the file without protection."""
    text = str(error).partition("\n")[0].strip() or type(error).__name__
    if "Weights only load failed" in text or "weights_only" in text:
        return "its pickle is damaged, or holds more than tensors, numbers and containers"
    return text[:300]


def _numpy_scalars() -> list:
    """What a NumPy number is pickled by, under NumPy 1 and 2: score_sde_pytorch saves its
    learning rate as one."""
    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + "efd"}
    return [np.dtype, *kinds, *((scalar, name) for name in names)]


# --- safetensors ----------------------------------------------------------------------------

SAFETENSORS_HINT = "safetensors is not installed; pip install 'score-sde[export]'"


def load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the notes of a safetensors file.

    Raises: ValueError where it is damaged, or the package is missing.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ValueError(f"{path}: {SAFETENSORS_HINT}") from error
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # SafetensorError, and what an unknown type of number raises
        raise ValueError(
            f"{path} is not a checkpoint that can be read (truncated, damaged, or of another "
            f"kind): {error}; use a copy that is whole"
        ) from error


def tensors_hash(tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and numbers, and of notes on them, but for one called
    'sha256': safetensors itself has no checksum."""
    noted = sorted((key, str(value)) for key, value in notes.items() if key != "sha256")
    digest = hashlib.sha256(json.dumps(noted).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
