"""Long work in parts that survive a kill: rows 0 to n − 1, each computed once, by any process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import distributed
import visualize
from files import remove_unfinished, write_atomically
from files_reading import UNREADABLE, array_header
from run_lib_journal import log, progress_bar

Arrays = dict[str, np.ndarray]
_KEY = "made_by"
#: Bytes that are put together at a time.
_CHUNK = 2**24


def name_of(made_by: dict[str, Any]) -> str:
    """SHA-256 of all that the rows depend on; rows of another name are never mixed with these."""
    return hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode()).hexdigest()


class Shards:
    """Rows of arrays at `path` (.npz), made part by part in the folder `path`.parts.

    A row belongs to one place in 0 … n − 1. What a killed run left is kept; processes and sizes of
    parts may differ from run to run. Files of another checkpoint or protocol (`made_by`) are
    replaced, which the log says. The folder must be one that all processes share.

    Args:
      path: of the finished file.
      made_by: all that the rows depend on, JSON-able.
      whole_parts: every part but the last holds `size` rows from a multiple of `size`, for work
        whose rows depend on the part that they are in.
    """

    def __init__(self, path: Path, made_by: dict[str, Any], *, whole_parts: bool = False):
        self.path, self.folder = path, path.with_suffix(".parts")
        self.name, self.whole_parts = name_of(made_by), whole_parts

    def fill(
        self, count: int, size: int, work: Callable[[range], Arrays], label: str, unit: str
    ) -> None:
        """Compute the rows that are missing of 0 … count − 1, spread over the processes.

        `work(places)` gives the arrays of at most `size` consecutive places, a row for each.
        """
        with distributed.together():
            known, parts = None, False
            if distributed.is_main():
                known = self._known(count)
                parts = self.folder.exists()
        known, parts = distributed.broadcast((known, parts))
        missing = [place for place in range(count) if not known[place]]
        if not missing:
            log.info("%s: all %d are there, from %s", label, count, self.path)
        elif len(missing) < count:
            log.info("%s: going on, %d of %d are there", label, count - len(missing), count)
        if missing or parts:  # parts: the process that put them together was killed
            self._compute(count, size, missing, work, label, unit)

    def _compute(self, count: int, size: int, missing: list[int], work, label, unit) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # The bar is the main process's, whose share is like that of the others.
        mine = self._mine(missing, size)
        total = sum(map(len, mine))
        with progress_bar(total, desc=label, unit=unit, leave=False) as bar:
            for places in mine:
                self._write(self.folder / f"{places.start:09d}.npz", work(places), places)
                bar.update(len(places))
        distributed.barrier()
        with distributed.together():
            if distributed.is_main():
                self._finish(count)

    def _mine(self, missing: list[int], size: int) -> list[range]:
        """This process's parts, each consecutive and of at most `size` places."""
        if self.whole_parts:
            parts = list(_runs(missing, size, aligned=True))
            share = distributed.share(len(parts))
            return parts[share.start : share.stop]
        share = distributed.share(len(missing))
        return list(_runs(missing[share.start : share.stop], size, aligned=False))

    def read(self, count: int, *keys: str) -> Arrays:
        """The arrays, or those of these names, of rows 0 … count − 1, all of which are there."""
        found = {}
        for key in keys or _keys(self.path):
            with self.rows(key) as rows:
                found[key] = rows.take(range(count))
        return found

    def rows(self, key: str) -> Rows:
        """The rows of one of the arrays, for some at a time."""
        return Rows(self.path, key)

    def _write(self, path: Path, arrays: Arrays, places: range) -> None:
        about = {_KEY: np.asarray(self.name), "places": np.asarray(places)}
        visualize.write_npz(path, {**about, **arrays}, compress=False)

    def _open(self, path: Path):
        """The file at `path` if it is one of these rows, and whole; None otherwise."""
        with contextlib.suppress(*UNREADABLE), contextlib.ExitStack() as opened:
            file = opened.enter_context(np.load(path))
            if str(file[_KEY]) == self.name and file.zip.testzip() is None:
                opened.pop_all()
                return file
        return None

    def _known(self, count: int) -> np.ndarray:
        """Which places are there; removes parts that are not these rows'."""
        known, strange = np.zeros(count, dtype=bool), 0
        for path in self._files():
            file = self._open(path)
            if file is not None:
                with file:
                    places = file["places"]
                known[places[places < count]] = True
            elif path.exists():
                strange += 1
                path.unlink() if path != self.path else None
        if strange:
            log.info("%s: damaged, or of another checkpoint or protocol; made anew", self.path)
        remove_unfinished(self.folder, "*")
        return known

    def _files(self) -> list[Path]:
        return [self.path, *sorted(self.folder.glob("*.npz"))]

    def _finish(self, count: int) -> None:
        """Put the parts together into the finished file, a few rows at a time, then remove them."""
        files: list[Path] = []
        owner, row = np.full(count, -1), np.zeros(count, dtype=np.int64)
        for path in self._files():
            file = self._open(path)
            if file is None:
                continue
            with file:
                places = file["places"]
            inside = np.flatnonzero(places < count)
            owner[places[inside]], row[places[inside]] = len(files), inside
            files.append(path)
        if (owner < 0).any():
            raise ValueError(
                f"{self.folder}: {int((owner < 0).sum())} of {count} rows are missing after all "
                "processes were done; the folder must be one that all machines share"
            )
        size = sum(path.stat().st_size for path in files)
        write_atomically(self.path, lambda to: self._merge(to, files, owner, row), size=size)
        shutil.rmtree(self.folder)

    def _merge(self, to, files: list[Path], owner: np.ndarray, row: np.ndarray) -> None:
        """Write row i of every array, which is row[i] of files[owner[i]], to the .npz `to`."""
        with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
            about = {_KEY: np.asarray(self.name), "places": np.arange(len(row))}
            for key, value in about.items():
                with archive.open(f"{key}.npy", "w") as entry:
                    np.lib.format.write_array(entry, value, allow_pickle=False)
            for key in _keys(files[0]):
                with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                    _merge_rows(entry, key, files, owner, row)


class Rows:
    """The rows of an array in a .npz, some at a time; fast in order, for it is read like a tape."""

    def __init__(self, path: Path, key: str):
        self.path = path
        with contextlib.ExitStack() as opened:
            archive = opened.enter_context(zipfile.ZipFile(path))
            self.file: Any = opened.enter_context(archive.open(f"{key}.npy"))
            self.shape, fortran, self.dtype = array_header(self.file)
            if self.dtype.hasobject or not self.shape:
                raise ValueError(f"{path}: expected {key} as numbers, row by row")
            if fortran:  # column by column: a transposed array, which was in memory when written
                columns = np.frombuffer(self.file.read(), self.dtype)
                self.file = io.BytesIO(columns.reshape(self.shape, order="F").tobytes())
            self.begin = self.file.tell()
            self.size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
            self.opened = opened.pop_all()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_) -> None:
        self.opened.close()

    def take(self, places: range) -> np.ndarray:
        """The rows at consecutive places, as a new array; fewer where there are fewer."""
        count = max(min(places.stop, self.shape[0]) - places.start, 0)
        found = np.empty((count, *self.shape[1:]), self.dtype)
        self.file.seek(self.begin + places.start * self.size)
        space = found.reshape(-1).view(np.uint8).data
        while len(space):
            read = self.file.readinto(space[:_CHUNK])
            if not read:
                raise EOFError(f"{self.path}: {len(space)} bytes are missing")
            space = space[read:]
        return found


def _keys(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    return [name for name in names if name not in (_KEY, "places")]


def _merge_rows(entry, key: str, files: list[Path], owner: np.ndarray, row: np.ndarray) -> None:
    """Write, as .npy, the array `key` whose row i is row[i] of files[owner[i]]."""
    with contextlib.ExitStack() as current:
        of, rows = 0, current.enter_context(Rows(files[0], key))
        about = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False}
        about["shape"] = (len(row), *rows.shape[1:])
        np.lib.format.write_array_header_1_0(entry, about)
        step = max(_CHUNK // max(rows.size, 1), 1)
        borders = np.flatnonzero((np.diff(owner) != 0) | (np.diff(row) != 1)) + 1
        for first, last in itertools.pairwise([0, *borders.tolist(), len(row)]):
            if owner[first] != of:
                current.close()
                of = int(owner[first])
                rows = current.enter_context(Rows(files[of], key))
            shift = int(row[first]) - first
            for i in range(first, last, step):
                part = rows.take(range(i + shift, min(i + step, last) + shift))
                entry.write(part.reshape(-1).view(np.uint8).data)


def _runs(places: list[int], size: int, *, aligned: bool) -> Iterator[range]:
    """`places`, in order, as consecutive ranges of at most `size`, `aligned` at its multiples."""
    start = 0
    for i in range(1, len(places) + 1):
        whole = i - start == size
        if i == len(places) or places[i] != places[i - 1] + 1 or whole or (
            aligned and places[i] % size == 0
        ):  # fmt: skip
            yield range(places[start], places[i - 1] + 1)
            start = i
