"""Files that are written whole or not at all, and what a full disk is told of them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(
    path: Path,
    write: Callable[[Any], Any],
    kept: Path | None = None,
    *,
    sync: bool = True,
    size: int | None = None,
) -> None:
    """`write(file)` beside `path`, flush, and rename: the file is complete or absent.

    What was at `path` moves to `kept`, if given, once the new file is complete. With `sync` that
    holds through a power failure too. `size` is about what it takes, where `write` is too slow to
    be called again to find out.

    Raises: OSError that names the file and, on a full disk, what it takes; what was at `path` is
      as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    watched = None
    try:
        try:
            with open(temporary, "wb") as file:
                watched = _Watched(file)
                write(watched)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except Exception as error:  # torch.save, and closing, hide the reason behind one of theirs
            reason = (watched and watched.error) or error
            if isinstance(reason, OSError):
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise unwritable(path, reason, write, size) from error
            raise
        if kept is not None and path.exists():
            _keep(path, kept)
        os.replace(temporary, path)
        if sync:
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # there is none, or the folder is read-only by now
            temporary.unlink()


def _keep(path: Path, kept: Path) -> None:
    """Give the file at `path` the name `kept` as well, so that at no moment one is missing; where
    the file system has no hard links, in place of its own."""
    second = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
    except OSError:
        second = path
    os.replace(second, kept)


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


class _Nowhere:
    """A file that counts what is written to it."""

    read = None  # NumPy looks whether it is there

    def __init__(self):
        self.size = 0

    def write(self, data):
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self):
        pass


def unwritable(
    path: Path,
    error: OSError,
    write: Callable[[Any], Any] | None = None,
    size: int | None = None,
) -> OSError:
    """The error for a file that cannot be written; `size`, or what `write` writes, is what it
    takes."""
    there = "the file that was there is as it was" if path.exists() else "nothing is there"
    return _cannot(f"{path} cannot be written: {error.strerror or error}; {there}", path, error, (
        write, size
    ))  # fmt: skip


@contextlib.contextmanager
def appending(path: Path) -> Iterator[None]:
    """An error of writing to a file that grows, or to files in a folder, names it."""
    try:
        yield
    except OSError as error:
        text = f"{path} cannot be written: {error.strerror or error}"
        raise _cannot(text, path, error, (None, None)) from error


def _cannot(text: str, path: Path, error: OSError, takes) -> OSError:
    if error.errno not in _FULL:
        return OSError(error.errno, f"{text}. Mend that, and start again with the same command")
    return OSError(
        error.errno,
        f"{text}.{_room(path, *takes)} Make room, and start again with the same command",
    )


def _room(path: Path, write: Callable[[Any], Any] | None, size: int | None) -> str:
    with contextlib.suppress(Exception):
        if size is None and write is not None:
            nowhere = _Nowhere()
            write(nowhere)
            size = nowhere.size
        free = _mib(shutil.disk_usage(path.parent).free)
        it = f"It takes {_mib(size)}, " if size is not None else ""
        return f" {it}{free} are free."
    return ""


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_unfinished(folder: Path, *names: str) -> None:
    """Remove what processes that are no more left of files of these names (patterns) in `folder`;
    what a living one is writing stays."""
    for name in names:
        for path in folder.glob(f".{name}.*.tmp"):
            found = re.search(r"\.(\d+)\.tmp$", path.name)
            if found and not _alive(int(found[1])):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier process of this number: this one is not writing now
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
