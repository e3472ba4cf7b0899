"""What the benchmark of inverse problems leaves behind: the tables and the picture."""

from __future__ import annotations

import math
from pathlib import Path

#: Methods as they are called in papers.
NAMES = {
    "replacement": "replacement",
    "projection": "projection",
    "repaint": "RePaint",
    "ddrm": "DDRM",
    "ddnm": "DDNM, DDNM+",
    "dps": "DPS, best ζ",
    "pigdm": "ΠGDM",
    "tmpd": "TMPD, diagonal",
    "mmps": "MMPS",
    "smc": "twisted SMC",
}
BEGIN, END = "<!-- begin: benchmarks.inverse -->", "<!-- end: benchmarks.inverse -->"
#: Okabe and Ito's colours, told apart by every kind of eye.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
#: Within so much of the truth a law is called exact: mean in standard deviations, and ratio.
EXACT = 0.03


def _values(rows) -> dict:
    return {(r.case, r.method, r.metric): r.value for r in rows}


def _ordered(names) -> list[str]:
    return list(dict.fromkeys(names))


def _gaussian_table(rows) -> list[str]:
    values = _values(rows)
    cases = _ordered(r.case for r in rows if r.metric == "mean")
    there = [m for m in NAMES if any((c, m, "mean") in values for c in cases)]
    lines = ["| |" + "".join(f" {c} |" for c in cases), "|---|" + "---|" * len(cases)]
    for method in there:
        cells = []
        for case in cases:
            keys = [(case, method, metric) for metric in ("mean", "low", "high")]
            cells.append(_cell(*(values[k] for k in keys)) if keys[0] in values else "–")
        lines.append(f"| {NAMES[method]} |" + "".join(f" {c} |" for c in cells))
    return lines


def _cell(mean: float, low: float, high: float) -> str:
    if not all(math.isfinite(v) for v in (mean, low, high)):
        return "diverges"
    text = f"{mean:.2f}, {low:.2f}–{high:.2f}"
    return f"**{text}**" if max(mean, abs(low - 1), abs(high - 1)) <= EXACT else text


def _mixture_table(rows) -> list[str]:
    values = _values(rows)
    cases = _ordered(r.case for r in rows if r.metric == "tv")
    there = [m for m in ("exact samples", *NAMES) if any((c, m, "tv") in values for c in cases)]
    lines = ["| |" + "".join(f" {c} |" for c in cases), "|---|" + "---|" * len(cases)]
    for method in there:
        cells = "".join(f" {values[c, method, 'tv']:.3f} |" for c in cases)
        lines.append(f"| {NAMES.get(method, method)} |{cells}")
    return lines


def tables(rows) -> str:
    return "\n".join([*_gaussian_table(rows), "", MIXTURE, "", *_mixture_table(rows), ""])


MIXTURE = (
    "Total variation between the histogram of 10,000 samples and the posterior of a mixture of "
    "three Gaussians in the plane, of which 0.8 x₁ + 0.6 x₂ is measured; 0 is exact, 1 disjoint, "
    "and 10,000 exact samples score as the first row says."
)


def insert(path: Path, text: str) -> None:
    """Put `text` between the markers of a page."""
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{path} must have one {BEGIN!r} and one {END!r}")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


# --- the picture ------------------------------------------------------------------------------


def plot(rows, path: Path) -> None:
    """A panel a method: its ellipse of two standard deviations, over that of the truth."""
    from matplotlib.figure import Figure

    values = _values(rows)
    case = next(r.case for r in rows if r.metric == "y")
    methods = [m for m in NAMES if (case, m, "m0") in values]
    columns = 5
    lines = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(11, 2.75 * lines + 0.6), dpi=130, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, method in zip(axes, methods, strict=False):
        _panel(axis, values, case, method)
    for axis in axes[len(methods) :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    figure.savefig(path)


def _panel(axis, values, case: str, method: str) -> None:
    def curve(name):
        m, c = [[values[case, name, k] for k in keys] for keys in (("m0", "m1"), C)]
        return _ellipse(*m, *c)

    y = values[case, "y", "y"]
    axis.plot(*curve("prior"), color=GREY, lw=1.2, ls=":", label="data")
    axis.axvline(y, color=GREY, lw=1.2, ls="--", label="measured $x_1$")
    axis.fill(*curve("truth"), color=BLUE, alpha=0.3, lw=0, label="true posterior")
    axis.plot(*curve(method), color=ORANGE, lw=2.2, label="method")
    off, low, high = (values[case, method, k] for k in ("mean", "low", "high"))
    axis.set_title(NAMES[method], fontsize=12.5)
    note = f"mean off {off:.2f} sd\nwidth × {low:.2f}–{high:.2f}"
    axis.text(
        0.04,
        0.96,
        note,
        transform=axis.transAxes,
        va="top",
        fontsize=9.5,
        zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_color("#cccccc")


C = ("c00", "c01", "c11")


def _ellipse(m0, m1, c00, c01, c11):
    """Points at two standard deviations."""
    mean, gap = (c00 + c11) / 2, math.hypot((c00 - c11) / 2, c01)
    angle = 0.5 * math.atan2(2 * c01, c00 - c11)
    a, b = (2 * math.sqrt(max(v, 0.0)) for v in (mean + gap, mean - gap))
    turns = [2 * math.pi * k / 200 for k in range(201)]
    cos, sin = math.cos(angle), math.sin(angle)
    return (
        [m0 + a * math.cos(u) * cos - b * math.sin(u) * sin for u in turns],
        [m1 + a * math.cos(u) * sin + b * math.sin(u) * cos for u in turns],
    )
