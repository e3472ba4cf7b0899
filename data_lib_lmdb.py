"""The keys of an lmdb, read in a process of its own.

The C library trusts the file that it maps: of a truncated or damaged one it may read past the end,
which ends the process. So a child does it, once for an index: it walks all keys, and holds every
value to lie inside the file.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_keys(path: Path) -> list[bytes]:
    """The keys of the lmdb in the folder `path`, in order.

    Raises: ImportError without the package; ValueError, with the reason, for a damaged file.
    """
    if importlib.util.find_spec("lmdb") is None:
        raise ImportError(f"{path} is an lmdb, which needs the package lmdb; pip install lmdb")
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        died = f"its reader died by signal {-done.returncode}"
        raise ValueError(died if done.returncode < 0 else (lines or ["?"])[-1])
    return list(_unpack(done.stdout))


def _unpack(data: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        end = place + 4 + int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : end]
        place = end


def _main(path: str) -> int:
    import lmdb

    try:
        environment: Any = lmdb.open(
            path, readonly=True, lock=False, readahead=False, meminit=False
        )
        size, page = Path(path, "data.mdb").stat().st_size, environment.stat()["psize"]
        pages = environment.info()["last_pgno"] + 1
        if pages * page > size:
            print(f"expected {pages * page:,} bytes, got {size:,}", file=sys.stderr)
            return 1
        start, entries = _mapped_at(path), environment.stat()["entries"]
        with environment.begin(buffers=True) as transaction:
            for number, (key, value) in enumerate(transaction.cursor()):
                if number >= entries:  # pages that lead back to themselves
                    print(f"it has more than its {entries:,} entries", file=sys.stderr)
                    return 1
                if start and len(value) and not 0 <= _address(value) - start <= size - len(value):
                    print(f"the value of {bytes(key)!r} lies outside the file", file=sys.stderr)
                    return 1
                sys.stdout.buffer.write(len(key).to_bytes(4, "big") + bytes(key))
    except lmdb.Error as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.flush()
    return 0


def _mapped_at(path: str) -> int:
    """Where the file begins in memory; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    ours = [line for line in lines if line.endswith(str(Path(path, "data.mdb").resolve()))]
    return int(ours[0].partition("-")[0], 16) if ours else 0


def _address(value: Any) -> int:
    import numpy as np

    return np.frombuffer(value, np.uint8).ctypes.data


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
