"""Checkpoints of score_sde_pytorch, NCSNv2, score_sde (JAX) and safetensors, in and out."""

import copy
import gzip
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_models import ALL_NETWORKS, make_config, published_weight

import losses
import sde_lib
from checkpoints import content_of, load_file, restore_checkpoint, save_checkpoint
from checkpoints_convert import convert
from checkpoints_export import export_checkpoint
from checkpoints_names import flax_names, score_sde_names
from configs.validation import complete
from files_reading import load_torch
from models.ema import ExponentialMovingAverage
from models.utils import create_model, get_score_fn

REPO = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data"
ORIGINAL = DATA / "checkpoint_ncsnpp_ve.pth"  # written by score_sde_pytorch
LAYOUTS = json.loads(gzip.decompress((DATA / "state_dict_layouts.json.gz").read_bytes()))
SMALL = {
    "data.image_size": 8,
    "model.nf": 8,
    "model.ch_mult": (1, 2),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (4,),
}


def published(path):
    spec = importlib.util.spec_from_file_location("published", REPO / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def small_config(path="configs/ve/cifar10_ncsnpp_continuous.py", **options):
    config = complete(published(path))
    for key, value in (SMALL | options).items():
        section, name = key.split(".")
        config[section][name] = value
    config.device = torch.device("cpu")
    return config


def make_state(config, steps=0):
    model = create_model(config)
    state = {
        "model": model,
        "optimizer": losses.get_optimizer(config, model.parameters()),
        "ema": ExponentialMovingAverage(model.parameters(), config.model.ema_rate),
        "step": 0,
    }
    size = config.data.image_size
    for _ in range(steps):
        x = torch.rand(2, config.data.num_channels, size, size)
        state["optimizer"].zero_grad()
        model(x, torch.tensor([1.0, 2.0])).square().mean().backward()
        state["optimizer"].step()
        state["ema"].update(model.parameters())
        state["step"] += 1
    return state


def same(a, b):
    """Equal to the bit: structure, dtypes, shapes, numbers."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_network(a, b):
    """The same, but for the table of noise levels: it is computed, and the last bit is NumPy's."""
    name = "module.sigmas"
    torch.testing.assert_close(a[name], b[name], rtol=1e-15, atol=0)
    return list(a) == list(b) and all(same(a[key], b[key]) for key in a if key != name)


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", LAYOUTS, ids=lambda g: g["configs"][0])
def test_names_are_those_of_every_published_model(group):
    theirs = {key.removeprefix("module."): shape for key, shape in group["state_dict"].items()}
    for path in group["configs"]:
        config = published(path)
        config.device = "meta"
        with torch.device("meta"):
            network = create_model(config)
        own, names = network.state_dict(), score_sde_names(network)
        assert list(names) == list(own)
        assert [(names[k], list(v.shape)) for k, v in own.items()] == list(theirs.items())
        assert len({path for path, _ in flax_names(network).values()}) == len(own) - 1


@pytest.mark.parametrize("network", ALL_NETWORKS, ids=lambda n: n["name"])
def test_names_of_parameters_are_the_originals_in_every_family(network):
    config = make_config(network["config"])
    config.device = "cpu"
    net = create_model(config)
    names = score_sde_names(net)
    theirs = [[names[key], list(p.shape)] for key, p in net.named_parameters()]
    assert theirs == network["parameters"]


def test_class_labels_have_no_counterpart():
    net = create_model(small_config(**{"model.num_classes": 3}))
    with pytest.raises(ValueError, match=r"1 tensors.*label_embedding.*safetensors"):
        score_sde_names(net)


# --- score_sde_pytorch ----------------------------------------------------------------------


def restored(path=ORIGINAL, **options):
    return restore_checkpoint(path, make_state(small_config(**options)), "cpu")


def test_score_of_the_originals_average_is_the_originals():
    state = restored()
    truth = np.load(DATA / "checkpoint_ncsnpp_ve.npz")
    state["ema"].copy_to(state["model"].parameters())
    model = state["model"].config.model
    sde = sde_lib.VESDE(model.sigma_min, model.sigma_max, model.num_scales)
    score_fn = get_score_fn(sde, state["model"], continuous=True)
    with torch.no_grad():
        score = score_fn(torch.tensor(truth["x"]), torch.tensor(truth["t"]))
    error = np.abs(score.numpy() - truth["score"]).max()
    assert error < 1e-5 * np.abs(truth["score"]).max()


def test_wrapped_networks_load_the_originals_file():
    state = make_state(small_config())
    inner = state["model"]
    restore_checkpoint(ORIGINAL, state | {"model": torch.nn.DataParallel(inner)})
    assert same(inner.state_dict(), restored()["model"].state_dict())


def test_everything_of_the_originals_state_arrives():
    state, saved = restored(), load_file(ORIGINAL)
    assert state["step"] == saved["step"] == 6
    assert state["ema"].num_updates == 6 and state["ema"].decay == 0.999
    assert same(state["ema"].shadow_params, saved["ema"]["shadow_params"])
    optimizer = state["optimizer"].state_dict()
    assert same(optimizer["state"], saved["optimizer"]["state"])
    assert 0 not in optimizer["state"]  # the Fourier frequencies have no moments
    group = optimizer["param_groups"][0]
    assert group["lr"] == 0.01 and group["fused"] is True  # how it is computed stays ours
    names = score_sde_names(state["model"])
    for key, value in state["model"].state_dict().items():
        theirs = saved["model"]["module." + names[key]]
        assert torch.equal(value, theirs.to(value.dtype)), key


def test_training_goes_on_from_the_originals_state():
    state = restored()
    before = state["model"].down[0].blocks[0].block.Conv_0.weight.clone()
    state["model"](torch.rand(2, 3, 8, 8), torch.ones(2)).square().mean().backward()
    state["optimizer"].step()
    assert state["optimizer"].state_dict()["state"][1]["step"] == 7
    assert not torch.equal(before, state["model"].down[0].blocks[0].block.Conv_0.weight)


def test_old_optimizer_states_without_newer_options_load(tmp_path):
    saved = load_file(ORIGINAL)
    group = saved["optimizer"]["param_groups"][0]
    known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")  # PyTorch 1.7
    saved["optimizer"]["param_groups"] = [{key: group[key] for key in known}]
    for moments in saved["optimizer"]["state"].values():
        moments["step"] = int(moments["step"])
    torch.save(saved, tmp_path / "old.pth")
    state = restored(tmp_path / "old.pth")
    state["model"](torch.rand(2, 3, 8, 8), torch.ones(2)).sum().backward()
    state["optimizer"].step()
    assert state["optimizer"].state_dict()["state"][1]["step"] == 7


@pytest.mark.parametrize("without", ["optimizer", "ema", "both", "module."])
def test_parts_that_are_missing_are_done_without(tmp_path, without):
    saved = load_file(ORIGINAL)
    if without == "module.":
        saved["model"] = {k.removeprefix("module."): v for k, v in saved["model"].items()}
    for part in ("optimizer", "ema"):
        if without in (part, "both"):
            del saved[part]
    torch.save(saved, tmp_path / "c.pth")
    state = restored(tmp_path / "c.pth")
    trained = [p for p in state["model"].parameters() if p.requires_grad]
    assert same(state["ema"].shadow_params, [p.detach() for p in trained]) == ("ema" not in saved)
    assert bool(state["optimizer"].state) == ("optimizer" in saved)
    bare = {"model": create_model(small_config()), "step": 0}
    restore_checkpoint(tmp_path / "c.pth", bare)
    assert same(bare["model"].state_dict(), state["model"].state_dict()) and bare["step"] == 6


def test_another_network_is_refused_by_the_files_names():
    state = make_state(small_config(**{"model.nf": 16}))
    before = copy.deepcopy(content_of(state))
    with pytest.raises(ValueError, match=r"of another shape: all_modules.0.W: \(8,\) instead of"):
        restore_checkpoint(ORIGINAL, state)
    state2 = make_state(small_config(**{"model.num_res_blocks": 2}))
    with pytest.raises(ValueError, match=r"missing: all_modules\.\d+"):
        restore_checkpoint(ORIGINAL, state2)
    assert same(before, content_of(state))


def test_moments_of_another_network_are_refused(tmp_path):
    saved = load_file(ORIGINAL)
    saved["optimizer"]["state"][3]["exp_avg"] = torch.zeros(5)
    torch.save(saved, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="for parameter 3 in the optimizer"):
        restored(tmp_path / "c.pth")


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", [np.bool_, np.int32, np.int64, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_numpy_numbers_of_every_kind_are_read(tmp_path, kind, new):
    torch.save({"step": kind(1)}, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
    read = load_torch(tmp_path / "c.pth")["step"]
    assert type(read) is kind and read == 1


def test_code_beside_numpy_scalars_is_never_run(tmp_path):
    trap = tmp_path / "executed"
    saved = torch.load(ORIGINAL, weights_only=False)  # our own test data
    assert type(saved["optimizer"]["param_groups"][0]["lr"]) is np.float64
    with pytest.raises(pickle.UnpicklingError):
        torch.load(ORIGINAL, weights_only=True)
    for place in (saved, saved["ema"], saved["optimizer"]["param_groups"][0]):
        place["lr"], kept = Malicious(trap), place.get("lr")
        torch.save(saved, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=r"bad\.pth is not a checkpoint that can be read"):
            restored(tmp_path / "bad.pth")
        place["lr"] = kept
    assert not trap.exists()


def test_export_gives_back_the_originals_file(tmp_path):
    export_checkpoint(tmp_path / "c.pth", restored(), "score_sde")
    ours = torch.load(tmp_path / "c.pth", weights_only=True)
    theirs = torch.load(ORIGINAL, weights_only=False)
    assert list(ours) == list(theirs) and list(ours["model"]) == list(theirs["model"])
    assert same_network(ours["model"], theirs["model"])
    for part in ("ema", "step"):
        assert same(ours[part], theirs[part]), part
    assert same(ours["optimizer"]["state"], theirs["optimizer"]["state"])
    mine, other = (s["optimizer"]["param_groups"][0] for s in (ours, theirs))
    assert {k: v for k, v in mine.items() if k in other} == {
        **other,
        **{k: mine[k] for k in ("foreach", "capturable", "differentiable")},
    }


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm", "ncsn", "ncsnv2_64"])
@pytest.mark.parametrize("format", ["native", "score_sde", "safetensors"])
def test_round_trips_are_equal_to_the_bit(tmp_path, name, format):
    if format == "safetensors":
        pytest.importorskip("safetensors")
    paths = {
        "ncsnpp": "configs/ve/cifar10_ncsnpp_continuous.py",
        "ddpm": "configs/vp/ddpm/cifar10_continuous.py",
        "ncsn": "configs/ve/ncsn/cifar10.py",
        "ncsnv2_64": "configs/ve/ncsnv2/cifar10.py",
    }
    config = small_config(paths[name])
    assert config.model.name == name
    state = make_state(config, steps=2)
    export_checkpoint(tmp_path / "c", state, format)
    fresh = restore_checkpoint(tmp_path / "c", make_state(config))
    a, b = content_of(state), content_of(fresh)
    for part in ("model", "ema", "step"):
        assert same(a[part], b[part]), part
    if format != "safetensors":
        assert same(a["optimizer"]["state"], b["optimizer"]["state"])
        lr = [c["optimizer"]["param_groups"][0]["lr"] for c in (a, b)]
        assert lr[0] == lr[1]


def test_export_without_optimizer_or_average_has_both(tmp_path):
    model = create_model(small_config())
    export_checkpoint(tmp_path / "c.pth", {"model": model, "step": 9}, "score_sde")
    saved = torch.load(tmp_path / "c.pth", weights_only=True)
    assert saved["optimizer"]["state"] == {} and saved["ema"]["num_updates"] == 9
    state = restored(tmp_path / "c.pth")
    trained = [p.detach() for p in state["model"].parameters() if p.requires_grad]
    assert same(state["ema"].shadow_params, trained) and state["step"] == 9


# --- NCSN and NCSNv2 ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "length"), [("ncsnv2", 5), ("ncsnv2", 4), ("ncsn", 2)])
def test_lists_of_the_ncsn_runners_load(tmp_path, name, length):
    """[model, optimizer, epoch, step, average by name], as ermongroup's runners write it."""
    network = next(n for n in ALL_NETWORKS if n["name"] == name)
    config = make_config(network["config"])
    config.device, config.model.ema_rate = "cpu", 0.999
    config.optim = small_config().optim
    weights = {key: published_weight(key, shape) for key, shape in network["parameters"]}
    sigmas = {} if name == "ncsn" else {"module.sigmas": create_model(config).sigmas.clone()}
    average = {key: value * 0.5 for key, value in weights.items()}
    model = sigmas | {f"module.{key}": value for key, value in weights.items()}
    optimizer = torch.optim.Adam([v.clone().requires_grad_() for v in weights.values()], lr=0.1)
    saved = [model, optimizer.state_dict(), 3, 70, average][:length]
    torch.save(saved, tmp_path / "checkpoint.pth")
    state = restore_checkpoint(tmp_path / "checkpoint.pth", make_state(config))
    assert state["step"] == (70 if length > 3 else 0)
    assert state["optimizer"].param_groups[0]["lr"] == 0.1
    for (key, p), shadow in zip(
        state["model"].named_parameters(), state["ema"].shadow_params, strict=True
    ):
        assert torch.equal(p, weights[key])
        assert torch.equal(shadow, weights[key] * (0.5 if length > 4 else 1))


def test_tables_that_a_network_does_not_save_are_accepted_if_they_are_its_own(tmp_path):
    config = small_config("configs/ve/ncsn/cifar10.py")
    state = make_state(config)
    content = content_of(state)
    content["model"]["sigmas"] = state["model"].sigmas.double()
    torch.save(content, tmp_path / "c.pth")
    restore_checkpoint(tmp_path / "c.pth", state)
    content["model"]["sigmas"] = 2 * state["model"].sigmas
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="1 not of this network: sigmas"):
        restore_checkpoint(tmp_path / "c.pth", state)


def test_lists_of_another_kind_are_refused(tmp_path):
    for saved in ([], [1, 2], [{"a": 1}]):
        torch.save(saved, tmp_path / "c.pth")
        with pytest.raises(ValueError, match=r"c\.pth: expected a list \[model, optimizer"):
            load_file(tmp_path / "c.pth")


# --- safetensors ----------------------------------------------------------------------------


def test_safetensors_needs_its_package_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"pip install 'score-sde\[export\]'"):
        export_checkpoint(tmp_path / "c.safetensors", restored(), "safetensors")
    assert os.listdir(tmp_path) == []


def test_safetensors_carries_its_config(tmp_path):
    pytest.importorskip("safetensors")
    state = restored()
    export_checkpoint(tmp_path / "c.safetensors", state, "safetensors")
    config = complete(json.loads((tmp_path / "c.json").read_text()))
    assert config.to_dict() == complete(state["model"].config).to_dict()
    from safetensors.torch import load_file as load_safetensors

    tensors = load_safetensors(tmp_path / "c.safetensors")
    assert torch.equal(tensors["model.conv_in.weight"], state["model"].conv_in.weight)
    assert torch.equal(tensors["ema.conv_in.weight"], state["ema"].shadow_params[4])


def test_foreign_safetensors_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.ones(2)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"expected tensors named 'model.…'"):
        load_file(tmp_path / "c.safetensors")
    data = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "d.safetensors").write_bytes(data[:-3])
    with pytest.raises(ValueError, match=r"d\.safetensors is not a checkpoint that can be read"):
        load_file(tmp_path / "d.safetensors")


# --- convert --------------------------------------------------------------------------------


def test_convert_through_every_format_comes_back_to_the_original(tmp_path):
    pytest.importorskip("safetensors")
    config = small_config()
    summary = convert(ORIGINAL, tmp_path / "a.pth", "native", config)
    assert "score_sde_pytorch, step 6" in summary
    assert "158 of 158 tensors matched, 157 parameters of 48,763 numbers" in summary
    assert "156 of 156 parameters, decay 0.999, 6 updates" in summary
    assert "moments of 156 of 157 parameters" in summary
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "safetensors", config)
    convert(tmp_path / "b.safetensors", tmp_path / "c.pth", "score_sde")  # its config is beside it
    theirs, ours = load_file(ORIGINAL), load_file(tmp_path / "c.pth")
    assert same_network(ours["model"], theirs["model"]) and same(ours["ema"], theirs["ema"])
    state = restored(tmp_path / "a.pth")
    save_checkpoint(tmp_path / "d.pth", state)
    assert same(load_file(tmp_path / "d.pth")["model"], load_file(tmp_path / "a.pth")["model"])


def test_convert_refuses_with_the_remedy_and_writes_nothing(tmp_path):
    config, out = small_config(), tmp_path / "out.pth"
    (tmp_path / "there.pth").write_bytes(b"mine")
    for arguments, message in (
        ((None, out, "native", config), "expected --input"),
        ((ORIGINAL, "", "native", config), "expected --output"),
        ((ORIGINAL, out, "onnx", config), "--format: expected one of"),
        ((ORIGINAL, out, "native", None), "expected --config"),
        ((ORIGINAL, tmp_path / "there.pth", "native", config), "there already; remove it"),
        ((ORIGINAL, out, "diffusers", config), "need model.progressive='output_skip'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(*arguments)
    own = load_file(ORIGINAL) | {"ema": {"mine": {}}}
    torch.save(own, tmp_path / "there.pth")
    with pytest.raises(ValueError, match=r"an average with 'shadow_params', got \['mine'\]"):
        convert(tmp_path / "there.pth", out, "native", config)
    with pytest.raises(FileNotFoundError, match="--input"):
        convert(tmp_path / "none.pth", out, "native", config)
    assert os.listdir(tmp_path) == ["there.pth"]


def test_command_line_converts(tmp_path):
    options = [
        f"--config.{key}={value if isinstance(value, int) else str(value).replace(' ', '')}"
        for key, value in SMALL.items()
    ]
    command = [sys.executable, "main.py", "--mode=convert", f"--input={ORIGINAL}"]
    command += [f"--output={tmp_path / 'c.pth'}", "--format=score_sde"]
    command += ["--config=configs/ve/cifar10_ncsnpp_continuous.py", *options]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "158 of 158 tensors matched" in run.stdout and "format score_sde" in run.stdout
    assert same_network(load_file(tmp_path / "c.pth")["model"], load_file(ORIGINAL)["model"])
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "is there already" in run.stderr
