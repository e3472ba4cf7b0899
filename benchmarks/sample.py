"""Samplers from the prior to images, ours and others', in one run: a step of the published
Predictor–Corrector sampler, what of it is not the network, and images per second of few-step ones.

    python -m benchmarks.sample --peer score_sde_pytorch=/path --peer edm=/path --model ncsnpp

Samples of ours and of score_sde_pytorch from one seed must agree. The 2,000 network evaluations of
the published sampler are counted from its steps; `--whole` makes them. What the sampler itself
takes is measured with a network that returns what it has already: on a GPU, where the host works
ahead, that is more than what it adds to a step.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

import sampling
import sde_lib
from benchmarks import contenders, harness, tables
from benchmarks.contenders import Blend, Ours, inverse_scaler
from benchmarks.peers import EDM, Contender, ScoreSDE
from losses_step import autocast, float32_precision

#: Few-step samplers of ours: predictor, schedule, number of times, network evaluations.
FEW = {
    "Heun": ("heun", "karras", 18, 35),
    "DPM-Solver++(2M)": ("dpmpp_2m", "logsnr", 10, 10),
}
#: Network evaluations of a CIFAR-10 sample in score_sde: 1,000 steps of one corrector each.
PUBLISHED = 2000


def precision(contender: Contender, device: torch.device) -> contextlib.AbstractContextManager:
    """Around a whole sampler: weights are cast once, not once an evaluation."""
    stack = contextlib.ExitStack()
    if isinstance(contender, Ours):
        stack.enter_context(float32_precision(contender.precision, device))
        stack.enter_context(autocast(contender.precision, device))
    return stack


def published(contender: Contender, model, config, steps: int) -> Callable[[], torch.Tensor]:
    """The sampler of the published configuration at so many steps, ours or theirs."""
    s, shape = config.sampling, contenders.images(config).shape
    if isinstance(contender, ScoreSDE):
        lib, sde = contender.sampling, contender.process(steps)
    else:
        lib, sde = sampling, sde_lib.get_sde(config)
        sde.N = steps
    fn = lib.get_pc_sampler(
        sde,
        tuple(shape),
        lib.get_predictor(s.predictor),
        lib.get_corrector(s.corrector),
        inverse_scaler(config),
        s.snr,
        n_steps=s.n_steps_each,
        probability_flow=s.probability_flow,
        continuous=True,
        denoise=s.noise_removal,
        eps=1e-5 if config.training.sde == "vesde" else 1e-3,
        device=config.device,
    )

    def sample():
        with precision(contender, config.device):
            return fn(model)[0]

    return sample


def few_steps(contender: Contender, model, config, name: str) -> Callable[[], torch.Tensor]:
    """One of our few-step samplers."""
    predictor, schedule, times, _ = FEW[name]
    fn = sampling.get_pc_sampler(
        sde_lib.get_sde(config),
        tuple(contenders.images(config).shape),
        sampling.get_predictor(predictor),
        None,
        inverse_scaler(config),
        0.0,
        continuous=True,
        eps=1e-5 if config.training.sde == "vesde" else 1e-3,
        device=config.device,
        steps=times,
        schedule=schedule,
    )

    def sample():
        with precision(contender, config.device):
            return fn(model)[0]

    return sample


class Ready(torch.nn.Module):
    """A network that takes no time: its output is there already."""

    def __init__(self, like: torch.Tensor):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        output = torch.randn(like.shape, generator=g).to(like)
        self.output = torch.nn.Parameter(output, requires_grad=False)

    def forward(self, x, labels):
        return self.output


# --- measuring --------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The agreement of samples, then each kind of work in turn."""
    known = contenders.line_up(args)
    config = contenders.configure(args, "fp32")
    x = contenders.images(config)
    report = contenders.facts(known, x, args)
    sde = sde_lib.get_sde(config)
    models = {n: Blend(c.network, sde, args.gain) for n, c in known.items() if c.comparable}
    report["sampler"] = {
        "predictor": config.sampling.predictor,
        "corrector": config.sampling.corrector,
        "agreement": same_samples(known, models, config, args),
    }
    per_step = 1 + (config.sampling.corrector != "none") * config.sampling.n_steps_each
    report["sampler"]["evaluations_per_step"] = per_step
    steps = pc_steps(known, models, config, args, report)
    images = end_to_end(known, models, config, args, steps)
    report["measurements"] = {
        "a step of the published sampler": steps,
        "images from the prior to the end": images,
    }
    report["overhead"] = overhead(known, config, args, steps, images)
    report["tables"] = [overhead_table(report["overhead"])]
    return report


def same_samples(known, models, config, args) -> dict[str, float]:
    """How far samples from one seed are from those of the first contender."""
    truth, found = None, {}
    for name, model in models.items():
        torch.manual_seed(0)
        with float32_precision("fp32", config.device):
            samples = published(known[name], model, config, args.steps)()
        truth = samples if truth is None else truth
        found[name] = error = contenders.difference([samples], [truth])
        if known[name].precision == "fp32" and not error <= contenders.TOLERANCE:
            raise SystemExit(
                f"samples of {name} from one seed differ from the first's by {error:.1e} > "
                f"{contenders.TOLERANCE:.0e}; timing them would compare different work"
            )
    return found


def pc_steps(known, models, config, args, report) -> dict[str, Any]:
    """Seconds of a step of the published sampler, from runs of `--steps` steps."""
    per_step, n = report["sampler"]["evaluations_per_step"], config.training.batch_size
    flops = contenders.work_flops(known, report["flops_forward"], per_step * n)
    works = {m: published(known[m], model, config, args.steps) for m, model in models.items()}
    rows = harness.measurement(
        works,
        n,
        args,
        held={m: known[m].weights_held for m in models},
        work_flops=flops,
        precisions={m: known[m].precision for m in models},
    )
    for row in rows.values():
        row["seconds"] = [s / args.steps for s in row["seconds"]]
        del row["images"], row["images_per_second"]
    return rows


def end_to_end(known, models, config, args, steps) -> dict[str, Any]:
    """Images per second of whole samplers; the published one from its steps, unless `--whole`."""
    n, device = config.training.batch_size, config.device
    rows: dict[str, Any] = {}
    works, evaluations = {}, {}
    for name, model in models.items():
        title = f"{name}, published"
        total = PUBLISHED // 2 * (1 + (config.sampling.corrector != "none"))
        evaluations[title] = total
        if args.whole:
            works[title] = published(known[name], model, config, PUBLISHED // 2)
        else:
            per_image = tables.median(steps[name]) * (PUBLISHED // 2)
            rows[title] = {"seconds": [per_image], "images": n}
        for few in FEW if isinstance(known[name], Ours) else ():
            title = f"{name}, {few}"
            works[title] = few_steps(known[name], model, config, few)
            evaluations[title] = FEW[few][-1]
    shape = tuple(contenders.images(config).shape)
    for name, contender in known.items():
        if isinstance(contender, EDM) and contender.precision != "bf16":  # its wrapper has fp16
            title = f"{name}, its Heun"
            works[title] = lambda c=contender: c.sample(shape, 18, device)
            evaluations[title] = 35
    for title, spent in harness.in_turn(works, device, args.runs, 0).items():
        rows[title] = {"seconds": spent, "images": n}
    for title, row in rows.items():
        row["precision"] = known[title.split(",")[0]].precision
        row["shown"] = {
            "evaluations": f"{evaluations[title]:,}",
            "measured": "whole" if title in works else f"{args.steps} steps a run",
        }
    return rows


def overhead(known, config, args, steps, images) -> dict[str, Any]:
    """The samplers with a network that takes no time, as a share of those with one."""
    device, found = config.device, {}
    ready = Ready(contenders.images(config))
    for name, contender in known.items():
        if not contender.comparable:
            continue
        count = max(args.steps, 20)
        work = published(contender, ready, config, count)
        spent = harness.in_turn({"work": work}, device, args.repeats, 1)["work"]
        whole = tables.median(steps[name])
        found[f"{name}, a published step"] = row(min(spent) / count, whole)
        for few in FEW if isinstance(contender, Ours) else ():
            work = few_steps(contender, ready, config, few)
            spent = harness.in_turn({"work": work}, device, args.repeats, 1)["work"]
            found[f"{name}, {few}"] = row(min(spent), tables.median(images[f"{name}, {few}"]))
    return found


def row(own: float, whole: float) -> dict[str, float]:
    """Seconds without the network, with it, and their ratio."""
    return {"seconds": own, "with_network": whole, "fraction": own / whole}


def overhead_table(found: dict[str, Any]) -> dict[str, Any]:
    """What the sampler takes without its network, and of the whole."""
    body = [
        [name, *map(tables.duration, (r["seconds"], r["with_network"])), f"{r['fraction']:.2%}"]
        for name, r in found.items()
    ]
    head = ["sampler", "without the network", "with it", "share"]
    return {"title": "what the sampler itself takes", "head": head, "rows": body}


# --- the command line -------------------------------------------------------------------------


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser("sample", __doc__)
    contenders.add_options(parser)
    add = parser.add_argument
    add("--steps", type=int, default=2, help="steps of the published sampler in each timed run")
    add("--runs", type=int, default=1, help="timed runs of each whole sampler")
    add("--whole", action="store_true", help="make the published sampler's 1,000 steps, too")
    add("--gain", type=float, default=0.01, help="how much of the network's output")
    return harness.parse(parser, given)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its tables, write its JSON, and return the report."""
    return harness.run("sample", parse(given), measure)


if __name__ == "__main__":
    main()
