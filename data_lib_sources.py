"""Where image files come from: a folder, a .zip or an lmdb. Each has an index and reads file i.

A source can be pickled and forked, and read by many threads: nothing in it has a position. Zips
and lmdbs are opened once in each process.
"""

from __future__ import annotations

import bz2
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_lib_index import Index, Names, Watched, indexed, progress, walk

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LMDB_FILE = "data.mdb"


class Source:
    """Image files at ``path``: ``index`` names them, ``content`` reads one."""

    path: Path
    index: Index

    def __init__(self, path: Path):
        self.path = path
        self.index = indexed(path, f"{type(self).__name__} {EXTENSIONS}", self._find)

    def content(self, i: int) -> bytes:
        """Return the bytes of file i."""
        raise NotImplementedError

    def _find(self, watched: Watched) -> Index:
        raise NotImplementedError


def open_source(path: Path) -> Source:
    """Return the folder, .zip or lmdb at ``path``.

    Raises FileNotFoundError where there is nothing, or no image, and ValueError for another file.
    """
    if (path / LMDB_FILE).is_file() or path.name == LMDB_FILE:
        source = Lmdb((path.parent if path.name == LMDB_FILE else path).resolve())
    elif path.is_dir():
        source = Folder(path)
    elif not path.exists():
        raise FileNotFoundError(
            f"expected a folder, a .zip or an lmdb of images, got {path}, which does not exist; "
            "set --config.data.path (or data.root) to where the images are"
        )
    elif path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        source = Zip(path)
    else:
        raise ValueError(f"expected a folder or a .zip of images, got the file {path}; zip it")
    if not len(source.index.names):
        raise FileNotFoundError(
            f"expected images in {path}, found {source.index.files} files and no image; "
            f"known are {', '.join(EXTENSIONS)}"
        )
    return source


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not any(
        part.startswith((".", "__MACOSX")) for part in name.split("/")
    )


class Folder(Source):
    """Files in a folder, at any depth, links followed."""

    def content(self, i: int) -> bytes:
        with open(f"{self.path}/{self.index.names[i]}", "rb") as file:
            return file.read()

    def _find(self, watched: Watched) -> Index:
        return walk(self.path, _is_image, watched)


#: The end of a local header in a .zip: the lengths of the name and the extra field after it.
_LOCAL_HEADER = struct.Struct("<26xHH")
_DECOMPRESS = {
    zipfile.ZIP_STORED: bytes,
    zipfile.ZIP_DEFLATED: lambda data: zlib.decompress(data, -zlib.MAX_WBITS),
    zipfile.ZIP_BZIP2: bz2.decompress,
}


class Zip(Source):
    """Files in a .zip, stored, deflated or compressed by bzip2.

    The index holds the place of each file's local header, its length there, the method and the
    checksum, so that a start does not parse the archive's directory. (Format: PKWARE, APPNOTE.)
    """

    _file: BinaryIO | None = None
    _lock = threading.Lock()

    def content(self, i: int) -> bytes:
        columns = self.index.columns
        offset, size = int(columns["offset"][i]), int(columns["size"][i])
        skip = _LOCAL_HEADER.size
        lengths = _LOCAL_HEADER.unpack(self._read(skip, offset))
        data = self._read(size, offset + skip + sum(lengths))
        data = _DECOMPRESS[int(columns["method"][i])](data)
        if zlib.crc32(data) != columns["checksum"][i]:
            raise ValueError("wrong checksum")
        return data

    def _read(self, size: int, offset: int) -> bytes:
        file = self._file or self._open()
        if hasattr(os, "pread"):
            return os.pread(file.fileno(), size, offset)
        with self._lock:  # Windows, where no process inherits the position either
            file.seek(offset)
            return file.read(size)

    def _open(self) -> BinaryIO:
        self._file = open(self.path, "rb")  # noqa: SIM115  # for as long as this process lives
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_file"}

    def _find(self, watched: Watched) -> Index:
        watched.add(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{self.path} is not a readable zip ({error}); make it again"
            ) from error
        images = sorted((e for e in entries if _is_image(e.filename)), key=lambda e: e.filename)
        for entry in images:
            if entry.compress_type not in _DECOMPRESS or entry.flag_bits & 1:
                raise ValueError(
                    f"{self.path}: expected files that are stored or deflated, got "
                    f"{entry.filename}, which is encrypted or compressed by method "
                    f"{entry.compress_type}; zip the images again (zip -0 is quickest to read)"
                )
        columns = {
            "offset": np.array([e.header_offset for e in images], np.int64),
            "size": np.array([e.compress_size for e in images], np.int64),
            "method": np.array([e.compress_type for e in images], np.uint8),
            "checksum": np.array([e.CRC for e in images], np.uint32),
        }
        return Index(Names.of(e.filename for e in images), len(entries), columns)


class Lmdb(Source):
    """Values of an lmdb whose keys are names of any kind, as LSUN's authors distribute it."""

    def content(self, i: int) -> bytes:
        key = self.index.names[i].encode("utf-8", "surrogateescape")
        with _environment(self.path).begin() as transaction:
            value = transaction.get(key)
        if value is None:
            raise ValueError("no such key any more")
        return value

    def _find(self, watched: Watched) -> Index:
        watched.add(self.path / LMDB_FILE)
        environment = _environment(self.path)
        names, total = [], environment.stat()["entries"]
        with (
            progress(f"reading the keys of {self.path}", total) as bar,
            environment.begin() as all_,
        ):
            for key in all_.cursor().iternext(keys=True, values=False):
                names.append(key.decode("utf-8", "surrogateescape"))
                bar.update()
        return Index(Names.of(names), total)


#: The open lmdbs and the processes that opened them: lmdb refuses to open one twice in a process.
_environments: dict[Path, tuple[int, Any]] = {}


def _environment(path: Path) -> Any:
    """Return the lmdb at ``path``, opened for reading once in each process.

    Raises ImportError without the package, and ValueError where lmdb cannot read the file.
    """
    pid, environment = _environments.get(path, (0, None))
    if pid == os.getpid():
        return environment
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(
            f"{path} is an lmdb, which needs the package lmdb; pip install lmdb"
        ) from error
    if environment is not None:
        environment.close()  # inherited by a fork; this closes the copy, not the parent's
    try:
        environment = lmdb.open(
            str(path), readonly=True, lock=False, readahead=False, meminit=False
        )
    except lmdb.Error as error:
        raise ValueError(f"{path} is not a readable lmdb ({error}); copy it again") from error
    _environments[path] = os.getpid(), environment
    return environment
