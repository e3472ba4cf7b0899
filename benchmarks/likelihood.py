"""Likelihoods by the probability-flow ODE, ours and others', in one run: the time of an evaluation,
and bits/dim of images from end to end.

    python -m benchmarks.likelihood --peer score_sde_pytorch=/path/to/checkout --model ncsnpp

An evaluation is what the solver asks for once: the drift and the divergence of a batch at one time.
The contenders have the same weights, images and probes. What is integrated is the exact output
for Gaussian data plus a little of the network's (`contenders.Blend`). EDM has no likelihood.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

import likelihood
import ode
import sde_lib
from benchmarks import contenders, harness
from benchmarks.contenders import Blend, inverse_scaler
from benchmarks.peers import ScoreSDE
from likelihood_bits import bits_per_dim
from losses_step import autocast, float32_precision

Evaluate = Callable[[float], torch.Tensor]


class Ours:
    """This library's likelihood of a configuration, by one solver."""

    def __init__(self, model, config, args, method: str, dtype: str = "fp32"):
        self.model, self.precision = model, dtype
        self.device, self.scaler = config.device, inverse_scaler(config)
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
            precise = float32_precision(self.precision, batch.device)
            with torch.no_grad(), precise, autocast(self.precision, batch.device):
                return caught["fn"](vec_t, caught["state"], *caught["args"])[0]

        return evaluate

    def bits(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Bits/dim of a batch, and the evaluations of each image."""
        with float32_precision(self.precision, batch.device):
            found = self.fn(self.model, batch)
        return bits_per_dim(found.logp, batch[0].numel(), self.scaler), found.nfe.tolist()


class Theirs:
    """score_sde_pytorch's likelihood, by SciPy's RK45 on the host."""

    precision = "fp32"

    def __init__(self, peer: ScoreSDE, model, config, args):
        self.peer, self.model, self.scaler = peer, model, inverse_scaler(config)
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


# --- measuring --------------------------------------------------------------------------------

#: The time of the evaluation that is measured; it costs the same at every other.
TIME = 0.5


def drifts(made: dict[str, Any], batch: torch.Tensor) -> tuple[dict[str, Evaluate], dict]:
    """An evaluation of each contender, and how far its drift is from the first's.

    Raises: SystemExit where two in float32 do not agree.
    """
    evaluations, agreement, truth = {}, {}, None
    for name, contender in made.items():
        torch.manual_seed(0)
        evaluations[name] = contender.evaluation(batch)
        with float32_precision("fp32", batch.device):
            drift = evaluations[name](TIME).cpu().double()
        truth = drift if truth is None else truth
        agreement[name] = error = contenders.difference([drift], [truth])
        if contender.precision == "fp32" and not error <= contenders.TOLERANCE:
            raise SystemExit(
                f"the drift of {name} is {error:.1e} > {contenders.TOLERANCE:.0e} from the "
                "first's; timing them would compare different work"
            )
    return evaluations, agreement


def time_bits(made: dict[str, Any], batches: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Bits/dim of all batches by every contender, batch by batch in turn."""
    found: dict[str, Any] = {n: {"seconds": 0.0, "nfe": [], "bits": []} for n in made}
    for i, batch in enumerate(batches):
        for name, contender in made.items():
            kept: list[Any] = []

            def step(contender=contender, kept=kept, i=i, batch=batch):
                torch.manual_seed(i)
                kept.extend(contender.bits(batch))

            found[name]["seconds"] += harness.seconds(step, batch.device)
            bits, nfe = kept
            found[name]["bits"] += bits.tolist()
            found[name]["nfe"] += nfe
    first = next(iter(found.values()))["bits"]
    rows = {}
    for name, row in found.items():
        apart = max(abs(a - b) for a, b in zip(row["bits"], first, strict=True))
        rows[name] = {
            "seconds": [row["seconds"]],
            "images": len(row["bits"]),
            "nfe": row["nfe"],
            "bits": row["bits"],
            "disagreement": apart,
            "shown": {
                "evaluations an image": f"{statistics.mean(row['nfe']):.1f}",
                "at most": max(row["nfe"]),
                "bits/dim": f"{statistics.mean(row['bits']):.5f}",
                "apart by": f"{apart:.1e}",
            },
        }
    return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One evaluation, then bits/dim end to end, of all contenders."""
    known = {n: c for n, c in contenders.line_up(args).items() if c.comparable}
    config = contenders.configure(args, "fp32")
    batch = contenders.images(config)
    report = contenders.facts(known, batch, args)
    if any(name == "edm" for name, _ in args.peer):
        report["notes"]["edm"] = "has no likelihood, and is left out"
    sde = sde_lib.get_sde(config)
    models = {name: Blend(c.network, sde, args.gain) for name, c in known.items()}
    peers = {
        name: Theirs(c, models[name], config, args)
        for name, c in known.items()
        if isinstance(c, ScoreSDE)
    }
    plain = next(models[name] for name in contenders.ours(known))
    single = peers | {
        name: Ours(models[name], config, args, "dopri5", c.precision)
        for name, c in contenders.ours(known).items()
    }
    evaluations, report["drift"] = drifts(single, batch)
    flops = contenders.work_flops(known, report["flops_forward"], 2 * len(batch))
    title = "an evaluation: drift and divergence"
    report["measurements"] = {
        title: harness.measurement(
            {name: lambda e=e: e(TIME) for name, e in evaluations.items()},
            len(batch),
            args,
            held={name: known[name].weights_held for name in evaluations},
            work_flops=flops,
            precisions={name: known[name].precision for name in evaluations},
        )
    }
    for name, error in report["drift"].items():
        report["measurements"][title][name]["shown"] = {"drift apart by": f"{error:.1e}"}
    if args.images:
        whole = peers | {f"ours {m}": Ours(plain, config, args, m) for m in args.method}
        with config.unlocked():
            config.training.batch_size = args.images
        batches = contenders.images(config).split(len(batch))
        report["measurements"]["bits/dim, end to end"] = time_bits(whole, batches)
    return report


# --- the command line -------------------------------------------------------------------------


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser("likelihood", __doc__)
    contenders.add_options(parser)
    add = parser.add_argument
    add("--images", type=int, default=64, help="images end to end; 0 = only one evaluation")
    add("--method", type=lambda s: s.split(","), default=["dopri5", "RK45"], help="of ours")
    add("--rtol", type=float, default=1e-5, help="relative and absolute tolerance")
    add("--eps", type=float, default=1e-5, help="the time of the data")
    add("--gain", type=float, default=0.01, help="how much of the network's output")
    return harness.parse(parser, given)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its tables, write its JSON, and return the report."""
    return harness.run("likelihood", parse(given), measure)


if __name__ == "__main__":
    main()
