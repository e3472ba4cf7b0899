"""Whole training steps, ours and others': images per second and peak memory, in one run.

    python -m benchmarks.train --peer score_sde_pytorch=/path --peer edm=/path --model ncsnpp
    python -m benchmarks.train --processes 1,2

A step is loss, backward pass, clipping, Adam and EMA. With `--checkpointing` ours has a turn that
recomputes its activations, too. `--processes` is strong scaling: the same batch on more processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import distributed
from benchmarks import contenders, harness, tables
from benchmarks.contenders import Ours, configure, images


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of all contenders in turn, and each one's peak memory; then, where asked for, ours on
    several processes."""
    report: dict[str, Any] = {}
    if not args.only_processes:
        report = compare(args)
    if args.processes:
        report["processes"] = on_processes(args, torch.get_num_threads())
        report.setdefault("tables", []).append(processes_table(report["processes"]))
    return report


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of all contenders in turn."""
    known = contenders.line_up(args)
    batch = images(configure(args, "fp32"))
    report = contenders.facts(known, batch, args)
    flops = contenders.work_flops(known, report["flops_forward"], 3 * len(batch))
    for dtype in args.dtype if args.checkpointing else ():
        plain = f"ours {dtype}"
        again = known[f"{plain}, checkpointing"] = recomputing(args, dtype)
        again.network.load_state_dict(known[plain].network.state_dict())
        flops[f"{plain}, checkpointing"] = flops[plain]
    report["measurements"] = {
        "training step": harness.measurement(
            {name: lambda c=c: c.step(batch) for name, c in known.items()},
            len(batch),
            args,
            held={name: c.held for name, c in known.items()},
            work_flops=flops,
            precisions={name: c.precision for name, c in known.items()},
        )
    }
    return report


def recomputing(args: argparse.Namespace, dtype: str) -> Ours:
    """Ours with activation checkpointing."""
    changed = copy.copy(args)
    changed.set = [*args.set, ("training.activation_checkpointing", True)]
    return Ours(configure(changed, dtype))


# --- several processes ------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """One process of a scaling run; the main one writes the seconds of its steps."""
    config = configure(args, args.dtype[0])
    config.device = distributed.local_device(config.device)
    with distributed.process_group(config.device.type):
        batch = images(config, distributed.share(config.training.batch_size))
        torch.manual_seed(0)
        contender = Ours(config)

        def step():
            contender.step(batch)
            harness.synchronize(config.device)
            distributed.barrier()

        distributed.barrier()
        spent = harness.in_turn({"step": step}, config.device, args.repeats, args.warmup)
        if distributed.is_main():
            Path(args.worker).write_text(json.dumps(spent["step"]))


def on_processes(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Seconds of a step of the same global batch on each number of fresh processes, which share
    so many threads or own a GPU each."""
    result = {}
    batch = configure(args, args.dtype[0]).training.batch_size
    for count in args.processes:
        each = max(1, threads // count)
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "seconds.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={count}", "-m", "benchmarks.train"]
            command += [*args.given, "--threads=0", f"--worker={found}"]
            own = {"OMP_NUM_THREADS": str(each)}
            subprocess.run(command, env=os.environ | own, check=True)
            seconds = json.loads(found.read_text())
        result[f"{count} × {each} thread{'s' * (each > 1)}"] = {
            "seconds": seconds,
            "images": batch,
            "threads": count * each,
        }
    return result


def processes_table(rows: dict[str, Any]) -> dict[str, Any]:
    """Speed against the number of processes, and as a multiple of the first line's."""
    base = next(iter(rows.values()))
    body = []
    for count, row in rows.items():
        speed = row["images"] / statistics.median(row["seconds"])
        cells = [count, tables.duration(tables.median(row)), f"{speed:.3g}"]
        body.append([*cells, f"{tables.speedup(row, base):.2f}"])
    head = ["processes", "a step", "images/s", "× the first"]
    return {"title": "the same batch on several processes", "head": head, "rows": body}


# --- the command line -------------------------------------------------------------------------


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser("train", __doc__)
    contenders.add_options(parser)
    add = parser.add_argument
    add("--checkpointing", action="store_true", help="ours with activation checkpointing, too")
    add("--processes", type=harness.numbers, default=[], help="1,2: strong scaling of ours")
    add("--only-processes", action="store_true", help="nothing but --processes")
    add("--worker", default="", help=argparse.SUPPRESS)
    return harness.parse(parser, given)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its table, write its JSON, and return the report."""
    args = parse(given)
    if args.worker:
        work(args)
        return {}
    return harness.run("train", args, measure)


if __name__ == "__main__":
    main()
