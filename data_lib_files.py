"""Images in a folder or a .zip: which ones there are, how they are split, how they are decoded."""

import io
import logging
import os
import posixpath
import threading
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
EVAL_FOLDERS = ("test", "val", "valid", "validation", "eval")

log = logging.getLogger("score_sde")


@dataclass(frozen=True)
class ImageFiles:
    """Image files in a fixed order, decoded to uint8 images of one shape.

    ``base`` is the folder below which ``names`` say something (a class, say); ``shape`` is
    (C, H, W) with H = W; ``crop`` is the side in pixels of the central square that is kept, 0 for
    the largest one. ``labels`` numbers the sorted class folders, or is None.
    """

    source: Path
    names: tuple[str, ...]
    open: Callable[[str], bytes]
    base: str = ""
    labels: tuple[int, ...] | None = None
    shape: tuple[int, int, int] = (3, 32, 32)
    crop: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def select(self, indices: Iterable[int]) -> "ImageFiles":
        """Return the files at ``indices``."""
        indices = list(indices)
        labels = self.labels and tuple(self.labels[i] for i in indices)
        return replace(self, names=tuple(self.names[i] for i in indices), labels=labels)

    def below(self, base: str) -> "ImageFiles":
        """Return the files whose names start with ``base``."""
        names = tuple(name for name in self.names if name.startswith(base))
        return replace(self, names=names, base=base, labels=None)

    def rest(self, keep: Callable[[str], bool]) -> "ImageFiles":
        """Return the files whose names are kept, the base being the folder that holds them all."""
        names = tuple(filter(keep, self.names))
        if len(names) == len(self.names):
            return self
        return replace(self, names=names, base=_common_folder(names), labels=None)

    def top(self, name: str) -> str:
        """Return the folder just below the base that a file lies in, or the file's own name."""
        return name[len(self.base) :].split("/")[0]

    def classes(self) -> list[str]:
        """Return the sorted folders just below the base; [] where some image lies in none."""
        parts = [name[len(self.base) :].split("/") for name in self.names]
        return sorted({p[0] for p in parts}) if all(len(p) > 1 for p in parts) else []

    def labelled(self, classes: Sequence[str]) -> "ImageFiles":
        """Return the files with the number of each one's class, where all have one of these."""
        if len(classes) < 2 or not set(self.classes()) or not set(self.classes()) <= set(classes):
            return self
        number = {name: i for i, name in enumerate(classes)}
        labels = tuple(number[self.top(name)] for name in self.names)
        return replace(self, labels=labels)

    def with_shape(self, shape: tuple[int, int, int], crop: int = 0) -> "ImageFiles":
        """Return the files to be decoded to another shape (C, H, W)."""
        return replace(self, shape=shape, crop=crop)

    def read(self, indices: Iterable[int]) -> torch.Tensor:
        """Decode the images at ``indices``: uint8 of shape (b, C, H, W).

        Raises ValueError naming the first file that cannot be decoded.
        """
        indices = list(indices)
        images = torch.empty((len(indices), *self.shape), dtype=torch.uint8)

        def fill(place: int) -> None:
            images[place] = self._decode(self.names[indices[place]])

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, range(len(indices))):
                pass
        return images

    def _decode(self, name: str) -> torch.Tensor:
        try:
            pixels = decode(self.open(name), self.shape[0], self.shape[1], self.crop)
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise ValueError(
                f"{self.source / name}: expected an image, got a file that cannot be decoded "
                f"({type(error).__name__}: {error}); replace or delete it"
            ) from error
        return torch.from_numpy(pixels)


def decode(content: bytes, channels: int, size: int, crop: int = 0) -> np.ndarray:
    """Decode one image file to uint8 of shape (channels, size, size).

    The image is turned as its EXIF tag says, laid on white where it is transparent, reduced to 8
    bits, made grey or colour, cut to its central square and resized (bicubic, antialiased).
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.width, image.height, crop or max(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Map 16-bit grey values to 8 bits: 65535 becomes 255."""
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels of {pixels.dtype} have no known range; save it with 8 or 16 bits")
    return ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)


def list_images(path: Path) -> ImageFiles:
    """Return the images in a folder or .zip, at any depth, sorted by name.

    Raises FileNotFoundError where there is nothing, or no image, and ValueError for another file.
    """
    if path.is_dir():
        names, open_file = _folder_names(path), lambda name: (path / name).read_bytes()
    elif not path.exists():
        raise FileNotFoundError(
            f"expected a folder or a .zip of images, got {path}, which does not exist; "
            "set --config.data.path (or data.root) to where the images are"
        )
    elif path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        names, open_file = _zip_access(path)
    else:
        raise ValueError(f"expected a folder or a .zip of images, got the file {path}; zip it")
    kept = sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not _hidden(n))
    if not kept:
        raise FileNotFoundError(
            f"expected images in {path}, found {len(names)} files and no image; "
            f"known are {', '.join(EXTENSIONS)}"
        )
    return ImageFiles(path, tuple(kept), open_file, _common_folder(kept))


def _folder_names(path: Path) -> list[str]:
    return [
        (Path(folder) / name).relative_to(path).as_posix()
        for folder, _, names in os.walk(path, followlinks=True)
        for name in names
    ]


def _zip_access(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    try:
        archive, lock = zipfile.ZipFile(path), threading.Lock()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a readable zip ({error}); make it again") from error

    def open_file(name: str) -> bytes:
        with lock:
            return archive.read(name)

    return [info.filename for info in archive.infolist() if not info.is_dir()], open_file


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _common_folder(names: Sequence[str]) -> str:
    """Return the longest folder, with its final slash, that holds every file; "" for no file."""
    if not names:
        return ""
    first, last = posixpath.dirname(names[0]), posixpath.dirname(names[-1])
    shared = posixpath.commonpath([first, last])  # names are sorted: common to all
    return f"{shared}/" if shared else ""


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
    folders = {files.top(name) for name in files.names}
    eval_folders = [name for name in EVAL_FOLDERS if name in folders]
    if not eval_path and not eval_folders:
        return _split_by_fraction(files.labelled(files.classes()), fraction)
    train = _training_part(files, folders, eval_folders)
    held_out = files.below(f"{files.base}{eval_folders[0]}/") if others is None else others
    _log_parts(files, train, held_out, "train" in folders)
    classes = train.classes()
    return train.labelled(classes), held_out.labelled(classes)


def _training_part(files: ImageFiles, folders: set[str], eval_folders: list[str]) -> ImageFiles:
    """Return the files in the folder train, or where there is none those in no eval folder."""
    if "train" in folders:
        return files.below(f"{files.base}train/")
    train = files.rest(lambda name: files.top(name) not in eval_folders)
    if not len(train):
        raise ValueError(
            f"{files.source}: expected training images, got only {', '.join(sorted(folders))} to "
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
    if not files.source.is_dir() or not others.source.is_dir():
        return files
    excluded = set(_real_paths(others))
    real = dict(zip(files.names, _real_paths(files), strict=True))
    kept = files.rest(lambda name: real[name] not in excluded)
    if not len(kept):
        raise ValueError(
            f"expected training images in {files.source}, got only such as are in data.eval_path "
            f"{others.source}; set --config.data.eval_path to another folder"
        )
    if len(kept) < len(files):
        log.info(
            f"data: {len(files) - len(kept)} images of {files.source} are in data.eval_path "
            f"{others.source}: they are not trained on"
        )
    return kept


def _real_paths(files: ImageFiles) -> list[str]:
    """Return the absolute paths of files in a folder, links followed; asks once per folder."""
    folders = {posixpath.dirname(name) for name in files.names}
    real = {folder: os.path.realpath(files.source / folder) for folder in folders}
    paths = (os.path.join(real[posixpath.dirname(n)], posixpath.basename(n)) for n in files.names)
    return [os.path.realpath(p) if os.path.islink(p) else p for p in paths]


def _log_parts(files: ImageFiles, train: ImageFiles, held_out: ImageFiles, named: bool) -> None:
    """Log the parts where the training part has no name of its own or something is unused."""
    used = {*train.names, *(held_out.names if held_out.source == files.source else ())}
    unused = sorted({files.top(name) for name in files.names if name not in used})
    if (named and not unused) or train is files:
        return
    where = held_out.base.rstrip("/") if held_out.source == files.source else held_out.source
    more = ", …" if len(unused) > 5 else ""
    log.info(
        f"data: {files.source}: training on {'train' if named else 'the rest'} ({len(train)} "
        f"images), evaluating on {where} ({len(held_out)} images), not using "
        f"{', '.join(unused[:5]) + more if unused else 'none'}"
    )


def _split_by_fraction(files: ImageFiles, fraction: float) -> tuple[ImageFiles, ImageFiles]:
    held_out = max(1, round(len(files) * fraction))
    if held_out >= len(files):
        raise ValueError(
            f"{files.source}: expected enough images for a held-out part of {fraction}, got "
            f"{len(files)}; add images, or set --config.data.eval_path"
        )
    order = np.random.RandomState(0).permutation(len(files))  # a stream that is frozen for ever
    parts = np.sort(order[held_out:]), np.sort(order[:held_out])
    return files.select(parts[0].tolist()), files.select(parts[1].tolist())
