"""Other libraries' training, run beside ours in one process; their files stay as they are."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class ScoreSDE:
    """score_sde_pytorch (Song et al. 2021) from a checkout: its network, loss, optimizer and EMA.

    Its FIR filters are a CUDA extension that is compiled at import. Where the device is a GPU and
    nvcc is there it is used; else its own PyTorch version of them is, everywhere.

    Args:
      folder: the checkout.
      config: a complete configuration of ours, whose keys are the original's.

    Raises: ValueError where `folder` is no such checkout.
    """

    def __init__(self, folder: str | os.PathLike, config):
        folder = Path(folder).expanduser().resolve()
        if not (folder / "op" / "upfirdn2d.py").exists():
            raise ValueError(f"{folder} is no checkout of score_sde_pytorch: no op/upfirdn2d.py")
        compiled = config.device.type == "cuda" and has_compiler()
        self.notes = f"FIR filters by {'its CUDA extension' if compiled else 'its native path'}"
        with modules_of(folder), contextlib.nullcontext() if compiled else no_extensions():
            self.losses = importlib.import_module("losses")
            self.utils = importlib.import_module("models.utils")
            ema = importlib.import_module("models.ema")
            sde_lib = importlib.import_module("sde_lib")
            self.likelihood = importlib.import_module("likelihood")
            importlib.import_module("models.ncsnpp")
            if not compiled:
                _use_native_filters(sys.modules["op.upfirdn2d"])
        self.model = self.utils.create_model(config)
        self.sde = _process(sde_lib, config)
        parameters = self.model.parameters
        self.state: dict[str, Any] = {
            "model": self.model,
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

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict, by the original's names."""
        return self.model.module.state_dict()

    def step(self, batch: torch.Tensor) -> torch.Tensor:
        """One training step; its loss."""
        return self.step_fn(self.state, batch)


def _process(sde_lib, config):
    m = config.model
    if config.training.sde == "vesde":
        return sde_lib.VESDE(m.sigma_min, m.sigma_max, m.num_scales)
    return sde_lib.VPSDE(m.beta_min, m.beta_max, m.num_scales)


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


PEERS: dict[str, Callable[..., ScoreSDE]] = {"score_sde_pytorch": ScoreSDE}
