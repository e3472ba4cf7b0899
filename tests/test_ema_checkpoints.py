"""The moving average and checkpoints: formulas, atomic writing, nothing loaded in part."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import utils
from checkpoints import load_file, restore_checkpoint, save_checkpoint
from models.ema import ExponentialMovingAverage

REPO = Path(__file__).resolve().parent.parent


class Net(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Linear(2, width)
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x):
        return self.layer(x)


def make_state(width=3, seed=0, steps=0):
    torch.manual_seed(seed)
    net = Net(width)
    state = {
        "model": net,
        "optimizer": torch.optim.Adam(net.parameters(), lr=1e-2),
        "ema": ExponentialMovingAverage(net.parameters(), 0.99),
        "step": 0,
    }
    for _ in range(steps):
        state["optimizer"].zero_grad()
        net(torch.randn(5, 2)).square().mean().backward()
        state["optimizer"].step()
        state["ema"].update(net.parameters())
        state["step"] += 1
    return state


def content(state):
    parts = (state[name].state_dict() for name in ("model", "optimizer", "ema"))
    return pickle.dumps([[*map(numpy_of, parts)], state["step"]])


def numpy_of(value):
    if torch.is_tensor(value):
        return value.detach().numpy().tolist()
    if isinstance(value, dict):
        return {k: numpy_of(v) for k, v in value.items()}
    return [numpy_of(v) for v in value] if isinstance(value, list | tuple) else value


# --- moving average -----------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False])
def test_average_follows_the_formula_with_its_warm_up(warm):
    p = torch.nn.Parameter(torch.zeros(3))
    ema = ExponentialMovingAverage([p], 0.5, use_num_updates=warm)
    shadow = torch.zeros(3)
    for n in range(1, 12):
        with torch.no_grad():
            p.copy_(torch.randn(3))
        ema.update([p])
        d = min(0.5, (1 + n) / (10 + n)) if warm else 0.5
        shadow = shadow - (1 - d) * (shadow - p.detach())
        torch.testing.assert_close(ema.shadow_params[0], shadow)
    assert ema.num_updates == (11 if warm else None)


def test_average_holds_trained_parameters_only_and_no_graph():
    net = Net()
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    assert [s.shape for s in ema.shadow_params] == [(3, 2), (3,)]
    ema.store(net.parameters())
    ema.update(net.parameters())
    assert not any(s.requires_grad for s in [*ema.shadow_params, *ema.collected_params])
    assert ema.shadow_params[0].data_ptr() != net.layer.weight.data_ptr()


def test_store_copy_restore_round_trip():
    net, other = Net(), Net()
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    weights = [p.clone() for p in net.parameters()]
    for s in ema.shadow_params:
        s.fill_(7.0)
    ema.store(net.parameters())
    ema.copy_to(net.parameters())
    assert (net.layer.weight == 7).all() and (net.frozen == 1).all()
    ema.restore(net.parameters())
    assert all(map(torch.equal, net.parameters(), weights))
    with pytest.raises(RuntimeError, match=r"without store\(\)"):
        ema.restore(net.parameters())
    ema.copy_to(other.parameters())
    assert (other.layer.bias == 7).all()


def test_weights_come_back_after_an_error_within_the_average():
    net = Net()
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    ema.shadow_params[0].fill_(7.0)
    kept = net.layer.weight.clone()
    with pytest.raises(KeyError), ema.average_parameters(net.parameters()):
        assert (net.layer.weight == 7).all()
        raise KeyError
    assert torch.equal(net.layer.weight, kept)


def test_parameters_of_another_network_are_refused():
    ema = ExponentialMovingAverage(Net().parameters(), 0.9)
    reordered = [Net().layer.bias, Net().layer.weight]
    for other in (Net(4).parameters(), [], list(Net().parameters())[:1], reordered):
        other = list(other)
        for method in (ema.update, ema.copy_to, ema.store):
            with pytest.raises(ValueError, match="same network"):
                method(other)
    with pytest.raises(ValueError, match="decay"):
        ExponentialMovingAverage([], 1.5)


def test_saved_average_is_checked_and_copied():
    net = Net()
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    saved = {"decay": 0.9, "num_updates": 5, "shadow_params": [torch.ones(3, 2), torch.ones(3)]}
    ema.load_state_dict(saved)
    ema.update(net.parameters())
    assert ema.num_updates == 6 and (saved["shadow_params"][0] == 1).all()
    before = [s.clone() for s in ema.shadow_params]
    for bad in ([torch.ones(3, 2)], [torch.ones(3), torch.ones(3, 2)], []):
        with pytest.raises(ValueError, match="shapes or order differ"):
            ema.load_state_dict(saved | {"shadow_params": bad})
    assert all(map(torch.equal, ema.shadow_params, before))
    with pytest.warns(UserWarning, match=r"decay 0\.5"):
        ema.load_state_dict(saved | {"decay": 0.5})
    half = [s.half() for s in saved["shadow_params"]]
    ema.load_state_dict(saved | {"shadow_params": half})
    assert ema.shadow_params[0].dtype == torch.float32


# --- checkpoints --------------------------------------------------------------------------


def test_checkpoint_restores_everything(tmp_path):
    path, state = tmp_path / "deep" / "checkpoint.pth", make_state(steps=4)
    save_checkpoint(path, state)
    fresh = make_state(seed=1)
    assert restore_checkpoint(path, fresh, device="cpu") is fresh
    assert content(fresh) == content(state)
    assert os.listdir(path.parent) == ["checkpoint.pth"]


def test_checkpoint_opens_with_weights_only(tmp_path):
    save_checkpoint(tmp_path / "c.pth", make_state(steps=2))
    saved = torch.load(tmp_path / "c.pth", weights_only=True)
    assert {"model", "optimizer", "ema", "step"} <= saved.keys() and saved["step"] == 2


def compiled(net):
    return torch.compile(net, backend="eager")


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, compiled])
def test_wrapped_networks_are_saved_bare(tmp_path, wrap):
    state = make_state(steps=2)
    save_checkpoint(tmp_path / "c.pth", state | {"model": wrap(state["model"])})
    for other in (make_state(seed=1), make_state(seed=2)):
        inner = other["model"]
        if other["step"] == 0:
            other["model"] = wrap(inner)
        restore_checkpoint(tmp_path / "c.pth", other)
        assert content(other | {"model": inner}) == content(state)


def test_prefix_of_data_parallel_is_accepted(tmp_path):
    state = make_state(steps=2)
    saved = {name: state[name].state_dict() for name in ("optimizer", "ema")} | {"step": 2}
    weights = state["model"].state_dict()
    torch.save(saved | {"model": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "c")
    fresh = restore_checkpoint(tmp_path / "c", make_state(seed=1))
    assert content(fresh) == content(state)


def test_checkpoint_with_numpy_learning_rate_is_accepted(tmp_path):
    """score_sde_pytorch's warm-up leaves an np.float64 in the optimizer's state."""
    state = make_state(steps=2)
    state["optimizer"].param_groups[0]["lr"] = np.float64(0.03)
    save_checkpoint(tmp_path / "c.pth", state)
    fresh = restore_checkpoint(tmp_path / "c.pth", make_state(seed=1))
    lr = fresh["optimizer"].param_groups[0]["lr"]
    assert lr == 0.03 and type(lr) is float
    save_checkpoint(tmp_path / "d.pth", fresh)
    torch.load(tmp_path / "d.pth", weights_only=True)


def test_submodule_called_module_keeps_its_name(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = torch.nn.ModuleDict({"module": torch.nn.Linear(1, 1)})
        state = {"model": net, "step": seed}
        if seed == 0:
            save_checkpoint(tmp_path / "c.pth", state)
            kept = net["module"].weight
    restore_checkpoint(tmp_path / "c.pth", state)
    assert torch.equal(net["module"].weight, kept) and state["step"] == 0


ORIGINAL = REPO / "tests" / "data" / "checkpoint_ncsnpp_ve.pth"


def test_checkpoint_of_the_original_opens():
    saved = load_file(ORIGINAL)
    assert saved["step"] == 6 and all(k.startswith("module.") for k in saved["model"])
    assert type(saved["optimizer"]["param_groups"][0]["lr"]) is float


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_failure_while_saving_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "c.pth"
    save_checkpoint(path, make_state(steps=1))
    old = path.read_bytes()

    def fail(*args, **kwargs):
        if moment == "save":
            args[1].write(b"half a file")
        raise OSError("disk full")

    owner = torch if moment == "save" else os
    monkeypatch.setattr(owner, moment, fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, make_state(steps=3))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["c.pth"]


def test_kill_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.pth"
    save_checkpoint(path, make_state(steps=1))
    old = path.read_bytes()
    code = f"""
        import os, signal, torch, checkpoints
        def die(saved, file):
            file.write(b"half a file"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
        torch.save = die
        checkpoints.save_checkpoint({str(path)!r}, {{"model": torch.nn.Linear(1, 1), "step": 9}})
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=REPO, check=False)
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == old and load_file(path)["step"] == 1


def test_another_network_is_refused_whole_and_its_keys_are_named(tmp_path):
    save_checkpoint(tmp_path / "c.pth", make_state(4, steps=2))
    state = make_state(3)
    before = content(state)
    with pytest.raises(ValueError, match=r"2 of another shape: layer.weight: \(4, 2\) instead of"):
        restore_checkpoint(tmp_path / "c.pth", state)
    saved = load_file(tmp_path / "c.pth")
    saved["model"] = {"layer.weigth": torch.ones(3, 2), "layer.bias": torch.ones(3)}
    torch.save(saved, tmp_path / "d.pth")
    with pytest.raises(ValueError) as error:
        restore_checkpoint(tmp_path / "d.pth", state)
    assert "3 missing: frozen, table, layer.weight" in str(error.value)
    assert "1 not of this network: layer.weigth" in str(error.value)
    assert content(state) == before


@pytest.mark.parametrize("part", ["ema", "optimizer"])
def test_checkpoint_with_another_average_or_optimizer_loads_no_weights(tmp_path, part):
    save_checkpoint(tmp_path / "c.pth", make_state(steps=2))
    saved = load_file(tmp_path / "c.pth")
    if part == "ema":
        saved["ema"]["shadow_params"].pop()
    else:
        saved["optimizer"]["param_groups"].append(saved["optimizer"]["param_groups"][0])
    torch.save(saved, tmp_path / "d.pth")
    state = make_state(seed=1)
    before = content(state)
    with pytest.raises(ValueError):
        restore_checkpoint(tmp_path / "d.pth", state)
    assert content(state) == before


def test_damaged_and_foreign_files_are_refused(tmp_path):
    save_checkpoint(tmp_path / "c.pth", make_state(steps=2))
    good = (tmp_path / "c.pth").read_bytes()
    files = [good[: len(good) * k // 10] for k in range(10)]
    files += [b"\x00" * 500, b"not a checkpoint", bytes(range(256)) * 9]
    foreign = (3, [1], {"a": 1}, None, {"model": 1}, {"model": 1, "step": 2})
    files += [pickle.dumps(v, protocol=2) for v in foreign]
    files += [pickle.dumps({"model": {}, "step": 1, "ema": [1]}, protocol=2)]
    state = make_state()
    before = content(state)
    for number, damaged in enumerate(files):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{number}.pth"):
            restore_checkpoint(path, state)
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"'model' and 'step', got \['bias', 'weight'\]"):
        restore_checkpoint(tmp_path / "weights.pth", state)
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        restore_checkpoint(tmp_path, state)
    assert content(state) == before


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    state = {"model": torch.nn.Linear(40, 40), "step": 1}
    save_checkpoint(tmp_path / "c.pth", state)
    legacy = {"model": state["model"].state_dict(), "step": 1}
    torch.save(legacy, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    rng, path = np.random.default_rng(0), tmp_path / "d.pth"
    for good in ((tmp_path / "c.pth").read_bytes(), (tmp_path / "old.pth").read_bytes()):
        for _ in range(60):
            damaged = bytearray(good)
            for where in rng.integers(0, min(len(good), 900), 5):
                damaged[where] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                load_file(path)
            except ValueError:
                continue


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    trap = tmp_path / "executed"
    saved = {"model": {}, "step": 1, "extra": Malicious(trap)}
    torch.save(saved, tmp_path / "zip.pth")
    torch.save(saved, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(saved))
    for name in ("zip", "old", "plain"):
        with pytest.raises(ValueError, match=f"{name}.pth"):
            restore_checkpoint(tmp_path / f"{name}.pth", make_state())
    assert not trap.exists()


def test_missing_checkpoint_warns_and_returns_the_state(tmp_path):
    state = make_state()
    before = content(state)
    with pytest.warns(UserWarning, match="no checkpoint at"):
        assert restore_checkpoint(tmp_path / "meta" / "none.pth", state, "cpu") is state
    assert content(state) == before and (tmp_path / "meta").is_dir()
    with pytest.raises(ValueError, match=r"none\.pth"):
        load_file(tmp_path / "none.pth")


def test_checkpoint_without_optimizer_or_average_restores_the_weights(tmp_path):
    state = make_state(steps=2)
    save_checkpoint(tmp_path / "c.pth", {"model": state["model"], "step": np.int64(2)})
    fresh = make_state(seed=1)
    restore_checkpoint(tmp_path / "c.pth", fresh)
    assert torch.equal(fresh["model"].layer.weight, state["model"].layer.weight)
    assert type(fresh["step"]) is int and fresh["step"] == 2


def test_door_of_score_sde_is_the_same_functions():
    assert utils.restore_checkpoint is checkpoints.restore_checkpoint
    assert utils.save_checkpoint is checkpoints.save_checkpoint


def test_resumed_training_is_that_of_an_uninterrupted_run(tmp_path):
    whole, first = make_state(steps=6), make_state(steps=3)
    save_checkpoint(tmp_path / "c.pth", first)
    rng = torch.get_rng_state()
    second = make_state(seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_checkpoint(tmp_path / "c.pth", second)
    torch.set_rng_state(rng)
    for _ in range(3):
        second["optimizer"].zero_grad()
        second["model"](torch.randn(5, 2)).square().mean().backward()
        second["optimizer"].step()
        second["ema"].update(second["model"].parameters())
        second["step"] += 1
    assert content(second) == content(whole)
