"""What the solver benchmark leaves behind: the plot, and docs/solvers.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import sampling
import solvers
from benchmarks.solver_beds import Member, Mixture, processes
from benchmarks.solver_orders import COUNTS, equal_steps
from benchmarks.solver_quality import MIXTURES, Row, Summary, first_to_reach, summarise

#: Curves of the plot, by label: colour and line. Solid lines are deterministic solvers.
CURVES = {
    "ddim": ("#7f7f7f", "-"),
    "heun": ("#1f77b4", "-"),
    "dpm_solver_3": ("#17becf", "-"),
    "dpmpp_2m": ("#2ca02c", "-"),
    "unipc 2": ("#d62728", "-"),
    "exp_ab noise 3": ("#9467bd", "-"),
    "euler_maruyama": ("#8c564b", "--"),
    "dpmpp_2m_sde": ("#ff7f0e", "--"),
    "gotta_go_fast": ("#e377c2", "--"),
}

#: Definitions that coincide: what the second is an instance of.
SAME: tuple[tuple[Member, Member], ...] = (
    (
        Member("ddim", solvers.DDIMPredictor),
        Member("tau_exponential, τ = 0", solvers.TauExponentialPredictor, {"tau": 0.0}),
    ),
    (
        Member("ddim", solvers.DDIMPredictor),
        Member("exp_ab data 1", solvers.ExponentialAdamsBashforthPredictor, {"order": 1}),
    ),
    (
        Member("ddim, η = 1", solvers.DDIMPredictor, {"eta": 1.0}),
        Member("tau_exponential, τ = 1", solvers.TauExponentialPredictor, {"tau": 1.0}),
    ),
    (
        Member("ancestral_sampling", sampling.AncestralSamplingPredictor),
        Member("tau_exponential, τ = 1", solvers.TauExponentialPredictor, {"tau": 1.0}),
    ),
    (
        Member("euler_maruyama", sampling.EulerMaruyamaPredictor),
        Member("tau_euler, τ = 1", solvers.TauEulerPredictor, {"tau": 1.0}),
    ),
    (Member("heun", solvers.HeunPredictor), Member("edm, S_churn = 0", solvers.EDMPredictor)),
    (
        Member("dpmpp_2m", solvers.DPMpp2MPredictor),
        Member("dpmpp_2m_sde, τ = 0", solvers.DPMpp2MSDEPredictor, {"tau": 0.0}),
    ),
    (
        Member("exp_ab data 3", solvers.ExponentialAdamsBashforthPredictor, {"order": 3}),
        Member("unipc 3, predictor only", solvers.UniPCPredictor, {"order": 3, "corrector": False}),
    ),
)


def agreement(first: Member, second: Member) -> float:
    """Largest difference after a run, over all processes, relative to the state."""
    worst = 0.0
    for sde in processes().values():
        bed, times = Mixture.pair(sde), equal_steps(sde, 16)
        ends = []
        for member in (first, second):
            predictor = member.make(sde, bed.score_fn())
            predictor.noise = sampling.NoiseSource(seeds=range(8))
            x = bed.sample(8, seed=2) * 3
            predictor.start(times)
            for t, s in itertools.pairwise(times):
                x = predictor.step(x, t, s)[0]
            ends.append(x)
        worst = max(worst, float((ends[0] - ends[1]).abs().max() / ends[0].abs().max()))
    return worst


# --- the plot -------------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path) -> None:
    """Error on the mixture and Fréchet distance of the digits against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    digits = summarise(rows, "digits", "frechet")
    panels = [("mixture", summarise([r for r in rows if r.process == "VP"], "mixture", "error"))]
    if digits:
        panels.append(("digits", digits))
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.6 * len(panels), 3.7), layout="constrained", squeeze=False
        )
        for axis, (bed, found) in zip(axes[0], panels, strict=True):
            ends = _panel(axis, found)
            if bed == "mixture":
                axis.set_title("2-D mixture, exact score, VP", fontsize=10)
                axis.set_ylabel("distance to the exact solution (RMS)")
                _label_ends(axis, ends)
            else:
                axis.set_title("digits, trained network, VP", fontsize=10)
                axis.set_ylabel("Fréchet distance of pixels")
                _reference_band(axis, found)
                axis.legend(loc="upper right", frameon=False, fontsize=8, labelspacing=0.25)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _panel(axis, found: dict[str, list[Summary]]) -> list[tuple]:
    """Draw the curves: (height, evaluations, label, colour) of their ends."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    labels = []
    for label, (colour, line) in CURVES.items():
        points = [p for p in found.get(label, []) if p.nfe <= 110]
        if not points:
            continue
        nfe, mean = [p.nfe for p in points], [p.mean for p in points]
        axis.plot(nfe, mean, line, color=colour, lw=1.5, marker="o", ms=3, label=label)
        labels.append((mean[-1], nfe[-1], label, colour))
    axis.set_xlabel("evaluations of the network")
    ticks = [5, 10, 20, 50, 100]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", lw=0.4, color="#dddddd")
    axis.set_xlim(4.5, 110)
    return labels


def _label_ends(axis, labels, gap: float = 0.055) -> None:
    """Names at the right of the curves, in their order, moved apart where they would collide."""
    low, high = (math.log(v) for v in axis.get_ylim())
    places = sorted(
        ((math.log(y) - low) / (high - low), x, label, colour) for y, x, label, colour in labels
    )
    heights = [place[0] for place in places]
    for _ in range(200):
        for i in range(len(heights) - 1):
            overlap = gap - (heights[i + 1] - heights[i])
            if overlap > 0:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
        if heights:
            shift = max(0.0, -heights[0]) - max(0.0, heights[-1] - 1)
            heights = [h + shift for h in heights]
    for height, (at, x, label, colour) in zip(heights, places, strict=True):
        axis.annotate(
            label,
            xy=(x, math.exp(low + at * (high - low))),
            xytext=(1.03, height),
            textcoords=axis.transAxes,
            color=colour,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkB": 3},
        )


def _reference_band(axis, found: dict[str, list[Summary]]) -> None:
    """The reference, from where the axis is cut: all curves end there."""
    from matplotlib.ticker import FixedLocator, ScalarFormatter

    reference, label = _reference(found)
    low, high = (reference.mean + k * 2 * reference.error for k in (-1, 1))
    axis.axhspan(low, high, color="#000000", alpha=0.15, lw=0)
    axis.axhline(reference.mean, color="#000000", lw=0.8)
    axis.set_ylim(0.75 * reference.mean, 8 * reference.mean)
    axis.yaxis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    text = f"{label}, ± 2 standard errors"
    axis.text(4.7, 0.8 * reference.mean, text, fontsize=8, va="center")


def _reference(found: dict[str, list[Summary]]) -> tuple[Summary, str]:
    label = next(name for name in found if name.startswith("reference: "))
    return found[label][-1], label.removeprefix("reference: ")


# --- docs/solvers.md ------------------------------------------------------------------------


def page(rows: Sequence[Row], picture: str) -> str:
    """docs/solvers.md, from the rows of a run."""
    beds = {name: [r for r in rows if r.bed == name] for name in dict.fromkeys(r.bed for r in rows)}
    parts = [_HEAD.format(about=beds["about"][0].solver, picture=picture)]
    for name, table in _TABLES.items():
        if name in beds:
            parts.append(table(beds[name]))
    return "\n".join(parts)


_HEAD = """# Solvers: their orders, and quality against evaluations

Written by `python -m benchmarks.solvers --publish`; the numbers of every run are in its CSV.
{about}

![Error on a mixture, and Fréchet distance of digits, against evaluations]({picture})

Choose a solver by `config.sampling.predictor`, its options by `config.sampling.solver` (on the
command line `--config.sampling.solver="{{'order': 2}}"`), the number of times by
`config.sampling.steps` and their spacing by `config.sampling.schedule`. Adaptive samplers are
chosen by `config.sampling.method`. In code: `sampling.get_pc_sampler(…, functools.partial(cls,
**options), …, steps=20, schedule="logsnr")`.
"""


def _table(header: Sequence[str], lines) -> str:
    bars = ["|".join(["", *(f" {cell} " for cell in line), ""]) for line in (header, *lines)]
    return "\n".join([bars[0], "|" + "---|" * len(header), *bars[1:]]) + "\n"


def _name(row: Row) -> str:
    return f"`{row.solver}`{' ~' if row.stochastic else ''}"


def _order_table(rows) -> str:
    (few, many), (fewer, more) = COUNTS[False], COUNTS[True]
    text = f"""
## Orders, declared against observed

The slope of the logarithm of the error against that of the number of steps: {few} to {many} on a
2-D mixture against SciPy's solution, and for solvers with noise (marked ~) {fewer} to {more} on a
Gaussian, where mean and variance are propagated exactly, without Monte Carlo; their order is the
weak one. `dpmpp_3m legacy` is the formula of several widely used implementations, which lacks a
factor of 2 and is of second order. `sa_solver` switches its noise on and off in t, so that its
slope depends on where the switches fall.

"""
    names = list(dict.fromkeys(r.process for r in rows if r.metric == "order"))
    declared = {r.solver: round(r.value) for r in rows if r.metric == "declared order"}
    observed: dict[str, list[Row]] = {}
    for r in rows:
        if r.metric == "order":
            observed.setdefault(r.solver, []).append(r)
    lines = [
        (_name(found[0]), declared[solver], *(f"{r.value:.2f}" for r in found))
        for solver, found in observed.items()
    ]
    return text + _table(("solver", "declared", *names), lines)


def _agreement_table(rows) -> str:
    text = """
## Agreement

Definitions that coincide, run step for step with the same random numbers on every process: the
largest difference relative to the state. Agreement with diffusers' schedulers is in
`tests/test_solvers_diffusers.py`.

"""
    lines = []
    for r in rows:
        first, second = r.solver.split("` = `")
        lines.append((f"{first}`", f"`{second}", f"{r.value:.0e}" if r.value else "0"))
    return text + _table(("solver", "is the same as", "difference"), lines)


def _digits_table(rows) -> str:
    found = summarise(rows, "digits", "frechet")
    reference, label = _reference(found)
    seeds = 1 + max(r.seed for r in rows)
    stochastic = {r.solver: r.stochastic for r in rows}
    lines, reached = [], []
    for solver, points in found.items():
        if solver.startswith("reference: "):
            continue
        first = first_to_reach(points, reference)
        if first is not None and first.nfe <= 20 and not stochastic[solver]:
            reached.append(f"`{solver}` ({first.nfe})")
        cells = [f"{p.mean:.2f} ({p.nfe})" for p in points]
        mark = " ~" if stochastic[solver] else ""
        lines.append((f"`{solver}`{mark}", first.nfe if first else "–", ", ".join(cells)))
    best = ", ".join(reached) or "none"
    text = f"""
## Digits: from which number of evaluations on the 1,000-step sampler is reached

Process {rows[0].process}, a network of 1 M parameters trained for minutes (`make demo`); Fréchet
distance between the pixels of the samples and of the 1,797 digits, {seeds} seeds. The reference
`{label}` has {reference.mean:.3f} ± {reference.error:.3f} (standard
error). A solver has reached it where its mean is at most two standard errors of the difference
above that, there and at every larger number measured. Deterministic solvers that do so with at
most 20 evaluations: {best}.

"""
    header = ("solver", "reached from", "distance (evaluations)")
    return text + _table(header, lines)


def _mixture_table(rows) -> str:
    text = """
## A mixture with exact scores

Eight narrow Gaussians on a circle, about 20 evaluations: distance to the exact solution of the
probability flow (RMS), and for solvers with noise (~) the sliced Wasserstein distance to the data,
whose value between two sets of data is in the last line. Cosine and rectified flow begin at
σ/α = e¹⁰, far above EDM's 80, which costs Heun's method, whose variable is σ/α, its first steps.

"""
    at_20 = [r for r in rows if 17 <= r.nfe <= 20]
    cells: dict[str, dict[str, str]] = {}
    for r in at_20:
        if r.metric == ("sliced_wasserstein" if r.stochastic else "error"):
            cells.setdefault(_name(r), {})[r.process] = f"{r.value:.3f}"
    floor = {r.process: f"{r.value:.3f}" for r in rows if r.solver == "data"}
    cells["data ~"] = floor
    lines = [(name, *(found.get(p, "–") for p in MIXTURES)) for name, found in cells.items()]
    return text + _table(("solver", *MIXTURES), lines)


_TABLES = {
    "orders": _order_table,
    "agreement": _agreement_table,
    "digits": _digits_table,
    "mixture": _mixture_table,
}
