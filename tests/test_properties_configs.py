"""Every configuration either builds and runs a step, or is refused by one clear error that names
the key; every key of configs/defaults.py with every kind of value."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys_properties import examples

import data_lib
import losses
import run_lib
import run_lib_checks
import sampling
import sampling_steps
import sde_lib
import sde_lib_base
import sde_lib_times
import solvers  # noqa: F401  registers its predictors
from configs import defaults
from configs.validation import FREE, NEVER_READ, complete, flatten
from parametrization import OUTPUTS, TIME_INPUTS
from run_lib_state import complete_here, create_state
from sampling_grids import SCHEDULES

DEFAULTS = dict(flatten(defaults.get_default_configs()))
NAN, INF = math.nan, math.inf

SMALL: dict[str, Any] = {
    "data": {"dataset": "digits", "levels": 17, "image_size": 8, "num_channels": 1},
    "model": {
        "nf": 4,
        "ch_mult": (1, 1),
        "num_res_blocks": 1,
        "attn_resolutions": (4,),
        "num_scales": 12,
        "beta_max": 5.0,
        "dropout": 0.0,
    },
    "training": {"batch_size": 4, "sde": "vpsde", "channels_last": False},
    "sampling": {"steps": 2, "predictor": "euler_maruyama", "corrector": "none"},
    "device": "cpu",
}


def small(changes=()):
    """The smallest configuration with some of its keys set, as a plain dictionary."""
    config = copy.deepcopy(SMALL)
    for key, value in dict(changes).items():
        part = config
        *sections, name = key.split(".")
        for section in sections:
            if not isinstance(part.get(section), dict):
                part[section] = {}
            part = part[section]
        part[name] = value
    return config


def live(given):
    """Check a configuration, build it, take a step of training and one of sampling."""
    config = complete_here(given)
    run_lib_checks.check_batch(config)
    sde = sde_lib.get_sde(config)
    state = create_state(config)
    train = losses.step_fn_from_config(config, sde, True)
    images = torch.randint(0, 17, (4, *data_lib.data_shape(config)), dtype=torch.uint8)
    train(state, data_lib.prepare(images, config, config.device))
    process = sde_lib.sampling_process(config, sde)
    eps = config.sampling.eps or process.sampling_eps
    unscale = data_lib.get_data_inverse_scaler(config)
    sampler = sampling.get_sampling_fn(
        config, process, (1, *data_lib.data_shape(config)), unscale, eps
    )
    samples, _ = sampler(state["model"])
    return samples


def finite(samples):
    return "" if samples.isfinite().all() else "samples are not finite"


# --- every key, wrong types -----------------------------------------------------------------

WRONG = {
    float: ["x", "", NAN, INF, -INF, True, (1.0,), [], 1j, b"x", object()],
    int: ["x", "", 1.5, NAN, INF, True, (1,), [], 1j, b"x", object()],
    bool: [1, 0, "True", "", 1.0, (), [True], b"x", object()],
    str: [3, 1.5, True, ("x",), ["x"], b"x", NAN, object()],
    tuple: ["x", "", 3, 1.5, True, ((),), (True,), (NAN,), (INF,), ("x", 1), (None,), object()],
}


@pytest.mark.parametrize("section", ["", *defaults.get_default_configs()])
def test_every_key_refuses_every_wrong_type_and_names_itself(cases, section):
    keys = [key for key in DEFAULTS if (key.rpartition(".")[0] or "") == section]
    for key in keys:
        kind = type(DEFAULTS[key])
        values = WRONG[kind] if key != "device" else [3, 1.5, True, "", "quda", (), object()]
        for value in values:
            wrong = f"{key}={value!r}"
            cases.refuse(wrong, lambda k=key, v=value: complete(small({k: v})), f"config.{key}")
        mapping = f"config.{key}"
        cases.refuse(key, lambda k=key: complete(small({f"{k}.deeper": 1})), mapping)
    cases.done(8 * len(keys))


def test_sections_are_sections(cases):
    for section in [*defaults.get_default_configs(), *(name.rstrip(".") for name in FREE)]:
        if section in ("seed", "device"):
            continue
        for value in (3, "x", True, 1.5, [1]):
            cases.refuse(
                f"{section}={value}",
                lambda s=section, v=value: complete({s: v} if "." not in s else small({s: v})),
                f"config.{section}",
                "section",
            )
    cases.done(40)


def test_something_else_than_a_configuration(cases):
    for value in (None, 3, "x", [], (), {1, 2}, object(), complete):
        cases.refuse(repr(value), lambda v=value: complete(v), "get_config")
    for value in ({3: 4}, {"model": {"": 1}}, {"model": {3: 1}}, {("a",): 1}):
        cases.refuse(repr(value), lambda v=value: complete(v), "config.")
    cases.done(12)


def misspelt(key):
    """A key with two letters swapped, one doubled, one left out, in capitals, with a stray end."""
    *sections, name = key.split(".")
    words = {name[:1] + name, name[:-1], name + "s", name.upper(), name.replace("_", "")}
    if len(name) > 3:
        words.add(name[:1] + name[2] + name[1] + name[3:])
    return {".".join([*sections, word]) for word in words} - set(DEFAULTS) - {key, ""}


def try_misspelt(cases, keys):
    """Every misspelling is refused with a key to write instead; nine in ten times the right one."""
    right = 0
    for key in keys:
        for wrong in sorted(misspelt(key)):
            if wrong.endswith(".") or wrong in NEVER_READ or wrong == "training.continuouse":
                continue
            cases.refuse(
                wrong, lambda k=wrong: complete(nested(k)), f"config.{wrong}", "mean config."
            )
            right += f"config.{key}?" in cases.said
    assert right > 0.9 * cases.count, (right, cases.count)


def test_a_misspelt_key_is_answered_with_the_nearest(cases):
    try_misspelt(cases, [*DEFAULTS][::5])
    cases.done(150)


@pytest.mark.slow
def test_every_misspelt_key_is_answered_with_the_nearest(cases):
    try_misspelt(cases, DEFAULTS)
    cases.done(800)


def nested(key, value=1):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


# --- every key, every size ------------------------------------------------------------------

SIZES = {
    float: [-1.0, 0.0, 1e-300, 0.3, 1.0, 2.0, 1e300, -1e300],
    int: [-(10**18), -1, 0, 1, 2, 3, 10**18],
    bool: [True, False],
    str: ["", "unknown", "NONE", "none", " ", "../../x", "ä" * 300],
    tuple: [(), (0,), (-1,), (1, 2, 3), (0.1,), (10**18,), (1,) * 60, (2, 1), ("unknown",)],
}


def try_sizes(cases, keys, sde="vpsde"):
    for key in keys:
        name = key.split(".")[-1]
        for value in SIZES[type(DEFAULTS[key])]:
            cases.attempt_naming(
                f"{key}={str(value)[:30]!r}",
                name,
                lambda k=key, v=value: live(small({"training.sde": sde, k: v})),
                finite,
            )


@pytest.mark.parametrize("section", ["model", "training", "sampling", "optim", "data"])
def test_every_key_at_every_size(cases, section):
    keys = [key for key in DEFAULTS if key.startswith(f"{section}.")]
    try_sizes(cases, keys)
    cases.done(5 * len(keys))


@pytest.mark.slow
@pytest.mark.parametrize("sde", ["vesde", "edm", "rectified_flow"])
def test_every_key_at_every_size_on_other_processes(cases, sde):
    try_sizes(cases, [k for k in DEFAULTS if k != "training.sde" and k != "device"], sde)
    cases.done(900)


# --- random configurations ------------------------------------------------------------------

NAMES: dict[str, tuple] = {
    "training.sde": (*sde_lib_base._SDES, "VPSDE", "ddpm"),
    "training.objective": ("", "denoising", "sliced", "implicit", "annealed", "elbo", "fisher"),
    "training.weighting": ("", "dsm", "likelihood", "edm", "min_snr", "noise", "v", "p2"),
    "training.time_sampler": (*sde_lib_times._TIME_SAMPLERS, "beta"),
    "training.precision": ("", "fp32", "tf32", "bf16", "fp16"),
    "training.elbo_form": ("score", "implicit", "x"),
    "sampling.sde": ("", *sde_lib_base._SDES, "ddpm"),
    "sampling.method": (*sampling_steps._SAMPLERS, "euler"),
    "sampling.predictor": (*sampling_steps._PREDICTORS, "plms"),
    "sampling.corrector": (*sampling_steps._CORRECTORS, "mala"),
    "sampling.schedule": (*SCHEDULES, "cosine"),
    "model.name": ("ncsnpp", "ddpm", "ncsnv2", "mlp", "dequantizer", "ncsnpp_classifier", "unet"),
    "model.parametrization": ("", *OUTPUTS, "epsilon"),
    "model.time_input": ("", *TIME_INPUTS, "t*1000"),
    "model.embedding_type": ("fourier", "positional", "learned"),
    "model.nonlinearity": ("swish", "elu", "relu", "lrelu", "gelu"),
    "model.normalization": ("GroupNorm", "InstanceNorm", "InstanceNorm++", "LayerNorm"),
    "model.resblock_type": ("biggan", "ddpm", "resnet"),
    "model.progressive": ("none", "output_skip", "residual", "x"),
    "model.progressive_input": ("none", "input_skip", "residual", "x"),
    "model.progressive_combine": ("sum", "cat", "x"),
    "optim.optimizer": ("Adam", "AdamW", "SGD"),
    "optim.schedule": ("constant", "cosine", "inverse_sqrt", "linear"),
}
SENSIBLE: dict[str, tuple] = {
    "model.nf": (4, 6, 8, 12, 16),
    "model.ch_mult": ((1,), (1, 1), (1, 2), (2, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1)),
    "model.attn_resolutions": ((), (4,), (8,), (8, 4), (5,), (16,)),
    "model.num_res_blocks": (1, 2),
    "model.num_scales": (1, 2, 10, 100),
    "model.sigma_min": (0.01, 1e-4, 1.0, 60.0),
    "model.sigma_max": (50.0, 1.0, 0.01),
    "model.beta_max": (5.0, 0.1, 0.05, 20.0),
    "model.num_classes": (0, 1, 10),
    "model.label_dropout": (0.0, 0.5),
    "model.dropout": (0.0, 0.5),
    "data.image_size": (8, 16, 9, 1, 2),
    "data.num_channels": (1, 3, 2, 4),
    "data.logit_alpha": (0.0, 0.05),
    "training.batch_size": (1, 2, 4, 6),
    "training.grad_accumulation": (1, 2, 3),
    "training.eps": (1e-5, 1e-3, 0.5, 2.0),
    "training.sigma": (0.0, 0.3, 100.0),
    "training.truncate": (0.0, 1e-3, 1.0),
    "training.slices": (1, 2),
    "sampling.steps": (0, 1, 2, 3),
    "sampling.snr": (0.0, 0.1, 3.0),
    "sampling.eps": (0.0, 1e-3, 0.5, 1.0),
    "sampling.n_steps_each": (0, 1, 2),
}
SKIPPED = ("device", "training.compile", "sampling.guidance_network", "data.dataset")
RANDOM = [
    key
    for key in DEFAULTS
    if key not in SKIPPED
    and key.split(".")[0] in ("training", "sampling", "model", "optim", "data")
]


def value_of(key):
    if key in NAMES:
        return st.sampled_from(NAMES[key])
    if key in SENSIBLE:
        return st.sampled_from(SENSIBLE[key])
    edges = st.sampled_from([*SIZES[type(DEFAULTS[key])], DEFAULTS[key]])
    if isinstance(DEFAULTS[key], bool):
        return st.booleans()
    wrong = st.sampled_from(WRONG[type(DEFAULTS[key])])
    return st.one_of(edges, edges, edges, wrong)


#: Half of the keys drawn are names and sizes, which decide most about what is built.
SETTINGS = st.lists(
    st.one_of(st.sampled_from([*NAMES, *SENSIBLE]), st.sampled_from(RANDOM)), min_size=1, max_size=6
).flatmap(lambda keys: st.fixed_dictionaries({key: value_of(key) for key in keys}))


def try_random(cases, changes):
    label = ", ".join(f"{key}={str(value)[:40]!r}" for key, value in changes.items())
    kept: list[str] = []

    def build():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return live(small(changes))

    def noted():
        try:
            return build()
        except Exception as error:
            kept.append(str(error))
            raise

    torch.manual_seed(0)
    cases.attempt(label, noted, finite)
    named = {key.split(".")[-1] for key in changes} | set(DEFAULTS)
    if kept and not any(name in kept[0] for name in named):
        cases.failures.append(f"{label}: names no key: {kept[0][:300]}")


@pytest.mark.parametrize(
    ("count", "at_least"), [(600, 250), pytest.param(2500, 500, marks=pytest.mark.slow)]
)
def test_random_configurations_run_or_are_refused(cases, count, at_least):
    @examples(count)
    @given(changes=SETTINGS)
    def run(changes):
        try_random(cases, changes)

    run()
    print(f"{cases.ran} of {cases.count} random configurations were built and took their steps")
    assert cases.ran >= at_least, f"{cases.ran} of {cases.count} were built and took their steps"
    cases.done(count)


# --- names that nothing is registered under -------------------------------------------------


class WorkError(AssertionError):
    """Something was trained before the configuration was refused."""


UNKNOWN_NAMES = ("nothing", "", "VE-SDE", "ncsnpp2", "Adam ", "../x", "None")
#: Keys that hold a name, other names that stand for something, and a name the error must list.
LISTED = {
    "training.sde": "vpsde",
    "training.objective": "sliced",
    "training.weighting": "min_snr",
    "training.time_sampler": "lognormal",
    "training.precision": "bf16",
    "sampling.sde": "vpsde",
    "sampling.method": "ode",
    "sampling.predictor": "ddim",
    "sampling.corrector": "langevin",
    "sampling.schedule": "karras",
    "sampling.guidance": "autoguidance",
    "model.name": "ncsnpp",
    "model.parametrization": "velocity",
    "model.time_input": "sigma",
    "model.embedding_type": "positional",
    "model.nonlinearity": "swish",
    "model.normalization": "GroupNorm",
    "model.resblock_type": "biggan",
    "model.progressive": "output_skip",
    "model.progressive_input": "input_skip",
    "model.progressive_combine": "cat",
    "optim.optimizer": "AdamW",
    "optim.schedule": "cosine",
    "data.dataset": "digits",
}


def test_unknown_names_are_refused_with_the_known_ones_before_any_step(
    cases, tmp_path, monkeypatch
):
    def step(*_, **__):
        raise WorkError

    monkeypatch.setattr(losses.TrainingStep, "__call__", step)
    for key, listed in LISTED.items():
        for wrong in UNKNOWN_NAMES:
            if wrong.lower() == "none" and key in ("sampling.predictor", "sampling.corrector"):
                continue
            if wrong.lower() == "none" and "progressive" in key:
                continue
            if wrong == "" and type(DEFAULTS[key]) is str and key in EMPTY_MEANS_SOMETHING:
                continue
            name = key.split(".")[-1]
            changes = {key: wrong, "training.n_iters": 1}
            if key == "model.time_input":
                changes["model.parametrization"] = "noise"
            cases.refuse(
                f"{key}={wrong!r}",
                lambda c=changes: run_lib.train(small(c), tmp_path / "run"),
                name,
                *([listed] if wrong else []),
            )
    cases.done(130)


EMPTY_MEANS_SOMETHING = (
    "training.objective", "training.weighting", "training.precision", "sampling.sde",
    "sampling.guidance", "model.parametrization", "model.time_input",
)  # fmt: skip
