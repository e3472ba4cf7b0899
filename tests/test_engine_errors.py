"""What cannot be trained is refused with one clear error, before the network is built."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from toys_processes import ROOT, Child, tiny

import run_lib
import run_lib_checks
import run_lib_state
from configs.validation import complete
from run_lib_journal import plain


@pytest.fixture
def no_network(monkeypatch):
    def build(config):
        raise AssertionError("the network was built")

    monkeypatch.setattr(run_lib_state, "create_model", build)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__grad_accumulation": 3}, r"1 processes × 3 micro-batches do not divide it"),
        ({"training__grad_accumulation": 5}, r"use --config\.training\.batch_size=15"),
        ({"training__sde": "magic"}, r"'magic' is unknown"),
        ({"training__eval_images": -1}, r"training\.eval_images: expected a number >= 0"),
        ({"data__dataset": "cifar10", "data__levels": 256, "data__root": "/nowhere"}, "download"),
    ],
)
def test_bad_settings_and_missing_data_are_refused_first(tmp_path, no_network, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_lib.train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_that_the_network_cannot_halve_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"halves the images 2 times .* divisible by 4, got 10"):
        run_lib.train(tiny(data__image_size=10, model__ch_mult=(1, 1, 1)), tmp_path)


def test_a_device_that_is_not_there_is_named(tmp_path, no_network):
    config = tiny()
    config.device = torch.device("cuda:63")
    with pytest.raises(ValueError, match="'cuda:63' cannot be used"):
        run_lib.train(config, tmp_path / "run")


# --- the folder -----------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named(tmp_path, no_network):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--workdir .*file/run: expected a folder to write in"):
        run_lib.train(tiny(), tmp_path / "file" / "run")


def as_another_user(folder):
    os.setuid(65534)
    try:
        run_lib_checks.check_writable(folder)
    except PermissionError as error:
        return str(error)
    return ""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o755)
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(0o755)
    code, said, text = Child(as_another_user, tmp_path / "mine").end()
    assert code == 0, text
    assert "expected a folder to write in, got: Permission denied" in said


def long_run(workdir):
    run_lib.train(tiny(training__n_iters=10**6), workdir)


def test_a_second_training_in_one_folder_is_refused_while_the_first_one_lives(tmp_path):
    first = Child(long_run, tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "history.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    second = Child(long_run, tmp_path)
    code, said, _ = second.end(60)
    assert code == 1
    assert f"{tmp_path} is in use: process {first.pid} on " in said
    first.process.kill()  # which leaves no lock behind
    first.process.join()
    third = run_lib.train(tiny(), tmp_path)
    assert third["step"] == 6


def test_evaluation_does_not_wait_for_training(tmp_path):
    run_lib.train(tiny(), tmp_path)
    with run_lib_checks.lock(tmp_path):
        run_lib.evaluate(tiny(eval__enable_sampling=False, eval__enable_bpd=False), tmp_path)


# --- another experiment, another network ----------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 7),
        ("model__nf", 16),
        ("training__sde", "subvpsde"),
        ("training__batch_size", 8),
        ("training__weighting", "edm"),
        ("optim__lr", 1.0),
        ("data__centered", False),
    ],
)
def test_a_folder_of_another_experiment_shows_the_difference(tmp_path, no_network, key, value):
    (tmp_path / "config.json").write_text(json.dumps(plain(complete(tiny()))))
    key_ = key.replace("__", ".")
    with pytest.raises(ValueError, match=rf"{key_}: .* there, .*{value}.* now"):
        run_lib.train(tiny(**{key: value}), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training__n_iters", 9),
        ("training__log_freq", 1),
        ("training__grad_accumulation", 2),
        ("training__precision", "bf16"),
        ("data__root", "/elsewhere"),
        ("sampling__predictor", "euler_maruyama"),
    ],
)
def test_how_far_how_fast_and_how_loudly_may_change(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(plain(complete(tiny()))))
    config = complete(tiny(**{key: value}))
    run_lib_checks.check_same_experiment(config, tmp_path, training=True)


def test_evaluation_names_its_own_data(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(plain(complete(tiny()))))
    config = complete(tiny(data__dataset="MNIST", data__levels=256, seed=3))
    run_lib_checks.check_same_experiment(config, tmp_path, training=False)
    with pytest.raises(ValueError, match=r"model\.nf: 8 there, 16 now"):
        run_lib_checks.check_same_experiment(complete(tiny(model__nf=16)), tmp_path, training=False)


def test_a_checkpoint_of_another_network_is_refused_with_its_keys(tmp_path):
    run_lib.train(tiny(), tmp_path)
    before = (tmp_path / "config.json").read_text()
    other = tiny(model__nf=16, training__force_workdir=True, training__n_iters=9)
    with pytest.raises(ValueError, match=r"checkpoint\.pth.*shape"):
        run_lib.train(other, tmp_path)
    assert (tmp_path / "config.json").read_text() == before


# --- the command line -----------------------------------------------------------------------


def test_running_out_of_memory_names_the_remedies(tmp_path, monkeypatch, capsys):
    import main

    def train(config, workdir):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(run_lib, "train", train)
    path = ROOT / "configs" / "vp" / "digits_ddpmpp_continuous.py"
    monkeypatch.setattr(
        sys, "argv", ["main.py", f"--config={path}", "--mode=train", f"--workdir={tmp_path}"]
    )
    main.FLAGS.unparse_flags()
    with pytest.raises(SystemExit) as end:
        main.run()
    assert "--config.training.grad_accumulation=2" in str(end.value)


@pytest.mark.slow
def test_the_program_stopped_by_sigterm_says_so_and_ends_with_143(tmp_path):
    words = ["--mode=train", f"--workdir={tmp_path}", "--config.training.n_iters=100000"]
    config = "configs/vp/digits_ddpmpp_continuous.py"
    process = subprocess.Popen(
        [sys.executable, "main.py", f"--config={config}", *words],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "tensorboard").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM at step" in text
    assert "Traceback" not in text
