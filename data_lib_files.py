"""Images in a folder, a .zip or an lmdb: which ones, how they are split, how they are decoded."""

from __future__ import annotations

import errno
import io
import logging
import os
import posixpath
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_lib_index import progress
from data_lib_sources import EXTENSIONS, Folder, Source, open_source, printable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EXTENSIONS", "ImageFiles", "decode", "list_images", "open_image", "split_images"]

EVAL_FOLDERS = ("test", "val", "valid", "validation", "eval")
#: Files of fewer bytes decode faster in one thread: the interpreter's lock outweighs the decoder.
SMALL_FILE = 8192
#: Damaged files after which no more are looked for.
MANY_DAMAGED = 10
#: What EXTENSIONS are; Pillow knows formats, such as PostScript, that run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")

#: Errors of the machine and not of a file: another process, or start, may read that file.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)

log = logging.getLogger("score_sde")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files of one source in a fixed order, decoded to uint8 images of one shape.

    ``rows`` numbers them in the source; ``base`` is the folder below which their names say
    something (a class, say); ``labels`` numbers the sorted class folders, or is None; ``shape`` is
    (C, H, W) with H = W; ``crop`` is the side in pixels of the central square that is kept, 0 for
    the largest one. What is asked of all names is asked of their folders, which are few.
    """

    source: Source
    rows: np.ndarray
    base: str = ""
    labels: np.ndarray | None = None
    shape: tuple[int, int, int] = (3, 32, 32)
    crop: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Every file's name: a new tuple of as many strings."""
        return tuple(self.source.index.names[row] for row in self.rows)

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageFiles:
        """Return the files at ``indices``."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, rows=self.rows[indices], labels=labels)

    def below(self, base: str) -> ImageFiles:
        """Return the files whose names start with ``base``, a folder with its final slash."""
        kept = self._in_folders(lambda folder: folder.startswith(base))
        return replace(self, rows=self.rows[kept], base=base, labels=None)

    def rest(self, kept: np.ndarray) -> ImageFiles:
        """Return the files that a mask keeps, the base being the folder that holds them all."""
        if kept.all():
            return self
        return _based(replace(self, rows=self.rows[kept], labels=None))

    def folders(self) -> list[str]:
        """Return the folders that hold a file, each with its final slash, the top being ''."""
        names = self.source.index.names
        return [names.folders[i] for i in np.unique(names.folder[self.rows])]

    def top(self, folder: str) -> str:
        """Return the folder just below the base that a folder lies in, '' for the base itself."""
        return folder[len(self.base) :].split("/")[0]

    def tops(self) -> set[str]:
        """Return the folders just below the base that hold a file, '' for the base itself."""
        return set(map(self.top, self.folders()))

    def outside(self, tops: Sequence[str]) -> np.ndarray:
        """Return the mask of the files that lie in none of these folders just below the base."""
        return self._in_folders(lambda folder: self.top(folder) not in tops)

    def classes(self) -> list[str]:
        """Return the sorted folders just below the base; [] where some image lies in none."""
        tops = self.tops()
        return [] if "" in tops else sorted(tops)

    def labelled(self, classes: Sequence[str]) -> ImageFiles:
        """Return the files with the number of each one's class, where all have one of these."""
        if len(classes) < 2 or not set(self.classes()) or not set(self.classes()) <= set(classes):
            return self
        names, number = self.source.index.names, {name: i for i, name in enumerate(classes)}
        label = np.array([number.get(self.top(folder), -1) for folder in names.folders])
        return replace(self, labels=label[names.folder[self.rows]])

    def with_shape(self, shape: tuple[int, int, int], crop: int = 0) -> ImageFiles:
        """Return the files to be decoded to another shape (C, H, W)."""
        return replace(self, shape=shape, crop=crop)

    def read(self, indices: Iterable[int], threads: int = 0, *, show: bool = False) -> torch.Tensor:
        """Decode the images at ``indices``: uint8 of shape (b, C, H, W).

        ``threads`` share the work, by default as many as pay; ``show`` shows the progress.

        Raises ValueError naming files that cannot be decoded.
        """
        indices = np.asarray(list(indices) if isinstance(indices, range) else indices, np.int64)
        rows = self.rows[indices]
        images = np.empty((len(rows), *self.shape), dtype=np.uint8)
        failures = self._decode_all(rows, images, threads, f"decoding {self.source.path}", show)
        if failures:
            raise ValueError(self._damaged(rows, failures))
        return torch.from_numpy(images)

    def without_damaged(self) -> ImageFiles:
        """Return the files that can be decoded, each of which is tried; a warning counts others.

        Which these are depends on the files alone, so that every process, and every start on the
        same files, has the same set in the same order.

        Raises ValueError where none is left; OSError where the machine fails, and not a file.
        """
        what = f"checking {self.source.path}"
        failures = self._decode_all(self.rows, None, 0, what, True)
        if len(failures) == len(self):
            raise ValueError(self._damaged(self.rows, dict(sorted(failures.items())[:1])))
        if not failures:
            return self
        names = [printable(self.source.index.names[int(self.rows[i])]) for i in sorted(failures)]
        log.warning(
            f"data: {len(failures)} of {len(self)} images in {self.source.path} cannot be decoded "
            f"and are left out (data.skip_corrupt): {', '.join(names[:MANY_DAMAGED])}"
            + (", …" if len(names) > MANY_DAMAGED else "")
        )
        return self.select(np.setdiff1d(np.arange(len(self)), list(failures)))

    def _decode_all(
        self, rows: np.ndarray, images: np.ndarray | None, threads: int, what: str, show: bool
    ) -> dict[int, str]:
        """Decode rows into ``images``, or only try to; the reasons of failures by place.

        Where the images are wanted, many failures end it.
        """
        failures: dict[int, str] = {}
        threads = min(threads or self._threads(), max(1, len(rows)))

        def fill(places: range) -> None:
            for place in places:
                try:
                    image = self._decode(int(rows[place]))
                    if images is not None:
                        images[place] = image
                except ValueError as error:
                    failures[place] = str(error)
                if images is not None and len(failures) > MANY_DAMAGED:
                    return
                bar.update()

        with progress(what, len(rows), show=show) as bar:
            shares = [range(k, len(rows), threads) for k in range(threads)]
            if threads == 1:
                fill(shares[0])
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(fill, shares))
        return failures

    def _threads(self) -> int:
        try:
            small = len(self.source.content(int(self.rows[0]))) < SMALL_FILE
        except Exception:  # a damaged file; decoding it says so
            small = True
        return 1 if small else min(8, os.cpu_count() or 1)

    def _decode(self, row: int) -> np.ndarray:
        try:
            return decode(self.source.content(row), self.shape[0], self.shape[1], self.crop)
        except Exception as error:  # decoders of damaged files raise nearly anything
            if isinstance(error, OSError) and error.errno in _PASSING:
                raise
            raise ValueError(
                f"{self.source.path}/{printable(self.source.index.names[row])}: expected an image, "
                f"got a file that cannot be decoded ({type(error).__name__}: {error}); replace or "
                "delete it, or leave out all such files with --config.data.skip_corrupt"
            ) from error

    def _damaged(self, rows: np.ndarray, failures: dict[int, str]) -> str:
        first, *others = sorted(failures)
        names = ", ".join(printable(self.source.index.names[int(rows[place])]) for place in others)
        return failures[first] + (f"; likewise {names}" if others else "")

    def _in_folders(self, holds: Callable[[str], bool]) -> np.ndarray:
        names = self.source.index.names
        return np.array([holds(folder) for folder in names.folders])[names.folder[self.rows]]


def _based(files: ImageFiles) -> ImageFiles:
    """Return the files with the longest folder that holds them all as their base."""
    folders = files.folders()
    shared = posixpath.commonpath(folders) if folders and all(folders) else ""
    return replace(files, base=f"{shared}/" if shared else "")


def decode(content: bytes, channels: int, size: int, crop: int = 0) -> np.ndarray:
    """Decode one image file to uint8 of shape (channels, size, size).

    The image is opened as by `open_image`, made grey or colour, cut to its central square and
    resized (bicubic, antialiased). Raises what that does.
    """
    from PIL import Image

    image = open_image(content).convert("L" if channels == 1 else "RGB")
    side = min(image.width, image.height, crop or max(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()


def open_image(content: bytes) -> Image:
    """Return an image file as a Pillow image of 8 bits, turned as its EXIF tag says, and laid on
    white where it is transparent.

    Raises ValueError, or what Pillow raises, where it is damaged, of another kind than EXTENSIONS,
    or of more pixels than Pillow takes (179 million).
    """
    from PIL import Image, ImageOps

    _check_png(content)
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _check_png(content: bytes) -> None:
    """Compare the checksums in a .png, as Pillow does for the chunks before the pixels only."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return
    view, place = memoryview(content), 8
    while place + 12 <= len(view):
        length, kind = struct.unpack(">I4s", view[place : place + 8])
        end = place + 12 + length
        if kind == b"IEND":
            return
        computed = zlib.crc32(view[place + 4 : end - 4]).to_bytes(4, "big")
        if end > len(view) or computed != view[end - 4 : end]:
            raise ValueError(f"wrong checksum of {kind.decode('latin-1')!r}")
        place = end


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Map 16-bit grey values to 8 bits: 65535 becomes 255."""
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels of {pixels.dtype} have no known range; save it with 8 or 16 bits")
    return ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)


def list_images(path: Path) -> ImageFiles:
    """Return the images in a folder, .zip or lmdb, at any depth, sorted by name.

    Raises FileNotFoundError where there is nothing, or no image, and ValueError for another file.
    """
    source = open_source(path)
    return _based(ImageFiles(source, np.arange(len(source.index.names))))


def split_images(
    path: Path, eval_path: Path | None, fraction: float
) -> tuple[ImageFiles, ImageFiles]:
    """Return the training and the evaluation images of a folder or .zip.

    The evaluation images are the first that there is of: all of ``eval_path``; the sub-folder
    named first in ``EVAL_FOLDERS``; a ``fraction`` of the images drawn with a fixed seed. The
    training images are those in the sub-folder train where there is one beside one of these
    folders or ``eval_path``, else all outside ``EVAL_FOLDERS``; none is in ``eval_path``. Class
    folders become labels. What is used is logged where it is not plain from the names.

    Raises ValueError where no training image remains, or ``path`` lies inside ``eval_path``.
    """
    files, others = list_images(path), None
    if eval_path:
        _refuse_inside(path, eval_path)
        others = list_images(eval_path)
        files = _without(files, others)
    tops = files.tops()
    eval_folders = [name for name in EVAL_FOLDERS if name in tops]
    if not eval_path and not eval_folders:
        return _split_by_fraction(files.labelled(files.classes()), fraction)
    train = _training_part(files, tops, eval_folders)
    held_out = files.below(f"{files.base}{eval_folders[0]}/") if others is None else others
    _log_parts(files, train, held_out, "train" in tops)
    classes = train.classes()
    return train.labelled(classes), held_out.labelled(classes)


def _training_part(files: ImageFiles, tops: set[str], eval_folders: list[str]) -> ImageFiles:
    """Return the files in the folder train, or where there is none those in no eval folder."""
    if "train" in tops:
        return files.below(f"{files.base}train/")
    train = files.rest(files.outside(eval_folders))
    if not len(train):
        raise ValueError(
            f"{files.source.path}: expected training images, got only {', '.join(sorted(tops))} to "
            "evaluate on; name the folder to train on train, or set --config.data.path"
        )
    return train


def _refuse_inside(path: Path, eval_path: Path) -> None:
    inner, outer = path.resolve(), eval_path.resolve()
    if inner == outer or (inner.is_dir() and inner.is_relative_to(outer)):
        raise ValueError(
            f"expected evaluation images that are not trained on, got data.path {path} inside "
            f"data.eval_path {eval_path}; set --config.data.eval_path to another folder"
        )


def _without(files: ImageFiles, others: ImageFiles) -> ImageFiles:
    """Return the files that are not, links followed, among the others."""
    if not isinstance(files.source, Folder) or not isinstance(others.source, Folder):
        return files
    excluded = _RealPaths(others)
    kept = ~_RealPaths(files).among(excluded)
    if not kept.any():
        raise ValueError(
            f"expected training images in {files.source.path}, got only such as are in "
            f"data.eval_path {others.source.path}; set --config.data.eval_path to another folder"
        )
    if not kept.all():
        log.info(
            f"data: {np.sum(~kept)} images of {files.source.path} are in data.eval_path "
            f"{others.source.path}: they are not trained on"
        )
    return files.rest(kept)


class _RealPaths:
    """Where files in a folder really are; asked of each folder once, and of each link to a file."""

    def __init__(self, files: ImageFiles):
        index, self.files = files.source.index, files
        self.folder_of = index.names.folder[files.rows]
        self.folders = {
            int(i): os.path.realpath(files.source.path / index.names.folders[i])
            for i in np.unique(self.folder_of)
        }
        self.links = {
            place: os.path.realpath(self._path(place))
            for place in np.flatnonzero(index.columns["link"][files.rows]).tolist()
        }

    def _path(self, place: int) -> str:
        name = self.files.source.index.names[self.files.rows[place]]
        return os.path.join(self.folders[int(self.folder_of[place])], posixpath.basename(name))

    def _in(self, folders: set[str]) -> dict[int, str]:
        """Return the real path, by place, of the files that really are in one of these folders."""
        chosen = [i for i, real in self.folders.items() if real in folders]
        places = np.flatnonzero(np.isin(self.folder_of, chosen)).tolist()
        paths = {place: self._path(place) for place in places if place not in self.links}
        return paths | {p: r for p, r in self.links.items() if os.path.dirname(r) in folders}

    def among(self, others: _RealPaths) -> np.ndarray:
        """Return the mask of the files that are among the others."""

        def homes(paths: _RealPaths) -> set[str]:
            return {*paths.folders.values(), *map(os.path.dirname, paths.links.values())}

        shared = homes(self) & homes(others)
        theirs = set(others._in(shared).values())
        found = np.zeros(len(self.files), bool)
        found[[place for place, path in self._in(shared).items() if path in theirs]] = True
        return found


def _log_parts(files: ImageFiles, train: ImageFiles, held_out: ImageFiles, named: bool) -> None:
    """Log the parts where the training part has no name of its own or something is unused."""
    same = held_out.source is files.source
    used = np.concatenate([train.rows, *([held_out.rows] if same else [])])
    spare = files.select(np.flatnonzero(~np.isin(files.rows, used)))
    loose = spare.select(np.flatnonzero(spare._in_folders(lambda folder: not spare.top(folder))))
    unused = sorted(
        {*spare.tops() - {""}, *map(posixpath.basename, loose.select(range(len(loose))[:6]).names)}
    )
    if (named and not unused) or train is files:
        return
    where = held_out.base.rstrip("/") if same else held_out.source.path
    more = ", …" if len(unused) > 5 else ""
    log.info(
        f"data: {files.source.path}: training on {'train' if named else 'the rest'} ({len(train)} "
        f"images), evaluating on {where} ({len(held_out)} images), not using "
        f"{', '.join(unused[:5]) + more if unused else 'none'}"
    )


def _split_by_fraction(files: ImageFiles, fraction: float) -> tuple[ImageFiles, ImageFiles]:
    held_out = max(1, round(len(files) * fraction))
    if held_out >= len(files):
        raise ValueError(
            f"{files.source.path}: expected enough images for a held-out part of {fraction}, got "
            f"{len(files)}; add images, or set --config.data.eval_path"
        )
    order = np.random.RandomState(0).permutation(len(files))  # a stream that is frozen for ever
    parts = np.sort(order[held_out:]), np.sort(order[:held_out])
    return files.select(parts[0]), files.select(parts[1])
