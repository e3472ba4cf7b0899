"""What training a configured network will take, found without computing any of it."""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .utils import get_model, prepare_for_training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """Parameters, work and memory of a training; `line()` says it in a sentence.

    FLOPs are of one image, a multiplication and an addition being two, and count products and
    convolutions only; the backward pass takes twice the forward's (and what it computes again is
    not counted). Bytes are of one process. Work and activations are 0 where a network cannot be
    run without numbers.
    """

    parameters: int
    flops_forward: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int
    images_per_step: int
    steps: int

    @property
    def flops_training(self) -> int:
        """FLOPs of one image in training."""
        return 3 * self.flops_forward

    @property
    def memory(self) -> int:
        """Bytes at the peak of a step: all of the above."""
        parts = (self.weight_bytes, self.gradient_bytes, self.optimizer_bytes, self.average_bytes)
        return sum(parts) + self.activation_bytes

    def seconds(self, images_per_second: float) -> float:
        """The whole training's time at a measured speed of all processes."""
        return self.steps * self.images_per_step / images_per_second

    def line(self, images_per_second: float = 0.0) -> str:
        """One line for a person, with the time to finish where the speed is known."""
        parts = [f"{self.parameters / 1e6:.2f} M parameters"]
        if self.flops_forward:
            work = self.flops_training * self.images_per_step * self.steps
            parts += [
                f"{_scaled(self.flops_forward, 'FLOP', 1000)} forward and "
                f"{_scaled(self.flops_training, 'FLOP', 1000)} in training per image "
                f"({_scaled(work, 'FLOP', 1000)} in all)",
                f"about {_scaled(self.memory, 'B', 1024)} in training, "
                f"{_scaled(self.activation_bytes, 'B', 1024)} of it activations",
            ]
        if images_per_second:
            seconds = self.seconds(images_per_second)
            parts.append(f"{_duration(seconds)} for {self.steps:,} steps")
        return ", ".join(parts)


def _scaled(value: float, unit: str, base: int) -> str:
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    infix = "i" if base == 1024 else ""
    while value >= 0.9995 * base and len(prefixes) > 1:
        value, prefixes = value / base, prefixes[1:]
    prefix = prefixes[0]
    return f"{value:.3g} {prefix.upper() if infix else prefix}{infix if prefix else ''}{unit}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def estimate(config, *, processes: int = 1) -> Estimate:
    """The cost of the training that `config` describes, spread over so many processes.

    The network is built and run on tensors without numbers: on one image and on two, with hooks on
    what the backward pass keeps, since activations are a constant (copies of weights in another
    type) and a part in proportion to the images. Compiled networks keep less. About a second at
    full size.

    Args:
      config: a complete configuration.
      processes: that share `training.batch_size`; each holds one micro-batch at a time.
    """
    model, t = config.model, config.training
    micro = -(-t.batch_size // (processes * t.get("grad_accumulation", 1)))
    fake = FakeTensorMode()
    with fake:
        network = _network(config)
        trained = [p for p in network.parameters() if p.requires_grad]
        stored = [*network.parameters(), *network.buffers()]
    size = sum(p.numel() * p.element_size() for p in trained)
    averages = 1 + len(model.get("ema_rates", ())) + len(model.get("ema_profiles", ()))
    try:
        with fake:
            two = _kept_bytes(network, config, 2)
            with FlopCounterMode(display=False) as counter:
                one = _kept_bytes(network, config, 1)
        forward = counter.get_total_flops()
    except Exception as error:  # a network of one's own may need numbers, which training has
        log.info("no estimate of work and activations: %s", error)
        forward = one = two = 0
    return Estimate(
        parameters=sum(p.numel() for p in network.parameters()),
        flops_forward=forward,
        weight_bytes=sum(v.numel() * v.element_size() for v in stored),
        gradient_bytes=size,
        optimizer_bytes=2 * size,
        average_bytes=averages * size,
        activation_bytes=one + (two - one) * (micro - 1),
        images_per_step=t.batch_size,
        steps=t.n_iters,
    )


def _network(config) -> torch.nn.Module:
    with torch.device(config.device):
        network = get_model(config.model.name)(config)
    eager = copy.deepcopy(config)
    with eager.unlocked():
        eager.training.compile = False
    return prepare_for_training(network, eager)


def _run(network, config, images: int) -> torch.Tensor:
    """The network on so many images, in training mode and under the configured precision."""
    data, device = config.data, config.device
    x = torch.zeros(images, data.num_channels, data.image_size, data.image_size, device=device)
    labels = torch.ones(images, device=device)
    low = config.training.get("precision", "fp32") == "bf16"
    context = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()
    with context:
        return network.train()(x, labels)


def _kept_bytes(network, config, images: int) -> int:
    """Bytes of the distinct storages that the backward pass keeps, those of weights apart."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor.detach()  # an operation that kept its own output would live for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = _run(network, config, images)
    assert output.requires_grad  # the graph, and with it what it keeps, is alive until here
    return sum(size for storage, size in kept.items() if storage not in weights)
