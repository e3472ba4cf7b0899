"""Pictures of distributions of points: densities, score fields, paths through time.

Every function returns a matplotlib Figure of panels side by side, on the square
[-half_side, half_side]². Densities are drawn in cividis, which reads the same with every kind of
colour vision, and paths in the colours of Okabe & Ito.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from visualize_points import HALF_SIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP, _PALE, _SIGNED, _ARROW, _DOT = "cividis", "Greys", "PuOr", "#ffffff", "#2563eb"
#: Colours of paths, in turn.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
#: Inches of a panel, and what an arrow of size 1 takes of the space between two.
_WIDTH, _LENGTH = 2.6, 0.25


def density_panels(
    log_densities: Mapping[str, Any],
    *,
    half_side: float = HALF_SIDE,
    log: bool = False,
    floor: float = -12.0,
    ncols: int = 6,
) -> Figure:
    """Densities on a square grid, each under its name, as heat maps.

    Args:
      log_densities: log p at the centres of size × size cells, row by row from the bottom,
        (size²,) or (size, size).
      log: show log p, on one scale for all from `floor` nats below the largest; else p, each panel
        on its own scale.
    """
    figure, axes = _panels(len(log_densities), half_side, ncols)
    values = {name: _square(v) for name, v in log_densities.items()}
    top = max(float(np.nanmax(v)) for v in values.values())
    image = None
    for (name, v), ax in zip(values.items(), axes):
        shown = np.clip(v, top + floor, top) if log else _relative(v)
        low, high = (top + floor, top) if log else (0, 1)
        image = _heat(ax, shown, half_side, vmin=low, vmax=high)
        ax.set_title(name, fontsize=11)
    if log:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + 0.8, height)
        _bar(figure, image, axes, "nats")
    return figure


def density_rows(
    rows: Mapping[str, Sequence[Any]], columns: Sequence[str], *, half_side: float = HALF_SIDE
) -> Figure:
    """Densities in rows and columns that have names, each panel on its own scale.

    Shapes: as many log-densities, as of `density_panels`, in each row as there are columns.
    """
    wrong = {name: len(row) for name, row in rows.items() if len(row) != len(columns)}
    if wrong:
        raise ValueError(f"expected {len(columns)} densities in each row, got {wrong}")
    figure, axes = _panels(len(rows) * len(columns), half_side, len(columns))
    for i, (name, row) in enumerate(rows.items()):
        for j, values in enumerate(row):
            ax = axes[i * len(columns) + j]
            _heat(ax, _relative(_square(values)), half_side, vmin=0, vmax=1)
            if i == 0:
                ax.set_title(columns[j], fontsize=11)
            if i < len(rows) - 1:
                ax.set_xticks([])
        axes[i * len(columns)].set_ylabel(name, fontsize=11)
    figure.set_size_inches(_WIDTH * len(columns) + 0.3, _WIDTH * len(rows) + 0.4)
    return figure


def truth_and_points(
    log_densities: Sequence[Any],
    points: Sequence[Any],
    names: Sequence[str],
    *,
    half_side: float = HALF_SIDE,
) -> Figure:
    """Exact densities above, sets of points (n, 2) as dots below, in columns that have names."""
    if not len(log_densities) == len(points) == len(names):
        raise ValueError(
            f"expected as many densities, sets of points and names, got {len(log_densities)}, "
            f"{len(points)} and {len(names)}"
        )
    figure = density_rows({"exact": log_densities, "samples": log_densities}, names)
    for ax, x in zip(figure.axes[len(names) :], points):
        ax.images[0].remove()
        ax.set(xlim=(-half_side, half_side), ylim=(-half_side, half_side))
        _dots(ax, x)
    return figure


def log_density_panels(
    truth: Any, model: Any, *, half_side: float = HALF_SIDE, floor: float = -12.0
) -> Figure:
    """The exact log-density, the model's, on one scale from `floor` nats below the largest, and by
    how much the model's is larger, on the upper half of that scale.

    Shapes: as `density_panels`.
    """
    p, q = _square(truth), _square(model)
    figure, axes = _panels(3, half_side, ncols=3)
    figure.set_size_inches(3 * _WIDTH + 2.0, _WIDTH + 0.45)
    top = float(np.nanmax(p))
    image = None
    for ax, values, name in zip(axes, (p, q), ("log p of the truth", "log p of the model")):
        shown = np.clip(values, top + floor, top)
        image = _heat(ax, shown, half_side, vmin=top + floor, vmax=top)
        ax.set_title(name, fontsize=11)
    _bar(figure, image, axes[:2], "nats")
    with np.errstate(invalid="ignore"):
        gap = np.where(p > top + floor / 2, q - p, np.nan)
    axes[2].set_facecolor("#b0b0b0")
    shown = np.clip(gap, -2, 2)
    image = _heat(axes[2], shown, half_side, _SIGNED, interpolation="nearest", vmin=-2, vmax=2)
    axes[2].set_title("model − truth", fontsize=11)
    _bar(figure, image, axes[2:], "nats")
    return figure


def field_panels(
    log_density: Any,
    places: Any,
    fields: Mapping[str, Any],
    *,
    half_side: float = HALF_SIDE,
    unit: float | None = None,
    ncols: int = 4,
) -> Figure:
    """Vector fields as arrows over a density, a panel each.

    Long arrows are shortened: an arrow's length is asinh of the field's size in `unit`s, so that
    what is small and what is large by orders of magnitude can be seen at once; the scale is the
    same in all panels.

    Args:
      log_density: on a square grid, as of `density_panels`; or one for each field, by its name.
      places: where arrows begin, (n, 2), on a grid.
      fields: vectors there, (n, 2), by name.
      unit: by default a quarter of the median size of all vectors.
    """
    start = _array(places)
    vectors = {name: _array(v) for name, v in fields.items()}
    for name, v in {"places": start, **vectors}.items():
        if v.ndim != 2 or v.shape != (len(start), 2):
            raise ValueError(f"{name}: expected shape ({len(start)}, 2), got {v.shape}")
    figure, axes = _panels(len(fields), half_side, ncols)
    spacing = 2 * half_side / math.sqrt(len(start))
    sizes = {name: np.linalg.norm(v, axis=1, keepdims=True) for name, v in vectors.items()}
    unit = unit or float(np.median(np.concatenate(list(sizes.values())))) / 4 or 1.0
    for (name, v), ax in zip(vectors.items(), axes):
        p = log_density[name] if isinstance(log_density, Mapping) else log_density
        _heat(ax, _relative(_square(p)), half_side, vmin=0, vmax=1.4)
        length = _LENGTH * spacing * np.arcsinh(sizes[name] / unit)
        arrows = v / np.maximum(sizes[name], 1e-12) * length
        ax.quiver(
            start[:, 0], start[:, 1], arrows[:, 0], arrows[:, 1], color=_ARROW, angles="xy",
            scale_units="xy", scale=1, width=0.008, headwidth=3.2, headlength=3.2,
            headaxislength=2.9,
        )  # fmt: skip
        ax.set_title(name, fontsize=11)
    return figure


def points_panels(
    points: Mapping[str, Any], *, log_density: Any = None, half_side: float = HALF_SIDE
) -> Figure:
    """Sets of points (n, 2) as dots, a panel each, on the density, drawn pale, where given."""
    figure, axes = _panels(len(points), half_side, ncols=5)
    for (name, x), ax in zip(points.items(), axes):
        _background(ax, log_density, half_side)
        _dots(ax, x)
        ax.set_title(name, fontsize=11)
    return figure


def path_panels(
    paths: Mapping[str, Any],
    *,
    log_density: Any = None,
    over: Mapping[str, tuple[Sequence[float], Any]] | None = None,
    xlabel: str = "noise level σ/α",
    half_side: float = HALF_SIDE,
    ncols: int = 4,
) -> Figure:
    """The ways of points, a panel each: from a circle to a dot, a colour for each point.

    Args:
      paths: (steps, n, 2), by name.
      log_density: of the data, on a square grid, drawn pale below; None for none.
      over: by the same names the place of every state on an axis `xlabel`, logarithmic and in the
        order of the states, (steps,), and densities of the first coordinate there, (steps, size),
        on an even grid of the square's side: a second row shows that coordinate on them.
    """
    states = {name: _array(x) for name, x in paths.items()}
    for name, x in states.items():
        if x.ndim != 3 or x.shape[2] != 2 or not len(x):
            raise ValueError(f"{name}: expected paths of shape (steps, points, 2), got {x.shape}")
    count = len(states)
    figure, axes = _panels(count * (2 if over else 1), half_side, count if over else ncols)
    for i, (name, x) in enumerate(states.items()):
        _background(axes[i], log_density, half_side)
        _lines(axes[i], x[..., 0], x[..., 1])
        axes[i].set_title(name, fontsize=11)
        if over:
            _over(axes[count + i], x[..., 0], *over[name], half_side)
            axes[count + i].set_xlabel(xlabel, fontsize=10)
    if over:
        axes[0].set_ylabel("$x_2$ over $x_1$", fontsize=10)
        axes[count].set_ylabel("$x_1$", fontsize=10)
    return figure


# --- parts ------------------------------------------------------------------------------------


def _panels(count: int, half_side: float, ncols: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    if not count:
        raise ValueError("a picture needs at least one panel, got none")
    ncols = min(count, ncols)
    rows = math.ceil(count / ncols)
    size = (_WIDTH * ncols + 0.3, (_WIDTH + 0.25) * rows + 0.25)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.05)  # type: ignore[union-attr]
    grid = figure.subplots(rows, ncols, squeeze=False)
    axes = list(grid.flat)
    for i, ax in enumerate(axes):
        if i >= count:
            ax.set_visible(False)
            continue
        ax.set_aspect("equal")
        ax.set(xlim=(-half_side, half_side), ylim=(-half_side, half_side))
        ticks = [-math.floor(half_side), 0, math.floor(half_side)]
        ax.set_xticks(ticks)
        ax.set_yticks(ticks if i % ncols == 0 else [])
        ax.tick_params(labelsize=9)
    return figure, axes[:count]


def _array(values: Any) -> np.ndarray:
    return np.asarray(torch.as_tensor(values).detach().cpu().double())


def _square(values: Any) -> np.ndarray:
    v = _array(values).reshape(-1)
    size = math.isqrt(len(v))
    if size**2 != len(v):
        raise ValueError(f"expected values on a square grid, got {len(v)} of them")
    return v.reshape(size, size)


def _relative(log_density: np.ndarray) -> np.ndarray:
    """The density, divided by its largest value."""
    return np.exp(log_density - np.nanmax(log_density))


def _heat(ax: Axes, values: np.ndarray, half_side: float, cmap: str = _MAP, **options: Any):
    extent = (-half_side, half_side, -half_side, half_side)
    options = {"interpolation": "bilinear", **options}
    return ax.imshow(values, origin="lower", extent=extent, cmap=cmap, **options)


def _background(ax: Axes, log_density: Any, half_side: float) -> None:
    if log_density is not None:
        _heat(ax, _relative(_square(log_density)), half_side, _PALE, vmin=0, vmax=2.5)


def _dots(ax: Axes, points: Any) -> None:
    x = _array(points)
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"expected points of shape (n, 2), got {x.shape}")
    ax.scatter(
        x[:, 0], x[:, 1], s=min(4.0, 6000 / max(len(x), 1)), color=_DOT, alpha=0.5, linewidths=0
    )


def _bar(figure: Figure, image, axes: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=list(axes), pad=0.02)
    bar.set_label(label, fontsize=10)
    bar.ax.tick_params(labelsize=9)


def _lines(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Paths (steps, n), their starts as circles and their ends as dots."""
    for i in range(x.shape[1]):
        color = _COLOURS[i % len(_COLOURS)]
        ax.plot(x[:, i], y[:, i], color=color, linewidth=0.6, alpha=0.8)
        for end, face in ((0, "white"), (-1, color)):
            seen = abs(y[end, i]) <= max(ax.get_ylim())  # a mark on the edge is drawn whole
            ax.plot(
                x[end, i], y[end, i], "o", color=color, markersize=5, markerfacecolor=face,
                zorder=4, clip_on=not seen or abs(x[end, i]) > max(ax.get_xlim()),
            )  # fmt: skip


def _over(ax: Axes, x: np.ndarray, places: Sequence[float], p: Any, half_side: float) -> None:
    """One coordinate (steps, n) at `places` (steps,), on its densities (steps, size)."""
    p, t = _array(p), np.asarray(places, dtype=float)
    if p.ndim != 2 or len(p) != len(t) or len(x) != len(t):
        raise ValueError(
            f"expected a place and a density for each of {len(x)} states, got {len(t)} and "
            f"shape {p.shape}"
        )
    ax.set(xscale="log", aspect="auto")
    ax.set(xlim=(t[0], t[-1]))
    edges = np.linspace(-half_side, half_side, p.shape[1])
    shown = (p / p.max(axis=1, keepdims=True)).T
    ax.pcolormesh(t, edges, shown, cmap=_PALE, shading="gouraud", vmin=0, vmax=2.5)
    ax.minorticks_off()
    _lines(ax, np.repeat(t[:, None], x.shape[1], axis=1), x)
