"""Long work in parts that survive a kill: rows 0 to n − 1, each computed once, by any process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import distributed
import visualize
from run_lib_journal import log, progress_bar

Arrays = dict[str, np.ndarray]
_KEY = "made_by"
#: What reading a damaged .npz raises.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


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
            known = self._known(count) if distributed.is_main() else None
        known = distributed.broadcast(known)
        missing = [place for place in range(count) if not known[place]]
        if not missing:
            log.info("%s: all %d are there, from %s", label, count, self.path)
            return
        if len(missing) < count:
            log.info("%s: going on, %d of %d are there", label, count - len(missing), count)
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

    def read(self, count: int) -> Arrays:
        """The arrays of rows 0 … count − 1, all of which are there."""
        with np.load(self.path) as file:
            return {key: file[key][:count] for key in file.files if key not in (_KEY, "places")}

    def _write(self, path: Path, arrays: Arrays, places: range, compress: bool = False) -> None:
        about = {_KEY: np.asarray(self.name), "places": np.asarray(places)}
        visualize.write_npz(path, {**about, **arrays}, compress=compress)

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
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        return known

    def _files(self) -> list[Path]:
        return [self.path, *sorted(self.folder.glob("*.npz"))]

    def _finish(self, count: int) -> None:
        """Put the parts together into the finished file, then remove them."""
        rows: dict[str, np.ndarray] = {}
        filled = np.zeros(count, dtype=bool)
        for path in self._files():
            file = self._open(path)
            if file is None:
                continue
            with file:
                inside = file["places"] < count
                places = file["places"][inside]
                for key in set(file.files) - {_KEY, "places"}:
                    part = file[key][inside]
                    rows.setdefault(key, np.zeros((count, *part.shape[1:]), part.dtype))
                    rows[key][places] = part
                filled[places] = True
        if not filled.all():
            raise ValueError(
                f"{self.folder}: {int((~filled).sum())} of {count} rows are missing after all "
                "processes were done; the folder must be one that all machines share"
            )
        self._write(self.path, rows, range(count), compress=True)
        shutil.rmtree(self.folder)


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
