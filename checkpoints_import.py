"""Checkpoints of other libraries, read without running code from them and without those libraries.

A file is read in two steps. `read` and `from_list` know formats: they give a dictionary with
'model' and 'step', and 'optimizer' and 'ema' where there are any, under the file's own names.
`for_network` knows networks: it gives the same under ours, complete, or refuses.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import checkpoints_diffusers
from checkpoints_flax import read_flax
from checkpoints_names import check_numbers, check_weights, flax_names, is_network, score_sde_names
from files_reading import load_safetensors, tensors_hash

# --- formats --------------------------------------------------------------------------------


def reader(path: Path) -> Callable[[Path], dict[str, Any]] | None:
    """What reads the file, by its first bytes; None where that is torch.load."""
    if path.is_dir():
        return checkpoints_diffusers.read if checkpoints_diffusers.is_folder(path) else None
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:
        return None  # torch.load says what is wrong
    if len(head) < 9:
        return None
    if head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size:
        return read_safetensors
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):  # a MessagePack map that is not empty
        return read_flax
    return None


def read_safetensors(path: Path) -> dict[str, Any]:
    """A file of `checkpoints_export`: tensors 'model.<key>' and 'ema.<key>', step and decay."""
    tensors, notes = load_safetensors(path)
    # Files of older versions, without a SHA-256, have these notes.
    older = notes.keys() <= {"format", "step", "decay", "num_updates"}
    if not older and notes.get("sha256") != tensors_hash(tensors, notes):
        raise ValueError(
            f"{path} is not a checkpoint that can be read: its tensors and notes do not have the "
            "SHA-256 that is noted in it; the file was damaged: use a copy that is whole"
        )
    parts = {
        part: {
            k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")
        }
        for part in ("model", "ema")
    }
    needed = {"step", "decay", "num_updates"} if parts["ema"] else {"step"}
    if not parts["model"] or not needed <= notes.keys():
        raise ValueError(
            f"{path}: expected tensors named 'model.…' and the notes {sorted(needed)}, got "
            f"{sorted(tensors)[:8]} and {sorted(notes)}; give a file of --format safetensors"
        )
    try:
        saved: dict[str, Any] = {"model": parts["model"], "step": int(notes["step"])}
        if parts["ema"]:
            updates = notes["num_updates"]  # empty without warm-up
            saved["ema"] = {
                "decay": float(notes["decay"]),
                "num_updates": int(updates) if updates else None,
                "shadow_params": parts["ema"],
            }
    except ValueError as error:
        raise ValueError(f"{path}: its notes are damaged ({error}); use a whole copy") from error
    return saved


def from_list(path, saved: list) -> dict[str, Any]:
    """The list [model, optimizer, epoch, step, average] of NCSN and NCSNv2 (ermongroup).

    NCSN writes the first two only; the average, {name: tensor}, does not tell its decay.
    """
    if len(saved) < 2 or not all(isinstance(part, dict) for part in saved[:2]):
        raise ValueError(
            f"{path}: expected a list [model, optimizer, epoch, step, average], as NCSNv2 writes "
            f"it, got {[type(part).__name__ for part in saved[:8]]}"
        )
    result: dict[str, Any] = {"model": saved[0], "optimizer": saved[1], "step": 0}
    if len(saved) > 3:
        result["step"] = saved[3]
    if len(saved) > 4:
        result["ema"] = {"decay": None, "num_updates": None, "shadow_params": saved[4]}
    return result


# --- structure ------------------------------------------------------------------------------


def check_structure(path, saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless the parts of a checkpoint are what their names say.

    An average without 'shadow_params', and an optimizer without 'param_groups', are of one's own.
    """
    step, model = saved["step"], saved["model"]
    optimizer, ema = saved.get("optimizer", {}), saved.get("ema", {})
    averages = [ema, *_values(ema.get("rates", {})), *_values(ema.get("profiles", {}))]
    groups = optimizer.get("param_groups", [])
    groups = groups if isinstance(groups, list) else [groups]
    wrong = [
        what
        for what, right in (
            ("'step', a count", _is_count(step)),
            ("'model', tensors by name", all(_is_weight(*item) for item in model.items())),
            ("'ema', averages", all(isinstance(a, Mapping) and _is_average(a) for a in averages)),
            ("'optimizer', groups of parameters", all(_is_group(group) for group in groups)),
            (
                "'optimizer', moments by number",
                all(isinstance(m, Mapping) for m in _values(optimizer.get("state", {}))),
            ),
        )
        if not right
    ]
    if wrong:
        raise ValueError(
            f"{path}: expected {', and '.join(wrong)}, got something else; the file is damaged, or "
            "of another kind: use a copy that is whole"
        )


def _values(tree: Any) -> list[Any]:
    """What is in a mapping; of anything else itself, which is none of what belongs there."""
    return list(tree.values()) if isinstance(tree, Mapping) else [tree]


def _is_count(value: Any) -> bool:
    try:
        return not isinstance(value, str) and value == int(value) >= 0
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and (
        isinstance(value, torch.Tensor) or key.endswith("_extra_state")
    )


def _is_average(average: Mapping[str, Any]) -> bool:
    if "shadow_params" not in average:
        return True
    shadow, decay = average["shadow_params"], average.get("decay", "")
    values = shadow.values() if isinstance(shadow, Mapping) else shadow
    return (
        isinstance(shadow, Mapping | list | tuple)
        and all(isinstance(value, torch.Tensor) for value in values)
        and (decay is None or (isinstance(decay, float | int) and 0 <= decay <= 1))
        and (average.get("num_updates", "") is None or _is_count(average.get("num_updates", "")))
    )


#: What torch's optimizers may be told besides numbers; None is its choice.
_SWITCHES = (
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "nesterov"),
    "decoupled_weight_decay",
)


def _is_group(group: Any) -> bool:
    """A group of parameters; its numbers, where it has them, are finite, its switches switches."""
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
        return False
    if not all(type(number) is int for number in group["params"]):
        return False
    if not all(isinstance(group.get(key), bool | None) for key in _SWITCHES):
        return False
    numbers = [group.get(key, 0.0) for key in ("lr", "eps", "weight_decay")]
    try:
        betas = list(group.get("betas", (0.9, 0.999)))
        return len(betas) == 2 and all(math.isfinite(x) for x in [*numbers, *betas])
    except (TypeError, ValueError, RuntimeError):
        return False


# --- networks -------------------------------------------------------------------------------


def layout_of(saved: Mapping[str, Any]) -> str:
    """Whose names the weights have: 'flax', 'diffusers', 'score_sde' or 'native'."""
    numbered = any(_bare(key).startswith("all_modules.") for key in saved["model"])
    return saved.get("layout") or ("score_sde" if numbered else "native")


def for_network(path, saved: Mapping[str, Any], network: torch.nn.Module) -> dict[str, Any]:
    """`saved` in the names and shapes of `network`; the average is a list in parameter order.

    Raises: ValueError where anything is missing, unknown or of another shape; it lists the keys,
      by the file's names.
    """
    layout, model = layout_of(saved), saved["model"]
    result = dict(saved)
    if layout == "flax":
        result.update(_from_flax(path, saved, network))
    elif layout == "diffusers":
        result["model"] = checkpoints_diffusers.for_network(path, saved, network)
    else:
        if model.keys() != network.state_dict().keys():  # a network may have its own `module`
            model = {_bare(key): value for key, value in model.items()}
        if layout == "score_sde" and is_network(network, "ncsnpp.NCSNpp"):
            model = _from_score_sde(path, model, network)
        result["model"] = _without_known_tables(model, network)
    check_weights(path, network.state_dict(), result["model"])
    check_numbers(path, dict(network.named_parameters()), result["model"])
    if "ema" in result:
        result["ema"] = _average(path, result["ema"], network)
    if "optimizer" in result:
        _check_moments(path, result["optimizer"], network)
    return result


def for_state(path, saved: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """`for_network`, fitted to a training state that lacks less than the file does.

    A file without an average gives one that starts at its weights. An optimizer of another
    library brings its numbers (moments, learning rate …), not how they are computed (`fused` …).
    """
    network = state["model"]
    result = for_network(path, saved, network)
    average: Any = state.get("ema")
    ours = hasattr(average, "shadow_params")
    if ours and "ema" in result and "shadow_params" not in result["ema"]:
        raise ValueError(
            f"{path}: expected an average with 'shadow_params', got "
            f"{sorted(map(str, result['ema']))}; the file is damaged, or its average another kind"
        )
    if ours and "ema" not in result:
        result["ema"] = average.state_dict() | {"shadow_params": _trained(network, result["model"])}
    groups = result.get("optimizer", {}).get("param_groups", ())
    if result["model"].keys() != saved["model"].keys() and "optimizer" in state:
        own_groups = state["optimizer"].param_groups
        kept = ("fused", "foreach", "capturable", "differentiable")
        for group, own in zip(groups, own_groups, strict=False):
            missing = {key: own[key] for key in own if key not in group and key != "params"}
            group.update(missing | {key: own[key] for key in kept if key in own})
    return result


def _bare(key: str) -> str:
    return key.removeprefix("module.")  # of DataParallel


def _from_score_sde(path, model: Mapping, network) -> dict[str, torch.Tensor]:
    names, own = score_sde_names(network), network.state_dict()
    expected = {theirs: own[ours] for ours, theirs in names.items()}
    check_weights(path, expected, model)
    check_numbers(path, expected, model)
    # The table of noise levels has float64 there.
    return {ours: model[theirs].to(own[ours].dtype) for ours, theirs in names.items()}


def _without_known_tables(model: Mapping, network) -> dict[str, torch.Tensor]:
    """Without the tables that this network computes and others save (`sigmas` of NCSN)."""
    own = network.state_dict()
    tables = {k: v for k, v in network.named_buffers() if k not in own}
    return {
        key: value
        for key, value in model.items()
        if key not in tables
        or not value.is_floating_point()
        or value.shape != tables[key].shape
        or not torch.allclose(value.to(tables[key]), tables[key])
    }


def _trained(network, model: Mapping) -> list[torch.Tensor]:
    return [model[name] for name, p in network.named_parameters() if p.requires_grad]


def _average(path, average: Mapping, network) -> dict[str, Any]:
    if "shadow_params" not in average:  # an average of one's own
        return dict(average)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for others in (average.get("rates", {}), average.get("profiles", {})):
        for other in others.values():
            _shadow(path, other.get("shadow_params", ()), trained)
    result = {**average, "shadow_params": _shadow(path, average["shadow_params"], trained)}
    if result.get("decay", 0) is None:
        result["decay"] = _option(network, "model", "ema_rate", 0.999)
    return result


def _shadow(path, shadow: Any, trained: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """An average as a list in the order of the trained parameters, checked against them."""
    title = f"the average of {path}"
    if isinstance(shadow, Mapping):
        named = {_bare(name): value for name, value in shadow.items()}
    elif len(shadow) == len(trained):
        named = dict(zip(trained, shadow, strict=True))
    else:
        raise ValueError(
            f"{title} belongs to another network or configuration; expected {len(trained)} "
            f"parameters, got {len(shadow)}"
        )
    check_weights(title, trained, named)
    check_numbers(title, trained, named)
    return [named[name] for name in trained]


#: The moments that torch's optimizers keep, each of the shape of its parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


def _check_moments(path, optimizer: Mapping, network) -> None:
    """Moments stand by number; refuse those that cannot be this network's parameters'."""
    params = list(network.named_parameters())
    for number, moments in optimizer.get("state", {}).items():
        if not isinstance(number, int) or not 0 <= number < len(params):
            continue  # an optimizer of one's own; its number of parameters is checked later
        name, p = params[number]
        for kind in _MOMENTS:
            moment = moments.get(kind)
            if kind not in moments or (moment is None and kind == "momentum_buffer"):  # of SGD
                continue
            if not isinstance(moment, torch.Tensor) or moment.shape != p.shape:
                got = tuple(getattr(moment, "shape", ())) or type(moment).__name__
                raise ValueError(
                    f"{path}: expected moments of shape {tuple(p.shape)} for parameter {number} in "
                    f"the optimizer, got {got}; it belongs to another network"
                )
            check_numbers(f"the optimizer of {path}", {name: p}, {name: moment})


def _option(network, section: str, key: str, default):
    config = getattr(network, "config", None)
    return default if config is None else config.get(section, {}).get(key, default)


def _from_flax(path, saved: Mapping, network) -> dict[str, Any]:
    """Weights, average and Adam's moments of a flax tree, {path in the tree: tensor} each."""
    names, own = flax_names(network), network.state_dict()

    def turned(tree: Mapping, title) -> dict[str, torch.Tensor]:
        known = {
            theirs: turn(tree[theirs])
            for ours, (theirs, turn) in names.items()
            if theirs in tree and tree[theirs].ndim == own[ours].ndim
        }
        expected = {theirs: own[ours] for ours, (theirs, _) in names.items()}
        check_weights(title, expected, {**tree, **known})
        return {ours: known[theirs].contiguous() for ours, (theirs, _) in names.items()}

    result: dict[str, Any] = {"model": {"sigmas": own["sigmas"], **turned(saved["model"], path)}}
    if "ema" in saved:
        shadow = turned(saved["ema"]["shadow_params"], f"the average of {path}")
        trained = [name for name, p in network.named_parameters() if p.requires_grad]
        result["ema"] = saved["ema"] | {"shadow_params": {name: shadow[name] for name in trained}}
    if "optimizer" in saved:
        moments = {
            kind: turned(saved["optimizer"][kind], f"the optimizer of {path}")
            for kind in ("exp_avg", "exp_avg_sq")
        }
        result["optimizer"] = adam_state(network, moments, saved["optimizer"])
    return result


def adam_state(network, moments: Mapping[str, Mapping], options: Mapping) -> dict[str, Any]:
    """Adam's state dict, as get_optimizer's for this network, from moments by our names.

    `options` are 'step' and 'lr' where known; the rest is what the network's config says.
    """
    names = [name for name, _ in network.named_parameters()]
    step = torch.tensor(float(options.get("step", 0)))
    state = {
        number: {"step": step.clone(), **{kind: moments[kind][name] for kind in moments}}
        for number, (name, p) in enumerate(network.named_parameters())
        if moments and p.requires_grad
    }
    group = {
        "lr": options.get("lr", _option(network, "optim", "lr", 2e-4)),
        "betas": (_option(network, "optim", "beta1", 0.9), 0.999),
        "eps": _option(network, "optim", "eps", 1e-8),
        "weight_decay": _option(network, "optim", "weight_decay", 0),
        "amsgrad": False,
    }
    return {"state": state, "param_groups": [group | {"params": list(range(len(names)))}]}
