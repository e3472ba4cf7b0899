"""Likelihoods by the probability-flow ODE, ours and others', in one run: the time of an evaluation,
and bits/dim of images from end to end.

    python -m benchmarks.likelihood --peer score_sde_pytorch=/path/to/checkout --model ncsnpp

An evaluation is what the solver asks for once: the drift and the divergence of a batch at one time.
The contenders have the same weights, images and probes and take turns, so that whatever else the
machine does meets all of them. Weights are random, and networks of random weights make ODEs that
are stiffer than any trained one's, so the output is the exact one for Gaussian data plus a little
of the network's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import likelihood
import ode
import sde_lib
from benchmarks import train
from benchmarks.peers import PEERS
from likelihood_bits import bits_per_dim
from losses_step import autocast

Evaluate = Callable[[float], torch.Tensor]


class Ours:
    """This library's likelihood of a configuration, by one solver."""

    def __init__(self, model, config, args, method: str, dtype: str = "fp32"):
        self.model, self.dtype = model, dtype
        self.device, self.scaler = config.device, _inverse_scaler(config)
        tolerances = {"rtol": args.rtol, "atol": args.rtol, "eps": args.eps, "method": method}
        self.fn = likelihood.get_ode_likelihood_fn(sde_lib.get_sde(config), **tolerances)

    def evaluation(self, batch: torch.Tensor) -> Evaluate:
        """One evaluation at t of a batch, as the solver makes it."""
        caught: dict[str, Any] = {}

        def catch(fn, state, t0, t1, *, args, **_):
            caught.update(fn=fn, state=state, args=args)
            raise _Caught

        with _replaced(ode, "solve", catch), contextlib.suppress(_Caught):
            self.fn(self.model, batch)

        def evaluate(t: float) -> torch.Tensor:
            vec_t = torch.full((len(batch),), t, dtype=torch.float64, device=batch.device)
            with torch.no_grad(), autocast(self.dtype, batch.device):
                return caught["fn"](vec_t, caught["state"], *caught["args"])[0]

        return evaluate

    def bits(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Bits/dim of a batch, and the evaluations of each image."""
        found = self.fn(self.model, batch)
        return bits_per_dim(found.logp, batch[0].numel(), self.scaler), found.nfe.tolist()


class Theirs:
    """score_sde_pytorch's likelihood, by SciPy's RK45 on the host."""

    def __init__(self, peer, model, config, args):
        self.peer, self.model, self.scaler = peer, model, _inverse_scaler(config)
        options = {"rtol": args.rtol, "atol": args.rtol, "eps": args.eps}
        self.fn = peer.likelihood.get_likelihood_fn(peer.sde, self.scaler, **options)

    def evaluation(self, batch: torch.Tensor) -> Evaluate:
        """One evaluation at t of a batch, as SciPy asks for it."""
        caught: dict[str, Any] = {}

        def catch(fn, interval, state, **_):
            caught.update(fn=fn, state=state)
            raise _Caught

        stub = types.SimpleNamespace(solve_ivp=catch)
        with _replaced(self.peer.likelihood, "integrate", stub), contextlib.suppress(_Caught):
            self.fn(self.model, batch)

        def evaluate(t: float) -> torch.Tensor:
            with torch.no_grad():
                found = caught["fn"](t, caught["state"])
            return torch.from_numpy(found[: batch.numel()]).reshape(batch.shape)

        return evaluate

    def bits(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Bits/dim of a batch, and the evaluations of each image: one step size for all."""
        bpd, _, nfe = self.fn(self.model, batch)
        return bpd, [nfe] * len(batch)


class _Caught(Exception):
    """The solver was reached; nothing is solved."""


@contextlib.contextmanager
def _replaced(module, name: str, value):
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


def _inverse_scaler(config) -> Callable:
    return (lambda x: (x + 1.0) / 2.0) if config.data.centered else (lambda x: x)


# --- measuring --------------------------------------------------------------------------------


class _Step:
    """What `train.timed` times: an evaluation at t."""

    def __init__(self, evaluate: Evaluate, t: float):
        self.evaluate, self.t = evaluate, t

    def step(self, batch: torch.Tensor) -> None:
        self.evaluate(self.t)


def time_evaluations(contenders: dict[str, Any], batch: torch.Tensor, args) -> dict[str, Any]:
    """Seconds of an evaluation of every contender in turn; drifts must agree before."""
    evaluations = {}
    for name, contender in contenders.items():
        torch.manual_seed(0)
        evaluations[name] = contender.evaluation(batch)
    t, first = 0.5, next(iter(contenders))
    truth = evaluations[first](t).cpu().double()
    agreement = {}
    for name in evaluations:
        error = (evaluations[name](t).cpu().double() - truth).abs().max() / truth.abs().max()
        agreement[name] = error.item()
        if error > 1e-4 and "bf16" not in name:
            raise SystemExit(f"drifts of {name} and {first} differ by {error:.1e} > 1e-4")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.warmup + args.evaluations):
        for name, evaluate in evaluations.items():
            spent = train.timed(_Step(evaluate, t), batch)
            if turn >= args.warmup:
                seconds[name].append(spent)
    return {
        name: {"seconds": seconds[name], "agreement": agreement[name], "batch": len(batch)}
        for name in contenders
    }


def time_bits(contenders: dict[str, Any], batches: list[torch.Tensor]) -> dict[str, Any]:
    """Bits/dim of all batches by every contender, batch by batch in turn."""
    found: dict[str, Any] = {name: {"seconds": 0.0, "nfe": [], "bits": []} for name in contenders}
    for i, batch in enumerate(batches):
        for name, contender in contenders.items():
            kept: list[Any] = []

            def step(batch, contender=contender, kept=kept, i=i):
                torch.manual_seed(i)
                kept.extend(contender.bits(batch))

            found[name]["seconds"] += train.timed(types.SimpleNamespace(step=step), batch)
            bits, nfe = kept
            found[name]["bits"] += bits.tolist()
            found[name]["nfe"] += nfe
    first = next(iter(found.values()))["bits"]
    for row in found.values():
        pairs = zip(row["bits"], first, strict=True)
        row["disagreement"] = max(abs(a - b) for a, b in pairs)
    return found


def compare(args) -> dict[str, Any]:
    """One evaluation, then bits/dim end to end, of all contenders."""
    torch.manual_seed(0)
    config = train.configure(args, "fp32")
    own = train.Ours(config)
    peers = {name: PEERS[name](folder, train.configure(args, "fp32")) for name, folder in args.peer}
    sde = sde_lib.get_sde(config)
    for peer in peers.values():
        own.load_from(peer.weights)
    model = Blend(own.network, sde, args.gain)
    contenders: dict[str, Any] = {
        name: Theirs(p, Blend(p.model, sde, args.gain), config, args) for name, p in peers.items()
    }
    single = contenders | {
        f"ours {dtype}": Ours(model, config, args, "dopri5", dtype) for dtype in args.dtype
    }
    whole = contenders | {
        f"ours {method}": Ours(model, config, args, method) for method in args.method
    }
    n = config.training.batch_size
    images = train.images(config, range(n))
    report = {"batch": n, "evaluation": time_evaluations(single, images, args)}
    if args.images:
        config.training.batch_size = args.images
        report["bits"] = time_bits(whole, list(train.images(config, range(args.images)).split(n)))
    return report


class Blend(torch.nn.Module):
    """The exact output for data N(0, 0.5²) plus `gain` times a network's, in score_sde's
    conventions: the score with labels σ for VE, noise with labels 999·t for VP."""

    def __init__(self, net: torch.nn.Module, sde, gain: float):
        super().__init__()
        self.net, self.sde, self.gain = net, sde, gain

    def forward(self, x, labels):
        if isinstance(self.sde, sde_lib.VESDE):
            own = -1 / (0.25 + labels**2)
        else:
            alpha, sigma = sde_lib.alpha_sigma(self.sde, labels / 999)
            own = sigma / (0.25 * alpha**2 + sigma**2)
        return sde_lib.expand(own, x) * x + self.gain * self.net(x, labels)


# --- the command line -------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    around = report["surroundings"]
    lines = [
        f"{around['model']} {around['size']}, {around['device']}, {around['threads']} threads, "
        f"torch {around['torch']}, load {around['load_average']}",
        "allocator: " + ", ".join(f"{k}={v}" for k, v in around["allocator"].items()),
        f"one evaluation of {report['batch']} images:",
    ]
    rows = report["evaluation"]
    first = statistics.median(next(iter(rows.values()))["seconds"])
    for name, row in rows.items():
        median = statistics.median(row["seconds"])
        lines.append(
            f"{name:>20}: {1e3 * median:9.1f} ms, {first / median:5.2f} × the first; "
            f"drift within {row['agreement']:.1e}"
        )
    rows = report.get("bits", {})
    for i, (name, row) in enumerate(rows.items()):
        if not i:
            first = row["seconds"]
            lines.append(f"bits/dim of {len(row['bits'])} images, end to end:")
        lines.append(
            f"{name:>20}: {row['seconds']:9.2f} s, {first / row['seconds']:5.2f} × the first; "
            f"{statistics.mean(row['nfe']):.1f} evaluations an image ({max(row['nfe'])} at most); "
            f"{statistics.mean(row['bits']):.5f} bits/dim, within {row['disagreement']:.1e}"
        )
    return "\n".join(lines)


def parse(given: list[str] | None):
    parser = argparse.ArgumentParser("benchmarks.likelihood", description=__doc__)
    add = parser.add_argument
    add("--peer", type=train._peer, action="append", default=[], help="NAME=FOLDER, of a library")
    add("--model", choices=train.CONFIGS, default="ncsnpp")
    add("--size", choices=train.SIZES, default="full")
    add("--batch", type=int, default=0, help="images at once; 0 = the size's own")
    add("--images", type=int, default=64, help="images end to end; 0 = only one evaluation")
    add("--device", default="cpu")
    add("--dtype", type=lambda s: s.split(","), default=["fp32"], help="of ours, one evaluation")
    add("--method", type=lambda s: s.split(","), default=["dopri5", "RK45"], help="of ours")
    add("--rtol", type=float, default=1e-5, help="relative and absolute tolerance")
    add("--eps", type=float, default=1e-5, help="the time of the data")
    add("--gain", type=float, default=0.01, help="how much of the network's output")
    add("--evaluations", type=int, default=5, help="timed evaluations of each contender")
    add("--warmup", type=int, default=1)
    add("--set", type=train._setting, action="append", default=[], help="section.key=value")
    add("--output", default="", help="a JSON file for the numbers")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its table, write its JSON, and return the report."""
    args = parse(given)
    report = {"surroundings": train.surroundings(args), **compare(args)}
    print(table(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
