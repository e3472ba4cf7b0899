"""Sets of points in the plane: toys on which everything can be seen, and compared with the truth.

Each is a `Density` (`data_lib_densities.py`), whose density and score are known at every noise
level. Points keep their own coordinates: they lie around the origin, with a standard deviation of
about 1 and within [-CANVAS, CANVAS]² but for the tails, and a network sees them as they are. A
training set is drawn once, by a seed that is always the same, and so are the points held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_lib_batches import Batch
from data_lib_densities import Density, EqualGaussians, Gaussians, Pixels
from data_lib_files import open_image

#: Half the side of the square in which the points lie.
CANVAS = 2.0
#: Numbers of points held out, and the longest side of an image whose dark pixels are the data.
HELD_OUT, MAX_SIDE = 10_000, 512

_POINT_SETS: dict[str, Callable[..., Density]] = {}


def register_points(fn=None, *, name: str):
    """Register a set of points, to be chosen by `config.data.dataset`: a function of `config.data`
    that returns a `Density`."""

    def register(fn):
        if name.lower() in _POINT_SETS:
            raise ValueError(f"a set of points named {name!r} is already registered")
        _POINT_SETS[name.lower()] = fn
        return fn

    return register if fn is None else register(fn)


def point_sets() -> list[str]:
    """The names of the registered sets of points."""
    return list(_POINT_SETS)


def is_points(config) -> bool:
    """Whether the data of `config` are points rather than images."""
    return config.data.dataset.lower() in _POINT_SETS


def get_density(config) -> Density:
    """The distribution that `config.data` names.

    Raises: ValueError for a name that is no set of points, naming those that are.
    """
    name = config.data.dataset.lower()
    if name not in _POINT_SETS:
        raise ValueError(
            f"config.data.dataset: expected a set of points, {', '.join(_POINT_SETS)}, got {name!r}"
        )
    return _POINT_SETS[name](config.data)


@dataclass(frozen=True)
class PointSet:
    """Points in memory: float32 of shape (n, 2), what `data_lib.ImageSet` is for images."""

    name: str
    points: torch.Tensor

    labels = None
    levels = 0
    files = None
    unit = "points"

    def __len__(self) -> int:
        return len(self.points)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one point."""
        return tuple(self.points.shape[1:])

    def take(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return the points at ``indices``, in that order."""
        return self.points[torch.as_tensor(indices, dtype=torch.int64)]

    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Batch:
        """Return the points at ``indices``; they have no labels."""
        return Batch(self.take(indices), None)


def get_point_sets(config) -> tuple[PointSet, PointSet]:
    """Return `data.num_points` points to train on, and HELD_OUT others.

    Raises ValueError for settings that are of images.
    """
    _refuse_settings_of_images(config.data)
    density, name = get_density(config), config.data.dataset.lower()
    return PointSet(f"{name}/train", density.sample(config.data.num_points, 0).float()), PointSet(
        f"{name}/held-out", density.sample(HELD_OUT, 1).float()
    )


def _refuse_settings_of_images(data) -> None:
    needed = {
        "num_channels": 2,
        "image_size": 1,
        "centered": False,
        "random_flip": False,
        "uniform_dequantization": False,
    }
    wrong = [f"data.{key}={data[key]!r}" for key, value in needed.items() if data[key] != value]
    if wrong:
        asked = " ".join(f"--config.data.{key}={value}" for key, value in needed.items())
        raise ValueError(
            f"{data.dataset} is a set of points, in the plane and without levels, got "
            f"{', '.join(wrong)}; start from a config of configs/toy/, or use {asked}"
        )


# --- the sets -------------------------------------------------------------------------------


def _circle(angle: torch.Tensor, radius: float | torch.Tensor = 1.0) -> torch.Tensor:
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)


def _evenly(n: int, low: float, high: float) -> torch.Tensor:
    """The midpoints of n equal parts of (low, high)."""
    return low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n


@register_points(name="swissroll")
def _swissroll(data) -> EqualGaussians:
    """θ (cos θ, sin θ)/7 for θ even in (1.5π, 4.5π), as scikit-learn's roll seen from its end."""
    angle = _evenly(384, 1.5 * math.pi, 4.5 * math.pi)
    return EqualGaussians(_circle(angle, angle / 7), 0.07)


@register_points(name="moons")
def _moons(data) -> EqualGaussians:
    """Two half circles that reach into each other, as scikit-learn's, centred and 1.25 times as
    large."""
    angle = _evenly(96, 0, math.pi)
    upper = _circle(angle)
    lower = torch.tensor([1.0, 0.5], dtype=torch.float64) - upper
    means = torch.cat([upper, lower]) - torch.tensor([0.5, 0.25], dtype=torch.float64)
    return EqualGaussians(1.25 * means, 0.09)


@register_points(name="rings")
def _rings(data) -> EqualGaussians:
    """Three circles about the origin, of radii 0.6, 1.2 and 1.8 and equal weights."""
    angle = _evenly(200, 0, 2 * math.pi)
    return EqualGaussians(torch.cat([_circle(angle, radius) for radius in (0.6, 1.2, 1.8)]), 0.06)


@register_points(name="checkerboard")
def _checkerboard(data) -> Pixels:
    """The dark squares of a board of four by four."""
    return Pixels(torch.eye(2, dtype=torch.float64).tile(2, 2), CANVAS)


@register_points(name="mixture")
def _mixture(data) -> Gaussians:
    """Five Gaussians of different weights, sizes and directions, two of which overlap."""
    means = [(-1.2, -1.0), (1.3, -0.9), (0.0, 1.3), (0.5, 0.9), (-1.3, 0.9)]
    stds = [(0.30, 0.30), (0.45, 0.15), (0.50, 0.12), (0.20, 0.20), (0.10, 0.35)]
    turns = [0.0, 0.8, -0.4, 0.0, 0.5]
    covariances = []
    for (a, b), turn in zip(stds, turns, strict=True):
        u = _circle(torch.tensor([turn, turn + math.pi / 2], dtype=torch.float64)).T
        covariances.append(u @ torch.diag(torch.tensor([a**2, b**2], dtype=torch.float64)) @ u.T)
    return Gaussians(means, torch.stack(covariances), [0.3, 0.25, 0.2, 0.1, 0.15])


@register_points(name="eight_gaussians")
def _eight_gaussians(data) -> EqualGaussians:
    """Eight equal Gaussians on a circle."""
    return EqualGaussians(_circle(_evenly(8, 0, 2 * math.pi), 1.6), 0.12)


@register_points(name="image_density")
def _image_density(data) -> Pixels:
    """Uniform on the dark pixels of the image `data.image`: those whose lightness, 0 to 1 and on
    white where they are transparent, is below `data.image_threshold`."""
    path = Path(data.image).expanduser()
    ours = Path(__file__).resolve().parent / path
    if not path.is_file() and ours.is_file():  # assets/ring.png, from another working directory
        path = ours
    if not data.image or not path.is_file():
        raise FileNotFoundError(
            f"image_density: expected config.data.image, an image file, got {data.image!r}; such "
            "as --config.data.image=assets/ring.png"
        )
    lightness = _lightness(path)
    dark = lightness < data.image_threshold
    if not dark.any():
        raise ValueError(
            f"{path}: expected pixels darker than data.image_threshold={data.image_threshold}, and "
            f"the darkest is {lightness.min():.3g}; use a larger threshold"
        )
    return Pixels(dark, CANVAS)


def _lightness(path: Path) -> np.ndarray:
    """The lightness of an image file, 0 to 1, on white, its longer side at most MAX_SIDE."""
    try:
        picture = open_image(path.read_bytes()).convert("L")
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(
            f"config.data.image={str(path)!r}: expected an image file, such as a PNG, got: {error}"
        ) from None
    picture.thumbnail((MAX_SIDE, MAX_SIDE))  # only ever smaller
    return np.asarray(picture) / 255
