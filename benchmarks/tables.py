"""A benchmark's report as a person reads it: tables in Markdown, on the terminal and in README.md.

A report has `measurements` ({what: {contender: row}}), `tables` ([{title, head, rows}]), or both.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any


def text(report: dict[str, Any]) -> str:
    """The whole report: what it depends on, what was checked, and its tables."""
    around = report["surroundings"]
    lines = [f"# {report['benchmark']}: {around['command']}", *about(around), *checks(report), ""]
    if around["warning"]:
        warn = f"WARNING: {around['warning']}; the machine was not quiet, so do not trust the times"
        lines[1:1] = ["!" * 100, warn, "!" * 100]
    return "\n".join(lines) + "\n\n".join(
        f"{title}\n\n{body}" for title, body in all_tables(report)
    )


def about(around: dict[str, Any]) -> list[str]:
    """The machine, in lines."""
    kept = {k: v for k, v in around["allocator"].items() if v != "default"}
    allocator = "default allocator" if not kept else ", ".join(f"{k}={v}" for k, v in kept.items())
    return [
        f"{around['device']}, {around['cores']} cores, {around['threads']} threads, torch "
        f"{around['torch']}, Python {around['python']}, {around['system']}, {around['date']}",
        f"{allocator}; load average {around['load_average']} before, others used "
        f"{around['others_cores']} cores meanwhile",
    ]


def checks(report: dict[str, Any]) -> list[str]:
    """What was made sure of, in lines: agreement, parameters, FLOPs, peaks."""
    lines = []
    agreed = report.get("agreement", {})
    for name, error in agreed.get("difference", {}).items():
        lines.append(f"outputs and input gradients of {name} are those of {agreed['with']} "
                     f"to {error:.1e}")  # fmt: skip
    for name, note in report.get("notes", {}).items():
        lines.append(f"{name}: {note}")
    counted = report.get("flops_forward", {})
    for name, number in report.get("parameters", {}).items():
        lines.append(f"{name}: {number / 1e6:.2f} M parameters, {counted[name] / 1e9:.2f} GFLOP "
                     "forward per image")  # fmt: skip
    for dtype, peak in report.get("peaks", {}).items():
        if dtype != "copy":
            lines.append(f"peak of {dtype}: matmul {rate(peak['matmul'])}, 3×3 convolutions of "
                         f"these shapes {rate(peak['conv3x3'])}")  # fmt: skip
    return lines


def all_tables(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, Markdown table) of everything measured."""
    made = [
        (title, markdown(*measured(rows, report.get("peaks", {}))))
        for title, rows in report.get("measurements", {}).items()
    ]
    return made + [(t["title"], markdown(t["head"], t["rows"])) for t in report.get("tables", [])]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in the source too."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]

    def line(cells):
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(table[0]), line(["-" * w for w in widths]), *map(line, table[1:])])


def is_ours(name: str) -> bool:
    """Whether a contender of that name is this library's."""
    return name.startswith("ours")


def measured(rows: dict[str, Any], peaks: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one measurement's table: columns that no row has are left out."""
    columns: dict[str, list[str]] = {}
    for name, row in rows.items():
        cells = {"contender": name, **_speed(row), **_ratios(name, row, rows), **_work(row, peaks)}
        for key in [*columns, *cells]:
            known = columns.setdefault(key, [""] * len(rows))
            known[list(rows).index(name)] = cells.get(key, "")
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def _speed(row: dict[str, Any]) -> dict[str, str]:
    cells = {"time": f"{duration(median(row))}{_spread(row)}"}
    if "images" in row:
        cells["images/s"] = f"{row['images'] / median(row):.3g}"
    return cells


def _ratios(name: str, row: dict[str, Any], rows: dict[str, Any]) -> dict[str, str]:
    """Speed, and memory, as multiples of every other library's."""
    cells = {}
    for library in libraries(rows):
        base = rows[peer_of(name, library, rows)]
        cells[f"× {library}"] = f"{speedup(row, base):.2f}"
    if "peak_bytes" in row:
        cells["peak memory"] = f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        first = next(iter(rows.values()))
        if len(rows) > 1:
            cells["peak memory"] += f" ({row['peak_bytes'] / first['peak_bytes']:.2f} ×)"
    return cells


def libraries(rows: dict[str, Any]) -> list[str]:
    """The other libraries among the contenders."""
    return list(dict.fromkeys(library_of(name) for name in rows if not is_ours(name)))


def library_of(name: str) -> str:
    """The library of a contender, whose name may go on: 'edm bf16', 'edm, its Heun'."""
    return re.split("[ ,]", name)[0]


def peer_of(name: str, library: str, rows: dict[str, Any]) -> str:
    """The row of a library that a contender is held against: low precision against low where
    the library has both."""
    low = rows[name].get("precision") in LOW
    same = [
        other
        for other, row in rows.items()
        if library_of(other) == library and (row.get("precision") in LOW) == low
    ]
    return same[0] if same else next(other for other in rows if library_of(other) == library)


#: Half the bits: what such a row is held against, where there is one.
LOW = ("bf16", "fp16")


def _work(row: dict[str, Any], peaks: dict[str, Any]) -> dict[str, str]:
    """FLOPs, fractions of the hardware's peaks, and what else a row says."""
    cells = {}
    if row.get("flops"):
        cells["GFLOP"] = f"{row['flops'] / 1e9:,.3g}"
        peak = peaks.get(row.get("precision", "fp32"), {})
        for kind, title in (("matmul", "of matmul peak"), ("conv3x3", "of 3×3 peak")):
            if peak.get(kind):
                cells[title] = f"{fraction(row, peak[kind]):.0%}"
    return cells | {key: str(value) for key, value in row.get("shown", {}).items()}


def median(row: dict[str, Any]) -> float:
    """The median of a row's seconds."""
    return statistics.median(row["seconds"])


def speedup(row: dict[str, Any], base: dict[str, Any]) -> float:
    """How many times as fast a row is as another: by images per second where both know them."""
    if "images" in row and "images" in base:
        return (row["images"] / median(row)) / (base["images"] / median(base))
    return median(base) / median(row)


def fraction(row: dict[str, Any], peak: float) -> float:
    """The share of a peak in FLOP/s that a row's work reached."""
    return row["flops"] / median(row) / peak


def _spread(row: dict[str, Any]) -> str:
    if len(row["seconds"]) < 2:
        return ""
    low, _, high = statistics.quantiles(row["seconds"], n=4, method="inclusive")
    return f" ± {(high - low) / 2 / median(row):.0%}"


def duration(seconds: float) -> str:
    """Three digits of a time, in the unit that suits it."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e6:.3g} µs"


def rate(flops: float) -> str:
    """FLOP/s in the unit that suits it."""
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"
