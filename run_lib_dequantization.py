"""The dequantizer that a configuration names, and the objective that trains one."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

import data_lib
import losses
import models.ema
from checkpoints import restore_checkpoint
from configs.validation import complete, flatten
from likelihood_dequantization import (
    UniformDequantizer,
    VariationalDequantizer,
    bits_loss,
    get_differentiable_elbo_fn,
    levels_of,
)
from models.utils import create_model
from run_lib_checks import NO_SCORE
from run_lib_state import checkpoint_path, list_checkpoints, weights_hash

#: What a dequantizer and a score model must agree on, and also to be trained on each other.
_IMAGES = ("data.dataset", "data.image_size", "data.num_channels", "data.levels")
_PROCESS = (
    "data.centered",
    "data.logit_alpha",
    "training.sde",
    "model.beta_min",
    "model.beta_max",
    "model.sigma_min",
    "model.sigma_max",
    "model.rho",
    "model.theta",
    "model.num_classes",
)


def get_dequantizer(config, device=None) -> UniformDequantizer | VariationalDequantizer:
    """The dequantizer of `config.eval.dequantization`: 'uniform', or 'variational', the averaged
    weights of `config.eval.dequantizer` (a workdir, for its newest checkpoint, or a checkpoint).

    Raises: ValueError, FileNotFoundError where there is none, or one for other images.
    """
    if config.eval.dequantization == "uniform":
        return UniformDequantizer()
    key = "eval.dequantizer"
    trained = load_trained(config.eval.dequantizer, key, str(device or config.device))
    if trained.config.training.objective != "dequantization":
        raise ValueError(
            f"config.{key}={config.eval.dequantizer!r}: expected a dequantizer, got a "
            f"{trained.config.model.name!r}; train one with --config.training.objective="
            "dequantization"
        )
    _check_agreement(config, trained, key, _IMAGES)
    about = {"dequantizer": str(trained.path), "dequantizer_step": trained.step}
    return VariationalDequantizer(
        trained.model, {**about, "dequantizer_weights": weights_hash(trained.model)}
    )


@losses.register_objective(name="dequantization")
def dequantization_objective(config, sde, train: bool) -> losses.Objective:
    """Bits/dim of the ELBO under a dequantizer, to be trained on a frozen score model.

    The score model is that of `config.training.score_checkpoint`, with its averaged weights. Its
    ELBO is taken at one time of each image, drawn uniformly in log-SNR, and the gradient goes
    through the frozen network into the dequantizer. Batches are images of discrete values,
    x = scaler(k/(L − 1)).

    Raises: ValueError, FileNotFoundError for a score model that is not there, or does not fit.
    """
    key, data = "training.score_checkpoint", config.data
    if data.uniform_dequantization:
        raise ValueError(
            "training.objective='dequantization' learns the noise of dequantisation and got images "
            "with noise; use --config.data.uniform_dequantization=False"
        )
    score = load_trained(config.training.score_checkpoint, key, str(config.device))
    if score.config.training.objective in NO_SCORE:
        name = score.config.model.name
        raise ValueError(f"config.{key}: expected a score model, got a {name!r}, {score.path}")
    _check_agreement(config, score, key, (*_IMAGES, *_PROCESS))
    scalers = {
        "scaler": data_lib.get_data_scaler(config),
        "inverse_scaler": data_lib.get_data_inverse_scaler(config),
        "levels": data.levels,
    }
    elbo = get_differentiable_elbo_fn(
        sde, eps=config.training.eps, continuous=score.config.training.continuous
    )

    def per_image(model, batch, *, draws=None, **conditions):
        if model.training != train:
            model.train(train)
        times = []

        def log_density(x, draws):
            logp, t = elbo(score.model, x, draws=draws, **conditions)
            times.append(t)
            return logp

        images = levels_of(batch, scalers["inverse_scaler"], data.levels)
        bits = bits_loss(model, images, log_density, draws=draws, **scalers)
        return bits, times[0]

    return losses.Objective(per_image)


# --- trained networks -----------------------------------------------------------------------


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
    settings = json.loads((workdir / "config.json").read_text())
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


def _check_agreement(config, trained: Trained, key: str, names: tuple[str, ...]) -> None:
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
