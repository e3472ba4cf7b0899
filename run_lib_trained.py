"""Trained networks that a configuration names by their workdirs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

import models.ema
from checkpoints import restore_checkpoint
from configs.validation import complete, flatten
from files_reading import read_json
from models.utils import create_model
from run_lib_state import checkpoint_path, list_checkpoints


class Trained(NamedTuple):
    """A frozen network with its averaged weights, in evaluation mode, and where it came from."""

    config: Any
    model: torch.nn.Module
    path: Path
    step: int


def load_trained(where: str, key: str, device: str) -> Trained:
    """The network that `config.<key>` = `where` names: a workdir, or a checkpoint in one.

    Raises: FileNotFoundError where it is not there, ValueError where it cannot be read.
    """
    workdir, path = _locate(where, key)
    return _load(workdir, path, device, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)  # the steps of training and of evaluation share one
def _load(workdir: Path, path: Path, device: str, written: int) -> Trained:
    settings = read_json(workdir / "config.json", "the configuration of a run")
    config = complete({**settings, "device": device})
    model = create_model(config)
    state = {
        "model": model,
        "ema": models.ema.from_config(config, model.parameters()),
        "step": 0,
    }
    restore_checkpoint(path, state, device)
    state["ema"].copy_to(model.parameters())
    return Trained(config, model.eval().requires_grad_(False), path, state["step"])


def _locate(where: str, key: str) -> tuple[Path, Path]:
    """The workdir and the checkpoint that `where` names."""
    if not where:
        raise ValueError(f"expected --config.{key}=WORKDIR, of a training or a checkpoint, got ''")
    path = Path(where).expanduser()
    if path.is_dir():
        numbers = list_checkpoints(path)
        workdir, path = path, checkpoint_path(path, numbers[-1] if numbers else 0)
    else:
        beside = [folder for folder in path.parents if (folder / "config.json").exists()]
        workdir = next((folder for folder in beside[:1]), path.parent.parent)
    for needed in (path, workdir / "config.json"):
        if not needed.exists():
            raise FileNotFoundError(
                f"config.{key}={where!r}: expected the workdir of a training, or a checkpoint in "
                f"one, got no {needed}"
            )
    return workdir, path


def check_agreement(config, trained: Trained, key: str, names: tuple[str, ...]) -> None:
    """Refuse a trained network whose settings `names` are not those of `config`.

    Raises: ValueError that lists the settings that differ.
    """
    there, here = (dict(flatten(c)) for c in (trained.config, config))
    differ = [
        f"{name}: {there[name]!r} there, {here[name]!r} here"
        for name in names
        if _plain(there[name]) != _plain(here[name])
    ]
    if differ:
        raise ValueError(
            f"config.{key}: {trained.path} does not fit this configuration "
            f"({'; '.join(differ)}); use its settings, or another checkpoint"
        )


def _plain(value):
    return value.lower() if isinstance(value, str) else value
