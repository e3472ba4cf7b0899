"""Convert a checkpoint from any known format to another; the work of `--mode convert`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints import load_file
from checkpoints_export import FORMATS, export_content
from checkpoints_import import for_network, layout_of, reader
from configs.validation import complete
from files import remove_unfinished
from files_reading import read_json
from models.ema import posthoc_ema
from models.utils import create_model

# What each format leaves behind.
_LEFT_OUT = {
    "safetensors": ("optimizer",),
    "diffusers": ("optimizer", "ema"),  # the averaged weights are the model
}


def convert(
    input: str | os.PathLike,
    output: str | os.PathLike,
    format: str,
    config: Any = None,
    *,
    ema_width: float = 0.0,
) -> str:
    """Read the checkpoint `input`, write it to `output` in `format`, and return a summary.

    The input's format is found by its content: ours, score_sde_pytorch's, NCSNv2's list, flax's
    (score_sde in JAX), safetensors, or a folder of diffusers. `config` describes the network; a
    safetensors file carries its own beside it.

    With `ema_width` the average is the power-function one of that relative width at the
    checkpoint's step, from the snapshots `ema/` in the run's folder (models/ema_posthoc.py).

    Raises: ValueError where something is missing or does not fit; nothing is written then.
    """
    source, target = _checked_paths(input, output, format)
    remove_unfinished(target.parent, target.name, target.with_suffix(".json").name)
    config = complete(_config_for(source, config))
    config.device = torch.device("cpu")
    network = create_model(config)
    saved = load_file(source, "cpu")
    content = for_network(source, saved, network)
    content = {k: content[k] for k in ("model", "optimizer", "ema", "step") if k in content}
    if ema_width:
        content["ema"] = _average_of_width(source, content, ema_width)
    if "shadow_params" not in content.get("ema", {"shadow_params": ()}):
        raise ValueError(
            f"{source}: expected an average with 'shadow_params', got {sorted(content['ema'])}, "
            "which no format knows; save it as one of models.ema"
        )
    export_content(target, content, network, format)
    kept = [p for p in ("optimizer", "ema") if p in content and p not in _LEFT_OUT.get(format, ())]
    lines = [
        f"read {source}: {_kind(source, saved)}, step {content['step']}",
        *_matched(content, network),
        f"wrote {target}: format {format}, with the {', the '.join(['weights', *kept])}"
        + (" (the averaged ones)" if format == "diffusers" and "ema" in content else ""),
    ]
    return "\n".join(lines)


def _average_of_width(source: Path, content: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The main average's state, with the weights of the average of relative width `width`."""
    known = content.get("ema", {"decay": 0.0, "num_updates": None})
    folder, step = source.resolve().parent.parent / "ema", content["step"]
    weights = posthoc_ema(folder, width, step)
    return {k: known[k] for k in ("decay", "num_updates")} | {"shadow_params": weights}


def _checked_paths(input, output, format: str) -> tuple[Path, Path]:
    for flag, value in (("--input", input), ("--output", output)):
        if not value:
            raise ValueError(f"convert: expected {flag}, a path, got none")
    if format not in FORMATS:
        raise ValueError(f"--format: expected one of {list(FORMATS)}, got {format!r}")
    source, target = Path(input), Path(output)
    if not source.exists():
        raise FileNotFoundError(f"--input: expected a checkpoint, got {source}, which is not there")
    if target.exists():
        raise ValueError(f"--output: {target} is there already; remove it, or name another")
    return source, target


def _config_for(source: Path, config: Any) -> Any:
    if config is not None:
        return config
    beside = source.with_suffix(".json")
    if source.is_file() and beside.exists():
        return read_json(beside, "the configuration of a network")
    raise ValueError(
        f"convert: expected --config, which says what network {source} holds, got none; "
        "give the configuration it was trained with"
    )


def _kind(source: Path, saved: Mapping[str, Any]) -> str:
    layout = layout_of(saved)
    names = {"flax": "score_sde (JAX)", "diffusers": "diffusers", "score_sde": "score_sde_pytorch"}
    if layout in names:
        return names[layout]
    return "safetensors" if reader(source) is not None else "native names"


def _matched(content: Mapping[str, Any], network) -> list[str]:
    """One line on each part: how many tensors, how many numbers."""
    own, params = network.state_dict(), list(network.parameters())
    count = sum(p.numel() for p in params)
    lines = [
        f"  weights: {len(content['model'])} of {len(own)} tensors matched, "
        f"{len(params)} parameters of {count:,} numbers"
    ]
    if "ema" in content:
        ema = content["ema"]
        trained = sum(p.requires_grad for p in params)
        lines.append(
            f"  ema: {len(ema['shadow_params'])} of {trained} parameters, decay {ema['decay']}, "
            f"{ema['num_updates']} updates"
        )
    else:
        lines.append("  ema: none")
    moments = content.get("optimizer", {}).get("state", {})
    lines.append(
        f"  optimizer: moments of {len(moments)} of {len(params)} parameters"
        if "optimizer" in content
        else "  optimizer: none"
    )
    return lines
