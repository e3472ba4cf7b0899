"""Pictures of samples, curves of training, animations of sampling.

Images are (n, C, H, W) in [0, 1] with one or three channels, or points (n, 2). matplotlib and
Pillow are imported where they are used; nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from files import write_atomically
from visualize_points import points_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    Picture = bytes | Image | Figure

Array = torch.Tensor | np.ndarray
PathLike = str | os.PathLike[str]

_BLUE, _ORANGE = "#2563eb", "#d9480f"


# ---------------------------------------------------------------------------------------------
# Images


def to_uint8(images: Array) -> torch.Tensor:
    """Images in [0, 1] as bytes: clipped, then rounded half up, floor(255 x + 0.5).

    Shapes: (n, C, H, W) to (n, C, H, W) uint8 on the CPU; uint8 images are returned as they are.
    Errors: ValueError for other shapes, integer types and values that are not finite.
    """
    x = torch.as_tensor(images).detach().cpu()
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"images must have shape (n, C, H, W), none of them 0, got "
            f"{tuple(x.shape)}; add the batch axis with x[None]"
        )
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise ValueError(f"images must be float in [0, 1] or uint8, got {x.dtype}")
    if not torch.isfinite(x).all():
        raise ValueError("images must be finite, got NaN or infinity; check the sampler's output")
    return (255 * x.float().clamp(0, 1) + 0.5).floor().to(torch.uint8)


def _pixels(images: Array, scale: int) -> np.ndarray:
    """(n, C, H, W) as bytes (n, H·scale, W·scale, C), each pixel a block."""
    x = to_uint8(images)
    if x.shape[1] not in (1, 3):
        raise ValueError(
            f"images must have 1 or 3 channels, got {x.shape[1]}; "
            "choose channels to show, as in x[:, :3]"
        )
    return x.permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)


def _tile(pixels: np.ndarray, ncols: int, padding: int) -> np.ndarray:
    """Tiles (n, h, w, C), row by row, as one picture (H, W, C) on white."""
    n, h, w, channels = pixels.shape
    rows = math.ceil(n / ncols)
    canvas = np.full(
        (rows * (h + padding) - padding, ncols * (w + padding) - padding, channels), 255, np.uint8
    )
    for i, tile in enumerate(pixels):
        y, x = (i // ncols) * (h + padding), (i % ncols) * (w + padding)
        canvas[y : y + h, x : x + w] = tile
    return canvas


def _to_pil(canvas: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas)


def _scale(scale: int | None, width: int, target: int = 400) -> int:
    """The asked whole enlargement, or the least that makes `width` pixels at least `target`."""
    if scale is not None and (scale < 1 or scale != int(scale)):
        raise ValueError(f"scale must be a whole number of at least 1, got {scale}")
    return scale or max(1, math.ceil(target / width))


def image_grid(
    images: Array, ncols: int | None = None, padding: int = 2, scale: int | None = None
) -> Image:
    """Images as one grid, row by row: a Pillow image, grey (L) or RGB.

    `ncols` is by default the least that makes the grid no higher than wide in tiles; `scale`
    enlarges each pixel to a block and is by default the least that makes the grid 400 wide;
    `padding` is in pixels of the result, between tiles only. Points (n, 2) are dots on one plane.

    Errors: as to_uint8; ValueError for channels other than 1 or 3.
    """
    if images.ndim == 2:
        return points_image(images)
    images = to_uint8(images)
    n, width = len(images), images.shape[-1]
    ncols = min(ncols or math.ceil(math.sqrt(n)), n)
    return _to_pil(_tile(_pixels(images, _scale(scale, ncols * width)), ncols, padding))


def save_grid(images: Array, path: PathLike, **options: Any) -> None:
    """Write image_grid(images, **options) to `path`, in the format of its extension, atomically."""
    from PIL import Image

    extension = Path(path).suffix.lower()
    if extension not in Image.registered_extensions():
        raise ValueError(f"path must end in an image extension, got {str(path)!r}; use .png")
    buffer = io.BytesIO()
    image_grid(images, **options).save(buffer, Image.registered_extensions()[extension])
    write_atomic(path, buffer.getvalue())


def save_image(image: Array, path: PathLike) -> None:
    """Write one image (C, H, W), in [0, 1] or uint8, to `path`, pixel by pixel, as PNG."""
    buffer = io.BytesIO()
    _to_pil(_pixels(torch.as_tensor(image)[None], 1)[0]).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _with_caption(canvas: np.ndarray, text: str, size: int) -> np.ndarray:
    """The picture with a white strip below that holds the text, centred."""
    from PIL import Image, ImageDraw, ImageFont

    width, channels = canvas.shape[1:]
    strip = Image.new("L", (width, math.ceil(1.6 * size)), 255)
    ImageDraw.Draw(strip).text(
        (width / 2, 0.8 * size), text, fill=40, anchor="mm", font=ImageFont.load_default(size)
    )
    rows = np.repeat(np.asarray(strip)[..., None], channels, -1)
    return np.concatenate([canvas, rows])


def side_by_side(
    left: Array,
    right: Array,
    distances: Array | None = None,
    ncols: int | None = None,
    scale: int | None = None,
) -> Image:
    """Pairs of images, left beside right, with the distance of each pair printed below it.

    Shapes: left, right (n, C, H, W), distances (n,) or (n, 1); `ncols` counts pairs.
    Errors: as image_grid; ValueError for numbers or shapes that differ.
    """
    if left.shape != right.shape:
        raise ValueError(
            f"left and right must have one shape, got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    left, right = to_uint8(left), to_uint8(right)
    n, width = len(left), left.shape[-1]
    ncols = min(ncols or math.ceil(math.sqrt(n)), n)
    scale = _scale(scale, 2 * ncols * width, target=140 * ncols)
    pairs = [
        _tile(np.stack(pair), 2, 2)
        for pair in zip(_pixels(left, scale), _pixels(right, scale), strict=True)
    ]
    if distances is not None:
        values = torch.as_tensor(distances).detach().cpu().flatten().tolist()
        if len(values) != n:
            raise ValueError(f"distances must hold one number per pair ({n}), got {len(values)}")
        size = max(12, pairs[0].shape[1] // 7)
        pairs = [
            _with_caption(pair, f"{value:#.3g}", size)
            for pair, value in zip(pairs, values, strict=True)
        ]
    return _to_pil(_tile(np.stack(pairs), ncols, padding=10))


def animation(
    frames: Sequence[Any],
    path: PathLike | None = None,
    *,
    fps: float = 12,
    hold: float = 1.5,
    format: str = "gif",
    **grid: Any,
) -> bytes:
    """Sampling over time as an endless animated picture; the last frame stays `hold` seconds.

    `frames` are images or pairs (t, images), t then written below the frame. The extension of
    `path`, else `format`, chooses GIF (at most 256 colours a frame) or WebP (lossless). The
    bytes are returned, and written to `path` atomically if it is given. Other options go to
    image_grid. Consecutive equal frames may be stored as one longer frame.

    Shapes: (n, C, H, W) in [0, 1] per frame. Errors: ValueError for no frames and other formats.
    """
    kind = (Path(path).suffix.lstrip(".") if path is not None else format).lower()
    if kind not in ("gif", "webp"):
        raise ValueError(f"an animation is .gif or .webp, got {kind!r}; rename the path")
    if len(frames) == 0:
        raise ValueError("animation needs at least one frame, got none")
    pictures = []
    for frame in frames:
        t, images = frame if isinstance(frame, tuple) else (None, frame)
        picture = image_grid(images, **grid)
        if t is not None:
            canvas = np.asarray(picture).reshape(picture.height, picture.width, -1)
            picture = _to_pil(_with_caption(canvas, f"t = {float(t):.3f}", 16))
        pictures.append(picture)
    durations = [round(1000 / fps)] * (len(pictures) - 1) + [round(1000 * hold)]
    options = {"lossless": True} if kind == "webp" else {"optimize": False}
    if kind == "webp":
        pictures = [p.convert("RGB") for p in pictures]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        kind.upper(),
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
        **options,
    )
    if path is not None:
        write_atomic(path, buffer.getvalue())
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------
# Plots


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over up to `reach` neighbours on each side; over fewer at the ends."""
    total = np.concatenate([[0.0], values.cumsum()])
    i = np.arange(len(values))
    low, high = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def vector(x: Any, name: str) -> np.ndarray:
    """x as a flat array in float64; refused where no number of it is finite."""
    x = x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=torch.float64)
    values = x.detach().cpu().double().flatten().numpy()
    if not np.isfinite(values).any():
        raise ValueError(f"{name} must hold at least one finite number, got {len(values)} others")
    return values


def loss_curve(steps: Any, losses: Any, eval_steps: Any = None, eval_losses: Any = None) -> Figure:
    """Training loss over steps, raw (light) and smoothed, with the evaluation loss if given.

    The smoothing is a centred moving average over a fiftieth of the run. The loss axis is
    logarithmic if everything shown is positive and spans more than a factor of ten. Losses that
    are not finite are left out.

    Shapes: steps and losses (n,), eval_steps and eval_losses (m,).
    Errors: ValueError for lengths that differ and for no finite loss.
    """
    figure, axes = _axes("training step", "loss")
    x, y = _curve(steps, losses, "losses")
    reach = len(y) // 100
    smoothed = _smooth(y, reach)
    thin = slice(None, None, max(1, len(y) // 4000))
    if reach:
        axes.plot(x[thin], y[thin], color=_BLUE, alpha=0.3, linewidth=0.8, label="training, raw")
    axes.plot(
        x[thin],
        smoothed[thin],
        color=_BLUE,
        linewidth=1.8,
        marker="o" if len(y) == 1 else None,
        label="training, smoothed" if reach else "training",
    )
    shown = [y]
    if eval_steps is not None and len(eval_steps):
        ex, ey = _curve(eval_steps, eval_losses, "eval_losses")
        axes.plot(
            ex, ey, color=_ORANGE, linewidth=1.5, marker="o", markersize=4, label="evaluation"
        )
        shown.append(ey)
    low, high = min(v.min() for v in shown), max(v.max() for v in shown)
    if low > 0 and high / low > 10:
        from matplotlib.ticker import LogFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.legend(frameon=False)
    return figure


def score_curve(steps: Any, values: Any, errors: Any, label: str) -> Figure:
    """A score over the checkpoints of a run, each with its standard error (0 where unknown).

    Shapes: (n,) each. Errors: ValueError for lengths that differ and for no finite value.
    """
    figure, axes = _axes("training step", label)
    e = _known(np.asarray(errors, dtype=float))
    if len(e) != len(values):
        raise ValueError(f"errors must be as many as the values ({len(values)}), got {len(e)}")
    x, y = _curve(steps, values, label)
    e = e[np.isfinite(np.asarray(values, dtype=float))]
    axes.errorbar(x, y, yerr=e, color=_BLUE, marker="o", markersize=5, linewidth=1.8, capsize=3)
    return figure


def _known(errors: np.ndarray) -> np.ndarray:
    """Errors as bars: 0 where they are not finite."""
    return np.where(np.isfinite(errors), errors, 0.0)


def _curve(steps: Any, values: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = vector(steps, "steps"), vector([] if values is None else values, name)
    if len(x) != len(y):
        raise ValueError(f"{name} must be as many as their steps ({len(x)}), got {len(y)}")
    keep = np.isfinite(y)
    return x[keep], y[keep]


def histogram(
    values: Any, xlabel: str, mark: float | None = None, mark_label: str = "mean"
) -> Figure:
    """Histogram of the finite values, with a labelled vertical line at `mark` if given.

    Errors: ValueError if no value is finite.
    """
    x = vector(values, "values")
    x = x[np.isfinite(x)]
    figure, axes = _axes(xlabel, "count")
    axes.hist(
        x,
        bins=min(60, max(10, math.ceil(2 * len(x) ** (1 / 3)))),
        color=_BLUE,
        alpha=0.75,
        edgecolor="white",
        linewidth=0.5,
    )
    if mark is not None and math.isfinite(mark):
        axes.axvline(mark, color=_ORANGE, linewidth=2, label=f"{mark_label} {mark:.4g}")
        axes.legend(frameon=False)
    return figure


def bar_chart(names: Sequence[str], values: Any, errors: Any, xlabel: str) -> Figure:
    """Horizontal bars from the top, each with its error bar and its value in words.

    Shapes: values and errors (n,), as many as names; an error of nan is not known.
    Errors: ValueError for lengths that differ and for no finite value.
    """
    y, e = vector(values, "values"), np.asarray(errors, dtype=float)
    if not len(names) == len(y) == len(e):
        raise ValueError(
            f"expected a value and an error for each of {len(names)} names, got {len(y)} and "
            f"{len(e)}"
        )
    figure, axes = _axes(xlabel, "")
    figure.set_size_inches(9, 0.9 + 0.42 * len(y))
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    places = np.arange(len(y))
    axes.barh(places, y, height=0.55, color=_BLUE, alpha=0.75)
    axes.errorbar(y, places, xerr=_known(e), fmt="none", ecolor=_ORANGE, elinewidth=1.8, capsize=3)
    axes.axvline(0, color="0.35", linewidth=0.8)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    for place, (value, error) in enumerate(zip(y, e, strict=True)):
        axes.text(1.01, place, with_error(value, error), transform=axes.get_yaxis_transform(),
                  va="center", fontsize=9)  # fmt: skip
    return figure


def with_error(value: float, error: float | None) -> str:
    """A signed value to the last of two digits of its standard error, as in -0.0213 ± 0.0004."""
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:+.2g}" if value else "0"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 9)
    return f"{value:+.{digits}f} ± {error:.{digits}f}" if value else f"0 ± {error:.{digits}f}"


def write_npz(path: PathLike, arrays: dict[str, Any], *, compress: bool = True) -> None:
    """Write arrays to the .npz at `path`, whole or not at all; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save = np.savez_compressed if compress else np.savez
    write_atomically(path, lambda file: save(file, **arrays))


def write_atomic(path: PathLike, data: bytes, *, sync: bool = False) -> None:
    """Write `data` to `path`, whole or not at all; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data), sync=sync)
