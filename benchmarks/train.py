"""Images per second and peak memory of whole training steps, ours and others', in one run.

    python -m benchmarks.train --peer score_sde_pytorch=/path/to/checkout --model ncsnpp

A step is loss, backward pass, clipping, Adam and EMA. The contenders take turns, step by step, so
that whatever else the machine does meets all of them; the numbers are medians.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the memory profiler talks of GPUs it does not find

import torch

import checkpoints_import
import distributed
import losses
import models.ema
import sde_lib
from benchmarks.peers import PEERS
from configs.validation import complete
from models.estimate import estimate
from models.utils import create_model, prepare_for_training, unwrap

CONFIGS = {
    "ncsnpp": "configs.ve.cifar10_ncsnpp_continuous",
    "ddpmpp": "configs.vp.cifar10_ddpmpp_continuous",
}
#: What a size changes in the published configuration, and the images per step.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({}, 8),
    "small": ({"model.nf": 32}, 32),
    "tiny": ({"model.nf": 8, "model.num_res_blocks": 1, "data.image_size": 16}, 2),
}
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "PYTORCH_CUDA_ALLOC_CONF")


class Ours:
    """This library's training of a configuration."""

    notes = ""

    def __init__(self, config):
        self.network = prepare_for_training(create_model(config), config)
        self.model = distributed.parallel(self.network)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": losses.get_optimizer(config, self.model.parameters()),
            "ema": models.ema.from_config(config, self.model.parameters()),
            "step": 0,
        }
        self.step_fn = losses.step_fn_from_config(config, sde_lib.get_sde(config), True)

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        """One training step; its loss."""
        return self.step_fn(self.state, batch)

    def load_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over a peer's weights."""
        saved = {"model": weights, "step": 0}
        found = checkpoints_import.for_network("the peer", saved, self.network)
        self.network.load_state_dict(found["model"])


def configure(args, dtype: str):
    """The published configuration, resized, whose zero-initialised layers have unit scale."""
    config = importlib.import_module(CONFIGS[args.model]).get_config()
    sizes, batch = SIZES[args.size]
    changes = {
        "model.init_scale": 1.0,
        "training.batch_size": args.batch or batch,
        "training.precision": dtype,
        **sizes,
        **dict(args.set),
    }
    config.device = torch.device(args.device)
    with config.unlocked():
        for key, value in changes.items():
            section, name = key.split(".")
            config[section][name] = value
    return complete(config)


def images(config, share: range) -> torch.Tensor:
    """This process's part of a batch of noise, in the range that the configuration says."""
    g = torch.Generator().manual_seed(0)
    size, data = config.data.image_size, config.data
    x = torch.rand(config.training.batch_size, data.num_channels, size, size, generator=g)
    x = x[share.start : share.stop].to(config.device)
    return 2 * x - 1 if data.centered else x


# --- measuring ------------------------------------------------------------------------------


def disagreement(ours: Ours, peer, config) -> float:
    """The largest difference of outputs and of input gradients, relative to the largest value."""
    x = images(config, range(config.training.batch_size)).requires_grad_()
    labels = torch.linspace(0.5, 40.0, len(x), device=x.device)
    found = []
    for model in (ours.network, peer.model):
        y = model.eval()(x, labels)
        (slope,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y.detach(), slope))
    pairs = zip(*found, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(contender, batch: torch.Tensor) -> float:
    """Seconds of one step."""
    synchronize(batch.device)
    distributed.barrier()
    start = time.perf_counter()
    contender.step(batch)
    synchronize(batch.device)
    distributed.barrier()
    return time.perf_counter() - start


def peak_bytes(contender, batch: torch.Tensor) -> int:
    """Bytes at the peak of one step: what the contender holds before it, and what comes on top."""
    contender.state["optimizer"].zero_grad()  # the profiler does not see what is freed from before
    held = sum(v.numel() * v.element_size() for v in _tensors(contender.state))
    if batch.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(batch.device)
        before = torch.cuda.memory_allocated(batch.device)
        contender.step(batch)
        return held + torch.cuda.max_memory_allocated(batch.device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        contender.step(batch)
    now = most = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return held + most


def _tensors(state) -> list[torch.Tensor]:
    """Weights, gradients, moments and averages of a training state."""
    network = unwrap(state["model"])
    found = [*network.parameters(), *network.buffers()]
    found += [p.grad for p in network.parameters() if p.grad is not None]
    found += [v for kept in state["optimizer"].state.values() for v in kept.values()]
    averages = [state["ema"], *getattr(state["ema"], "others", {}).values()]
    found += [v for average in averages for v in average.shadow_params]
    return [v for v in found if torch.is_tensor(v)]


def compare(args) -> dict[str, Any]:
    """Steps of all contenders in turn, and each one's peak memory."""
    contenders: dict[str, Any] = {}
    config = configure(args, args.dtype[0])
    torch.manual_seed(0)
    for name, folder in args.peer:
        contenders[name] = PEERS[name](folder, configure(args, "fp32"))
    result: dict[str, Any] = {"agreement": {}, "notes": {k: c.notes for k, c in contenders.items()}}
    for dtype in args.dtype:
        own = contenders[f"ours {dtype}"] = Ours(configure(args, dtype))
        for name, _ in args.peer:
            own.load_from(contenders[name].weights)
            error = disagreement(own, contenders[name], config)
            result["agreement"][name] = error
            if error > 1e-4:
                raise SystemExit(f"outputs of ours and {name} differ by {error:.1e} > 1e-4")
    batch = images(config, range(config.training.batch_size))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.warmup + args.steps):
        for name, contender in contenders.items():
            spent = timed(contender, batch)
            if turn >= args.warmup:
                seconds[name].append(spent)
    result["contenders"] = {
        name: {
            "seconds": [round(s, 5) for s in seconds[name]],
            "images_per_second": len(batch) / statistics.median(seconds[name]),
            "peak_bytes": peak_bytes(contender, batch),
        }
        for name, contender in contenders.items()
    }
    return result


# --- several processes ----------------------------------------------------------------------


def work(args) -> None:
    """One process of a scaling run; the main one writes the seconds of its steps."""
    config = configure(args, args.dtype[0])
    config.device = distributed.local_device(config.device)
    with distributed.process_group(config.device.type):
        batch = images(config, distributed.share(config.training.batch_size))
        torch.manual_seed(0)
        contender = Ours(config)
        seconds = [timed(contender, batch) for _ in range(args.warmup + args.steps)]
        if distributed.is_main():
            Path(args.worker).write_text(json.dumps(seconds[args.warmup :]))


def scale(args) -> dict[str, Any]:
    """The same global batch on more and more processes, which share the cores or own a GPU each."""
    result, cores = {}, torch.get_num_threads()
    for count in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "seconds.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={count}", "-m", "benchmarks.train"]
            command += [*args.given, f"--worker={found}"]
            threads = {"OMP_NUM_THREADS": str(max(1, cores // count))}
            subprocess.run(command, env=os.environ | threads, check=True)
            seconds = json.loads(found.read_text())
        batch = configure(args, args.dtype[0]).training.batch_size
        speed = batch / statistics.median(seconds)
        result[count] = {"seconds": seconds, "images_per_second": speed}
    first = result[args.processes[0]]["images_per_second"] / args.processes[0]
    for count, row in result.items():
        row["efficiency"] = row["images_per_second"] / (count * first)
    return result


# --- the command line -----------------------------------------------------------------------


def surroundings(args) -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cuda = torch.device(args.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(args.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
        "allocator": {name: os.environ.get(name, "default") for name in ALLOCATOR},
        "model": args.model,
        "size": args.size,
        "changes": dict(args.set),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    around = report["surroundings"]
    lines = [
        f"{around['model']} {around['size']}, batch {report['batch']}, {around['device']}, "
        f"{around['threads']} threads, torch {around['torch']}, load {around['load_average']}",
        "allocator: " + ", ".join(f"{k}={v}" for k, v in around["allocator"].items()),
        report["estimate"],
    ]
    for name, error in report.get("agreement", {}).items():
        lines.append(f"outputs agree with {name} to {error:.1e}; {report['notes'][name]}")
    rows = report.get("contenders", {})
    peers = [name for name in rows if not name.startswith("ours")]
    for name, row in rows.items():
        quartiles = statistics.quantiles(row["seconds"], n=4) if len(row["seconds"]) > 1 else []
        spread = f" ± {(quartiles[2] - quartiles[0]) / 2:.3f}" if quartiles else ""
        line = (
            f"{name:>20}: {row['images_per_second']:8.2f} images/s, "
            f"{statistics.median(row['seconds']):.3f}{spread} s a step, "
            f"peak {row['peak_bytes'] / 2**20:,.0f} MiB"
        )
        for peer in peers if name not in peers else ():
            speed = row["images_per_second"] / rows[peer]["images_per_second"]
            memory = row["peak_bytes"] / rows[peer]["peak_bytes"]
            line += f"; {speed:.2f} × the speed of {peer}, {memory:.2f} × its memory"
        lines.append(line)
    for count, row in report.get("scaling", {}).items():
        lines.append(
            f"{count:>10} processes: {row['images_per_second']:8.2f} images/s, "
            f"efficiency {row['efficiency']:.2f}"
        )
    return "\n".join(lines)


def _peer(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if name not in PEERS or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, NAME one of {sorted(PEERS)}")
    return name, folder


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    if key.count(".") != 1 or not value:
        raise argparse.ArgumentTypeError("expected section.key=value, as training.compile=True")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(given: list[str] | None):
    parser = argparse.ArgumentParser("benchmarks.train", description=__doc__)
    add = parser.add_argument
    add("--peer", type=_peer, action="append", default=[], help="NAME=FOLDER of another library")
    add("--model", choices=CONFIGS, default="ncsnpp")
    add("--size", choices=SIZES, default="full")
    add("--batch", type=int, default=0, help="images per step; 0 = the size's own")
    add("--device", default="cpu")
    add("--dtype", type=lambda s: s.split(","), default=["fp32"], help="of ours: fp32, tf32, bf16")
    add("--steps", type=int, default=5, help="timed steps of each contender")
    add("--warmup", type=int, default=1)
    add("--processes", type=_numbers, default=[], help="1,2: strong scaling of ours")
    add("--set", type=_setting, action="append", default=[], help="section.key=value, of ours")
    add("--output", default="", help="a JSON file for the numbers")
    add("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    args.given = sys.argv[1:] if given is None else list(given)
    return args


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its table, write its JSON, and return the report."""
    args = parse(given)
    if args.worker:
        work(args)
        return {}
    config = configure(args, args.dtype[0])
    report: dict[str, Any] = {
        "surroundings": surroundings(args),
        "batch": config.training.batch_size,
        "estimate": estimate(config).line(),
        **compare(args),
    }
    if args.processes:
        report["scaling"] = scale(args)
    print(table(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
