"""One self-contained HTML report of a run: numbers, pictures, animation, configuration."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from visualize import (
    Array,
    PathLike,
    animation,
    bar_chart,
    histogram,
    image_grid,
    loss_curve,
    score_curve,
    side_by_side,
    vector,
    with_error,
    write_atomic,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    Picture = bytes | Image | Figure

Row = tuple[str, Any, Any, str]  # name, value, standard error or None, how to read it

#: What a browser may do with the page: show its own pictures and styles, and nothing else.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
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
td { overflow-wrap: anywhere; } td:first-child { white-space: nowrap; }
th, td { text-align: left; padding: 10px 12px 10px 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; } th { font-weight: 600; }
td.number { text-align: right; padding-right: 0; white-space: nowrap; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.error, .note { color: var(--quiet); font-weight: 400; }
.note { display: block; font-size: .9rem; max-width: 70ch; }
@media (max-width: 600px) { .wide { overflow-x: auto; }
  .wide img { max-width: none; width: 720px; } }
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
            for name, value, error, note in rows
        )
        if body:
            self._add(
                section, "table", f'<div class="table"><table><tbody>{body}</tbody></table></div>'
            )

    def figure(
        self, picture: Picture, caption: str = "", section: str = "", *, wide: bool = False
    ) -> None:
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
            raise ValueError(
                f"picture must be an image file, got {len(data)} bytes of something "
                "else; pass the file's content, not its path"
            ) from None
        text = html.escape(caption)
        self._add(
            section,
            "figure",
            f'<figure{" class=wide" if wide else ""}><img width="{width}" height="{height}" '
            f'alt="{text}" src="data:{mime};base64,{base64.b64encode(data).decode()}">'
            f"<figcaption>{text}</figcaption></figure>",
        )

    def table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[Any]],
        caption: str = "",
        section: str = "",
    ) -> None:
        """Add a table of any cells; numbers are shown to four digits."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{_number(cell, None)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        note = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._add(
            section,
            "table",
            f'<div class="table"><table>{note}<thead><tr>{head}</tr>'
            f"</thead><tbody>{body}</tbody></table></div>",
        )

    def text(self, text: str, section: str = "") -> None:
        """Add a paragraph."""
        self._add(section, "text", f"<p>{html.escape(text)}</p>")

    def details(self, title: str, text: str, section: str = "") -> None:
        """Add text of fixed width, such as a configuration, folded under its title."""
        self._add(
            section,
            "details",
            f"<details><summary>{html.escape(title)}</summary>"
            f"<pre>{html.escape(text)}</pre></details>",
        )

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
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f'<meta name="color-scheme" content="light dark"><title>{title}</title>'
            f"<style>{_CSS}</style></head>\n<body><main><header><h1>{title}</h1>{subtitle}"
            "</header>\n" + "\n".join(parts) + "\n</main></body></html>\n"
        )

    def save(self, path: PathLike) -> None:
        """Write the page to `path` atomically: a reader sees the old file or the whole new one."""
        write_atomic(path, self.html().encode())


# ---------------------------------------------------------------------------------------------
# The report of one run


_METRICS = {
    "fid": (
        "FID",
        "Fréchet distance to the reference in feature space; lower is better. Values of other "
        "numbers of samples, extractors or references are not comparable: see the protocol.",
    ),
    "kid": (
        "KID",
        "Kernel distance to the reference in feature space, unbiased: 0 for a perfect model.",
    ),
    "is": (
        "Inception Score",
        "How surely and how variedly the samples are classified, all together; higher is better.",
    ),
    "is_splits": ("Inception Score over ten splits", "The older custom."),
    "precision": ("Precision", "Share of samples that lie among the reference images."),
    "recall": ("Recall", "Share of reference images that lie among the samples."),
    "density": ("Density", "How densely the samples lie among the reference images; 1 is best."),
    "coverage": ("Coverage", "Share of reference images with a sample in their neighbourhood."),
    "frechet_distance_pixels": (
        "Fréchet distance, pixels",
        (
            "Between Gaussians fitted to the pixels of samples and of held-out real images; lower "
            "is better, but not 0 even for a perfect model with finitely many images."
        ),
    ),
    "frechet_distance_pixels_train": (
        "Fréchet distance, pixels: real training images",
        "As many real images in place of the samples: what a perfect model would score.",
    ),
    "one_nn_accuracy": (
        "1-NN accuracy",
        (
            "How often the nearest neighbour tells samples from held-out real images. 0.5 is best: "
            "they cannot be told apart; 1 means always told apart; near 0 means copies."
        ),
    ),
    "one_nn_accuracy_real": (
        "1-NN accuracy on real images",
        "Much lower than on samples: the samples are more alike than real images are.",
    ),
    "one_nn_accuracy_fake": (
        "1-NN accuracy on samples",
        "Much lower than on real images: the samples are more spread out than real images are.",
    ),
    "one_nn_accuracy_train": (
        "1-NN accuracy: real training images",
        "Real images in place of the samples: what a perfect model would score.",
    ),
    "nearest_train_distance": (
        "Distance to the nearest training image: samples",
        (
            "Mean Euclidean distance over pixels in [0, 1]. Much below the next row, samples are "
            "suspect of being copies."
        ),
    ),
    "nearest_train_distance_reference": (
        "Distance to the nearest training image: held-out images",
        "The same for real images that the model has not seen.",
    ),
    "sliced_wasserstein": (
        "Sliced Wasserstein distance",
        "Of the samples to true points, in the units of the data; above 0 even for the truth.",
    ),
    "sliced_wasserstein_true": (
        "Sliced Wasserstein distance: true points",
        "Of true points to others: what a perfect model would score.",
    ),
    "sliced_wasserstein_ratio": ("Ratio of the two", "1 cannot be told from the truth."),
    "mmd2": ("MMD²", "Kernel distance to true points, unbiased: 0 for a perfect model."),
    "mmd2_true": ("MMD²: true points", "Of true points to others; 0 but for chance."),
    "num_samples": ("Samples", "Number of samples behind these numbers."),
    "num_reference": ("Held-out images", "Number of real images they are compared with."),
}


#: Ends of the names of numbers that say how others came to be: in the JSON, not in the report.
_DETAILS = (
    *("_se", "_std", "_seed", "_subset_size"),
    *("_num_samples", "_num_reference", "_num_splits", "_num_subsets"),
)


def metric_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Metrics as rows of Report.numbers: `key_se` is the error of `key`; unknown keys come last."""
    known = [(key, *_METRICS[key]) for key in _METRICS if key in metrics]
    other = [
        (key, key, "")
        for key, value in metrics.items()
        if key not in _METRICS and isinstance(value, numbers.Real) and not key.endswith(_DETAILS)
    ]
    return [
        (name, metrics[key], metrics.get(f"{key}_se"), note) for key, name, note in known + other
    ]


_FROM_NOISE = "From noise to samples, as the sampler takes the diffusion time t down."
_OUTSIDE = "Values outside [0, 1] are shown as black or white."
_BITS = (
    "Mean of -log2 p(x) per dimension over the images of the set in the protocol; lower is better. "
    "A uniform guess over the grey levels scores log2(levels)."
)


def _bpd_row(name: str, bpd: Any, note: str) -> Row:
    values = vector(bpd, "bpd")
    n = len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return name, float(values.mean()), error, note


def _add_gaps(report: Report, gaps: Mapping[str, Any], section: str) -> None:
    """The gap report: a table of the rows, and the same as bars."""
    rows, reference = gaps["rows"], gaps["reference"]
    names = [row["label"] for row in rows]
    values = [row["value"] for row in rows]
    errors = [math.nan if e is None else e for e in (row["standard_error"] for row in rows)]
    total = with_error(reference["mean"], reference["standard_error"]).removeprefix("+")
    report.text(
        "By how much bits/dim would change if one thing at a time were done better, or "
        f"otherwise, on the same {gaps['images']} images, noise and probes. They score {total} "
        "bits/dim by the ODE under uniform dequantisation; a negative change lowers that.",
        section,
    )
    figure = bar_chart(names, values, errors, "change of bits/dim")
    report.figure(figure, "Changes, with one standard error.", section, wide=True)
    table = [
        (name, value, error, row["note"])
        for name, value, error, row in zip(names, values, errors, rows, strict=True)
    ]
    report.numbers(table, section)


def _neighbor_figure(samples: Array, neighbors: tuple[Array, Array], pairs: int) -> Image:
    """The pairs of a sample and its nearest training image, closest first."""
    left, right, distances = (torch.as_tensor(x).detach().cpu() for x in (samples, *neighbors))
    if not len(left) == len(right) == distances.numel():
        raise ValueError(
            f"train_neighbors must hold one image and one distance per sample "
            f"({len(left)}), got {len(right)} and {distances.numel()}"
        )
    closest = distances.flatten().argsort()[:pairs]
    return side_by_side(
        left[closest],
        right[closest],
        distances.flatten()[closest],
        ncols=6 if len(closest) <= 48 else 12,
    )


def write_report(
    path: PathLike,
    *,
    title: str,
    subtitle: str = "",
    config_text: str | None = None,
    samples: Array | None = None,
    real: Array | None = None,
    train_neighbors: tuple[Array, Array] | None = None,
    loss_history: Mapping[str, Any] | None = None,
    frames: Sequence[tuple[float, Array]] | None = None,
    bpd: Any = None,
    gaps: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    rows: Sequence[Row] = (),
    pictures: Sequence[tuple[Picture, str]] = (),
    curves: Mapping[str, tuple[Any, Any, Any]] | None = None,
    protocol: Sequence[tuple[str, str]] = (),
    max_images: int = 64,
    max_pairs: int = 24,
    max_frames: int = 48,
) -> None:
    """Write the report of one run; what is None is left out.

    - samples, real: images (n, C, H, W) in [0, 1], or points (n, 2); the first `max_images` of each
      are shown.
    - train_neighbors: (images, distances) of the training image nearest to each of `samples`;
      the `max_pairs` closest pairs are shown.
    - loss_history: the arguments of loss_curve by name. bpd: bits per dimension (n,), or (bits,
      how to read them) by name.
    - gaps: the gap report, with 'images', 'reference' (mean, standard_error) and 'rows', each with
      label, value, standard_error and note.
    - frames: pairs (t, images) of the sampling of a few samples, thinned to `max_frames`.
    - metrics: the dict of evaluation.low_dimensional_metrics, or any names and numbers.
    - rows: further rows of the table of numbers, as in Report.numbers; they come first.
    - pictures: figures with their captions, each on a row of its own.
    - curves: scores over checkpoints by name, each steps, values and standard errors.
    - protocol: (what, how) of these numbers.
    - config_text: shown folded.

    Errors: ValueError where a part has the wrong shape; nothing is written then.
    """
    report = Report(title, subtitle)
    if not isinstance(bpd, Mapping):
        bpd = {} if bpd is None else {"Bits per dimension": (bpd, _BITS)}
    scored = [_bpd_row(name, values, note) for name, (values, note) in bpd.items()]
    table = [*rows, *scored, *metric_rows(metrics or {})]
    report.numbers(table, "Results")
    for note in (metrics or {}).get("notes", ()):
        report.text(note, "Results")
    points = samples is not None and samples.ndim == 2
    truth = "true points, held out" if points else "real images"
    for images, what in ((samples, "samples of the model"), (real, truth)):
        if images is not None:
            shown = images[:max_images]
            caption = f"{len(shown):,} {what}, not selected."
            report.figure(image_grid(shown, padding=6), caption, "Samples")
    if frames:
        picked = np.unique(np.linspace(0, len(frames) - 1, max_frames).round().astype(int))
        report.figure(
            animation([frames[i] for i in picked], format="webp", padding=6),
            _FROM_NOISE if frames[0][1].ndim == 2 else f"{_FROM_NOISE} {_OUTSIDE}",
            "Sampling",
        )
    for picture, caption in pictures:
        report.figure(picture, caption, "In the plane", wide=True)
    heading = " and ".join(
        name for name, part in (("training", loss_history), ("likelihood", scored)) if part
    ).capitalize()
    if loss_history is not None:
        report.figure(loss_curve(**loss_history), "Loss over training.", heading)
    for name, mean, _, _ in scored:
        figure = histogram(bpd[name][0], "bits/dim", mean)
        report.figure(figure, f"{name}, one value per image.", heading)
    if gaps is not None:
        _add_gaps(report, gaps, "Where the bits go")
    for name, (steps, values, errors) in (curves or {}).items():
        figure = score_curve(steps, values, errors, name)
        report.figure(
            figure, f"{name} of the checkpoints that were evaluated alike.", "Over checkpoints"
        )
    if train_neighbors is not None and samples is not None:
        report.figure(
            _neighbor_figure(samples, train_neighbors, max_pairs),
            "The samples that "
            f"come closest to a training image, of {len(samples)}: each on the left, "
            "its nearest training image on the right, their Euclidean distance below. "
            "Copies would look equal.",
            "Nearest training images",
            wide=True,
        )
    if protocol:
        report.table(("What", "How"), protocol, section="Protocol")
    if config_text is not None:
        report.details("Configuration", config_text, "Protocol" if protocol else "")
    report.save(path)
