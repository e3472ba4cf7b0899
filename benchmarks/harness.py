"""What the speed benchmarks share: options, timing in turns, peak memory, FLOPs, the machine, JSON.

A benchmark is a function of its options that returns measurements; `run` adds to them what they
depend on (machine, versions, allocator, and how much of the processor others used meanwhile),
prints the table and writes the JSON file.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import tables

Work = Callable[[], Any]
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "PYTORCH_CUDA_ALLOC_CONF")
DTYPES = ("fp32", "tf32", "bf16")
#: Share of our cores that others may use during a run before its numbers are called doubtful.
QUIET = 0.1


# --- the command line -------------------------------------------------------------------------


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser of the options that every benchmark has."""
    made = argparse.ArgumentParser(
        f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=0, help="of torch on the CPU; 0 = its own choice")
    add("--repeats", type=int, default=5, help="timed turns of each contender; the median counts")
    add("--warmup", type=int, default=1, help="turns before the clock starts")
    add("--output", default="", help="a JSON file for the numbers")
    return made


def listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes several of `known`, with commas between them."""

    def parts(text: str) -> list[str]:
        found = text.split(",")
        unknown = [part for part in found if part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {text!r}")
        return found

    return parts


def numbers(text: str) -> list[int]:
    """The type of an option that takes several whole numbers."""
    return [int(part) for part in text.split(",") if part]


def setting(text: str) -> tuple[str, Any]:
    """The type of `--set section.key=value`."""
    key, _, value = text.partition("=")
    if key.count(".") != 1 or not value:
        raise argparse.ArgumentTypeError("expected section.key=value, as training.compile=True")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def parse(made: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """The options; torch's number of threads is set to theirs."""
    args = made.parse_args(given)
    args.given = list(sys.argv[1:] if given is None else given)
    if args.threads:
        torch.set_num_threads(args.threads)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        made.error(f"--device {args.device}: torch {torch.__version__} finds no GPU here; use cpu")
    return args


def run(name: str, args: argparse.Namespace, measure: Callable[[Any], dict[str, Any]]):
    """The report of a benchmark: measured, printed as a table, and written as JSON."""
    watch = Watch()
    found = measure(args)
    report = {"benchmark": name, "surroundings": surroundings(name, args, watch), **found}
    print(tables.text(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    return report


# --- what the numbers depend on ---------------------------------------------------------------


class Watch:
    """How many cores other processes keep busy from now on, by /proc/stat; None elsewhere."""

    def __init__(self):
        self.load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        self._busy, self._own, self._start = _busy_seconds(), _own_seconds(), time.perf_counter()

    @property
    def others(self) -> float | None:
        """Cores' worth of others' work since the start."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        spent = busy - self._busy - (_own_seconds() - self._own)
        return round(max(0.0, spent) / max(time.perf_counter() - self._start, 1e-3), 3)


def _busy_seconds() -> float | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    fields = [int(v) for v in stat.read_text().splitlines()[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def surroundings(name: str, args: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cuda = torch.device(args.device).type == "cuda"
    around = {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *args.given]),
        "device": torch.cuda.get_device_name(args.device) if cuda else processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "allocator": {key: os.environ.get(key, "default") for key in ALLOCATOR},
        "load_average": watch.load,
        "others_cores": watch.others,
        "date": time.strftime("%Y-%m-%d"),
    }
    options = {key: value for key, value in vars(args).items() if key in OPTIONS}
    return around | {"options": options, "warning": warning(around)}


#: The options that a report repeats, those that say what was measured.
OPTIONS = ("model", "size", "batch", "dtype", "compile", "device", "set")


def warning(around: dict[str, Any]) -> str:
    """Why the numbers should not be trusted; empty where nothing speaks against them."""
    others, load = around["others_cores"], around["load_average"]
    if others is not None:
        return (
            f"other processes used {others:.2f} cores meanwhile"
            if others > QUIET * around["cores"]
            else ""
        )
    busy = load is not None and load > QUIET * around["cores"]
    return f"the load average was {load} before the start" if busy else ""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- time, memory, work -----------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for the device to end what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Work, device: torch.device) -> float:
    """Wall-clock seconds of `work`, until the device has ended it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def in_turn(
    works: dict[str, Work], device: torch.device, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each, `repeats` times: all take turns, so that whatever else the machine does
    meets all of them. What Python collects, it collects between the turns."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + repeats):
            for name, work in works.items():
                took = seconds(work, device)
                if turn >= warmup:
                    spent[name].append(round(took, 6))
            gc.collect()
    finally:
        gc.enable()
    return spent


def peak_bytes(work: Work, held: Sequence[torch.Tensor], device: torch.device) -> int:
    """Bytes at the peak of `work`: what is held before it, and what comes on top."""
    kept = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in held}
    before = sum(kept.values())
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return before + torch.cuda.max_memory_allocated(device) - allocated
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    now = most = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return before + most


def flops(work: Work) -> int:
    """FLOPs of products and convolutions, a multiplication and an addition being two; 0 where
    they cannot be counted."""
    try:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()
    except (NotImplementedError, RuntimeError, TypeError):
        return 0


def measurement(
    works: dict[str, Work],
    images: int,
    args: argparse.Namespace,
    *,
    held: dict[str, Callable[[], Sequence[torch.Tensor]]] | None = None,
    work_flops: dict[str, int] | None = None,
    precisions: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One row for each contender: its seconds in turns and, where given, peak memory of `held` and
    the work on top, FLOPs, and the precision whose peak they are held against."""
    device = torch.device(args.device)
    spent = in_turn(works, device, args.repeats, args.warmup)
    rows: dict[str, Any] = {}
    for name, work in works.items():
        rows[name] = {"seconds": spent[name], "images": images}
        rows[name]["images_per_second"] = images / statistics.median(spent[name])
        if held is not None:
            rows[name]["peak_bytes"] = peak_bytes(work, held[name](), device)
        if work_flops is not None:
            rows[name]["flops"] = work_flops[name]
        if precisions is not None:
            rows[name]["precision"] = precisions[name]
    return rows
