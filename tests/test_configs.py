"""Configurations: published values, completion, validation, and no key that nothing reads."""

import argparse
import ast
import importlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import ml_collections
import pytest
import torch
from ml_collections import config_dict

from configs import defaults
from configs.validation import ALIASES, NEVER_READ, complete, flatten

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = json.loads((ROOT / "tests/data/published_configs.json").read_text())
SHIPPED = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config(" in path.read_text()
)


def load(path):
    return importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config()


def plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", [p for p in SHIPPED if p in PUBLISHED["configs"]])
def test_published_config_has_every_published_value(path):
    ours = dict(flatten(load(path)))
    published = PUBLISHED["every_config"] | PUBLISHED["configs"][path]
    assert {key: plain(ours.get(key)) for key in published} == published


def test_every_published_config_is_shipped():
    assert len(PUBLISHED["configs"]) == 39 and set(PUBLISHED["configs"]) <= set(SHIPPED)


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_config_is_complete_and_valid(path):
    config = load(path)
    known = set(dict(flatten(defaults.get_default_configs())))
    assert set(dict(flatten(config))) - known <= set(NEVER_READ)
    completed = complete(config)
    assert {k: plain(v) for k, v in flatten(completed)} == {k: plain(v) for k, v in flatten(config)}


@pytest.mark.parametrize("name", ["cifar10", "celeba", "lsun"])
def test_family_defaults_are_complete_and_can_be_changed(name):
    config = importlib.import_module(f"configs.default_{name}_configs").get_default_configs()
    assert isinstance(config.device, torch.device)
    config.model.fir_kernel = [1, 3, 3, 1]
    config.optim.weight_decay = 0.1
    config.optim.amsgrad = False
    config.device = torch.device("cpu")
    assert complete(config).device == torch.device("cpu")


def test_no_default_is_none_or_a_list_so_that_flags_can_override_it():
    for key, value in flatten(defaults.get_default_configs()):
        assert isinstance(value, bool | int | float | str | tuple), key


def test_flags_override_every_kind_of_field(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        "from absl import app\n"
        "from ml_collections import config_flags\n"
        "flag = config_flags.DEFINE_config_file('config', lock_config=True)\n"
        "def main(argv):\n"
        "    c = flag.value\n"
        "    print(c.device, c.model.ch_mult, c.optim.weight_decay, c.eval.dataset)\n"
        "app.run(main)\n"
    )
    command = [
        sys.executable,
        str(script),
        f"--config={ROOT / 'configs/vp/digits_ddpmpp_continuous.py'}",
        "--config.device=cuda:1",
        "--config.model.ch_mult=(1, 1, 2)",
        "--config.optim.weight_decay=0.5",
        "--config.eval.dataset=train",
    ]
    done = subprocess.run(command, cwd=ROOT, env=_env(), capture_output=True, text=True)
    assert done.stdout.strip() == "cuda:1 (1, 1, 2) 0.5 train", done.stderr


def _env():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_importing_configs_does_not_import_torch():
    code = (
        "import sys, configs.validation, configs.vp.digits_ddpmpp_continuous;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=_env(), check=True)


# complete


def test_complete_fills_in_every_key_and_leaves_its_input_alone():
    given: Any = ml_collections.ConfigDict({"model": {"nf": 16}, "training": {}})
    before = given.to_dict()
    completed = complete(given)
    assert given.to_dict() == before
    assert completed.model.nf == 16
    assert set(dict(flatten(completed))) == set(dict(flatten(defaults.get_default_configs())))
    completed.model.nf = 8
    assert given.model.nf == 16


def test_complete_is_idempotent():
    once = complete({"eval": {"dataset": "train"}, "model": {"sigma_begin": 90}})
    assert complete(once).to_dict() == once.to_dict()


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"nf": 16}},
        {"model": types.SimpleNamespace(nf=16)},
        argparse.Namespace(model={"nf": 16}),
        ml_collections.FrozenConfigDict({"model": {"nf": 16}}),
        ml_collections.ConfigDict({"model": {"nf": 16}}).lock(),
    ],
)
def test_complete_takes_any_kind_of_configuration(config):
    assert complete(config).model.nf == 16


def test_complete_fills_the_gaps_of_a_vp_config_with_the_vp_family():
    completed = complete({"training": {"sde": "vpsde"}, "sampling": {"predictor": "ddim"}})
    assert completed.data.centered and not completed.model.scale_by_sigma
    assert completed.sampling.corrector == "none" and completed.sampling.predictor == "ddim"


def test_complete_treats_none_and_placeholders_as_missing():
    config = ml_collections.ConfigDict({"data": {"category": None}})
    config.seed = config_dict.placeholder(int)
    completed = complete(config)
    assert completed.data.category == "" and completed.seed == 42


def test_aliases_stand_for_their_keys():
    completed = complete({"eval": {"dataset": "train", "bpd_dataset": "test"}})
    assert completed.eval.bpd_dataset == "train" and completed.eval.dataset == ""
    completed = complete({"training": {"continuouse": False, "continuous": True}})
    assert completed.training.continuous is False and "continuouse" not in completed.training


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto"])
def test_device_becomes_a_torch_device(device):
    completed = complete({"device": device})
    assert isinstance(completed.device, torch.device)
    completed.device = "cuda:1"  # still of any type


@pytest.mark.parametrize(("key", "value"), NEVER_READ.items())
def test_never_read_keys_take_their_published_value_only(key, value):
    section, name = key.split(".")
    assert complete({section: {name: value}})[section][name] == value
    with pytest.raises(ValueError, match=re.escape(key)):
        complete({section: {name: "other"}})


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ({"model": {"droput": 0.1}}, "model.dropout"),
        ({"training": {"dropout": 0.1}}, "model.dropout"),
        ({"training": {"bach_size": 1}}, "training.batch_size"),
        ({"evaluation": {"rtol": 1e-3}}, "eval.rtol"),
        ({"sed": 1}, "seed"),
    ],
)
def test_unknown_key_is_refused_naming_the_nearest(given, nearest):
    key = next(flatten(given))[0]
    with pytest.raises(ValueError, match=rf"config\.{key}: .*config\.{nearest}\?"):
        complete(given)


@pytest.mark.parametrize(
    "given",
    [
        {"training": {"batch_size": 2.0}},
        {"training": {"batch_size": True}},
        {"training": {"continuous": 1}},
        {"training": {"continuous": "False"}},
        {"optim": {"lr": "1e-3"}},
        {"optim": {"lr": float("nan")}},
        {"optim": {"lr": True}},
        {"model": {"name": 3}},
        {"model": {"ch_mult": 2}},
        {"model": {"ch_mult": (1, 2.5)}},
        {"model": 3},
        {"device": 0},
        {"device": "quda"},
    ],
)
def test_wrong_type_is_refused(given):
    key = next(flatten(given))[0]
    with pytest.raises(ValueError, match=rf"config\.{key}: expected .*got"):
        complete(given)


@pytest.mark.parametrize(
    "given",
    [
        {"training": {"batch_size": 0}},
        {"training": {"n_iters": 0}},
        {"model": {"num_scales": 0}},
        {"model": {"ema_rate": 1.0}},
        {"model": {"dropout": 1.0}},
        {"model": {"ch_mult": ()}},
        {"eval": {"bpd_dataset": "both"}},
        {"data": {"levels": 1}},
        {"optim": {"grad_clip": 0.0}},  # nothing would be learnt
    ],
)
def test_value_out_of_range_is_refused_with_a_remedy(given):
    key = next(flatten(given))[0]
    with pytest.raises(ValueError, match=rf"config\.{key}: expected .*got.*the default is"):
        complete(given)


def test_values_that_must_be_ordered_are_checked():
    with pytest.raises(ValueError, match="sigma_min <= config"):
        complete({"model": {"sigma_min": 2.0, "sigma_max": 1.0}})
    with pytest.raises(ValueError, match="begin_ckpt <= config"):
        complete({"eval": {"begin_ckpt": 3, "end_ckpt": 2}})


def test_numbers_are_converted_and_lists_become_tuples():
    import numpy as np

    given = {"model": {"sigma_max": 50, "nf": np.int64(8), "attn_resolutions": [8]}}
    model = complete(given).model
    assert (model.sigma_max, model.nf, model.attn_resolutions) == (50.0, 8, (8,))
    assert type(model.sigma_max) is float and type(model.nf) is int


def test_something_else_is_not_a_configuration():
    with pytest.raises(ValueError, match="get_config"):
        complete(3)


def test_an_old_config_file_runs_unchanged():
    source = """
from configs.default_cifar10_configs import get_default_configs
def get_config():
  config = get_default_configs()
  training = config.training
  training.sde = 'vpsde'
  training.continuous = False
  training.reduce_mean = True
  sampling = config.sampling
  sampling.method = 'pc'
  sampling.predictor = 'ancestral_sampling'
  sampling.corrector = 'none'
  data = config.data
  data.centered = True
  model = config.model
  model.name = 'ddpm'
  model.scale_by_sigma = False
  model.ema_rate = 0.9999
  model.nf = 128
  model.ch_mult = (1, 2, 2, 2)
  model.conv_size = 3
  return config
"""
    space = {}
    exec(source, space)
    completed = complete(space["get_config"]())
    assert completed.model.name == "ddpm" and completed.data.levels == 256


# A key that no line outside configs and tests reads would be a promise that nobody keeps.


def assignments(tree):
    """Yield (name, expression) of `a = x` and of each part of `a, b = x, y`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            parts: Any = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                parts = zip(target.elts, value.elts, strict=False)
            yield from ((t.id, v) for t, v in parts if isinstance(t, ast.Name))


def keys_read(source):
    """Return the dotted keys of config.section.name, section.get(name), getattr(section, name).

    Where the name is computed, every string of the file may be meant.
    """
    tree = ast.parse(source)
    sections = {"config", *(k.split(".")[0] for k in KEYS if "." in k)}
    meant = {name: {name} for name in sections}  # a variable's name -> the sections it may be
    for name, value in assignments(tree):
        if isinstance(value, ast.Attribute) and value.attr in sections:
            meant.setdefault(name, set()).add(value.attr)
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}

    def keys(receiver, names):
        of = {receiver.attr} if isinstance(receiver, ast.Attribute) else set()
        of |= meant.get(receiver.id, set()) if isinstance(receiver, ast.Name) else set()
        return {f"{section}.{name}".removeprefix("config.") for section in of for name in names}

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found |= keys(node.value, [node.attr])
        elif isinstance(node, ast.Call):
            called, given = node.func, node.args
            if isinstance(called, ast.Attribute) and called.attr == "get":
                given = [called.value, *given]
            elif not (isinstance(called, ast.Name) and called.id == "getattr"):
                continue
            if len(given) > 1:
                name = given[1]
                found |= keys(given[0], [name.value] if isinstance(name, ast.Constant) else strings)
    return found


KEYS = [key for key, _ in flatten(defaults.get_default_configs())]


@pytest.fixture(scope="module")
def every_key_read():
    outside = {"configs", "tests", "benchmarks", "build"}
    paths = [p.relative_to(ROOT) for p in ROOT.rglob("*.py")]
    kept = [p for p in paths if not outside & set(p.parts) and not p.parts[0].startswith(".")]
    return set().union(*(keys_read((ROOT / path).read_text()) for path in kept))


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ALIASES])
def test_every_key_is_read_somewhere(key, every_key_read):
    assert key in every_key_read, f"nothing outside configs and tests reads config.{key}"


def test_the_search_for_reads_tells_reads_from_other_things():
    source = """
data, m = config.data, config.model
print(data.root, m.get("nf", 1), getattr(config.eval, "rtol", 0), self.config.seed)
config.training.eps = self.dropout
"""
    assert set(KEYS) & keys_read(source) == {"data.root", "model.nf", "eval.rtol", "seed"}


def test_keys_of_ones_own_live_under_extra():
    given = {"extra": {"width": 3, "deep": {"er": "x"}}, "sampling": {"method": "my_sampler"}}
    config = complete(complete(given))
    assert (config.extra.width, config.extra.deep.er) == (3, "x")
    assert config.sampling.method == "my_sampler"


@pytest.mark.parametrize("word", ["--config.sampling.solver={'order': 2}", "--config.extra.mine=1"])
def test_sections_of_any_keys_are_set_on_the_command_line(word):
    import main

    main._check_key(word, main.load_config("configs/vp/digits_ddpmpp_continuous.py"))
    with pytest.raises(ValueError, match="solvr: expected a known key"):
        main._check_key("--config.sampling.solvr=1", main.load_config("configs/vp/digits_v.py"))
