"""What a run works on: its device, its network, its checkpoints, and names of its data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distributed
import losses
import models.ema
from checkpoints import restore_checkpoint
from configs.validation import complete
from evaluation_features import state_hash
from models.utils import create_model, unwrap
from randomness import seed_for
from run_lib_memory import batch_that_fits


def complete_here(config):
    """`config` completed, on a device that is there: of several GPUs this process's own; with a
    number of images a batch, where it left that to the memory.

    Raises: ValueError for a configuration that is wrong, or a device that cannot be used.
    """
    config = complete(config)
    config.device = distributed.local_device(config.device)
    try:
        torch.zeros((), device=config.device)
        if config.device.type == "cuda":
            torch.cuda.set_device(config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"config.device={str(config.device)!r} cannot be used: {reason}; "
            "use --config.device=cpu"
        ) from error
    if config.eval.batch_size == 0:
        config.eval.batch_size = batch_that_fits(config)
    return config


def create_state(config) -> dict[str, Any]:
    """A fresh training state: model, optimizer, ema, step."""
    torch.manual_seed(seed_for(config.seed, "weights"))
    model = create_model(config)
    return {
        "model": model,
        "optimizer": losses.get_optimizer(config, model.parameters()),
        "ema": models.ema.from_config(config, model.parameters()),
        "step": 0,
    }


# --- data -----------------------------------------------------------------------------------


#: Names of folders that say which part of a set they hold, and not of which set.
_PARTS = ("train", "training", "val", "valid", "validation", "test", "eval", "images")


def data_name(config) -> str:
    """The name of the data set; of a folder, its own, or that of the folder it is a part of; of the
    dark pixels of an image, that of the file."""
    data, folder = config.data, data_folder(config)
    name = data.dataset.lower()
    if folder is not None:
        name = folder.stem.lower()
    if name == "image_density" and data.image:
        name = Path(data.image).stem.lower()
    return f"{name}-{data.category}" if data.category else name


def data_folder(config) -> Path | None:
    """Of images of one's own, the folder of the whole set, of which `data.path` may be a part."""
    if config.data.dataset.lower() != "folder" or not config.data.path:
        return None
    path = Path(config.data.path).expanduser().resolve()
    return path.parent if path.name.lower() in _PARTS else path


def fixed_subset(n: int, count: int) -> torch.Tensor:
    """The indices of `count` of n images (all, where there are no more), in an order that is
    always the same: its beginning is spread over the classes, and part of any longer one."""
    return torch.from_numpy(np.random.RandomState(0).permutation(n)[:count])


# --- checkpoints ----------------------------------------------------------------------------


def checkpoint_path(workdir: Path, number: int) -> Path:
    """Where checkpoint `number` of the run is."""
    return workdir / "checkpoints" / f"checkpoint_{number}.pth"


def list_checkpoints(workdir: Path) -> list[int]:
    """The numbers of the run's checkpoints, in order."""
    return sorted(
        int(path.stem.removeprefix("checkpoint_"))
        for path in (workdir / "checkpoints").glob("checkpoint_*.pth")
        if path.stem.removeprefix("checkpoint_").isdigit()
    )


def find_checkpoints(config, workdir: Path) -> list[int]:
    """The numbers of the run's checkpoints from eval.begin_ckpt to eval.end_ckpt; -1 is the newest.

    Raises: FileNotFoundError where there is none of them, naming what there is.
    """
    found = list_checkpoints(workdir)
    begin, end = config.eval.begin_ckpt, config.eval.end_ckpt
    if -1 in (begin, end) and found:
        begin, end = found[-1] if begin == -1 else begin, found[-1]
    chosen = [number for number in found if begin <= number <= end]
    if not found:
        raise FileNotFoundError(
            f"expected a checkpoint in {workdir / 'checkpoints'}, found none; train first with "
            "this --workdir (one is written every training.snapshot_freq steps, and at the end)"
        )
    if not chosen:
        raise FileNotFoundError(
            f"expected checkpoints {begin} to {end} in {workdir / 'checkpoints'}, found "
            f"{', '.join(map(str, found))}; --config.eval.begin_ckpt=-1 takes the newest"
        )
    return chosen


def each_checkpoint(config, workdir: Path) -> Iterator[int]:
    """Those checkpoints one by one, the same in every process; with eval.wait_s > 0 also those that
    come later, until none has come for so many seconds.

    Raises: FileNotFoundError where there is none of them.
    """
    last, since = -1, time.monotonic()
    while True:
        number, error = None, None
        if distributed.is_main():
            try:
                later = [n for n in find_checkpoints(config, workdir) if n > last]
                number = later[0] if later else None
            except FileNotFoundError as none:
                error = str(none)
        number, error = distributed.broadcast((number, error))
        if number is not None:
            yield number
            last, since = number, time.monotonic()
            continue
        ended = -1 < config.eval.end_ckpt <= last or (config.eval.end_ckpt == -1 and last >= 0)
        waited = distributed.broadcast(time.monotonic() - since)
        if ended or waited >= config.eval.wait_s:
            break
        time.sleep(min(10.0, config.eval.wait_s / 10))
    if last < 0:
        raise FileNotFoundError(error)


class _Saved:
    """An average that keeps hold of all the averages that a checkpoint has, by decay or σ_rel, also
    of those that the configuration does not name."""

    def __init__(self, ema: models.ema.ExponentialMovingAverage):
        self.main, self.others = ema, {}

    def __getattr__(self, name):
        return getattr(self.main, name)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.others = {**saved.get("rates", {}), **saved.get("profiles", {})}
        main = {name: saved[name] for name in saved if name not in ("rates", "profiles")}
        with warnings.catch_warnings():  # of others that the configuration names: not asked for
            warnings.filterwarnings("ignore", message="averages not in the file")
            self.main.load_state_dict(main)


def load_averages(config, workdir: Path, number: int, state: dict[str, Any]) -> str:
    """Put the averaged weights of checkpoint `number` into the state's model; their SHA-256.

    They are those of the main average, or of the one that `eval.ema` names by its decay or σ_rel;
    state["average"] says which.

    Raises: ValueError for an average that the checkpoint does not hold, with those that it does.
    """
    path, which = checkpoint_path(workdir, number), config.eval.ema
    ema = _Saved(state["ema"])
    wanted = {"model": state["model"], "ema": ema, "step": 0}
    restore_checkpoint(path, wanted, config.device)
    if which in (0, ema.decay):
        ema.copy_to(state["model"].parameters())
        kind = f"decay {ema.decay:g}"
    elif which in ema.others:
        chosen = ema.others[which]
        ema.copy_to(state["model"].parameters(), which=chosen["shadow_params"])
        kind = f"relative width {which:g}" if chosen["decay"] == 1 else f"decay {which:g}"
    else:
        held = ", ".join(f"{number:g}" for number in (ema.decay, *sorted(ema.others)))
        raise ValueError(
            f"{path}: expected an average with the decay or width eval.ema={which:g}, got {held}; "
            "choose one of these, or 0 for the main average"
        )
    state["step"], state["average"] = wanted["step"], f"exponential moving average, {kind}"
    compile_once(state["model"], config.eval.compile)
    return weights_hash(state["model"])


def compile_once(model: torch.nn.Module, mode: str) -> None:
    """Compile a network in place, by `eval.compile`, unless it is already; '' leaves it as it is.

    Its first call in each shape, and the first whose gradient is asked for, takes a while. CUDA
    graphs ('reduce-overhead') write an output over the last one, which solvers of several steps
    still read: it is copied.
    """
    network = unwrap(model)
    if not mode or getattr(network._compiled_call_impl, "mode", "") == mode:
        return
    network.compile(mode=mode)
    run: Any = network._compiled_call_impl
    if mode == "reduce-overhead":
        network._compiled_call_impl = lambda *args, **kwargs: run(*args, **kwargs).clone()
    call: Any = network._compiled_call_impl
    call.mode = mode


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers by name."""
    return state_hash(unwrap(model))
