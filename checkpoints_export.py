"""Checkpoints in the formats of other libraries: score_sde_pytorch, safetensors, diffusers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import checkpoints_diffusers
from checkpoints import VERSION, content_of
from checkpoints_import import adam_state
from checkpoints_names import is_network, score_sde_names
from files import write_atomically
from files_reading import SAFETENSORS_HINT, tensors_hash
from models.utils import get_sigmas, unwrap

FORMATS = ("native", "score_sde", "safetensors", "diffusers")


def export_checkpoint(path: str | os.PathLike, state: Mapping[str, Any], format: str) -> None:
    """Write a training state in one of `FORMATS`; see `export_content`."""
    export_content(path, content_of(state), unwrap(state["model"]), format)


def export_content(path, content: Mapping[str, Any], network, format: str) -> None:
    """Write what a checkpoint holds, in our names, in one of `FORMATS`.

    native: our own file. score_sde: what score_sde_pytorch's restore_checkpoint loads.
    safetensors: model and average, and the config in a JSON file beside it. diffusers: a folder
    for ScoreSdeVePipeline.from_pretrained, with the averaged weights.

    Raises: ValueError for an unknown format, or a network that the format cannot hold.
    """
    if format not in FORMATS:
        raise ValueError(f"--format: expected one of {list(FORMATS)}, got {format!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "native":
        write_atomically(path, lambda file: torch.save({"version": VERSION, **content}, file))
    elif format == "score_sde":
        saved = score_sde_content(content, network)
        write_atomically(path, lambda file: torch.save(saved, file))
    elif format == "safetensors":
        _write_safetensors(path, content, network)
    else:
        weights = averaged_weights(content, network)
        checkpoints_diffusers.write(path, weights, network, content["step"])


def averaged_weights(content: Mapping[str, Any], network) -> dict[str, torch.Tensor]:
    """The state dict with the average in place of the trained parameters, where there is one."""
    weights = dict(content["model"])
    if "ema" in content:
        trained = [name for name, p in network.named_parameters() if p.requires_grad]
        weights.update(zip(trained, content["ema"]["shadow_params"], strict=True))
    return weights


def score_sde_content(content: Mapping[str, Any], network) -> dict[str, Any]:
    """The content as score_sde_pytorch saves it: every part of it, keys as of DataParallel.

    Where there is no average it starts at the weights; where there is no optimizer, at zero
    moments. The original demands both.
    """
    names, model = score_sde_names(network), dict(content["model"])
    if is_network(network, "ncsnpp.NCSNpp"):
        model["sigmas"] = _sigmas(model["sigmas"], network)
    shadow = content.get("ema", {}).get("shadow_params")
    if shadow is None:
        shadow = [model[name] for name, p in network.named_parameters() if p.requires_grad]
    own = getattr(network, "config", None)
    ema = {"decay": own.model.ema_rate if own else 0.999, "num_updates": content["step"]}
    ema.update(content.get("ema", {}))
    optimizer = content.get("optimizer") or adam_state(network, {}, {})
    groups = [g | {"fused": None} if "fused" in g else g for g in optimizer["param_groups"]]
    return {
        "optimizer": {"state": optimizer["state"], "param_groups": groups},
        "model": {f"module.{names[key]}": model[key].contiguous() for key in names},
        "ema": ema | {"shadow_params": [s.contiguous() for s in shadow]},
        "step": content["step"],
    }


def _sigmas(ours: torch.Tensor, network) -> torch.Tensor:
    """The original keeps its table in float64."""
    exact = torch.as_tensor(get_sigmas(network.config), dtype=torch.float64)
    return exact if torch.equal(exact.to(ours), ours) else ours.double()


def _write_safetensors(path: Path, content: Mapping[str, Any], network) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ValueError(f"{path}: {SAFETENSORS_HINT}") from error
    tensors = {f"model.{key}": value for key, value in content["model"].items()}
    notes = {"format": "pt", "step": str(content["step"])}
    if "ema" in content:
        ema = content["ema"]
        trained = [name for name, p in network.named_parameters() if p.requires_grad]
        shadow = zip(trained, ema["shadow_params"], strict=True)
        tensors.update({f"ema.{name}": value for name, value in shadow})
        updates = "" if ema["num_updates"] is None else str(ema["num_updates"])
        notes.update(decay=repr(float(ema["decay"])), num_updates=updates)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    data = save(tensors, notes | {"sha256": tensors_hash(tensors, notes)})
    if getattr(network, "config", None) is not None:  # first: where it is killed, nothing is there
        _write_config(path.with_suffix(".json"), network.config)
    write_atomically(path, lambda file: file.write(data))


def _write_config(path: Path, config) -> None:
    content = json.dumps(plain_config(config), indent=1).encode()
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"--output: {path} is there already; remove it, or name another")
    write_atomically(path, lambda file: file.write(content))


def plain_config(config) -> dict[str, Any]:
    """A configuration as JSON-able values."""
    return json.loads(json.dumps(config.to_dict(), default=str))
