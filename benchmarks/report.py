"""The tables of benchmarks/README.md, from the JSON files in benchmarks/results/.

    python -m benchmarks.report                              # only write the tables
    python -m benchmarks.report --run all --peer score_sde_pytorch=PATH --peer edm=PATH
    python -m benchmarks.report --run train,sample_ncsnpp_full --peer …

`--run` makes the runs of those names, or whose names begin so, first; `--list` says which there
are. No number in the README is typed: what stands between its markers comes from the files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import contenders, import_time, tables

FOLDER = Path(__file__).resolve().parent
RESULTS, README = FOLDER / "results", FOLDER / "README.md"
#: Freed memory is kept by the process: half of what some code costs is asking for it again.
KEPT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
FAMILIES = {"ncsnpp": "NCSN++", "ddpmpp": "DDPM++"}


def _runs() -> dict[str, tuple[str, list[str], dict[str, str]]]:
    """By name: module, options and environment of every run that the README shows."""
    runs: dict[str, tuple[str, list[str], dict[str, str]]] = {}
    for family in FAMILIES:
        model = f"--model={family}"
        for module in ("model", "train", "sample", "likelihood"):
            own = ["--images=0"] if module == "likelihood" else []
            low = [*own, model, "--dtype=fp32,bf16"]
            more = ["--checkpointing"] if module == "train" else []
            runs[f"{module}_{family}_full"] = module, [*low, *more], {}
            runs[f"{module}_{family}_full_kept"] = module, [*own, model], KEPT
            runs[f"{module}_{family}_small"] = module, [*own, model, "--size=small"], {}
        large = ["--batch=32", "--checkpointing", "--repeats=1", "--no-peaks"]
        runs[f"train_{family}_memory"] = "train", [model, *large], {}
        few = ["--images=16"] if family == "ncsnpp" else []  # theirs takes seconds an evaluation
        bits = [*few, "--size=small", "--rtol=1e-5", "--method=dopri5", "--repeats=1"]
        runs[f"likelihood_{family}_bits"] = "likelihood", [model, *bits], {}
    runs["import_time"] = "import_time", [], {}
    runs["scaling"] = "scaling", ["--plot=assets/scaling.png"], {}
    runs["data"] = "data", ["--workers=0,1,2", "--seconds=1"], {}
    return runs


RUNS = _runs()
#: Those that take no other library.
ALONE = ("scaling",)

# --- the numbers to reach ---------------------------------------------------------------------

WORK = {
    "forward": ("model", "forward"),
    "training step": ("train", "training step"),
    "PC step": ("sample", "a step of the published sampler"),
    "likelihood evaluation": ("likelihood", "an evaluation: drift and divergence"),
}
#: Times as fast as another library: (title, kind of run, contender, library, by family the numbers
#: of WORK in its order, as far as there are any).
RATIOS: list[tuple[str, str, str, str, dict[str, tuple[float, ...]]]] = [
    ("full, fp32", "full", "ours fp32", "score_sde_pytorch",
     {"ncsnpp": (1.6, 2.0, 1.5, 2.9), "ddpmpp": (1.16, 1.19, 1.16, 1.9)}),
    ("full, bf16", "full", "ours bf16", "score_sde_pytorch",
     {"ncsnpp": (2.6, 2.6, 2.5, 4.3), "ddpmpp": (2.0, 1.6, 1.9, 3.0)}),
    ("full, fp32, memory kept", "full_kept", "ours fp32", "score_sde_pytorch",
     {"ncsnpp": (1.2, 1.3, 1.25, 2.0), "ddpmpp": (1.15, 1.12, 1.17, 1.75)}),
    ("small, fp32", "small", "ours fp32", "score_sde_pytorch",
     {"ncsnpp": (3.2, 4.3, 0, 6.5), "ddpmpp": (1.4, 1.4, 0, 2.0)}),
    ("full, fp32", "full", "ours fp32", "edm", dict.fromkeys(FAMILIES, (1.08, 1.08))),
    ("full, fp32, memory kept", "full_kept", "ours fp32", "edm",
     dict.fromkeys(FAMILIES, (1.05, 1.05))),
    ("small, fp32", "small", "ours fp32", "edm", dict.fromkeys(FAMILIES, (1.2, 1.2))),
]  # fmt: skip
#: Shares of the measured peak of 3×3 convolutions: forward, training step.
SHARES = {"fp32": (0.87, 0.80), "bf16": (0.75, 0.60)}
#: A number counts as reached from this share of it on, being the median of a few runs.
ENOUGH = 0.95

Reports = dict[str, dict[str, Any]]


def load(folder: Path = RESULTS) -> Reports:
    """Every report there is, by the name of its run."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def rows_of(reports: Reports, run: str, title: str) -> dict[str, Any]:
    """The rows of a measurement; none where it was not made."""
    return reports.get(run, {}).get("measurements", {}).get(title, {})


def reached(value: float | None, goal: float, most: bool = False) -> str:
    """A number beside what it should be; ✓ where it is. `most`: it should be at most that."""
    if value is None:
        return "–"
    sign, near = ("≤", value * ENOUGH <= goal) if most else ("≥", value >= ENOUGH * goal)
    return f"{value:.2f}" + (f" ({sign} {goal:g}{' ✓' if near else ''})" if goal else "")


def ratio(reports: Reports, run: str, title: str, name: str, library: str) -> float | None:
    """How many times as fast a contender is as a library in a run."""
    rows = rows_of(reports, run, title)
    if name not in rows or library not in rows:
        return None
    return tables.speedup(rows[name], rows[library])


def ratios_table(reports: Reports) -> str:
    """Times as fast as others, beside the numbers to reach."""
    body = []
    for title, kind, name, library, goals in RATIOS:
        for family, numbers in goals.items():
            cells = []
            for (module, work), goal in zip(WORK.values(), [*numbers, 0, 0, 0], strict=False):
                found = ratio(reports, f"{module}_{family}_{kind}", work, name, library)
                cells.append(reached(found, goal))
            body.append([f"× {library}: {FAMILIES[family]} {title}", *cells])
    return tables.markdown(["how many times as fast", *WORK], body)


def memory_ratio(
    reports: Reports, family: str, name: str, library: str, kind: str = "full"
) -> float | None:
    """Peak memory of a contender's training step as a multiple of a library's."""
    rows = rows_of(reports, f"train_{family}_{kind}", "training step")
    if name not in rows or library not in rows:
        return None
    return rows[name]["peak_bytes"] / rows[library]["peak_bytes"]


def share(reports: Reports, family: str, dtype: str, work: str) -> float | None:
    """The share of the convolution peak that our work reached."""
    module, title = WORK[work]
    run = f"{module}_{family}_full"
    row = rows_of(reports, run, title).get(f"ours {dtype}")
    peak = reports.get(run, {}).get("peaks", {}).get(dtype, {}).get("conv3x3")
    return tables.fraction(row, peak) if row and peak else None


def others_table(reports: Reports) -> str:
    """The other numbers, of each family, and those of starting."""
    rival, again = "score_sde_pytorch", "ours fp32, checkpointing"
    lines: list[tuple[str, Callable[[str], float | None], tuple[float, float], bool]] = [
        (
            f"share of the 3×3 convolutions' peak, full, {dtype}: {work}",
            lambda f, d=dtype, w=work: share(reports, f, d, w),
            (goal, goal),
            False,
        )
        for dtype, goals in SHARES.items()
        for work, goal in zip(("forward", "training step"), goals, strict=True)
    ]
    lines += [
        (
            "bits/dim end to end, small, as fast as score_sde_pytorch ×",
            lambda f: ratio(reports, f"likelihood_{f}_bits", BITS, "ours dopri5", rival),
            (3.0, 2.0),
            False,
        ),
        (
            "peak memory of a training step, × score_sde_pytorch",
            lambda f: memory_ratio(reports, f, "ours fp32", rival),
            (1.0, 1.0),
            True,
        ),
        (
            "the same, × edm",
            lambda f: memory_ratio(reports, f, "ours fp32", "edm"),
            (1.0, 1.0),
            True,
        ),
        (
            "the same with activation checkpointing, × score_sde_pytorch",
            lambda f: memory_ratio(reports, f, again, rival),
            (0.0, 0.0),
            True,
        ),
        (
            "the same with activation checkpointing, batch 32, × score_sde_pytorch",
            lambda f: memory_ratio(reports, f, again, rival, "memory"),
            (0.5, 0.5),
            True,
        ),
        (
            "the sampler outside the network, % of a published step, full",
            lambda f: overhead(reports, f),
            (2.0, 2.0),
            True,
        ),
    ]
    body = [
        [title, *(reached(value(f), g, most) for f, g in zip(FAMILIES, goals, strict=True))]
        for title, value, goals, most in lines
    ]
    started = reports.get("import_time", {}).get("rows", {})
    for name, (above, goal) in import_time.GOALS.items():
        row = started.get(name)
        value = row and (row["above_torch"] if above else tables.median(row))
        title = f"{name}: seconds{' above import torch' if above else ''}"
        body.append([title, reached(value, goal, True), ""])
    return tables.markdown(["number (to reach)", *FAMILIES.values()], body)


BITS = "bits/dim, end to end"


def overhead(reports: Reports, family: str) -> float | None:
    """What of a published step at full size is the sampler's own, in percent."""
    found = reports.get(f"sample_{family}_full", {}).get("overhead", {})
    known = found.get("ours fp32, a published step")
    return 100 * known["fraction"] if known else None


def summary(reports: Reports) -> str:
    """Both tables of numbers to reach."""
    return f"{ratios_table(reports)}\n\n{others_table(reports)}"


# --- the README -------------------------------------------------------------------------------

#: What stands between markers: the numbers to reach, and each benchmark's tables.
PARTS = ("summary", "model", "train", "sample", "likelihood", "data", "import_time", "scaling")


def section(reports: Reports, benchmark: str) -> str:
    """Every table of a benchmark, each with its command, machine and checks."""
    parts = []
    for report in reports.values():
        if report["benchmark"] == benchmark:
            around = report["surroundings"]
            lines = [*tables.about(around), *tables.checks(report)]
            if around["warning"]:
                lines.insert(0, f"**Not a quiet machine: {around['warning']}.**")
            parts.append(f"`{plain_command(around['command'])}`\n")
            parts.append("\n".join(f"- {line}" for line in lines) + "\n")
            for title, body in tables.all_tables(report):
                parts.append(f"{title[0].upper() + title[1:]}:\n\n{body}\n")
    return "\n".join(parts).rstrip() or "Not measured yet."


def plain_command(command: str) -> str:
    """A command as one would type it: without where the numbers went, with peers in /tmp."""
    kept = []
    for part in command.split():
        name = part.partition("=")[0]
        if name == "--peer":
            library = part.split("=")[1]
            part = f"--peer={library}=/tmp/{library}"
        if name != "--output":
            kept.append(part)
    return " ".join(kept)


def publish(reports: Reports, path: Path = README) -> None:
    """Put every part between its markers, `<!-- begin: train -->` and `<!-- end: train -->`.

    Raises: ValueError where a marker has no end.
    """
    text = path.read_text()
    for name in PARTS:
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if begin in text:
            if end not in text:
                raise ValueError(f"{path} has {begin!r} without {end!r}; add it after the table")
            body = summary(reports) if name == "summary" else section(reports, name)
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n\n{body}\n\n{end}{rest.split(end, 1)[1]}"
    path.write_text(text)


def run(names: Sequence[str], peers: Sequence[tuple[str, str]], folder: Path = RESULTS) -> None:
    """Make the runs, each a process of its own, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        module, options, environment = RUNS[name]
        command = [sys.executable, "-m", f"benchmarks.{module}", *options]
        if module not in ALONE:
            command += [f"--peer={peer}={path}" for peer, path in peers]
        command.append(f"--output={os.path.relpath(folder / name, FOLDER.parent)}.json")
        print(f"\n{name}", flush=True)
        subprocess.run(command, cwd=FOLDER.parent, env=os.environ | environment, check=True)


def chosen(text: str) -> list[str]:
    """The type of `--run`: names, or their beginnings, with commas; all."""
    starts = text.split(",")
    found = [n for n in RUNS if "all" in starts or n.startswith(tuple(starts))]
    unknown = [s for s in starts if s != "all" and not any(n.startswith(s) for n in RUNS)]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(RUNS)}, got {unknown}")
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Make the runs that are asked for, and write the README's tables."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=chosen, default=[], help="names, or how they begin; all")
    parser.add_argument("--peer", type=contenders.peer, action="append", default=[])
    parser.add_argument("--list", action="store_true", help="only say which runs there are")
    args = parser.parse_args(given)
    if args.list:
        print("\n".join(f"{n}: benchmarks.{m} {' '.join(o)}" for n, (m, o, _) in RUNS.items()))
        return
    run(args.run, args.peer)
    publish(load())


if __name__ == "__main__":
    main()
