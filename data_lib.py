"""Data sets, their batches, and the way from 8-bit pixels to what a network sees.

An image set holds integers x in 0 ... levels - 1. `prepare` turns a batch of them into floats on
the device: x / (levels - 1), or (x + u) / levels with u uniform in [0, 1) where the images are
dequantised, then the scaler of the configuration. Points (`data_lib_points.py`) pass as they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_lib_batches import Batch, eval_batches, train_batches
from data_lib_files import ImageFiles, list_images, split_images
from data_lib_points import PointSet, get_point_sets, is_points, point_sets

__all__ = [
    "Batch",
    "ImageSet",
    "PointSet",
    "data_shape",
    "eval_batches",
    "get_data_inverse_scaler",
    "get_data_scaler",
    "get_image_sets",
    "is_points",
    "prepare",
    "quantize",
    "resize",
    "to_channels",
    "train_batches",
]

DIGITS_HELD_OUT = 300
CROP_CELEBA = 140

Scaler = Callable[[Any], Any]


def get_data_scaler(config) -> Scaler:
    """Return the map from [0, 1] to the network's range: [-1, 1] if ``data.centered``.

    With a = ``data.logit_alpha`` > 0 it is logit(a + (1 - 2a) x) of tensors, the whole line being
    the range of x a little beyond [0, 1] (Dinh et al. 2017, section 4.1).

    Raises ValueError for both.
    """
    if alpha := _logit_alpha(config):
        return lambda x: torch.logit(alpha + (1 - 2 * alpha) * x)
    if config.data.centered:
        return lambda x: x * 2.0 - 1.0
    return lambda x: x


def get_data_inverse_scaler(config) -> Scaler:
    """Return the inverse of ``get_data_scaler``."""
    if alpha := _logit_alpha(config):
        return lambda x: (torch.sigmoid(x) - alpha) / (1 - 2 * alpha)
    if config.data.centered:
        return lambda x: (x + 1.0) / 2.0
    return lambda x: x


def _logit_alpha(config) -> float:
    alpha = config.data.get("logit_alpha", 0.0)
    if alpha and config.data.centered:
        raise ValueError(
            f"data.logit_alpha={alpha} and data.centered=True both choose the network's range; set "
            "--config.data.centered=False"
        )
    return alpha


@dataclass(frozen=True)
class ImageSet:
    """A set of equally sized images of integer levels, in memory or decoded when taken.

    ``images`` is a uint8 tensor of shape (n, C, H, W), or None where the images are read from
    ``files``; ``labels`` is int64 of shape (n,), or None; ``levels`` counts the possible values;
    ``workers`` processes decode the files for batches (``data_lib_batches``).
    """

    name: str
    images: torch.Tensor | None
    labels: torch.Tensor | None = None
    levels: int = 256
    files: ImageFiles | None = None
    workers: int = 0

    unit = "images"

    def __post_init__(self):
        if (self.images is None) == (self.files is None):
            raise ValueError(f"{self.name}: expected either images or files; pass one of them")
        if self.images is not None and (
            self.images.ndim != 4 or self.images.dtype != torch.uint8 or not len(self.images)
        ):
            raise ValueError(
                f"{self.name}: expected a non-empty uint8 tensor of shape (n, C, H, W), got "
                f"{self.images.dtype} of shape {tuple(self.images.shape)}; convert it"
            )

    def __len__(self) -> int:
        if self.images is not None:
            return len(self.images)
        assert self.files is not None
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        if self.images is None:
            assert self.files is not None
            return self.files.shape
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return the images at ``indices``, in that order: uint8 of shape (b, C, H, W)."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        if self.images is not None:
            return self.images[index]
        assert self.files is not None
        return self.files.read(index.numpy())

    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Batch:
        """Return the images and the labels at ``indices``."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(self.take(index), None if self.labels is None else self.labels[index])


# Levels and floats


def prepare(
    images: torch.Tensor,
    config,
    device: torch.device | str | None = None,
    *,
    flip: bool = False,
    dequantize: bool = False,
    generator: torch.Generator | None = None,
    draws: Any = None,
) -> torch.Tensor:
    """Return a uint8 batch (b, C, H, W) as the network's float32 input on ``device``.

    ``flip`` mirrors each image left-right with probability 1/2. With L = ``config.data.levels``,
    x becomes x / (L - 1) in [0, 1], or (x + u) / L in [0, 1) with u ~ U[0, 1) if ``dequantize``;
    then ``get_data_scaler(config)`` applies.

    ``draws`` (a ``randomness.Draws`` of these images) gives the flips, stream "flip", and u, stream
    "dequantize", to each image by its place in the global batch. Else ``generator``, or the
    device's default one, draws the flips, then u, for the batch. Each draws on its own device, so
    that one of the CPU gives the same batch on every device. Images go to the device as bytes, to a
    GPU from pinned memory without waiting. A floating-point batch of points has neither sides nor
    levels, and goes there as it is.

    Raises ValueError where the images are not uint8 of four dimensions, or as many as the draws.
    """
    if is_points(config) and images.is_floating_point():
        return images.to(images.device if device is None else device)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"expected uint8 images of shape (b, C, H, W), got {images.dtype} of shape "
            f"{tuple(images.shape)}; pass what an ImageSet yields"
        )
    if draws is not None and (generator is not None or draws.count != len(images)):
        raise ValueError(
            f"expected draws of {len(images)} images and no generator beside them, got draws of "
            f"{draws.count} and generator={generator}; use draws.rows for a part of a batch"
        )
    device = images.device if device is None else torch.device(device)

    def rand(stream: str, shape: tuple[int, ...] = ()) -> torch.Tensor:
        if draws is not None:
            return draws.rand(stream, shape).to(device)
        drawn_on = device if generator is None else generator.device
        shape = (len(images), *shape)
        return torch.rand(shape, device=drawn_on, generator=generator).to(device)

    if device.type == "cuda" and images.device.type == "cpu":
        images = images.pin_memory()
    x = images.to(device, non_blocking=True)
    if flip:
        mirrored = rand("flip") < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
    x = x.float()
    if dequantize:
        # In float32 x + u may round up to x + 1, which is another level.
        noisy = x + rand("dequantize", tuple(x.shape[1:]))
        x = torch.minimum(noisy, torch.nextafter(x + 1, x)) / config.data.levels
    else:
        x = x / (config.data.levels - 1)
    return get_data_scaler(config)(x)


def data_shape(config) -> tuple[int, ...]:
    """Return the shape of one datum as a network sees it: (C, H, W) of images, (2,) of points."""
    data = config.data
    if is_points(config):
        return (data.num_channels,)
    return (data.num_channels, data.image_size, data.image_size)


def quantize(x: torch.Tensor, config) -> torch.Tensor:
    """Return images x (b, C, H, W) in [0, 1] as uint8 levels: the inverse of ``prepare``.

    With L = ``config.data.levels``, floor(L x) where training data are dequantised, else
    round((L - 1) x), in at least 32 bits; values outside [0, 1] are clipped.
    """
    levels = config.data.levels
    x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1)
    if config.data.uniform_dequantization:
        return (x * levels).floor().clamp(max=levels - 1).byte()
    return (x * (levels - 1)).add(0.5).floor().byte()


# Image sets


def get_image_sets(config) -> tuple[ImageSet, ImageSet] | tuple[PointSet, PointSet]:
    """Return the training and the evaluation set that ``config.data`` names, of images or points.

    Images have ``data.num_channels`` channels and ``data.image_size`` pixels a side; others are
    converted, and resized with antialiasing. Which images are held out never depends on the seed.

    Raises FileNotFoundError where the data are missing, at once and without a download unless
    ``data.download`` is set, and ValueError for a name, or a number of levels or channels, that
    the data do not have.
    """
    loaders = {
        "digits": _digits,
        "mnist": _torchvision,
        "fashionmnist": _torchvision,
        "cifar10": _torchvision,
        "svhn": _torchvision,
        "folder": _folder,
        "celeba": _celeba,
        "lsun": _folder,
        "ffhq": _folder,
        "celebahq": _folder,
    }
    data = config.data
    if is_points(config):
        return get_point_sets(config)
    if data.dataset.lower() not in loaders:
        raise ValueError(
            f"config.data.dataset: expected one of {', '.join(loaders)}, or a set of points "
            f"({', '.join(point_sets())}), got {data.dataset!r}; use 'folder' with "
            "config.data.path for images of your own"
        )
    if data.num_channels not in (1, 3):
        raise ValueError(
            f"config.data.num_channels: expected 1 (grey) or 3 (colour), got {data.num_channels}"
        )
    levels = 17 if data.dataset.lower() == "digits" else 256
    if data.levels != levels:
        raise ValueError(
            f"config.data.levels: expected {levels}, the levels of {data.dataset}, got "
            f"{data.levels}; use --config.data.levels={levels}"
        )
    return loaders[data.dataset.lower()](data)


def _digits(data) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1797 digits, 8 x 8 and 17 levels; 300 of them are held out."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    # RandomState: its stream is frozen, so the held-out digits stay the same for ever.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    held_out, rest = order[:DIGITS_HELD_OUT].sort()[0], order[DIGITS_HELD_OUT:].sort()[0]

    def part(name: str, indices: torch.Tensor) -> ImageSet:
        return _in_memory(f"digits/{name}", images[indices], labels[indices], data)

    return part("train", rest), part("held-out", held_out)


# Files, one of which must be there, relative to data.root; to know without importing torchvision.
_TORCHVISION_FILES = {
    "MNIST": "MNIST/raw/train-images-idx3-ubyte",
    "FashionMNIST": "FashionMNIST/raw/train-images-idx3-ubyte",
    "CIFAR10": "cifar-10-batches-py/data_batch_1",
    "SVHN": "train_32x32.mat",
}


def _torchvision(data) -> tuple[ImageSet, ImageSet]:
    name = {key.lower(): key for key in _TORCHVISION_FILES}[data.dataset.lower()]
    root = Path(data.root).expanduser()
    if not data.download and not (root / _TORCHVISION_FILES[name]).exists():
        raise _missing(name, root / _TORCHVISION_FILES[name])
    import torchvision.datasets

    def part(split: str) -> ImageSet:
        which = {"split": split} if name == "SVHN" else {"train": split == "train"}
        try:
            source = getattr(torchvision.datasets, name)(root, download=data.download, **which)
        except Exception as error:  # readers of damaged files raise nearly anything
            reason = str(error) or type(error).__name__
            raise _missing(name, root / _TORCHVISION_FILES[name], reason) from error
        images = torch.as_tensor(source.data)
        if images.ndim == 3:
            images = images.unsqueeze(1)
        elif name == "CIFAR10":
            images = images.permute(0, 3, 1, 2)
        labels = torch.as_tensor(source.labels if name == "SVHN" else source.targets)
        if len(labels) != len(images):
            reason = f"{len(images)} images and {len(labels)} labels"
            raise _missing(name, root / _TORCHVISION_FILES[name], reason)
        return _in_memory(f"{name}/{split}", images, labels.long(), data)

    return part("train"), part("test")


def _missing(name: str, path: Path, reason: str = "") -> FileNotFoundError:
    return FileNotFoundError(
        f"{name}: expected {path}, {f'got: {reason}' if reason else 'which does not exist'}; "
        "set --config.data.root to the folder that holds it, --config.data.download=True to "
        "download it, or --config.data.dataset=folder with --config.data.path for images of "
        "your own"
    )


def _in_memory(name: str, images: torch.Tensor, labels: torch.Tensor | None, data) -> ImageSet:
    images = resize(to_channels(images, data.num_channels), data.image_size, data.levels)
    return ImageSet(name, images.contiguous(), labels, data.levels)


def to_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Return uint8 images (n, 1 or 3, H, W) as grey (1 channel) or colour (3 channels)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601, as Pillow's 'L'
    return torch.cat([(part * luma).sum(1, True).round().byte() for part in images.split(4096)])


def resize(images: torch.Tensor, size: int, levels: int = 256) -> torch.Tensor:
    """Return uint8 images (n, C, H, W) at size x size, antialiased, on the same integer levels."""
    if tuple(images.shape[2:]) == (size, size):
        return images

    def resized(part: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(part.float(), (size, size), mode="bicubic", antialias=True)
        return x.round().clamp(0, levels - 1).byte()

    return torch.cat([resized(part) for part in images.split(4096)])


def _folder(data) -> tuple[ImageSet, ImageSet]:
    if not data.path:
        raise FileNotFoundError(_how_to_point_at_a_folder(data))
    path = Path(data.path).expanduser()
    eval_path = Path(data.eval_path).expanduser() if data.eval_path else None
    if data.dataset.lower() == "lsun":
        path, eval_path = _lsun_paths(path, eval_path, data.category)
    train, held_out = split_images(path, eval_path, data.eval_fraction)
    return _from_files(f"{data.dataset}/train", train, data), _from_files(
        f"{data.dataset}/eval", held_out, data
    )


def _lsun_paths(path: Path, eval_path: Path | None, category: str) -> tuple[Path, Path | None]:
    """Return where a scene of LSUN is and its validation part, by the names its authors give.

    These are the lmdbs SCENE_train_lmdb and SCENE_val_lmdb; else there may be a folder SCENE.
    """
    for inner in (f"{category}_train_lmdb", category):
        if category and (path / inner).is_dir():
            path = path / inner
            break
    scene = path.name.removesuffix("_train_lmdb")
    beside = path.parent / f"{scene}_val_lmdb"
    if eval_path is None and scene != path.name and beside.is_dir():
        eval_path = beside
    return path, eval_path


def _how_to_point_at_a_folder(data) -> str:
    tfrecords = ""
    if data.tfrecords_path:
        tfrecords = f" (the TFRecord file {data.tfrecords_path} of score_sde is not read)"
    what = f"{data.dataset} {data.category}".strip()
    return (
        f"{what}: expected config.data.path, a folder, .zip or lmdb of images, got ''{tfrecords}; "
        "export the images to files and set --config.data.path=/where/they/are"
    )


def _celeba(data) -> tuple[ImageSet, ImageSet]:
    """CelebA as torchvision unpacks it: the official training and validation parts."""
    root = Path(data.root).expanduser()
    partition = root / "celeba" / "list_eval_partition.txt"
    if data.download and not partition.exists():
        import torchvision.datasets

        try:
            torchvision.datasets.CelebA(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise _missing("CELEBA", partition, str(error)) from error
    folder = root / "celeba" / "img_align_celeba"
    for path in (partition, folder):
        if not path.exists():
            raise _missing("CELEBA", path)
    files = list_images(folder)
    lines = partition.read_text(errors="replace").splitlines()
    part_of = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
    if not {"0", "1"} <= {part_of.get(name) for name in files.names}:
        raise ValueError(
            f"{partition}: expected images of {folder} in the parts 0 and 1, got none in one of "
            "them; the file is damaged, or of other images: fetch it again"
        )
    train, held_out = (
        files.select(np.array([part_of.get(name) == part for name in files.names]))
        for part in ("0", "1")
    )
    return _from_files("CELEBA/train", train, data, CROP_CELEBA), _from_files(
        "CELEBA/validation", held_out, data, CROP_CELEBA
    )


def _from_files(name: str, files: ImageFiles, data, crop: int = 0) -> ImageSet:
    """Decode the files now where they fit into ``data.memory_gib``, else when they are taken."""
    files = files.with_shape((data.num_channels, data.image_size, data.image_size), crop)
    if data.get("skip_corrupt", False):
        files = files.without_damaged()
    labels = None if files.labels is None else torch.from_numpy(files.labels.astype(np.int64))
    if len(files) * math.prod(files.shape) > data.memory_gib * 2**30:
        files.read([0])  # one that cannot be read had better say so now
        return ImageSet(name, None, labels, data.levels, files, data.workers)
    return ImageSet(name, files.read(range(len(files)), show=True), labels, data.levels)
