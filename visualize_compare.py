"""Pictures side by side under headings: measurement, samples, truth."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from visualize import Array, PathLike, _pixels, _to_pil, write_atomic

#: Width of the names of rows at most, in pixels.
NAMES = 180


def comparison(
    columns: Sequence[tuple[str, Array]],
    rows: Sequence[str] = (),
    scale: int | None = None,
    padding: int = 2,
) -> Any:
    """Columns of images, a row for each image, each column under its heading: a Pillow image.

    `rows` are names of the images, to their left. `scale` enlarges each pixel to a block, and is by
    default the least that makes a tile 96 wide.

    Shapes: (n, C, H, W) in [0, 1] or uint8, with one n, H and W for all, 1 or 3 channels each.
    Errors: ValueError for no columns, for shapes that differ, and for a number of names not n.
    """
    if not columns:
        raise ValueError("a comparison needs at least one column, got none")
    sizes = {(len(images), *images.shape[-2:]) for _, images in columns}
    if len(sizes) > 1:
        raise ValueError(f"columns must have one number and size of images, got {sorted(sizes)}")
    n, _, width = next(iter(sizes))
    if rows and len(rows) != n:
        raise ValueError(f"expected a name for each of {n} rows, got {len(rows)}")
    scale = scale or max(1, math.ceil(96 / width))
    shown = [_in_colour(_pixels(images, scale)) for _, images in columns]
    strips = []
    for (heading, _), tiles in zip(columns, shown):
        gaps = np.full((len(tiles), padding, tiles.shape[2], 3), 255, np.uint8)
        column = np.concatenate([gaps, tiles], axis=1).reshape(-1, tiles.shape[2], 3)
        strips.append(np.concatenate([_text(heading, width * scale, 22), column]))
    if rows:
        height = shown[0].shape[1]
        wide = min(NAMES, max(_length(name) for name in rows) + 8)
        column = [_text(name, wide, height + padding) for name in rows]
        strips.insert(0, np.concatenate([_text("", wide, 22), *column]))
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


def _length(text: str) -> int:
    from PIL import ImageFont

    return math.ceil(ImageFont.load_default(14).getlength(text))


def _text(text: str, width: int, height: int) -> np.ndarray:
    """The text on white, as large as fits from 14 points to 10; what is longer loses its middle."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    strip = Pillow.new("L", (width, height), 255)
    fonts = [ImageFont.load_default(size) for size in (14, 13, 12, 11, 10)]
    font = next((font for font in fonts if font.getlength(text) <= width), fonts[-1])
    shown, keep = text, len(text)
    while font.getlength(shown) > width and keep > 2:
        keep -= 1
        shown = f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"
    ImageDraw.Draw(strip).text((width / 2, height / 2), shown, fill=40, anchor="mm", font=font)
    return np.repeat(np.asarray(strip)[..., None], 3, -1)
