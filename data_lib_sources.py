"""Where image files come from: a folder, a .zip or an lmdb. Each has an index and reads file i.

A source can be pickled and forked, and read by many threads: nothing in it has a position. Zips
and lmdbs are opened once in each process. Nothing is unpacked to the disk, so names lead nowhere;
no file is read that has, or would unpack to, more than `MOST_BYTES`.
"""

from __future__ import annotations

import bz2
import os
import stat
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_lib_index import Index, Names, Watched, indexed, walk
from data_lib_lmdb import read_keys
from files_reading import UNREADABLE

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LMDB_FILE = "data.mdb"
#: Of one image file: more than any image has that `data_lib_files.decode` takes.
MOST_BYTES = 2**30


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
        path = f"{self.path}/{self.index.names[i]}"
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_BYTES:
            raise ValueError(f"expected a file of at most {MOST_BYTES:,} bytes")
        with open(path, "rb") as file:
            return file.read()

    def _find(self, watched: Watched) -> Index:
        return walk(self.path, _is_image, watched)


#: The end of a local header in a .zip: the lengths of the name and the extra field after it.
_LOCAL_HEADER = struct.Struct("<26xHH")
#: From the compressed bytes and a length to the content, but to no more of it than that.
_DECOMPRESS = {
    zipfile.ZIP_STORED: lambda data, most: data[:most],
    zipfile.ZIP_DEFLATED: lambda data, most: zlib.decompressobj(-zlib.MAX_WBITS).decompress(
        data, most
    ),
    zipfile.ZIP_BZIP2: lambda data, most: bz2.BZ2Decompressor().decompress(data, most),
}


class Zip(Source):
    """Files in a .zip, stored, deflated or compressed by bzip2.

    The index holds the place of each file's local header, its length there and unpacked, the method
    and the checksum, so that a start does not parse the archive's directory. (Format: PKWARE,
    APPNOTE.)
    """

    _file: BinaryIO | None = None
    _lock = threading.Lock()

    def content(self, i: int) -> bytes:
        columns = self.index.columns
        offset, size = int(columns["offset"][i]), int(columns["size"][i])
        skip = _LOCAL_HEADER.size
        lengths = _LOCAL_HEADER.unpack(self._read(skip, offset))
        data = self._read(size, offset + skip + sum(lengths))
        length = int(columns["length"][i])
        data = _DECOMPRESS[int(columns["method"][i])](data, max(length, 1))
        if len(data) != length or zlib.crc32(data) != columns["checksum"][i]:
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
        except UNREADABLE as error:
            raise ValueError(
                f"{self.path} is not a readable zip ({error}); make it again"
            ) from error
        images = sorted((e for e in entries if _is_packed(e)), key=lambda e: e.filename)
        for entry in images:
            self._check(entry)
        columns = {
            "offset": np.array([e.header_offset for e in images], np.int64),
            "size": np.array([e.compress_size for e in images], np.int64),
            "length": np.array([e.file_size for e in images], np.int64),
            "method": np.array([e.compress_type for e in images], np.uint8),
            "checksum": np.array([e.CRC for e in images], np.uint32),
        }
        return Index(Names.of(e.filename for e in images), len(entries), columns)

    def _check(self, entry: zipfile.ZipInfo) -> None:
        name = printable(entry.filename)
        if entry.compress_type not in _DECOMPRESS or entry.flag_bits & 1:
            raise ValueError(
                f"{self.path}: expected files that are stored or deflated, got {name}, which is "
                f"encrypted or compressed by method {entry.compress_type}; zip the images again "
                "(zip -0 is quickest to read)"
            )
        inside = 0 <= entry.header_offset <= self.path.stat().st_size - entry.compress_size
        if not inside or entry.file_size > MOST_BYTES:
            raise ValueError(
                f"{self.path}: expected files inside the archive, of at most {MOST_BYTES:,} bytes, "
                f"got {name}, {entry.compress_size:,} bytes that unpack to {entry.file_size:,}; "
                "the archive is damaged, or made to fill the memory: make it again"
            )


def _is_packed(entry: zipfile.ZipInfo) -> bool:
    """Whether it is an image, and no symbolic link, whose content is a path."""
    return _is_image(entry.filename) and not stat.S_ISLNK(entry.external_attr >> 16)


def printable(name: str) -> str:
    """A file's name for people: what is not printable, such as a terminal's commands, as \\x1b."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in name
    )


class Lmdb(Source):
    """Values of an lmdb whose keys are names of any kind, as LSUN's authors distribute it."""

    def content(self, i: int) -> bytes:
        key = self.index.names[i].encode("utf-8", "surrogateescape")
        with _environment(self.path).begin(buffers=True) as transaction:
            value = transaction.get(key)
            if value is None:
                raise ValueError("no such key any more")
            if len(value) > min(MOST_BYTES, (self.path / LMDB_FILE).stat().st_size):
                raise ValueError(f"it claims {len(value):,} bytes")
            return bytes(value)

    def _find(self, watched: Watched) -> Index:
        watched.add(self.path / LMDB_FILE)
        try:
            names = [key.decode("utf-8", "surrogateescape") for key in read_keys(self.path)]
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not a readable lmdb ({error}); copy it again"
            ) from error
        return Index(Names.of(names), len(names))


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
