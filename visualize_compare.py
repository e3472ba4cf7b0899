"""Pictures side by side under headings: measurement, samples, truth."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from visualize import Array, PathLike, _pixels, _to_pil, write_atomic


def comparison(
    columns: Sequence[tuple[str, Array]], scale: int | None = None, padding: int = 2
) -> Any:
    """Columns of images, a row for each image, each column under its heading: a Pillow image.

    `scale` enlarges each pixel to a block, and is by default the least that makes a tile 96 wide.

    Shapes: (n, C, H, W) in [0, 1] or uint8, with one n, H and W for all, 1 or 3 channels each.
    Errors: ValueError for no columns and for shapes that differ.
    """
    if not columns:
        raise ValueError("a comparison needs at least one column, got none")
    sizes = {(len(images), *images.shape[-2:]) for _, images in columns}
    if len(sizes) > 1:
        raise ValueError(f"columns must have one number and size of images, got {sorted(sizes)}")
    width = next(iter(sizes))[2]
    scale = scale or max(1, math.ceil(96 / width))
    shown = [_in_colour(_pixels(images, scale)) for _, images in columns]
    strips = []
    for (heading, _), tiles in zip(columns, shown):
        gaps = np.full((len(tiles), padding, tiles.shape[2], 3), 255, np.uint8)
        column = np.concatenate([gaps, tiles], axis=1).reshape(-1, tiles.shape[2], 3)
        strips.append(np.concatenate([_heading(heading, width * scale), column]))
    gap = np.full((strips[0].shape[0], padding, 3), 255, np.uint8)
    joined = [part for strip in strips for part in (gap, strip)][1:]
    return _to_pil(np.concatenate(joined, axis=1))


def save_comparison(columns: Sequence[tuple[str, Array]], path: PathLike, **options: Any) -> None:
    """Write comparison(columns, **options) to `path` as PNG, atomically."""
    buffer = io.BytesIO()
    comparison(columns, **options).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _in_colour(pixels: np.ndarray) -> np.ndarray:
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def _heading(text: str, width: int) -> np.ndarray:
    """The text on white, as large as fits up to 14 points."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    strip = Pillow.new("L", (width, 22), 255)
    draw = ImageDraw.Draw(strip)
    font = next(
        (
            font
            for font in map(ImageFont.load_default, (14, 13, 12, 11, 10, 9))
            if draw.textlength(text, font) <= width
        ),
        ImageFont.load_default(8),
    )
    draw.text((width / 2, 11), text, fill=40, anchor="mm", font=font)
    return np.repeat(np.asarray(strip)[..., None], 3, -1)
