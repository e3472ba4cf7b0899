"""Fill in, check and normalise a configuration that may come from anywhere."""

import argparse
import difflib
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from configs import defaults, families

# Other names of a key. One that is given wins: its key may hold no more than a default.
ALIASES = {
    "eval.dataset": "eval.bpd_dataset",
    "training.continuouse": "training.continuous",
}

# Keys that score_sde ships and never reads, with their only published value.
NEVER_READ = {
    "model.attention_type": "ddpm",
    "model.conv_size": 3,
    "model.interpolation": "bilinear",
    "model.sigma_begin": 90,
    "optim.amsgrad": False,
    "training.loss": "vesde",
}

# Processes that score_sde lacks: their networks are told of the time as VP's are, by a number that
# runs evenly from 0 to 1, so that VP's defaults fit them.
_UNIT_TIME = ("cosine", "edm", "linear_ve", "rectified_flow", "ouve")

# Processes whose noise levels are sigma_min to sigma_max.
_WITH_SIGMAS = {"vesde", "edm", "linear_ve", "ouve"}

# Tuples whose entries need not be whole.
_NUMBERS = (
    "model.fir_kernel",
    "model.ema_rates",
    "model.ema_profiles",
    "sampling.guidance_interval",
)

# Tuples of names.
_NAMES = ("eval.metrics",)

# Sections of any keys.
FREE = ("extra.", "sampling.solver.", "control.operator.", "control.options.")

_Range = tuple[str, Callable[[Any], bool]]
_AT_LEAST_1: _Range = ("a number >= 1", lambda v: v >= 1)
_AT_LEAST_0: _Range = ("a number >= 0", lambda v: v >= 0)
_POSITIVE: _Range = ("a number > 0", lambda v: v > 0)
_BELOW_1: _Range = ("a number in [0, 1)", lambda v: 0 <= v < 1)


def _within(low: float, high: float) -> _Range:
    """From `low` to `high`: what lies beyond is a slip of the keys, or overflows in float32."""
    return f"a number from {low:g} to {high:g}", lambda v: low <= v <= high


def _count(low: int, high: float) -> _Range:
    return f"an integer from {low} to {high:,.0f}", lambda v: low <= v <= high


_CHECKPOINT: _Range = ("a checkpoint number, or -1 for the newest", lambda v: v >= -1)
_NAME: _Range = ("a name", bool)
_PRECISION: _Range = (
    "'fp32', 'tf32', 'bf16' or ''",
    lambda v: v in ("fp32", "tf32", "bf16", ""),
)

_RANGES: dict[str, _Range] = {
    "seed": _count(0, 2**63 - 1),
    "training.sde": _NAME,
    "training.batch_size": _count(1, 10**7),
    "training.n_iters": _AT_LEAST_1,
    "training.snapshot_freq": _AT_LEAST_1,
    "training.log_freq": _AT_LEAST_1,
    "training.eval_freq": _AT_LEAST_1,
    "training.eval_images": _AT_LEAST_0,
    "training.snapshot_freq_for_preemption": _AT_LEAST_1,
    "training.num_snapshot_samples": _AT_LEAST_0,
    "training.eps": _within(1e-12, 1e6),
    "training.time_sampler": _NAME,
    "training.time_std": _within(0, 100),
    "training.truncate": _AT_LEAST_0,
    "training.time_mean": _within(-100, 100),
    "training.anneal_power": _within(-100, 100),
    "training.max_nonfinite": _AT_LEAST_0,
    "training.min_snr_gamma": _within(1e-6, 1e6),
    "training.sigma": _within(0, 1e8),
    "training.slices": _count(1, 10**5),
    "training.elbo_form": ("'score' or 'implicit'", lambda v: v in ("score", "implicit")),
    "training.precision": _PRECISION,
    "training.grad_accumulation": _count(1, 10**6),
    "training.posthoc_freq": _AT_LEAST_0,
    "sampling.method": _NAME,
    "sampling.n_steps_each": _count(0, 10**6),
    "sampling.snr": _within(0, 1e3),
    "sampling.steps": _count(0, 10**7),
    "sampling.eps": _AT_LEAST_0,
    "sampling.precision": _PRECISION,
    "sampling.rho": _within(0.05, 1e3),
    "sampling.guidance": (
        "'classifier_free', 'autoguidance', 'classifier' or ''",
        lambda v: v in ("classifier_free", "autoguidance", "classifier", ""),
    ),
    "sampling.guidance_interval": (
        "(low, high) with 0 <= low < high, or ()",
        lambda v: not v or (len(v) == 2 and 0 <= v[0] < v[1]),
    ),
    "sampling.guidance_weight": _within(-1e6, 1e6),
    "control.weight": _within(-1e6, 1e6),
    "eval.begin_ckpt": _CHECKPOINT,
    "eval.end_ckpt": _CHECKPOINT,
    "eval.ema": ("0 for the main average, or a decay or width in (0, 1)", lambda v: 0 <= v < 1),
    "eval.batch_size": _count(0, 10**7),
    "eval.compile": (
        "'', 'default' or 'reduce-overhead'",
        lambda v: v in ("", "default", "reduce-overhead"),
    ),
    "eval.num_samples": _count(1, 10**9),
    "eval.bpd_dataset": ("'train' or 'test'", lambda v: v.lower() in ("train", "test")),
    "eval.bpd_repeats": _AT_LEAST_0,
    "eval.bpd_num_images": _AT_LEAST_0,
    "eval.wait_s": _AT_LEAST_0,
    "eval.extractor": _NAME,
    "eval.stats_features": _AT_LEAST_0,
    "eval.rtol": _POSITIVE,
    "eval.atol": _POSITIVE,
    "eval.likelihood": (
        "'ode', 'elbo' or 'iw', or several joined by '+'",
        lambda v: set(v.split("+")) <= {"ode", "elbo", "iw"} and len(v.split("+")) <= 3,
    ),
    "eval.likelihood_eps": _AT_LEAST_0,
    "eval.ode_method": _NAME,
    "eval.probes": _count(1, 10**6),
    "eval.elbo_points": _count(1, 10**7),
    "eval.iw_samples": _count(1, 10**6),
    "eval.dequantization": (
        "'uniform' or 'variational'",
        lambda v: v in ("uniform", "variational"),
    ),
    "eval.gap_images": _AT_LEAST_1,
    "control.task": _NAME,
    "control.num_images": _count(1, 10**6),
    "control.num_samples": _count(1, 10**6),
    "control.mask": _NAME,
    "control.noise": _within(0, 1e6),
    "control.label": ("a class, or -1 for every class in turn", lambda v: v >= -1),
    "control.strength": ("a share of T in (0, 1]", lambda v: 0 < v <= 1),
    "control.temperature": _within(1e-6, 1e6),
    "data.eval_fraction": ("a number in (0, 1)", lambda v: 0 < v < 1),
    "data.image_size": _count(1, 16384),
    "data.num_channels": _count(1, 4096),
    "data.levels": ("an integer in 2 ... 65536", lambda v: 2 <= v <= 65536),
    "data.num_points": _count(1, 10**9),
    "data.image_threshold": ("a lightness in (0, 1]", lambda v: 0 < v <= 1),
    "data.logit_alpha": ("a number in [0, 0.5)", lambda v: 0 <= v < 0.5),
    "data.memory_gib": _AT_LEAST_0,
    "data.workers": (
        "a number of processes, at most 1024, or -1 for as many as pay",
        lambda v: -1 <= v <= 1024,
    ),
    "model.name": _NAME,
    "model.sigma_data": _within(1e-8, 1e8),
    "model.rho": _within(0.05, 1e3),
    "model.theta": _within(1e-8, 1e3),
    "model.sigma_min": _within(1e-8, 1e8),
    "model.sigma_max": _within(1e-8, 1e8),
    "model.beta_min": _within(0, 1e6),
    "model.beta_max": _within(1e-8, 1e6),
    "model.num_scales": _count(1, 10**7),
    "model.ema_rate": _BELOW_1,
    "model.ema_rates": ("numbers in [0, 1)", lambda v: all(0 <= r < 1 for r in v)),
    "model.ema_profiles": (
        "widths in (0, 0.2887), 1/sqrt(12) being the plain mean",
        lambda v: all(0 < s < 12**-0.5 for s in v),
    ),
    "model.dropout": _BELOW_1,
    "model.coordinate_scale": _within(0, 1e6),
    "model.num_classes": _count(0, 10**7),
    "model.label_dropout": _BELOW_1,
    "model.nf": _count(1, 65536),
    "model.ch_mult": (
        "1 to 14 integers from 1 to 1024",
        lambda v: 0 < len(v) <= 14 and 1 <= min(v) <= max(v) <= 1024,
    ),
    "model.num_res_blocks": _count(1, 1024),
    "model.attn_resolutions": ("integers >= 1", lambda v: all(r >= 1 for r in v)),
    "model.fir_kernel": (
        "up to 64 numbers of non-zero sum, at most 1e6",
        lambda v: len(v) <= 64 and sum(v) != 0 and all(abs(n) <= 1e6 for n in v),
    ),
    "model.fourier_scale": _within(0, 1e6),
    "model.init_scale": _within(0, 1e6),
    "model.couplings": _count(1, 1000),
    "model.spline_bins": ("an integer in 2 ... 64", lambda v: 2 <= v <= 64),
    "optim.optimizer": _NAME,
    "optim.lr": _within(1e-30, 1e3),
    "optim.beta1": _BELOW_1,
    "optim.beta2": _BELOW_1,
    "optim.eps": _within(1e-30, 1e3),
    "optim.schedule": (
        "'constant', 'cosine' or 'inverse_sqrt'",
        lambda v: v in ("constant", "cosine", "inverse_sqrt"),
    ),
    "optim.weight_decay": _within(0, 1e3),
    "optim.warmup": _AT_LEAST_0,
    "optim.grad_clip": ("a norm > 0, or a negative number for no clipping", bool),
}


def complete(config: Any) -> Any:
    """Return a new ConfigDict with every known key, checked; the input is left as it is.

    ``config`` is a ConfigDict, a mapping or a namespace, with sections of any of these kinds and
    any of the known keys. A key that is missing or None takes its default, which is that of the
    VP family where ``training.sde`` is 'vpsde', 'subvpsde' or one of the processes that score_sde
    lacks, and of the VE family elsewhere. The keys of ``ALIASES`` stand for others. Those of
    ``NEVER_READ`` are accepted with their published value; those of ``FREE`` are the user's own.
    ``device`` becomes a torch.device. Completing twice changes nothing.

    Raises ValueError for an unknown key (naming the nearest one), for a value of the wrong type or
    out of range, and for a never-read key that asks for something else than what is published.
    """
    given = _resolve_aliases(dict(flatten(config)))
    result = _defaults_for(given)
    known = dict(flatten(result))
    for key, value in given.items():
        if key in NEVER_READ:
            _check_never_read(key, value)
        elif key in known:
            value = _cast(key, value, known[key])
        elif not key.startswith(FREE):
            raise ValueError(_unknown(key, list(known)))
        _assign(result, key, value)
    _check_ranges(dict(flatten(result)), known)
    return result


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of a nested configuration as (dotted key, value); None counts as absent."""
    if isinstance(config, types.SimpleNamespace | argparse.Namespace):
        config = vars(config)
    if isinstance(config, ml_collections.ConfigDict | Mapping):
        for name, value in config.items():
            yield from flatten(value, f"{prefix}.{name}" if prefix else str(name))
    elif not prefix:
        raise ValueError(
            f"a configuration is a ConfigDict, a dict or a namespace, got {type(config).__name__}; "
            "pass what get_config() returns"
        )
    elif config is not None:
        yield prefix, config


def _resolve_aliases(given: dict[str, Any]) -> dict[str, Any]:
    known = dict(flatten(defaults.get_default_configs()))
    for alias, key in ALIASES.items():
        if alias in given and (value := given.pop(alias)) != "":
            given[key] = _cast(alias, value, known[key])
    return given


def _defaults_for(given: dict[str, Any]) -> Any:
    config = defaults.get_default_configs()
    sde = given.get("training.sde")
    if sde in ("vpsde", "subvpsde", *_UNIT_TIME):
        config = families.vp(config)
    if sde in _UNIT_TIME:  # Euler–Maruyama's first step is large where g is
        config.sampling.predictor = "reverse_diffusion"
    # Given devices are cast to a torch.device; the default becomes one here.
    return config if "device" in given else families.on_best_device(config)


def _assign(config: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if section not in config:
            config[section] = ml_collections.ConfigDict()
        config = config[section]
    config[name] = value


def _unknown(key: str, known: list[str]) -> str:
    if any(name.startswith(f"{key}.") for name in known) or f"{key}." in FREE:
        return f"config.{key}: expected a section of keys, got a value; write config.{key}.<name>"

    asked = key.lower()

    def likeness(name: str) -> float:
        def ratio(a: str, b: str) -> float:
            return difflib.SequenceMatcher(None, a, b).ratio()

        return ratio(asked, name) + ratio(asked.split(".")[-1], name.split(".")[-1])

    nearest = max(known, key=likeness)
    return (
        f"config.{key}: expected a known key, got one that nothing reads; "
        f"did you mean config.{nearest}? (all keys: configs/defaults.py)"
    )


def _check_never_read(key: str, value: Any) -> None:
    published = NEVER_READ[key]
    if value != published:
        raise ValueError(
            f"config.{key}: expected {published!r}, the only value that score_sde publishes and "
            f"the only behaviour there is, got {value!r}; remove the key"
        )


def _cast(key: str, value: Any, default: Any) -> Any:
    """Return the value with the type of the default, or raise ValueError."""
    if key == "device":
        return _as_device(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a NumPy or torch scalar
    kind = type(default).__name__
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if kind == "tuple":
        entries = _entries(key)[0]
        fits = isinstance(value, list | tuple) and all(
            isinstance(v, entries) and not isinstance(v, bool) and _is_finite(v) for v in value
        )
    elif kind == "float":
        fits = number and _is_finite(value)
    elif kind == "int":
        fits = number and isinstance(value, int)
    else:
        fits = isinstance(value, type(default))
    if not fits:
        expected = {
            "tuple": f"a tuple of {_entries(key)[1]}",
            "float": "a finite number",
            "int": "an integer",
            "bool": "True or False",
            "str": "a string",
        }[kind]
        raise ValueError(
            f"config.{key}: expected {expected}, got {value!r} of type {type(value).__name__}; "
            f"the default is {default!r}"
        )
    return type(default)(value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, str):
        return True
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _entries(key: str) -> tuple[Any, str]:
    """The type of a tuple's entries, and what they are called."""
    if key in _NAMES:
        return str, "names"
    return ((int, float), "numbers") if key in _NUMBERS else (int, "integers")


def _as_device(value: Any) -> Any:
    import torch

    if value == "auto":
        value = "cuda:0" if torch.cuda.is_available() else "cpu"
    if isinstance(value, str | torch.device):
        try:
            return torch.device(value)
        except RuntimeError:
            pass
    raise ValueError(
        f"config.device: expected 'auto', a device name or a torch.device, got {value!r}; "
        "use 'cpu' or 'cuda:0'"
    )


def _check_ranges(config: dict[str, Any], known: dict[str, Any]) -> None:
    for key, (expected, holds) in _RANGES.items():
        if not holds(config[key]):
            raise ValueError(
                f"config.{key}: expected {expected}, got {config[key]!r}; "
                f"the default is {known[key]!r}"
            )
    ordered = [("model.beta_min", "model.beta_max")]
    if {config["training.sde"].lower(), config["sampling.sde"].lower()} & _WITH_SIGMAS:
        ordered.append(("model.sigma_min", "model.sigma_max"))
    if min(config["eval.begin_ckpt"], config["eval.end_ckpt"]) >= 0:
        ordered.append(("eval.begin_ckpt", "eval.end_ckpt"))
    for low, high in ordered:
        if config[low] > config[high]:
            raise ValueError(
                f"expected config.{low} <= config.{high}, got {config[low]!r} and "
                f"{config[high]!r}; the defaults are {known[low]!r} and {known[high]!r}"
            )
