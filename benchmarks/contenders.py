"""Ours and the others, of one configuration: what they compute must agree before it is timed."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch

import checkpoints_import
import distributed
import losses
import models.ema
import sde_lib
from benchmarks import harness, peaks
from benchmarks.peers import PEERS, Contender, ScoreSDE
from configs.validation import complete
from losses_step import float32_precision
from models.utils import create_model, prepare_for_training, unwrap

CONFIGS = {
    "ncsnpp": "configs.ve.cifar10_ncsnpp_continuous",
    "ncsnpp_deep": "configs.ve.cifar10_ncsnpp_deep_continuous",
    "ddpmpp": "configs.vp.cifar10_ddpmpp_continuous",
    "ddpmpp_deep": "configs.vp.cifar10_ddpmpp_deep_continuous",
}
#: What a size changes in the published configuration, and the images per step.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "full": ({}, 8),
    "small": ({"model.nf": 32}, 32),
    "tiny": ({"model.nf": 8, "model.num_res_blocks": 1, "data.image_size": 16}, 2),
}
#: Largest difference of float32 outputs, relative to the largest output.
TOLERANCE = 1e-4


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which networks are compared."""
    add = parser.add_argument
    add("--peer", type=peer, action="append", default=[], help="NAME=FOLDER of another library")
    add("--no-peaks", action="store_true", help="do not measure what the hardware can do")
    add_network_options(parser)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what ours is."""
    add = parser.add_argument
    add("--model", choices=CONFIGS, default="ncsnpp")
    add("--size", choices=SIZES, default="full")
    add("--batch", type=int, default=0, help="images at once; 0 = the size's own")
    types = harness.listed(harness.DTYPES)
    add("--dtype", type=types, default=["fp32"], help="of ours, as fp32,bf16")
    add("--compile", action="store_true", help="compile ours")
    add("--set", type=harness.setting, action="append", default=[], help="section.key=value")


def peer(text: str) -> tuple[str, str]:
    """The type of `--peer NAME=FOLDER`."""
    name, _, folder = text.partition("=")
    if name not in PEERS or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, NAME one of {sorted(PEERS)}")
    return name, folder


def configure(args: argparse.Namespace, dtype: str):
    """The published configuration, resized, whose zero-initialised layers have unit scale."""
    config = importlib.import_module(CONFIGS[args.model]).get_config()
    sizes, batch = SIZES[args.size]
    changes = {
        "model.init_scale": 1.0,
        "training.batch_size": args.batch or batch,
        "training.precision": dtype,
        "training.compile": args.compile,
        **sizes,
        **dict(args.set),
    }
    config.device = torch.device(args.device)
    with config.unlocked():
        for key, value in changes.items():
            section, name = key.split(".")
            config[section][name] = value
    return complete(config)


class Ours(Contender):
    """This library's training of a configuration."""

    def __init__(self, config):
        self.network = prepare_for_training(create_model(config), config)
        self.precision = config.training.precision
        model = distributed.parallel(self.network)
        self.state = {
            "model": model,
            "optimizer": losses.get_optimizer(config, model.parameters()),
            "ema": models.ema.from_config(config, model.parameters()),
            "step": 0,
        }
        self.step_fn = losses.step_fn_from_config(config, sde_lib.get_sde(config), True)

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        """One training step; its loss."""
        return self.step_fn(self.state, batch)

    def load_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over a peer's weights."""
        saved = {"model": weights, "step": 0}
        found = checkpoints_import.for_network("the peer", saved, unwrap(self.network))
        unwrap(self.network).load_state_dict(found["model"])


def line_up(args: argparse.Namespace) -> dict[str, Contender]:
    """The peers, then ours in each precision, with one set of weights wherever they fit.

    EDM has a turn in low precision too where ours has: bfloat16 on a CPU, its own float16 on a GPU.
    """
    torch.manual_seed(0)
    found: dict[str, Contender] = {}
    low = "fp16" if torch.device(args.device).type == "cuda" else "bf16"
    for name, folder in args.peer:
        found[name] = PEERS[name](folder, configure(args, "fp32"))
        if name == "edm" and "bf16" in args.dtype:
            found[f"edm {low}"] = PEERS[name](folder, configure(args, "fp32"), precision=low)
    for dtype in args.dtype:
        own = Ours(configure(args, dtype))
        same = next((c for c in found.values() if c.comparable), None)
        if isinstance(same, ScoreSDE):
            own.load_from(same.weights)
        elif same is not None:
            own.network.load_state_dict(same.network.state_dict())
        found[f"ours {dtype}"] = own
    return found


def ours(contenders: dict[str, Contender]) -> dict[str, Ours]:
    """Those that are this library's."""
    return {name: c for name, c in contenders.items() if isinstance(c, Ours)}


def images(config, share: range | None = None) -> torch.Tensor:
    """A batch of noise in the range that the configuration says, or a process's part of it."""
    data, count = config.data, config.training.batch_size
    g = torch.Generator().manual_seed(0)
    x = torch.rand(count, data.num_channels, data.image_size, data.image_size, generator=g)
    x = (x if share is None else x[share.start : share.stop]).to(config.device)
    return 2 * x - 1 if data.centered else x


def labels_for(x: torch.Tensor) -> torch.Tensor:
    """Time inputs that every network here takes: noise levels of VE, labels of VP."""
    return torch.linspace(0.5, 40.0, len(x), device=x.device)


# --- agreement --------------------------------------------------------------------------------


def outputs(contender: Contender, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output in evaluation mode and the input gradient of its square, in float32; a library
    that leaves torch's settings alone is asked for exact products."""
    contender.network.eval()
    x = x.detach().clone().requires_grad_()
    with float32_precision("fp32", x.device):
        y = contender.call(x, labels_for(x)).float()
        (slope,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), slope


def difference(found, truth) -> float:
    """The largest difference of tensors, each relative to the largest number of its own."""
    pairs = zip(found, truth, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def agreement(contenders: dict[str, Contender], x: torch.Tensor) -> dict[str, Any]:
    """How far outputs and input gradients are from those of the first contender that has our
    weights: in float32 to 1e-4, in bfloat16 its rounding.

    Raises: SystemExit where two float32 contenders do not agree.
    """
    compared = {name: c for name, c in contenders.items() if c.comparable}
    first = next(iter(compared))
    truth = outputs(compared[first], x)
    found: dict[str, Any] = {"with": first, "tolerance": TOLERANCE, "difference": {}}
    for name, contender in compared.items():
        if name != first:
            found["difference"][name] = error = difference(outputs(contender, x), truth)
            if contender.precision == "fp32" and not error <= TOLERANCE:
                raise SystemExit(
                    f"outputs of {name} and {first} differ by {error:.1e} > {TOLERANCE:.0e}; "
                    "timing them would compare different work"
                )
    return found


def facts(contenders: dict[str, Contender], x: torch.Tensor, args) -> dict[str, Any]:
    """What every table says: agreement, parameters and FLOPs of each, and the hardware's peaks.

    FLOPs are of one image forward, in training mode. The plain ones of score_sde_pytorch, or
    of ours, are the work that every contender with these weights is credited for.
    """
    own = next(iter(ours(contenders).values()))
    labels, counted = labels_for(x), {}
    with torch.compiler.set_stance("force_eager"):  # compiled code is not seen to convolve
        for name, c in contenders.items():
            c.network.train()
            counted[name] = harness.flops(lambda c=c: c.call(x[:1], labels[:1]))
        shapes = peaks.shapes_of(lambda: own.network(x, labels))
    found: dict[str, Any] = {
        "batch": len(x),
        "notes": {name: c.notes for name, c in contenders.items() if c.notes},
        "agreement": agreement(contenders, x),
        "parameters": {
            n: sum(p.numel() for p in c.network.parameters()) for n, c in contenders.items()
        },
        "flops_forward": counted,
    }
    if not args.no_peaks:
        found["peaks"] = peaks.measure([c.precision for c in contenders.values()], x.device, shapes)
    return found


def work_flops(contenders: dict[str, Contender], counted: dict[str, int], factor: float):
    """FLOPs of a contender's work: `factor` forward passes of the plain formulation."""
    plain = next(name for name, c in contenders.items() if c.comparable)
    return {
        name: round(factor * counted[plain if c.comparable else name])
        for name, c in contenders.items()
    }


# --- what samplers and likelihoods integrate --------------------------------------------------


class Blend(torch.nn.Module):
    """The exact output for data N(0, 0.5²) plus `gain` times a network's, in score_sde's
    conventions: the score with labels σ for VE, noise with labels 999·t for VP.

    Networks of random weights make ODEs that are stiffer than any trained one's; this one costs
    the same.
    """

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


def inverse_scaler(config):
    """From the network's range to [0, 1]."""
    return (lambda x: (x + 1.0) / 2.0) if config.data.centered else (lambda x: x)
