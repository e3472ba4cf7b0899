"""VE NCSN++ networks with skip pyramids as 🤗 diffusers' UNet2DModel, and back.

diffusers has the networks of the published 256 and 1024 pixel models: blocks with FIR resampling,
an image pyramid on both sides, Fourier features of log σ. Its blocks fix what NCSN++ leaves open,
so most other configurations cannot be written; `unet_config` names the option.
"""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints_names import check_weights, is_network
from files import unwritable
from files_reading import load_safetensors, load_torch, read_json, tensors_hash

HINT = "diffusers is not installed; pip install 'score-sde[diffusers]'"

# The only value of an option that diffusers' blocks know.
_FIXED = {
    "model.embedding_type": "fourier",
    "model.resblock_type": "biggan",
    "model.progressive": "output_skip",
    "model.progressive_input": "input_skip",
    "model.progressive_combine": "sum",
    "model.fir": True,
    "model.fir_kernel": (1, 3, 3, 1),
    "model.skip_rescale": True,
    "model.conditional": True,
    "model.scale_by_sigma": True,
    "model.nonlinearity": "swish",
    "model.num_classes": 0,
    "data.num_channels": 3,
    "data.centered": False,  # the pipeline clamps its images to [0, 1]
    "training.sde": "vesde",
    "training.continuous": True,
}
# Our names -> diffusers', one after the other.
_NAMES = (
    (r"^embedding\.fourier\.W", "time_proj.weight"),
    (r"^embedding\.Dense_0", "time_embedding.linear_1"),
    (r"^embedding\.Dense_1", "time_embedding.linear_2"),
    (r"^down\.(\d+)\.blocks\.(\d+)\.block\.", r"down_blocks.\1.resnets.\2."),
    (r"^down\.(\d+)\.blocks\.(\d+)\.attention\.", r"down_blocks.\1.attentions.\2."),
    (r"^down\.(\d+)\.downsample\.", r"down_blocks.\1.resnet_down."),
    (r"^down\.(\d+)\.combine\.Conv_0", r"down_blocks.\1.skip_conv"),
    (r"^middle\.block_in\.", "mid_block.resnets.0."),
    (r"^middle\.attention\.", "mid_block.attentions.0."),
    (r"^middle\.block_out\.", "mid_block.resnets.1."),
    (r"^up\.(\d+)\.blocks\.(\d+)\.", r"up_blocks.\1.resnets.\2."),
    (r"^up\.(\d+)\.attention\.", r"up_blocks.\1.attentions.0."),
    (r"^up\.(\d+)\.upsample\.", r"up_blocks.\1.resnet_up."),
    (r"^up\.(\d+)\.head\.GroupNorm_0", r"up_blocks.\1.skip_norm"),
    (r"^up\.(\d+)\.head\.Conv_0", r"up_blocks.\1.skip_conv"),
    (r"(attentions\.\d+)\.GroupNorm_0", r"\1.group_norm"),
    (r"NIN_0", "to_q"),
    (r"NIN_1", "to_k"),
    (r"NIN_2", "to_v"),
    (r"NIN_3", "to_out.0"),
    (r"\.W$", ".weight"),
    (r"\.b$", ".bias"),
    (r"GroupNorm_0", "norm1"),
    (r"GroupNorm_1", "norm2"),
    (r"Dense_0", "time_emb_proj"),
    (r"Conv_0", "conv1"),
    (r"Conv_1", "conv2"),
    (r"Conv_2", "conv_shortcut"),
)


def unet_config(config) -> dict[str, Any]:
    """The arguments of UNet2DModel that build the network of a configuration.

    Raises: ValueError where diffusers has no such network; it names the option.
    """
    _check_fixed(config)
    m, levels = config.model, range(len(config.model.ch_mult))
    attends = [config.data.image_size // 2**i in m.attn_resolutions for i in levels]
    widths = [m.nf * multiple for multiple in m.ch_mult]
    if m.ch_mult[0] != 1:
        raise ValueError(
            f"diffusers' VE networks need model.ch_mult to begin with 1, got {tuple(m.ch_mult)}"
        )
    _check_widths(widths, attends)
    return {
        "sample_size": config.data.image_size,
        "in_channels": 3,
        "out_channels": 3,
        "center_input_sample": True,
        "time_embedding_type": "fourier",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "block_out_channels": tuple(widths),
        "down_block_types": tuple(_block("Down", a) for a in attends),
        "up_block_types": tuple(_block("Up", a) for a in reversed(attends)),
        "layers_per_block": m.num_res_blocks,
        "mid_block_scale_factor": math.sqrt(2),
        "dropout": m.dropout,
        "act_fn": "silu",
        "attention_head_dim": None,  # one head
        "norm_num_groups": None,  # min(channels / 4, 32)
        "norm_eps": 1e-6,
        "resnet_time_scale_shift": "default",
        "add_attention": True,
    }


def _check_fixed(config) -> None:
    name = config.model.name
    if name != "ncsnpp":
        raise ValueError(
            "only VE NCSN++ can be written for diffusers; these need model.name "
            f"'ncsnpp', got {name!r}; use --format safetensors or score_sde"
        )
    for key, value in _FIXED.items():
        section, _, option = key.partition(".")
        got = config[section].get(option, value)
        got = got.lower() if isinstance(got, str) else got
        if (tuple(got) if isinstance(got, list) else got) != value:
            raise ValueError(
                f"only VE NCSN++ can be written for diffusers; these need {key}={value!r}, "
                f"got {got!r}; use --format safetensors or score_sde for this network"
            )


def _block(direction: str, attends: bool) -> str:
    return f"{'Attn' if attends else ''}Skip{direction}Block2D"


def _check_widths(widths, attends) -> None:
    for level, (width, attending) in enumerate(zip(widths, attends, strict=True)):
        if attending and (width < 128 or width % 32):
            raise ValueError(
                "diffusers' attention blocks need at least 128 channels, a multiple of 32, got "
                f"{width} on level {level}; change model.nf, ch_mult or attn_resolutions"
            )
        for channels in (width, 2 * width, width + widths[max(level - 1, 0)]):
            if channels % max(min(channels // 4, 32), 1):
                raise ValueError(
                    "diffusers' blocks need channels divisible by min(channels / 4, 32), got "
                    f"{channels} on level {level}; change model.nf or model.ch_mult"
                )


def diffusers_names(network: torch.nn.Module) -> dict[str, str]:
    """{our key: diffusers' key} of every parameter; the table of noise levels is no part of it."""
    last = len(network.get_submodule("up")._modules) - 1
    ends = {f"up.{last}.head.GroupNorm_0": "conv_norm_out", f"up.{last}.head.Conv_0": "conv_out"}
    names = {}
    for key, _ in network.named_parameters():
        module, _, leaf = key.rpartition(".")
        theirs = f"{ends[module]}.{leaf}" if module in ends else key
        for pattern, replacement in _NAMES:
            theirs = re.sub(pattern, replacement, theirs)
        names[key] = theirs
    return names


def _turn(key: str, value: torch.Tensor) -> torch.Tensor:
    """Our W (in, out) of a NIN is the transpose of their linear layer's weight."""
    return value.t() if re.search(r"NIN_\d\.W$", key) else value


def is_folder(path: Path) -> bool:
    """Whether it looks like a pipeline or a model that diffusers saved."""
    return (path / "model_index.json").exists() or (path / "config.json").exists()


def _diffusers(path: Path) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"{path}: {HINT}") from error
    return diffusers


#: Names in folders of before diffusers 0.15 -> today's.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read(path: Path) -> dict[str, Any]:
    """The weights of a folder that diffusers saved, a pipeline's or a UNet's, in its names.

    Nothing is built from its description, which could ask for any amount of memory.

    Raises: ValueError where a file of it is missing or damaged.
    """
    diffusers = _diffusers(path)
    folder = path / "unet" if (path / "unet").is_dir() else path
    described, notes = folder / "config.json", path / "score_sde.json"
    if not described.is_file():
        raise ValueError(f"{path}: expected {described}, which describes a UNet2DModel, got none")
    known = inspect.signature(diffusers.UNet2DModel.__init__).parameters.values()
    unet = {p.name: p.default for p in known} | read_json(described, "a UNet2DModel's options")
    file, weights = _weights(path, folder)
    model = {
        re.sub(
            r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
            lambda found: f"{found[1]}.{_OLD_NAMES[found[2]]}.",
            key,
        ): value
        for key, value in weights.items()
    }
    about = read_json(notes, "notes of score-sde") if notes.exists() else {}
    older = about.keys() <= {"step"}  # without a SHA-256
    if not older and about.get("sha256") != tensors_hash(model, about):
        raise ValueError(
            f"{path} is not a checkpoint that can be read: {file.name} and {notes.name} do not "
            "have the SHA-256 noted there; one was damaged: use a copy that is whole"
        )
    return {"layout": "diffusers", "model": model, "step": about.get("step", 0), "unet": unet}


def _weights(path: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    names = [f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
    there = [folder / name for name in names if (folder / name).is_file()]
    if not there:
        raise ValueError(f"{path}: expected the weights {' or '.join(names)} in {folder}, got none")
    if there[0].suffix == ".safetensors":
        return there[0], load_safetensors(there[0])[0]
    model = load_torch(there[0], "cpu", what="file of weights")
    if not isinstance(model, dict) or not all(isinstance(v, torch.Tensor) for v in model.values()):
        raise ValueError(f"{there[0]}: expected tensors by name, got a {type(model).__name__}")
    return there[0], model


def for_network(path, saved: Mapping[str, Any], network) -> dict[str, torch.Tensor]:
    """The weights of `read` in the names of `network`, which must be the same network."""
    if not is_network(network, "ncsnpp.NCSNpp"):
        raise ValueError(
            f"{path}: diffusers' VE networks need model.name 'ncsnpp', got {type(network).__name__}"
        )
    expected = unet_config(network.config)
    got = saved["unet"]
    different = [
        f"{key}: {_plain(got.get(key))} instead of {_plain(value)}"
        for key, value in expected.items()
        if key not in ("dropout", "sample_size", "flip_sin_to_cos", "freq_shift")
        and not _same(got.get(key), value)
    ]
    if different:
        raise ValueError(f"{path} holds another network: {'; '.join(different)}")
    names, own = diffusers_names(network), network.state_dict()
    turned = {theirs: _turn(ours, own[ours]) for ours, theirs in names.items()}
    check_weights(path, turned, saved["model"])
    weights = {ours: _turn(ours, saved["model"][theirs]) for ours, theirs in names.items()}
    return {"sigmas": own["sigmas"], **{key: w.contiguous() for key, w in weights.items()}}


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


def _same(a, b) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6)
    return _plain(a) == _plain(b)


def write(path: Path, weights: Mapping[str, torch.Tensor], network, step: int) -> None:
    """Write a folder that ScoreSdeVePipeline.from_pretrained loads.

    `weights` are the network's, by our names: give the averaged ones, there is room for one set.
    """
    options = unet_config(network.config)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: expected no such file or folder; remove it, or name another")
    diffusers = _diffusers(path)
    config = network.config
    unet = diffusers.UNet2DModel(**options)
    names = diffusers_names(network)
    state = {theirs: _turn(ours, weights[ours]).contiguous() for ours, theirs in names.items()}
    check_weights("the network built by diffusers", unet.state_dict(), state)
    unet.load_state_dict(state)
    scheduler = diffusers.ScoreSdeVeScheduler(
        num_train_timesteps=config.model.num_scales,
        snr=config.sampling.snr,
        sigma_min=config.model.sigma_min,
        sigma_max=config.model.sigma_max,
        sampling_eps=1e-5,
        correct_steps=config.sampling.n_steps_each,
    )
    pipeline = diffusers.ScoreSdeVePipeline(unet.eval(), scheduler)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pipeline.save_pretrained(str(temporary))
        notes: dict[str, Any] = {"step": step}
        notes["sha256"] = tensors_hash(unet.state_dict(), notes)
        (temporary / "score_sde.json").write_text(json.dumps(notes))
        os.replace(temporary, path)
    except Exception as error:  # safetensors has errors of its own for a full disk
        full = re.search(r"No space left|os error 28\b", str(error))
        if full:
            reason = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif isinstance(error, OSError):
            reason = error
        else:
            raise
        size = sum(tensor.nbytes for tensor in state.values())
        shutil.rmtree(temporary, ignore_errors=True)
        raise unwritable(path, reason, size=size) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
