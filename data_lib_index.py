"""Which files there are: found once, held in few bytes, kept for the next start.

An index of at least `KEEP_FROM` files is kept in `$XDG_CACHE_HOME/score_sde` (else
`~/.cache/score_sde`), not beside the data: a file written into a folder changes the very time by
which changes are noticed. A kept index is used while every folder it was made from, or the archive,
has the modification time and the size of then. So files and folders added, removed or renamed at
any depth are noticed, at the price of one `stat` per folder; a file overwritten in place needs no
new index. Not noticed is a change whose time the file system does not record (a network file system
may lag a minute). A folder that changed less than two seconds before it was read is read again the
next time, for a second change would carry the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import distributed
from files import write_atomically
from files_reading import UNREADABLE

VERSION = 4
KEEP_FROM = 10_000
RACY_NS = 2 * 10**9

log = logging.getLogger("score_sde")


@dataclass(frozen=True, eq=False)
class Names:
    """File names in a few arrays: a million of 12 letters take 24 MB, and no object each.

    Name i is ``folders[folder[i]]``, which ends with a slash or is empty, and then the letters
    from ``ends[i - 1]`` to ``ends[i]``.
    """

    folders: list[str]
    folder: np.ndarray
    letters: bytes
    ends: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Return the names in the order given."""
        number: dict[str, int] = {}
        folder, letters = [], []
        for name in names:
            above, slash, rest = name.rpartition("/")
            folder.append(number.setdefault(above + slash, len(number)))
            letters.append(_encode(rest))
        ends = np.cumsum([len(part) for part in letters], dtype=np.int64)
        return cls(list(number), np.array(folder, np.int32), b"".join(letters), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return self.folders[self.folder[i]] + _decode(self.letters[start : self.ends[i]])


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(letters: bytes) -> str:
    return letters.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Index:
    """The images of a source, in a fixed order: names, and numbers that lead to each one.

    ``columns`` holds one array per kind of number; ``files`` counts the images and all else.
    """

    names: Names
    files: int
    columns: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Watched:
    """Paths whose change makes an index invalid, with each one's (modification time, size)."""

    paths: list[str] = field(default_factory=list)
    stamps: list[tuple[int, int]] = field(default_factory=list)

    def add(self, path: str | os.PathLike, known: os.stat_result | None = None) -> None:
        """Watch a path, from before it is read."""
        self.paths.append(os.fspath(path))
        self.stamps.append(_stamp(known or os.stat(path)))


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_mtime_ns, stat.st_size


def indexed(path: Path, kind: str, find: Callable[[Watched], Index]) -> Index:
    """Return the kept index of what lies at ``path``, or else what ``find`` finds, and keep it."""
    key = json.dumps([VERSION, kind, str(path.resolve())])
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    kept_at = cache_folder() / f"{path.resolve().name[:40]}-{digest}.npz"
    index = _load(kept_at)
    if index is not None:
        return index
    started, watched = time.time_ns(), Watched()
    index = find(watched)
    if len(index.names) >= KEEP_FROM and max(watched.stamps)[0] < started - RACY_NS:
        _keep(kept_at, index, watched)
    return index


def cache_folder() -> Path:
    """Return the folder of the kept indices, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "score_sde"


def _keep(path: Path, index: Index, watched: Watched) -> None:
    """Write an index, whole or not at all; where that fails, the next start has to search again."""
    arrays = {f"column_{name}": values for name, values in index.columns.items()}
    arrays |= {
        "columns": _packed([*index.columns]),  # an entry's name in a zip has no checksum
        "folders": _packed(index.names.folders),
        "folder": index.names.folder,
        "letters": np.frombuffer(index.names.letters, np.uint8),
        "ends": index.names.ends,
        "files": np.array(index.files),
        "watched": _packed(watched.paths),
        "stamps": np.array(watched.stamps, np.int64),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    except OSError as error:
        log.info(f"data: the index of {watched.paths[0]} could not be kept at {path}: {error}")
    else:
        log.info(f"data: {len(index.names):,} images in {watched.paths[0]}, index kept at {path}")


def _load(path: Path) -> Index | None:
    """Return a kept index, or None where there is none, or it is damaged or out of date."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            for folder, known in zip(_unpacked(kept["watched"]), kept["stamps"], strict=True):
                if _stamp(os.stat(folder)) != tuple(known.tolist()):
                    return None
            names = Names(
                _unpacked(kept["folders"]), kept["folder"], kept["letters"].tobytes(), kept["ends"]
            )
            columns = {name: kept[f"column_{name}"] for name in _unpacked(kept["columns"])}
            return Index(names, int(kept["files"]), columns)
    except UNREADABLE:
        return None


def _packed(texts: list[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(texts).encode(), np.uint8)


def _unpacked(letters: np.ndarray) -> list[str]:
    return json.loads(letters.tobytes())


def walk(root: Path, wanted: Callable[[str], bool], watched: Watched) -> Index:
    """Return the wanted files below a folder, links followed, sorted by name.

    Column ``link`` says which are links themselves. A folder inside itself by way of a link is not
    entered again; one that may not be read is left out, with a warning. Pipes and devices, whose
    reading might never end, are no files.
    """
    names: list[str] = []
    links: list[bool] = []
    files = 0
    ahead: list[tuple[str, str, tuple]] = [(str(root), "", ())]  # a folder and those it is in
    with progress(f"looking for images in {root}") as bar:
        while ahead:
            folder, prefix, above = ahead.pop()
            try:
                stat = os.stat(folder)
                with os.scandir(folder) as listing:
                    entries = list(listing)
            except PermissionError as error:
                if not prefix:
                    raise
                log.warning(f"data: {folder} is left out ({error.strerror})")
                continue
            inside = (*above, (stat.st_dev, stat.st_ino))
            if inside[-1] in above:
                continue
            watched.add(folder, stat)
            for entry in entries:
                if entry.is_dir():
                    ahead.append((entry.path, f"{prefix}{entry.name}/", inside))
                    continue
                if not entry.is_file() and os.path.exists(entry.path):
                    continue
                files += 1
                if wanted(prefix + entry.name):
                    names.append(prefix + entry.name)
                    links.append(entry.is_symlink())
            bar.update(len(entries))
    order = sorted(range(len(names)), key=names.__getitem__)
    return Index(Names.of(names[i] for i in order), files, {"link": np.array(links, bool)[order]})


class Silent(contextlib.AbstractContextManager):
    """A progress bar that shows nothing."""

    def update(self, n: int = 1) -> None:
        """Nothing to show."""

    def __exit__(self, *error: object) -> None:
        """Nothing to end."""


def progress(what: str, total: int | None = None, *, show: bool = True) -> Any:
    """Return a progress bar for work of more than a second; only the main process shows it."""
    # Even a disabled tqdm takes a lock that all processes share: a worker killed there ends all.
    if not (show and distributed.is_main()):
        return Silent()
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, desc=what, delay=1, unit="", unit_scale=True, leave=False, dynamic_ncols=True,
        mininterval=interval, maxinterval=interval,
    )  # fmt: skip
