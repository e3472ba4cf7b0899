"""Process × solver × evaluations: orders, exactness on mixtures, quality on a trained network.

    python -m benchmarks.solvers --workdir runs/demo      # minutes on 2 cores
    python -m benchmarks.solvers --quick                  # seconds, no network

Leaves solvers.csv, solvers.png and solvers.md in --output; --publish also writes docs/solvers.md
and assets/solvers.png. --redraw makes them from the CSV of an earlier run.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import solver_report as report
from benchmarks.solver_beds import members, processes
from benchmarks.solver_orders import declared_order, observed_order
from benchmarks.solver_quality import (
    ADAPTIVE,
    MIXTURES,
    Digits,
    Row,
    chosen,
    digit_rows,
    mixture_rows,
)

ROOT = Path(__file__).resolve().parent.parent
NFES = (5, 8, 10, 13, 16, 20, 30, 50, 100)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs/demo", help="of the digits")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/solvers")
    parser.add_argument("--samples", type=int, default=200, help="digits a seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--points", type=int, default=2000, help="of the mixtures")
    parser.add_argument("--reference-steps", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="seconds: no digits, few points")
    parser.add_argument("--redraw", action="store_true", help="from the CSV in --output")
    parser.add_argument("--publish", action="store_true", help="write docs/ and assets/ as well")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.samples < 2 or args.seeds < 2 or args.points < 2:
        raise ValueError("expected --samples, --seeds and --points of at least 2")
    args.output.mkdir(parents=True, exist_ok=True)
    table = args.output / "solvers.csv"
    if args.redraw:
        rows = _read(table)
    else:
        rows = _run(args)
        with open(table, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(rows)
    report.plot(rows, args.output / "solvers.png")
    (args.output / "solvers.md").write_text(report.page(rows, "solvers.png"))
    print(f"{args.output / 'solvers.md'}, solvers.png and solvers.csv ({len(rows)} rows)")
    if args.publish:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs/solvers.md").write_text(report.page(rows, "../assets/solvers.png"))
        shutil.copy(args.output / "solvers.png", ROOT / "assets/solvers.png")


def _run(args) -> list[Row]:
    start = time.monotonic()
    nfes, names = (NFES, list(processes())) if not args.quick else ((5, 20), ["VE", "VP"])
    points = 200 if args.quick else args.points
    # The network before the long work.
    digits = None if args.quick else Digits(args.workdir, args.samples, args.seeds)
    with _bar(_tasks(nfes, len(names), args.quick)) as tell:
        rows = list(_order_rows(names, tell))
        for a, b in report.SAME:
            rows.append(_row("agreement", f"`{a.label}` = `{b.label}`", report.agreement(a, b)))
        rows += mixture_rows(nfes, points, tell)
        if digits is not None:
            rows += digit_rows(digits, nfes, args.reference_steps, tell)
    about = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{(time.monotonic() - start) / 60:.0f} minutes; mixtures of {points} points."
    )
    if digits is not None:
        about += f" Digits: {args.seeds} × {args.samples} samples, step {digits.step}."
    return [_row("about", about, 0.0), *rows]


def _row(bed: str, label: str, value: float, metric: str = "difference") -> Row:
    return Row(bed, "", label, False, "", 0, 0, metric, value)


def _order_rows(names, tell: Callable):
    for member in members():
        noise = member.probe(processes()["VP"]).stochastic
        declared = declared_order(member, processes()["VP"])
        yield Row("orders", "", member.label, noise, "", 0, 0, "declared order", declared)
        for name in names:
            tell(f"order of {member.label}, {name}")
            order = observed_order(member, processes()[name])
            yield Row("orders", name, member.label, noise, "", 0, 0, "order", order)


def _read(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        return [
            Row(
                r["bed"],
                r["process"],
                r["solver"],
                r["stochastic"] == "True",
                r["schedule"],
                int(r["nfe"]),
                int(r["seed"]),
                r["metric"],
                float(r["value"]),
            )
            for r in csv.DictReader(file)
        ]


def _tasks(nfes, names: int, quick: bool) -> int:
    """How often the parts tell what they do."""
    count = len(members()) * names + len(MIXTURES) * len(chosen()) * len(nfes)
    if not quick:
        adaptive = sum(len(tolerances) for _, tolerances, _ in ADAPTIVE.values())
        count += 1 + len(chosen()) * len(nfes) + adaptive
    return count


class _bar:
    """A progress bar whose tell(what) is called before each part."""

    def __init__(self, total: int):
        from tqdm import tqdm

        wait = 0.2 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=total, unit="run", dynamic_ncols=True, mininterval=wait)

    def __enter__(self) -> Callable:
        return self

    def __call__(self, what: str) -> None:
        self.bar.set_postfix_str(what, refresh=False)
        self.bar.update()

    def __exit__(self, *_) -> None:
        self.bar.close()


if __name__ == "__main__":
    main()
