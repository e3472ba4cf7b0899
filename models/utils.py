"""The model registry, and the functions that turn a network into a score."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import torch

import sde_lib
from parametrization import (
    ScoreFunction,
    as_parametrization,
    check_output,
    declared_parametrization,
    legacy_parametrization,
)

_MODELS: dict[str, type] = {}
_BUILTIN_MODULES = ("classifier", "ddpm", "ncsnpp", "ncsnv2", "dequantizer", "mlp")


def register_model(cls=None, *, name: str | None = None):
    """Register a network class, built as `cls(config)`, to be chosen by `config.model.name`.

    A user's network wins over a built-in one of its name, whichever is imported first.
    """

    def register(cls):
        key = name or cls.__name__
        known = _MODELS.get(key)
        if known is not None and _is_builtin(cls):
            return cls
        if known is not None and not _is_builtin(known):
            raise ValueError(f"a model named {key!r} is already registered: {known!r}")
        _MODELS[key] = cls
        return cls

    return register if cls is None else register(cls)


def _is_builtin(cls: type) -> bool:
    return cls.__module__ in {f"models.{module}" for module in _BUILTIN_MODULES}


def get_model(name: str) -> type:
    """The network class registered under `name`."""
    if name not in _MODELS:
        for module in _BUILTIN_MODULES:
            importlib.import_module(f"models.{module}")
    if name not in _MODELS:
        raise ValueError(f"model.name {name!r} is unknown; registered: {sorted(_MODELS)}")
    return _MODELS[name]


def create_model(config) -> torch.nn.Module:
    """Build `config.model.name` on `config.device`, in channels-last memory where
    `config.training.channels_last`; what `config.model` declares of its output and time input is
    kept on it, for `get_score_fn`."""
    declared = declared_parametrization(config)
    model = get_model(config.model.name)(config)
    training = config.get("training", {})
    # Convolutions run 1.1 to 1.5 times as fast on channels-last weights, with the same numbers.
    last = training.get("channels_last", True)
    memory_format = torch.channels_last if last else torch.contiguous_format
    model = model.to(device=config.device, memory_format=memory_format)
    if declared is not None:
        model.parametrization = declared  # type: ignore[assignment]
    return model


def prepare_for_training(model: torch.nn.Module, config) -> torch.nn.Module:
    """Make a bare network recompute its activations, and compile it, as `config.training` says.

    In place: the names in its state dict stay, and whatever wraps it afterwards (DDP) finds the
    network itself.

    Raises:
      ValueError: `training.activation_checkpointing` of a network that cannot: no part of it has
        the attribute `recompute` of `models.layers.run_block`, or it holds a BatchNorm, whose
        running statistics would count every batch twice.
    """
    training = config.get("training", {})
    if training.get("activation_checkpointing", False):
        name, batch_norm = type(model).__name__, torch.nn.modules.batchnorm._BatchNorm
        able = [part for part in model.modules() if hasattr(part, "recompute")]
        if not able or any(isinstance(part, batch_norm) for part in model.modules()):
            reason = "has a BatchNorm" if able else "calls no block by models.layers.run_block"
            raise ValueError(
                f"training.activation_checkpointing=True cannot serve {name}, which {reason}; "
                "set it to False and use training.grad_accumulation"
            )
        for part in able:
            part.recompute = True  # type: ignore[assignment]
    if training.get("compile", False):
        model.compile()
    return model


def rows_are_free(sde, model) -> bool:
    """Whether samples may leave a batch under way: not where conditions or an observation are bound
    to all of its rows, nor for functions that are no network."""
    free = sde_lib.is_declared_affine(sde) and sde_lib.unbound(sde) is sde
    return free and isinstance(model, torch.nn.Module)


def unwrap(model) -> Any:
    """The network inside DataParallel, DistributedDataParallel or torch.compile."""
    while isinstance(
        model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    ) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod" if hasattr(model, "_orig_mod") else "module")
    return model


def get_model_fn(model, train: bool = False):
    """model_fn(x, labels) that runs `model` in training or in evaluation mode.

    The network's dtype is its own business: x goes in as its parameters are, and the output
    comes back as x is.
    """
    is_module = isinstance(model, torch.nn.Module)
    parameter = next(model.parameters(), None) if is_module else None
    dtype = None if parameter is None else parameter.dtype

    def model_fn(x, labels, **conditions):
        if is_module and model.training != train:
            model.train(train)
        if dtype is None or dtype == x.dtype:
            return _as_input(model(x, labels, **conditions), x)
        labels = labels.to(dtype) if labels.is_floating_point() else labels
        return _as_input(model(x.to(dtype), labels, **conditions), x)

    return model_fn


def _as_input(output, x: torch.Tensor) -> torch.Tensor:
    """A network's output in the dtype of its input x."""
    check_output(output)
    return output.to(x.dtype)


def get_score_fn(sde, model, train: bool = False, continuous: bool = False) -> ScoreFunction:
    """The score of a network: s(x, t), with `.denoise`, `.noise` and `.velocity`.

    What the network's output and time input mean is asked in this order: a parametrization it
    declares; score_sde's rules for VE, VP and sub-VP; for any other process noise prediction
    with labels t·999/T.

    Args:
      sde: the forward process.
      model: a network, bare or wrapped (DataParallel, DDP, compiled), called as
        `model(x, labels)`; or a ScoreFunction of this process, returned as it is.
      train: whether the network runs in training mode.
      continuous: whether the network was trained with continuous time.

    The range of integer labels is bound here: `config.model.num_scales` where the network
    carries its config, else the present `sde.N`.
    """
    if isinstance(model, ScoreFunction):
        kinds = [type(sde_lib.unbound(process)) for process in (model.sde, sde)]
        if kinds[0] is not kinds[1]:
            raise ValueError(
                f"expected a score of {kinds[1].__name__}, got one of {kinds[0].__name__}; "
                "carry it over by parametrization.on_process(score_fn, sde)"
            )
        return model
    inner = unwrap(model)
    declared = getattr(inner, "parametrization", None)
    if declared is not None:
        parametrization = as_parametrization(declared)
    else:
        bound = copy.copy(sde)
        bound.N = _num_scales(inner, sde)
        parametrization = legacy_parametrization(bound, continuous)
    score_fn = ScoreFunction(get_model_fn(model, train), sde, parametrization)
    parameter = next(inner.parameters(), None) if isinstance(inner, torch.nn.Module) else None
    score_fn.device = None if parameter is None else parameter.device
    return score_fn


def _num_scales(model, sde) -> int:
    config = getattr(model, "config", None)
    try:
        return config.model.num_scales  # type: ignore[union-attr]
    except AttributeError:
        return sde.N


def get_sigmas(config) -> np.ndarray:
    """The noise levels of SMLD networks: num_scales numbers, geometric, descending."""
    m = config.model
    return np.exp(np.linspace(np.log(m.sigma_max), np.log(m.sigma_min), m.num_scales))


def get_ddpm_params(config) -> dict:
    """DDPM's tables of betas and their products for `config.model`, as NumPy arrays."""
    N = config.model.num_scales
    betas = np.linspace(config.model.beta_min / N, config.model.beta_max / N, N, dtype=np.float64)
    alphas_cumprod = np.cumprod(1.0 - betas)
    return {
        "betas": betas,
        "alphas": 1.0 - betas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_1m_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "beta_min": config.model.beta_min,
        "beta_max": config.model.beta_max,
        "num_diffusion_timesteps": N,
    }


def to_flattened_numpy(x: torch.Tensor) -> np.ndarray:
    """A tensor as a flat NumPy array."""
    return x.detach().cpu().numpy().reshape(-1)


def from_flattened_numpy(x: np.ndarray, shape) -> torch.Tensor:
    """A tensor of the given shape from a flat NumPy array."""
    return torch.from_numpy(x.reshape(shape))


__all__ = [
    "create_model",
    "from_flattened_numpy",
    "get_ddpm_params",
    "get_model",
    "get_model_fn",
    "get_score_fn",
    "get_sigmas",
    "prepare_for_training",
    "register_model",
    "to_flattened_numpy",
    "unwrap",
]
