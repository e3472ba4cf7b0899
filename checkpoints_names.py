"""What other libraries call the parameters of our networks, derived from the networks themselves.

score_sde_pytorch numbers the layers of a U-Net in the order in which they are made
(`all_modules.7.Conv_0.weight`); flax, and so score_sde in JAX, numbers those of each class
(`ResnetBlockBigGANpp_3/Conv_0/kernel`). Our layers are made in the same order and named by their
place (`down.0.blocks.1.block.Conv_0.weight`), so one walk gives both.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from models import layerspp
from models.up_or_down_sampling import Conv2d

_LAYERS = (
    layerspp.AttnBlockpp,
    layerspp.Combine,
    layerspp.Downsample,
    layerspp.GaussianFourierProjection,
    layerspp.ResnetBlockBigGANpp,
    layerspp.ResnetBlockDDPMpp,
    layerspp.Upsample,
    nn.Conv2d,
    nn.GroupNorm,
    nn.Linear,
)
# Flax's classes, where they are not called as ours are; DDPM has layers of its own there.
_FLAX_CLASSES = {"Conv2d": "Conv", "Linear": "Dense"}
_FLAX_CLASSES_DDPM = {"AttnBlockpp": "AttnBlock", "ResnetBlockDDPMpp": "ResnetBlockDDPM"}


def is_network(network: nn.Module, kind: str) -> bool:
    """Whether it is one of our networks, 'ncsnpp.NCSNpp' say, or derived from it.

    Importing a network's module registers its name, which may be taken by one of the user's own;
    a module that was never imported has no networks.
    """
    module, _, name = kind.rpartition(".")
    loaded = sys.modules.get(f"models.{module}")
    return loaded is not None and isinstance(network, getattr(loaded, name))


def layers_in_order(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The (path, layer) of a U-Net's layers in the order in which the original makes them."""

    def walk(prefix: str, module: nn.Module):
        for name, child in module.named_children():
            if isinstance(child, _LAYERS):
                yield prefix + name, child
            else:
                yield from walk(f"{prefix}{name}.", child)

    return walk("", network)


def score_sde_names(network: nn.Module) -> dict[str, str]:
    """{our key: score_sde_pytorch's} for every tensor of the state dict, in the original's order.

    RefineNets (NCSN, NCSNv2) and networks of one's own keep their names.

    Raises: ValueError where a U-Net has tensors that the original does not know (class labels).
    """
    if not is_network(network, "ncsnpp.NCSNpp"):
        return {key: key for key in network.state_dict()}
    names, number = {"sigmas": "sigmas"}, 0
    for path, layer in layers_in_order(network):
        place = path.rpartition(".")[2]
        if place.startswith("pyramid_") and not getattr(layer, "with_conv", True):
            continue  # the original keeps these two outside its list
        for key in layer.state_dict():
            names[f"{path}.{key}"] = f"all_modules.{number}.{key}"
        number += 1
    _check_complete(network, names, "score_sde_pytorch")
    return names


def flax_names(network: nn.Module) -> dict[str, tuple[str, Callable]]:
    """{our key: (path in score_sde's flax tree, what turns its array into ours)}.

    The table of noise levels is no part of the tree.

    Raises: ValueError where the network is not one of score_sde's U-Nets.
    """
    if not is_network(network, "ncsnpp.NCSNpp"):
        raise ValueError(
            "score_sde's JAX checkpoints are read for the networks 'ncsnpp' and 'ddpm', got "
            f"{type(network).__name__}; its RefineNets resize by another rule than PyTorch's"
        )
    classes = _FLAX_CLASSES
    if is_network(network, "ddpm.DDPM"):
        classes = classes | _FLAX_CLASSES_DDPM
    counts: Counter[str] = Counter()
    names: dict[str, tuple[str, Callable]] = {}
    for path, layer in layers_in_order(network):
        kind = classes.get(type(layer).__name__, type(layer).__name__)
        for inner, module in layer.named_modules():
            for key, _ in module.named_parameters(recurse=False):
                leaf, turn = _flax_leaf(module, key)
                steps = [f"{kind}_{counts[kind]}", *inner.split("."), leaf]
                ours = ".".join(filter(None, (path, inner, key)))
                names[ours] = "/".join(filter(None, steps)), turn
        counts[kind] += 1
    _check_complete(network, {"sigmas", *names}, "score_sde")
    return names


def _flax_leaf(module: nn.Module, key: str) -> tuple[str, Callable]:
    """Flax's name of a layer's own parameter, and what turns its array into ours."""
    if isinstance(module, nn.Conv2d | Conv2d) and key == "weight":
        name = "kernel" if isinstance(module, nn.Conv2d) else "weight"
        return name, lambda w: w.permute(3, 2, 0, 1)  # HWIO -> OIHW
    if isinstance(module, nn.Linear) and key == "weight":
        return "kernel", lambda w: w.t()
    if isinstance(module, nn.GroupNorm) and key == "weight":
        return "scale", lambda w: w
    return key, lambda w: w


def _check_complete(network: nn.Module, names, library: str) -> None:
    unknown = [key for key in network.state_dict() if key not in names]
    if unknown:
        raise ValueError(
            f"{library} has no counterpart of {len(unknown)} tensors of this network: "
            f"{', '.join(unknown[:8])}; use the format 'safetensors' or 'native'"
        )


def check_weights(path, expected: Mapping, got: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, with the keys that differ, unless names and shapes are the expected."""
    missing = [key for key in expected if key not in got]
    unknown = [key for key in got if key not in expected]
    shapes = [
        f"{key}: {tuple(got[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in got and got[key].shape != expected[key].shape
    ]
    if missing or unknown or shapes:
        parts = [
            f"{len(keys)} {what}: {', '.join(keys[:8])}{', …' if len(keys) > 8 else ''}"
            for what, keys in (
                ("missing", missing),
                ("not of this network", unknown),
                ("of another shape", shapes),
            )
            if keys
        ]
        raise ValueError(f"{path} belongs to another network or configuration; {'; '.join(parts)}")


def check_numbers(path, expected: Mapping, got: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where weights are not floating-point numbers, or not finite."""
    wrong = [
        key
        for key, value in expected.items()
        if value.is_floating_point() and not _is_finite(got[key])
    ]
    if wrong:
        raise ValueError(
            f"{path}: expected finite numbers, got {len(wrong)} tensors with NaN, infinite or "
            f"other values: {', '.join(wrong[:8])}{', …' if len(wrong) > 8 else ''}; the training "
            "had diverged, or the file is damaged: use an earlier checkpoint"
        )


def _is_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.layout != torch.strided:
        return False
    return bool((value if value.itemsize > 1 else value.float()).isfinite().all())
