"""Other libraries, run beside ours in one process from a checkout; their files stay as they are."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from losses_step import autocast, float32_precision


class Contender:
    """A library's network and its training, as the benchmarks use them.

    Attributes:
      network: what is called as network(x, labels).
      state: `model`, `optimizer` and `ema` of its training, for the count of memory.
      precision: of its products: 'fp32', 'tf32', 'bf16' or 'fp16'.
      notes: what a reader of the numbers should know.
      comparable: whether it can have our weights, so that its outputs must be ours.
    """

    network: torch.nn.Module
    state: dict[str, Any]
    precision = "fp32"
    notes = ""
    comparable = True

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        """One training step; its loss."""
        raise NotImplementedError

    def call(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The network's output in this contender's precision."""
        precise = float32_precision(self.precision, x.device)
        with precise, autocast(self.precision, x.device):
            return self.network(x, labels)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The output in evaluation mode, without gradients."""
        self.network.eval()
        with torch.no_grad():
            return self.call(x, labels)

    def forward_backward(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        """The gradients of all weights in training mode, as they would be for Adam."""
        self.network.train()
        for p in self.network.parameters():
            p.grad = None
        self.call(x, labels).float().square().mean().backward()

    def weights_held(self) -> list[torch.Tensor]:
        """What the network itself holds, gradients dropped."""
        for p in self.network.parameters():
            p.grad = None
        return [*self.network.parameters(), *self.network.buffers()]

    def held(self) -> list[torch.Tensor]:
        """Weights, moments and averages of training, gradients dropped: a memory profiler does
        not see what was there before it."""
        found: list[Any] = self.weights_held()
        found += [v for kept in self.state["optimizer"].state.values() for v in kept.values()]
        averages = [self.state["ema"], *getattr(self.state["ema"], "others", {}).values()]
        found += [v for average in averages for v in average.shadow_params]
        return [v for v in found if torch.is_tensor(v)]


class ScoreSDE(Contender):
    """score_sde_pytorch (Song et al. 2021): network, training, samplers, likelihood.

    Its FIR filters are a CUDA extension that is compiled at import. Where the device is a GPU and
    nvcc is there it is used; else its own PyTorch version of them is, everywhere.

    Args:
      folder: the checkout.
      config: a complete configuration of ours, whose keys are the original's.

    Raises: ValueError where `folder` is no such checkout.
    """

    def __init__(self, folder: str | os.PathLike, config):
        folder = checkout(folder, "score_sde_pytorch", "op/upfirdn2d.py")
        compiled = config.device.type == "cuda" and has_compiler()
        self.notes = f"FIR filters by {'its CUDA extension' if compiled else 'its native path'}"
        with modules_of(folder), contextlib.nullcontext() if compiled else no_extensions():
            self.losses = importlib.import_module("losses")
            self.utils = importlib.import_module("models.utils")
            self.sampling = importlib.import_module("sampling")
            ema = importlib.import_module("models.ema")
            self.sde_lib = importlib.import_module("sde_lib")
            self.likelihood = importlib.import_module("likelihood")
            importlib.import_module("models.ncsnpp")
            if not compiled:
                _use_native_filters(sys.modules["op.upfirdn2d"])
        self.network = self.utils.create_model(config)
        self.config = config
        if config.device.type == "cuda":
            self.precision = "tf32"  # torch's own setting for convolutions
        self.sde = self.process(config.model.num_scales)
        parameters = self.network.parameters
        self.state = {
            "model": self.network,
            "optimizer": self.losses.get_optimizer(config, parameters()),
            "ema": ema.ExponentialMovingAverage(parameters(), decay=config.model.ema_rate),
            "step": 0,
        }
        self.step_fn = self.losses.get_step_fn(
            self.sde,
            train=True,
            optimize_fn=self.losses.optimization_manager(config),
            reduce_mean=config.training.reduce_mean,
            continuous=config.training.continuous,
            likelihood_weighting=config.training.likelihood_weighting,
        )

    def process(self, steps: int) -> Any:
        """Its forward process, discretised into so many steps; it looks its σ up in a table by
        indices that are on the device, and so must be the table."""
        m = self.config.model
        if self.config.training.sde == "vesde":
            sde = self.sde_lib.VESDE(m.sigma_min, m.sigma_max, steps)
            sde.discrete_sigmas = sde.discrete_sigmas.to(self.config.device)
            return sde
        return self.sde_lib.VPSDE(m.beta_min, m.beta_max, steps)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict, by the original's names."""
        return self.network.module.state_dict()  # type: ignore[union-attr, operator]

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.step_fn(self.state, batch)

    def call(self, x, labels):
        return self.network(x, labels)  # with torch's own settings, as its users have it


class EDM(Contender):
    """EDM's SongUNet (Karras et al. 2022) at the size of a configuration, and its sampler.

    Its convolutions cast their weights to the type of the input, so that is what sets the
    precision. Training is the denoising loss

        ‖F(x + σz, log(σ)/4) − x‖²,   log σ ~ N(−1.2, 1.2²),

    backward, torch's Adam and an average of the weights: its own loop, written here without
    what is not part of a step. Its parametrization is another, so that no weights of ours fit it.
    """

    comparable = False

    def __init__(self, folder: str | os.PathLike, config, precision: str = "fp32"):
        folder = checkout(folder, "edm", "training/networks.py")
        m, data = config.model, config.data
        options: dict[str, Any] = {
            "img_resolution": data.image_size,
            "img_channels": data.num_channels,
            "model_type": "SongUNet",
            "use_fp16": precision == "fp16",
            "model_channels": m.nf,
            "channel_mult": list(m.ch_mult),
            "num_blocks": m.num_res_blocks,
            "attn_resolutions": list(m.attn_resolutions),
            "dropout": m.dropout,
            **(NCSNPP if m.progressive_input == "residual" else DDPMPP),
        }
        with modules_of(folder), absent("click"), absent("tqdm"):
            networks = importlib.import_module("training.networks")
            self.precond = networks.EDMPrecond(**options).to(config.device)
            self.sampler = importlib.import_module("generate").edm_sampler
        self.network, self.precision = self.precond.model, precision
        self.notes = "its own parametrization: no weights in common, so outputs are not compared"
        parameters = list(self.network.parameters())
        optimizer = torch.optim.Adam(parameters, lr=config.optim.lr)
        self.state = {"model": self.network, "optimizer": optimizer, "ema": Average(parameters)}

    def call(self, x, labels):
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, x.dtype)
        with float32_precision(self.precision, x.device):
            return self.network(x.to(kind), labels, None)

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        self.network.train()
        log_sigma = torch.randn(len(batch), device=batch.device) * 1.2 - 1.2
        sigma = log_sigma.exp().reshape(-1, *[1] * (batch.ndim - 1))
        self.state["optimizer"].zero_grad()
        found = self.call(batch + sigma * torch.randn_like(batch), log_sigma / 4)
        loss = (found.float() - batch).square().mean()
        loss.backward()
        self.state["optimizer"].step()
        self.state["ema"].update(self.network.parameters())
        return loss.detach()

    def sample(self, shape, times: int, device: torch.device) -> torch.Tensor:
        """Images by its own sampler: Heun's method, 2·times − 1 evaluations."""
        with torch.no_grad(), float32_precision(self.precision, device):
            return self.sampler(
                self.precond.eval(), torch.randn(shape, device=device), num_steps=times
            )


#: What makes a SongUNet the network of a configuration of this family.
NCSNPP: dict[str, Any] = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "resample_filter": [1, 3, 3, 1],
    "channel_mult_noise": 2,
}
DDPMPP: dict[str, Any] = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
    "channel_mult_noise": 1,
}


class Average:
    """A moving average of weights, one tensor after the other."""

    def __init__(self, parameters):
        self.shadow_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters) -> None:
        for average, p in zip(self.shadow_params, parameters, strict=True):
            average.lerp_(p.detach(), 1e-4)


def checkout(folder: str | os.PathLike, name: str, file: str) -> Path:
    """The folder, absolute; ValueError where it does not have the file by which it is known."""
    found = Path(folder).expanduser().resolve()
    if not (found / file).exists():
        raise ValueError(f"{found} is no checkout of {name}: no {file}")
    return found


@contextlib.contextmanager
def absent(name: str) -> Iterator[None]:
    """Within this context a package that is not installed, and that nothing here uses, imports."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        yield
        return
    sys.modules[name] = mock.MagicMock()
    try:
        yield
    finally:
        del sys.modules[name]


def has_compiler() -> bool:
    """Whether CUDA extensions can be compiled here."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") is not None or Path(home, "bin", "nvcc").exists()


@contextlib.contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Within this context the top-level names that `folder` defines are imported from there; ours
    of the same names come back afterwards."""
    names = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}

    def theirs() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in names]

    ours = {name: sys.modules.pop(name) for name in theirs()}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in theirs():
            del sys.modules[name]
        sys.modules.update(ours)


@contextlib.contextmanager
def no_extensions() -> Iterator[None]:
    """Within this context importing a module compiles nothing."""
    name = "torch.utils.cpp_extension"
    stub, real = types.ModuleType(name), sys.modules.get(name)
    stub.load = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    sys.modules[name] = stub
    try:
        yield
    finally:
        del sys.modules[name]
        if real is not None:
            sys.modules[name] = real


def _use_native_filters(op: types.ModuleType) -> None:
    """The module's own PyTorch filters on GPUs too, where it asks for the extension."""

    def apply(x, kernel, up, down, pad):
        return op.upfirdn2d_native(x, kernel, *up, *down, *pad)

    op.UpFirDn2d = types.SimpleNamespace(apply=apply)  # type: ignore[attr-defined]


PEERS: dict[str, Callable[..., Any]] = {"score_sde_pytorch": ScoreSDE, "edm": EDM}
