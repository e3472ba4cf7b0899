"""Pictures of samples, curves of training, animations of sampling, and one HTML report of all.

Images are (n, C, H, W) in [0, 1] with one or three channels. matplotlib and Pillow are imported
where they are used; nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    Picture = bytes | Image | Figure

Array = torch.Tensor | np.ndarray
PathLike = str | os.PathLike[str]
Row = tuple[str, Any, Any, str]  # name, value, standard error or None, how to read it

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
        raise ValueError(f"images must have shape (n, C, H, W), none of them 0, got "
                         f"{tuple(x.shape)}; add the batch axis with x[None]")
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
        raise ValueError(f"images must have 1 or 3 channels, got {x.shape[1]}; "
                         "choose channels to show, as in x[:, :3]")
    return x.permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)


def _tile(pixels: np.ndarray, ncols: int, padding: int) -> np.ndarray:
    """Tiles (n, h, w, C), row by row, as one picture (H, W, C) on white."""
    n, h, w, channels = pixels.shape
    rows = math.ceil(n / ncols)
    canvas = np.full((rows * (h + padding) - padding, ncols * (w + padding) - padding, channels),
                     255, np.uint8)
    for i, tile in enumerate(pixels):
        y, x = (i // ncols) * (h + padding), (i % ncols) * (w + padding)
        canvas[y:y + h, x:x + w] = tile
    return canvas


def _to_pil(canvas: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas)


def _scale(scale: int | None, width: int, target: int = 400) -> int:
    """The asked whole enlargement, or the least that makes `width` pixels at least `target`."""
    if scale is not None and (scale < 1 or scale != int(scale)):
        raise ValueError(f"scale must be a whole number of at least 1, got {scale}")
    return scale or max(1, math.ceil(target / width))


def image_grid(images: Array, ncols: int | None = None, padding: int = 2,
               scale: int | None = None) -> Image:
    """Images as one grid, row by row: a Pillow image, grey (L) or RGB.

    `ncols` is by default the least that makes the grid no higher than wide in tiles; `scale`
    enlarges each pixel to a block and is by default the least that makes the grid 400 wide;
    `padding` is in pixels of the result, between tiles only.

    Errors: as to_uint8; ValueError for channels other than 1 or 3.
    """
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
    _write_atomic(path, buffer.getvalue())


def _with_caption(canvas: np.ndarray, text: str, size: int) -> np.ndarray:
    """The picture with a white strip below that holds the text, centred."""
    from PIL import Image, ImageDraw, ImageFont

    width, channels = canvas.shape[1:]
    strip = Image.new("L", (width, math.ceil(1.6 * size)), 255)
    ImageDraw.Draw(strip).text((width / 2, 0.8 * size), text, fill=40, anchor="mm",
                               font=ImageFont.load_default(size))
    rows = np.repeat(np.asarray(strip)[..., None], channels, -1)
    return np.concatenate([canvas, rows])


def side_by_side(left: Array, right: Array, distances: Array | None = None,
                 ncols: int | None = None, scale: int | None = None) -> Image:
    """Pairs of images, left beside right, with the distance of each pair printed below it.

    Shapes: left, right (n, C, H, W), distances (n,) or (n, 1); `ncols` counts pairs.
    Errors: as image_grid; ValueError for numbers or shapes that differ.
    """
    if left.shape != right.shape:
        raise ValueError(f"left and right must have one shape, got {tuple(left.shape)} and "
                         f"{tuple(right.shape)}")
    n, width = len(left), left.shape[-1]
    ncols = min(ncols or math.ceil(math.sqrt(n)), n)
    scale = _scale(scale, 2 * ncols * width, target=140 * ncols)
    pairs = [_tile(np.stack(pair), 2, 2)
             for pair in zip(_pixels(left, scale), _pixels(right, scale), strict=True)]
    if distances is not None:
        values = torch.as_tensor(distances).detach().cpu().flatten().tolist()
        if len(values) != n:
            raise ValueError(f"distances must hold one number per pair ({n}), got {len(values)}")
        size = max(12, pairs[0].shape[1] // 7)
        pairs = [_with_caption(pair, f"{value:#.3g}", size)
                 for pair, value in zip(pairs, values, strict=True)]
    return _to_pil(_tile(np.stack(pairs), ncols, padding=10))


def animation(frames: Sequence[Any], path: PathLike | None = None, *, fps: float = 12,
              hold: float = 1.5, format: str = "gif", **grid: Any) -> bytes:
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
    pictures[0].save(buffer, kind.upper(), save_all=True, append_images=pictures[1:],
                     duration=durations, loop=0, **options)
    if path is not None:
        _write_atomic(path, buffer.getvalue())
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


def _vector(x: Any, name: str) -> np.ndarray:
    values = torch.as_tensor(x).detach().cpu().double().flatten().numpy()
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
    axes.plot(x[thin], smoothed[thin], color=_BLUE, linewidth=1.8,
              marker="o" if len(y) == 1 else None,
              label="training, smoothed" if reach else "training")
    shown = [y]
    if eval_steps is not None and len(eval_steps):
        ex, ey = _curve(eval_steps, eval_losses, "eval_losses")
        axes.plot(ex, ey, color=_ORANGE, linewidth=1.5, marker="o", markersize=4,
                  label="evaluation")
        shown.append(ey)
    low, high = min(v.min() for v in shown), max(v.max() for v in shown)
    if low > 0 and high / low > 10:
        from matplotlib.ticker import LogFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.legend(frameon=False)
    return figure


def _curve(steps: Any, values: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = _vector(steps, "steps"), _vector([] if values is None else values, name)
    if len(x) != len(y):
        raise ValueError(f"{name} must be as many as their steps ({len(x)}), got {len(y)}")
    keep = np.isfinite(y)
    return x[keep], y[keep]


def histogram(values: Any, xlabel: str, mark: float | None = None,
              mark_label: str = "mean") -> Figure:
    """Histogram of the finite values, with a labelled vertical line at `mark` if given.

    Errors: ValueError if no value is finite.
    """
    x = _vector(values, "values")
    x = x[np.isfinite(x)]
    figure, axes = _axes(xlabel, "count")
    axes.hist(x, bins=min(60, max(10, math.ceil(2 * len(x) ** (1 / 3)))), color=_BLUE, alpha=0.75,
              edgecolor="white", linewidth=0.5)
    if mark is not None and math.isfinite(mark):
        axes.axvline(mark, color=_ORANGE, linewidth=2, label=f"{mark_label} {mark:.4g}")
        axes.legend(frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------
# Report


_CSS = """
:root { --ground: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --quiet: #5c6570; --line: #e1e5ea;
  --accent: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ground: #101317; --card: #191d23; --ink: #e8eaed;
  --quiet: #a0a8b3; --line: #2c323a; --accent: #7aa5ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: clamp(16px, 4vw, 48px); }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; margin: 0;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2em 0 .7em; }
p { max-width: 75ch; } .subtitle { color: var(--quiet); margin: .4em 0 0; font-size: 1.05rem; }
.figures { display: grid; gap: 20px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure, .table, details { margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: 16px; }
.wide { grid-column: 1 / -1; }
figure img { display: block; max-width: min(100%, 720px); height: auto; margin: 0 auto;
  border-radius: 6px; }
figcaption { color: var(--quiet); font-size: .92rem; margin: 12px 0 0; max-width: 110ch; }
.table { overflow-x: auto; padding: 4px 16px; } .table + div, .figures + div { margin-top: 20px; }
table { border-collapse: collapse; width: 100%; }
caption { caption-side: bottom; text-align: left; color: var(--quiet); font-size: .92rem;
  padding: 10px 0; }
th, td { text-align: left; padding: 10px 12px 10px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; } th { font-weight: 600; }
td.number { text-align: right; padding-right: 0; white-space: nowrap; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.error, .note { color: var(--quiet); font-weight: 400; }
.note { display: block; font-size: .9rem; max-width: 70ch; }
details { margin-top: 20px; } summary { cursor: pointer; font-weight: 600; color: var(--accent); }
pre { overflow-x: auto; font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace;
  margin: 12px 0 0; }
"""


def _number(value: Any, error: Any) -> str:
    """A value, and its standard error to two digits, as HTML."""
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.item()
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return f"{int(value):,}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return html.escape(str(value))
    error = None if error is None else float(error)
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{float(value):#.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 9)
    return f'{float(value):.{digits}f} <span class="error">± {error:.{digits}f}</span>'


def _encode(picture: Picture) -> bytes:
    """A Figure or Pillow image as PNG; bytes are an image file already."""
    if isinstance(picture, bytes):
        return picture
    buffer = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(buffer, format="png", dpi=160, metadata={"Software": None})  # type: ignore
    else:
        picture.save(buffer, "PNG")  # type: ignore
    return buffer.getvalue()


class Report:
    """One self-contained HTML file of numbers, pictures, tables and text.

    Parts appear in the order in which they are added, sections in that of their first part; "" is
    a section without a heading. All text is escaped; pictures are embedded; there is no script
    and nothing is loaded from elsewhere.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._sections: dict[str, list[tuple[str, str]]] = {}

    def _add(self, section: str, kind: str, part: str) -> None:
        self._sections.setdefault(section, []).append((kind, part))

    def numbers(self, rows: Iterable[Row], section: str = "") -> None:
        """Add a table of (name, value, standard error or None, how to read it)."""
        body = "".join(
            f'<tr><th scope="row">{html.escape(name)}<span class="note">{html.escape(note)}</span>'
            f'</th><td class="number">{_number(value, error)}</td></tr>'
            for name, value, error, note in rows)
        if body:
            self._add(section, "table",
                      f'<div class="table"><table><tbody>{body}</tbody></table></div>')

    def figure(self, picture: Picture, caption: str = "", section: str = "", *,
               wide: bool = False) -> None:
        """Add a picture (bytes of an image file, a Pillow image or a matplotlib Figure).

        Pictures that follow each other share a row where they fit; a `wide` one has its own.
        Errors: ValueError for bytes that are no image.
        """
        from PIL import Image, UnidentifiedImageError

        data = _encode(picture)
        try:
            with Image.open(io.BytesIO(data)) as image:
                mime, (width, height) = Image.MIME[image.format or ""], image.size
        except UnidentifiedImageError:
            raise ValueError(f"picture must be an image file, got {len(data)} bytes of something "
                             "else; pass the file's content, not its path") from None
        text = html.escape(caption)
        self._add(section, "figure",
                  f'<figure{" class=wide" if wide else ""}><img width="{width}" height="{height}" '
                  f'alt="{text}" src="data:{mime};base64,{base64.b64encode(data).decode()}">'
                  f'<figcaption>{text}</figcaption></figure>')

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "",
              section: str = "") -> None:
        """Add a table of any cells; numbers are shown to four digits."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
        body = "".join("<tr>" + "".join(f"<td>{_number(cell, None)}</td>" for cell in row) + "</tr>"
                       for row in rows)
        note = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._add(section, "table", f'<div class="table"><table>{note}<thead><tr>{head}</tr>'
                                    f"</thead><tbody>{body}</tbody></table></div>")

    def text(self, text: str, section: str = "") -> None:
        """Add a paragraph."""
        self._add(section, "text", f"<p>{html.escape(text)}</p>")

    def details(self, title: str, text: str, section: str = "") -> None:
        """Add text of fixed width, such as a configuration, folded under its title."""
        self._add(section, "details", f"<details><summary>{html.escape(title)}</summary>"
                                      f"<pre>{html.escape(text)}</pre></details>")

    def html(self) -> str:
        """The whole page."""
        parts = []
        for section, items in self._sections.items():
            if section:
                parts.append(f"<h2>{html.escape(section)}</h2>")
            for kind, run in itertools.groupby(items, key=lambda item: item[0]):
                body = "\n".join(part for _, part in run)
                parts.append(f'<div class="figures">{body}</div>' if kind == "figure" else body)
        title = html.escape(self.title)
        subtitle = f'<p class="subtitle">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1">'
                f'<meta name="color-scheme" content="light dark"><title>{title}</title>'
                f"<style>{_CSS}</style></head>\n<body><main><header><h1>{title}</h1>{subtitle}"
                "</header>\n" + "\n".join(parts) + "\n</main></body></html>\n")

    def save(self, path: PathLike) -> None:
        """Write the page to `path` atomically: a reader sees the old file or the whole new one."""
        _write_atomic(path, self.html().encode())


def _write_atomic(path: PathLike, data: bytes) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# The report of one run


_METRICS = {
    "frechet_distance_pixels": (
        "Fréchet distance, pixels",
        ("Between Gaussians fitted to the pixels of samples and of held-out real images; lower is "
        "better, but not 0 even for a perfect model with finitely many images.")),
    "frechet_distance_pixels_train": (
        "Fréchet distance, pixels: real training images",
        "As many real images in place of the samples: what a perfect model would score."),
    "one_nn_accuracy": (
        "1-NN accuracy",
        ("How often the nearest neighbour tells samples from held-out real images. 0.5 is best: "
        "they cannot be told apart; 1 means always told apart; near 0 means copies.")),
    "one_nn_accuracy_real": (
        "1-NN accuracy on real images",
        "Much lower than on samples: the samples are more alike than real images are."),
    "one_nn_accuracy_fake": (
        "1-NN accuracy on samples",
        "Much lower than on real images: the samples are more spread out than real images are."),
    "one_nn_accuracy_train": (
        "1-NN accuracy: real training images",
        "Real images in place of the samples: what a perfect model would score."),
    "nearest_train_distance": (
        "Distance to the nearest training image: samples",
        ("Mean Euclidean distance over pixels in [0, 1]. Much below the next row, samples are "
        "suspect of being copies.")),
    "nearest_train_distance_reference": (
        "Distance to the nearest training image: held-out images",
        "The same for real images that the model has not seen."),
    "num_samples": ("Samples", "Number of samples behind these numbers."),
    "num_reference": ("Held-out images", "Number of real images they are compared with."),
}


def metric_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Metrics as rows of Report.numbers: `key_se` is the error of `key`; unknown keys come last."""
    known = [(key, *_METRICS[key]) for key in _METRICS if key in metrics]
    other = [(key, key, "") for key, value in metrics.items() if key not in _METRICS
             and isinstance(value, numbers.Real) and not key.endswith("_se")]
    return [(name, metrics[key], metrics.get(f"{key}_se"), note)
            for key, name, note in known + other]


def _bpd_row(bpd: Any) -> Row:
    values = _vector(bpd, "bpd")
    n = len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return ("Bits per dimension", float(values.mean()), error,
            (f"Mean over {n} held-out images of -log2 p(x) per dimension; lower is better. A "
            "uniform guess over the grey levels scores log2(levels)."))


def _neighbor_figure(samples: Array, neighbors: tuple[Array, Array], pairs: int) -> Image:
    """The pairs of a sample and its nearest training image, closest first."""
    left, right, distances = (torch.as_tensor(x).detach().cpu() for x in (samples, *neighbors))
    if not len(left) == len(right) == distances.numel():
        raise ValueError(f"train_neighbors must hold one image and one distance per sample "
                         f"({len(left)}), got {len(right)} and {distances.numel()}")
    closest = distances.flatten().argsort()[:pairs]
    return side_by_side(left[closest], right[closest], distances.flatten()[closest],
                        ncols=6 if len(closest) <= 48 else 12)


def write_report(path: PathLike, *, title: str, subtitle: str = "", config_text: str | None = None,
                 samples: Array | None = None, real: Array | None = None,
                 train_neighbors: tuple[Array, Array] | None = None,
                 loss_history: Mapping[str, Any] | None = None,
                 frames: Sequence[tuple[float, Array]] | None = None, bpd: Any = None,
                 metrics: Mapping[str, Any] | None = None, rows: Sequence[Row] = (),
                 max_images: int = 64, max_pairs: int = 24, max_frames: int = 48) -> None:
    """Write the report of one run; what is None is left out.

    - samples, real: images (n, C, H, W) in [0, 1]; the first `max_images` of each are shown.
    - train_neighbors: (images, distances) of the training image nearest to each of `samples`;
      the `max_pairs` closest pairs are shown.
    - loss_history: the arguments of loss_curve by name. bpd: bits per dimension (n,).
    - frames: pairs (t, images) of the sampling of a few samples, thinned to `max_frames`.
    - metrics: the dict of evaluation.low_dimensional_metrics, or any names and numbers.
    - rows: further rows of the table of numbers, as in Report.numbers; they come first.
    - config_text: shown folded.

    Errors: ValueError where a part has the wrong shape; nothing is written then.
    """
    report = Report(title, subtitle)
    table = [*rows, *([] if bpd is None else [_bpd_row(bpd)]), *metric_rows(metrics or {})]
    report.numbers(table, "Results")
    for note in (metrics or {}).get("notes", ()):
        report.text(note, "Results")
    for images, what in ((samples, "samples of the model"), (real, "real images")):
        if images is not None:
            shown = images[:max_images]
            report.figure(image_grid(shown, padding=6), f"{len(shown)} {what}, not selected.",
                          "Samples")
    if frames:
        picked = np.unique(np.linspace(0, len(frames) - 1, max_frames).round().astype(int))
        report.figure(animation([frames[i] for i in picked], format="webp", padding=6),
                      "From noise to images, as the sampler takes the diffusion time t down. "
                      "Values outside [0, 1] are shown as black or white.", "Sampling")
    curves = " and ".join(name for name, part in (("training", loss_history), ("likelihood", bpd))
                          if part is not None).capitalize()
    if loss_history is not None:
        report.figure(loss_curve(**loss_history), "Loss over training.", curves)
    if bpd is not None:
        report.figure(histogram(bpd, "bits/dim", table[len(rows)][1]), "Bits per dimension of "
                      "held-out images, one value per image.", curves)
    if train_neighbors is not None and samples is not None:
        report.figure(_neighbor_figure(samples, train_neighbors, max_pairs), "The samples that "
                      f"come closest to a training image, of {len(samples)}: each on the left, "
                      "its nearest training image on the right, their Euclidean distance below. "
                      "Copies would look equal.", "Nearest training images", wide=True)
    if config_text is not None:
        report.details("Configuration", config_text)
    report.save(path)
