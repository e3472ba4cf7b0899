"""What a network costs against image size, batch and number of processes, as tables and a plot.

    python -m benchmarks.scaling --plot assets/scaling.png

The laws that time is held against: convolutions cost pixels¹; attention over all pixels of a map
pixels², so that a network has the law of its FLOPs; a batch costs images¹, and n processes with
n times the threads 1/n of the time. The networks are small (nf 32) but for one, the published.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders, harness, tables, train
from benchmarks.contenders import Ours, configure, images
from models.estimate import estimate

#: By name: what it changes in the published configuration at an image size, and the largest image
#: that it is trained on here.
NETWORKS: dict[str, Any] = {
    "small, convolutions only": (lambda n: {"model.nf": 32, "model.attn_resolutions": ()}, 256),
    "small, attention at half the size": (
        lambda n: {"model.nf": 32, "model.attn_resolutions": (n // 2,)},
        128,
    ),
    "full, attention at 16": (lambda n: {}, 64),
}


def cost(args: argparse.Namespace, changes: dict[str, Any], training: bool) -> dict[str, Any]:
    """Seconds of a forward pass and of a training step, peak memory of both, and FLOPs."""
    changed = copy.copy(args)
    changed.set = [*changes.items(), *args.set]
    config = configure(changed, args.dtype[0])
    device, x = config.device, images(config)
    torch.manual_seed(0)
    own, labels = Ours(config), contenders.labels_for(x)
    works: dict[str, Any] = {"forward": lambda: own.forward(x, labels)}
    if training:
        works["training"] = lambda: own.step(x)
    row: dict[str, Any] = {"flops_forward": estimate(config).flops_forward * len(x)}
    for kind, work in works.items():
        spent = harness.in_turn({kind: work}, device, args.repeats, args.warmup)[kind]
        held = own.weights_held() if kind == "forward" else own.held()
        row[kind] = {"seconds": spent, "peak_bytes": harness.peak_bytes(work, held, device)}
    return row


def against_size(args: argparse.Namespace) -> dict[str, Any]:
    """Every network at every image size, one image at a time."""
    found: dict[str, Any] = {}
    for name, (changes, largest) in NETWORKS.items():
        if name.startswith("full") and args.size != "full":
            continue
        found[name] = {}
        for n in args.sizes:
            given = {"data.image_size": n, "training.batch_size": 1, **changes(n)}
            if args.size == "tiny":
                given |= {"model.nf": 8, "model.num_res_blocks": 1}
            found[name][str(n)] = cost(args, given, n <= largest)
    return found


def against_batch(args: argparse.Namespace) -> dict[str, Any]:
    """The small network on more and more images of 32 pixels."""
    small: dict[str, Any] = {"model.nf": 32}
    if args.size == "tiny":
        small = {"model.nf": 8, "model.num_res_blocks": 1, "data.image_size": 16}
    return {str(n): cost(args, {**small, "training.batch_size": n}, True) for n in args.batches}


def against_processes(args: argparse.Namespace) -> dict[str, Any]:
    """A training step of the small network on one thread, and on all of them as threads of one
    process and as processes; the batch is the same."""
    size = "tiny" if args.size == "tiny" else "small"
    given = [f"--size={size}", f"--model={args.model}", f"--repeats={args.repeats}"]
    given += [f"--device={args.device}", f"--dtype={args.dtype[0]}", f"--warmup={args.warmup}"]
    counts = ",".join(map(str, args.processes))
    one, several = (train.parse([*given, f"--processes={c}"]) for c in ("1", counts))
    return train.on_processes(one, 1) | train.on_processes(several, torch.get_num_threads())


# --- tables -----------------------------------------------------------------------------------


def exponent(rows: dict[str, Any], at: str, key: str, value, power: int) -> str:
    """The exponent p of `value` ∝ key^(power·p) between the row before `at` and this one."""
    names = list(rows)
    before = names[names.index(at) - 1] if names.index(at) else ""
    if not before or value(rows[before]) is None or value(rows[at]) is None:
        return ""
    ratio = math.log(value(rows[at]) / value(rows[before]))
    return f"{ratio / (power * math.log(int(at) / int(before))):.2f}"


def of(kind: str, what: str):
    """The median seconds or the peak bytes of a kind of work, None where it was not done."""

    def value(row):
        if kind not in row:
            return None
        return tables.median(row[kind]) if what == "seconds" else row[kind]["peak_bytes"]

    return value


COLUMNS = {
    "forward": of("forward", "seconds"),
    "a training step": of("training", "seconds"),
    "its peak memory": of("training", "bytes"),
}


def growth(title: str, rows: dict[str, Any], key: str, power: int) -> dict[str, Any]:
    """Costs with their exponents, beside that of the FLOPs."""
    body = []
    for n, row in rows.items():
        work = exponent(rows, n, key, lambda r: r["flops_forward"], power)
        cells = [n, f"{row['flops_forward'] / 1e9:.3g}", work]
        for name, value in COLUMNS.items():
            shown = value(row)
            show = f"{(shown or 0) / 2**20:,.0f} MiB" if "memory" in name else ""
            show = show or tables.duration(shown or 1)
            cells += [show if shown else "", exponent(rows, n, key, value, power)]
        body.append(cells)
    head = [key, "GFLOP", "exponent"]
    for name in COLUMNS:
        head += [name, "exponent"]
    return {"title": title, "head": head, "rows": body}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All three, and the plot."""
    size, batch = against_size(args), against_batch(args)
    report: dict[str, Any] = {"size": size, "batch": batch, "processes": {}}
    made = [
        growth(f"{name}, one image; exponents are of the pixels", rows, "image size", 2)
        for name, rows in size.items()
    ]
    made.append(growth("small, 32 pixels; exponents are of the batch", batch, "batch", 1))
    if args.processes:
        report["processes"] = against_processes(args)
        shown = train.processes_table(report["processes"])
        title = "a training step of the small network, the same batch"
        made.append({**shown, "title": title})
    report["tables"] = made
    if args.plot:
        plot(report, Path(args.plot))
    return report


# --- the plot ---------------------------------------------------------------------------------


def plot(report: dict[str, Any], path: Path) -> None:
    """Costs as dots, and dashed the law, from the cheapest of the points by the law on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for i, (name, rows) in enumerate(report["size"].items()):
        for axis, value in zip(axes[0], COLUMNS.values(), strict=True):
            _line(axis, rows, value, f"C{i}", name)
    for axis, name in zip(axes[0], COLUMNS, strict=True):
        axis.set(title=f"{name}, one image", xlabel="image size", ylabel=UNITS[name])
        _log(axis, sorted({int(n) for rows in report["size"].values() for n in rows}))
        axis.legend(fontsize=8)
    _batches(axes[1], report["batch"])
    if report["processes"]:
        _processes(axes[1, 2], report["processes"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


UNITS = {"forward": "seconds", "a training step": "seconds", "its peak memory": "bytes"}


def _line(axis, rows: dict[str, Any], value, color: str, name: str) -> None:
    """One curve and its law: that of FLOPs for times, of pixels for memory."""
    known = [(int(n), value(r), r["flops_forward"]) for n, r in rows.items() if value(r)]
    sizes, found, flops = zip(*known, strict=True)
    work = [n * n for n in sizes] if value is COLUMNS["its peak memory"] else flops
    least = min(cost / done for cost, done in zip(found, work, strict=True))
    axis.plot(sizes, found, "o-", color=color, label=name)
    axis.plot(sizes, [least * done for done in work], "--", color=color, linewidth=1)


def _batches(axes, rows: dict[str, Any]) -> None:
    counts = [int(n) for n in rows]
    for name, value in COLUMNS.items():
        axis, color = axes[1 if "memory" in name else 0], f"C{list(COLUMNS).index(name)}"
        each = [(value(row) or 0) / n for n, row in zip(counts, rows.values(), strict=True)]
        axis.plot(counts, each, "o-", color=color, label=name)
        axis.axhline(each[-1], linestyle="--", color=color, linewidth=1)
    for axis, unit in zip(axes, ("seconds per image", "bytes per image"), strict=False):
        axis.set(title="small network, 32 pixels", xlabel="batch", ylabel=unit)
        _log(axis, counts)
        axis.set(yscale="linear", ylim=(0, None))
        axis.legend(fontsize=8)


def _processes(axis, rows: dict[str, Any]) -> None:
    """Images per second as bars; dashed, those of one thread times the threads in all."""
    speeds = [row["images"] / tables.median(row) for row in rows.values()]
    axis.bar(range(len(rows)), speeds, color="C2")
    axis.set_xticks(range(len(rows)), list(rows), fontsize=8)
    for i, row in enumerate(rows.values()):
        law = row["threads"] * speeds[0]
        axis.plot([i - 0.4, i + 0.4], [law, law], "k--", linewidth=1)
    axis.set(title="small network, training: the same batch", ylabel="images per second")
    axis.set_xlabel("processes × threads")


def _log(axis, ticks: list[int]) -> None:
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


# --- the command line -------------------------------------------------------------------------


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser("scaling", __doc__)
    contenders.add_network_options(parser)
    add = parser.add_argument
    add("--sizes", type=harness.numbers, default=[32, 64, 128, 256], help="image sizes")
    add("--batches", type=harness.numbers, default=[1, 2, 4, 8, 16, 32, 64])
    add("--processes", type=harness.numbers, default=[1, 2], help="gloo or nccl processes")
    add("--plot", default="", help="where to write the plot, as assets/scaling.png")
    parser.set_defaults(repeats=3)
    return harness.parse(parser, given)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its tables, write its JSON and plot, and return the report."""
    return harness.run("scaling", parse(given), measure)


if __name__ == "__main__":
    main()
