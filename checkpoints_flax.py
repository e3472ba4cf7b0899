"""Checkpoints of score_sde in JAX, read without JAX: flax's MessagePack encoding of a State.

Flax writes arrays as extensions: 1 is an array, packed as (shape, dtype name, bytes); 2 a complex
number; 3 a NumPy scalar, packed as an array. Lists become maps with keys '0', '1', …; arrays of
more than 1 GiB become maps with flat chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"


def read_flax(path: Path) -> dict[str, Any]:
    """A State of score_sde: its trees as {'Conv_0/kernel': tensor}, in flax's names and layouts.

    Raises: ValueError where the file is damaged or no such State.
    """
    tree = _decode(path)
    if not isinstance(tree, dict) or not {"optimizer", "params_ema", "step"} <= tree.keys():
        got = sorted(map(str, tree))[:8] if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(
            f"{path}: expected a State of score_sde with 'optimizer', 'params_ema' and 'step', "
            f"got {got}"
        )
    try:
        return _content(tree)
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"{path}: expected a State of score_sde with Adam's moments, got another structure "
            f"({type(error).__name__}: {error})"
        ) from error


def _content(tree: Mapping) -> dict[str, Any]:
    optimizer, state = tree["optimizer"], tree["optimizer"]["state"]
    moments = flatten(state["param_states"])
    parts = {
        kind: {
            key.removesuffix(f"/{name}"): value
            for key, value in moments.items()
            if key.endswith(f"/{name}")
        }
        for kind, name in (("exp_avg", "grad_ema"), ("exp_avg_sq", "grad_sq_ema"))
    }
    return {
        "layout": "flax",
        "model": flatten(optimizer["target"]),
        "ema": {  # without warm-up there
            "decay": float(tree["ema_rate"]),
            "num_updates": None,
            "shadow_params": flatten(tree["params_ema"]),
        },
        "optimizer": {"step": int(state["step"]), "lr": float(tree["lr"]), **parts},
        "step": int(tree["step"]),
    }


def flatten(tree: Mapping, prefix: str = "") -> dict[str, torch.Tensor]:
    """{'a': {'b': array}} -> {'a/b': tensor}."""
    leaves: dict[str, torch.Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{prefix}{name}/"))
        else:
            leaves[f"{prefix}{name}"] = torch.from_numpy(np.array(value))
    return leaves


def _decode(path: Path) -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise ValueError(
            f"{path} looks like a checkpoint of score_sde in JAX, and msgpack is not installed; "
            "pip install 'score-sde[jax]'"
        ) from error

    def extension(code: int, data: bytes):
        unpacked = msgpack.unpackb(data, raw=True)
        if code == _COMPLEX:
            return complex(*unpacked)
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"unknown extension {code}")
        shape, dtype, buffer = unpacked
        array = np.frombuffer(buffer, _dtype(dtype.decode())).reshape(shape)
        return array if code == _ARRAY else array[()]

    try:
        with open(path, "rb") as file:
            tree = msgpack.unpackb(file.read(), ext_hook=extension, raw=False)
        return _joined(tree)
    except Exception as error:  # damaged bytes fail in a dozen ways
        raise ValueError(
            f"{path} is not a checkpoint that can be read (truncated, damaged, or of another "
            f"kind): {str(error) or type(error).__name__}; use a copy that is whole"
        ) from error


def _dtype(name: str) -> np.dtype:
    dtype = np.dtype(name)  # a TypeError for bfloat16, which NumPy does not have
    if dtype.kind not in "biufc":
        raise ValueError(f"expected an array of numbers, got dtype {name!r}")
    return dtype


def _joined(tree: Any) -> Any:
    """The tree with its chunked arrays put together."""
    if not isinstance(tree, dict):
        return tree
    if tree.get(_CHUNKED):
        shape = tree["shape"]
        shape = [shape[k] for k in sorted(shape, key=int)] if isinstance(shape, dict) else shape
        chunks = [tree["chunks"][k] for k in sorted(tree["chunks"], key=int)]
        return np.concatenate([np.ravel(chunk) for chunk in chunks]).reshape(shape)
    return {key: _joined(value) for key, value in tree.items()}
