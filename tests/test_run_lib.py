"""Training and evaluation end to end, on a network small enough for seconds."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import run_lib
import run_lib_journal
import run_lib_state
import run_lib_train
from configs.vp import digits_ddpmpp_continuous

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "model.nf": 8,
    "model.num_res_blocks": 1,
    "model.num_scales": 30,
    "training.batch_size": 16,
    "training.n_iters": 6,
    "training.snapshot_freq": 3,
    "training.snapshot_freq_for_preemption": 2,
    "training.log_freq": 2,
    "training.eval_freq": 3,
    "training.num_snapshot_samples": 4,
    "training.snapshot_sampling": True,
    "sampling.steps": 0,
    "eval.num_samples": 20,
    "eval.batch_size": 130,
    "eval.rtol": 1e-2,
    "eval.atol": 1e-2,
}


def tiny(**changes):
    config = digits_ddpmpp_continuous.get_config()
    for key, value in {**TINY, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        section, name = key.split(".")
        config[section][name] = value
    return config


def weights(workdir, name="checkpoints-meta/checkpoint.pth"):
    return torch.load(Path(workdir) / name, weights_only=True)


def same(a, b) -> bool:
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and all(
        torch.equal(x, y)
        for x, y in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True)
    )


def test_training_leaves_everything_it_promises(tmp_path):
    run_lib.train(tiny(), tmp_path)
    for name in (
        "checkpoints/checkpoint_1.pth",
        "checkpoints/checkpoint_2.pth",
        "checkpoints-meta/checkpoint.pth",
        "samples/iter_3/sample.png",
        "samples/iter_6/sample.png",
        "config.json",
        "log.txt",
        "history.jsonl",
    ):
        assert (tmp_path / name).exists(), name
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 42
    history = run_lib_journal.read_history(tmp_path)
    assert history is not None
    assert history["steps"] == [2, 4, 6]
    assert history["eval_steps"] == [3, 6]


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = tiny(training__snapshot_sampling=False, model__dropout=0.1)
        config.seed = seed
        run_lib.train(config, tmp_path / name)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    off = {"training__snapshot_sampling": False, "model__dropout": 0.1}
    run_lib.train(tiny(**off), tmp_path / "whole")
    run_lib.train(tiny(training__n_iters=2, **off), tmp_path / "parts")
    run_lib.train(tiny(**off), tmp_path / "parts")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    history = run_lib_journal.read_history(tmp_path / "parts")
    assert history is not None
    assert history["steps"] == [2, 4, 6]


def test_lines_of_history_beyond_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 6, "lo')
    file, known = run_lib_journal._open_history(path, 2)
    file.close()
    assert path.read_text() == '{"step": 2, "loss": 1}\n'
    assert known == {(2, "step"), (2, "loss")}


def test_evaluation_writes_numbers_with_their_protocol(tmp_path):
    run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    result = run_lib.evaluate(tiny(), tmp_path, "ev")[2]
    saved = json.loads((tmp_path / "ev" / "ckpt_2.json").read_text())
    assert saved == json.loads(json.dumps(result))
    bpd = saved["bpd"]
    per_image = np.load(tmp_path / "ev" / "ckpt_2_bpd.npz")["bpd"]
    assert per_image.shape == (300, 1)
    assert np.isfinite(per_image).all()
    assert bpd["mean"] == pytest.approx(per_image.mean())
    assert bpd["standard_error"] == pytest.approx(per_image[:, 0].std(ddof=1) / 300**0.5)
    assert (bpd["images"], bpd["levels"], saved["loss"]["images"]) == (300, 17, 300)
    assert np.load(tmp_path / "ev" / "ckpt_2_samples.npz")["samples"].shape == (20, 1, 8, 8)
    assert 0 <= saved["metrics"]["one_nn_accuracy"] <= 1
    assert saved["protocol"]["bpd"]["config"]["eval"]["rtol"] == 1e-2
    assert "<html" in (tmp_path / "report.html").read_text()


def test_bits_per_dim_do_not_depend_on_the_rest_of_the_batch_count(tmp_path):
    run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    off = {"eval__enable_sampling": False, "eval__enable_loss": False}
    a = run_lib.evaluate(tiny(eval__bpd_num_images=7, **off), tmp_path, "a")[2]["bpd"]
    b = run_lib.evaluate(tiny(eval__bpd_num_images=7, **off), tmp_path, "b")[2]["bpd"]
    assert a == b
    assert a["images"] == 7


def test_only_what_is_asked_for_is_evaluated(tmp_path):
    run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    off = {"eval__enable_sampling": False, "eval__enable_bpd": False}
    result = run_lib.evaluate(tiny(**off), tmp_path)[2]
    assert "loss" in result
    assert "bpd" not in result
    assert not (tmp_path / "eval" / "ckpt_2_samples.npz").exists()


def test_a_class_conditional_network_is_told_the_labels(tmp_path):
    config = tiny(model__num_classes=10, model__label_dropout=0.1)
    run_lib.train(config, tmp_path)
    results = run_lib.evaluate(config, tmp_path)[2]
    assert np.isfinite(results["bpd"]["mean"])
    with pytest.raises(ValueError, match="labels 0 to 4"):
        run_lib.train(tiny(model__num_classes=5), tmp_path / "few")


def test_a_later_evaluation_keeps_what_an_earlier_one_found(tmp_path):
    run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    parts = ("loss", "bpd", "sampling")
    for part in parts:
        asked = {f"eval__enable_{p}": p == part for p in parts}
        run_lib.evaluate(tiny(eval__bpd_num_images=5, **asked), tmp_path)
    saved = json.loads((tmp_path / "eval" / "ckpt_2.json").read_text())
    assert {*parts, "metrics"} <= saved.keys()
    assert saved["protocol"].keys() == set(parts)


def test_a_workdir_of_another_experiment_is_refused(tmp_path):
    run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    for changes in ({"training__sde": "subvpsde"}, {"model__nf": 16}, {"data__centered": False}):
        for call in (run_lib.train, run_lib.evaluate):
            with pytest.raises(ValueError, match="belongs to another experiment"):
                call(tiny(**changes), tmp_path)
    for changes in ({"model__dropout": 0.5}, {"optim__lr": 1e-3}, {"training__batch_size": 8}):
        with pytest.raises(ValueError, match=r"there, .* now.*--config\.training\.force_workdir"):
            run_lib.train(tiny(training__n_iters=7, **changes), tmp_path)
    run_lib.evaluate(tiny(model__dropout=0.5, eval__bpd_num_images=3), tmp_path)
    options = {"training__n_iters": 7, "training__log_freq": 1, "model__dropout": 0.5}
    run_lib.train(tiny(training__force_workdir=True, **options), tmp_path)
    assert "model.dropout: 0.0 there, 0.5 now" in (tmp_path / "log.txt").read_text()
    run_lib.train(tiny(**options), tmp_path)  # from now on these are the run's own


def test_a_checkpoint_lost_between_two_saves_is_written_again(tmp_path, monkeypatch):
    whole = run_lib_train.save_checkpoint

    def die_at_the_resume_file(path, state, **options):
        if state["step"] == 6 and Path(path).name == "checkpoint.pth":
            raise KeyboardInterrupt
        whole(path, state, **options)

    monkeypatch.setattr(run_lib_train, "save_checkpoint", die_at_the_resume_file)
    with pytest.raises(KeyboardInterrupt):
        run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    monkeypatch.setattr(run_lib_train, "save_checkpoint", whole)
    (tmp_path / "checkpoints" / "checkpoint_2.pth").unlink()
    run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint_2.pth").exists()


def test_an_average_of_any_width_is_made_after_training(tmp_path):
    from checkpoints_convert import convert

    config = tiny(
        training__snapshot_sampling=False, training__posthoc_freq=2, model__ema_profiles=(0.05, 0.1)
    )
    run_lib.train(config, tmp_path)
    assert len(list((tmp_path / "ema").iterdir())) == 4  # steps 2, 3, 4 and 6
    source, target = tmp_path / "checkpoints" / "checkpoint_2.pth", tmp_path / "of_width.pth"
    convert(source, target, "native", config, ema_width=0.1)
    kept = weights(tmp_path, "checkpoints/checkpoint_2.pth")["ema"]["profiles"][0.1]
    made = weights(tmp_path, "of_width.pth")["ema"]
    for a, b in zip(kept["shadow_params"], made["shadow_params"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_an_unknown_sampler_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="'magic' is unknown; registered"):
        run_lib.train(tiny(sampling__predictor="magic"), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_subsets_are_fixed_and_spread_over_the_set():
    chosen = run_lib_state.fixed_subset(1000, 100)
    assert torch.equal(chosen, run_lib_state.fixed_subset(1000, 200)[:100])
    assert len(set(chosen.tolist())) == 100
    assert 350 < chosen.double().mean() < 650
    assert sorted(run_lib_state.fixed_subset(5, 9).tolist()) == list(range(5))


def test_a_missing_checkpoint_is_an_error_that_names_what_there_is(tmp_path):
    run_lib.train(tiny(training__snapshot_sampling=False), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found 1, 2; --config\.eval\.begin_ckpt=-1"):
        run_lib.evaluate(tiny(eval__begin_ckpt=9, eval__end_ckpt=26), tmp_path)
    with pytest.raises(FileNotFoundError, match="train first"):
        run_lib.evaluate(tiny(), tmp_path / "nothing")


def test_checkpoints_of_a_range_are_evaluated_in_order(tmp_path):
    for number in (1, 2, 10, 11):
        path = tmp_path / "checkpoints" / f"checkpoint_{number}.pth"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    find = run_lib.find_checkpoints
    assert find(tiny(eval__begin_ckpt=2, eval__end_ckpt=10), tmp_path) == [2, 10]
    assert find(tiny(), tmp_path) == [11]


def test_a_nan_loss_ends_the_run_with_the_reason(tmp_path, monkeypatch):
    import data_lib

    whole = data_lib.prepare
    monkeypatch.setattr(data_lib, "prepare", lambda *a, **k: whole(*a, **k) * float("nan"))
    with pytest.raises(FloatingPointError, match="not finite 3 steps in a row"):
        run_lib.train(tiny(training__max_nonfinite=3), tmp_path)


# --- the command line -----------------------------------------------------------------------


def command(*arguments, workdir, config="configs/vp/digits_ddpmpp_continuous.py", **options):
    words = [f"--config.{key}={value}" for key, value in {**TINY, **options}.items()]
    return [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", *words,
            *arguments]  # fmt: skip


def call(*arguments, **options):
    result = subprocess.run(
        command(*arguments, **options), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stdout + result.stderr


def test_stray_arguments_are_refused(tmp_path):
    code, text = call("--mode=eval", "--config.eval.enable_bpd", "False", workdir=tmp_path)
    assert code != 0
    assert "stray arguments ['False']" in text
    assert "--config.eval.enable_bpd=False" in text


def test_missing_data_fail_in_seconds_with_the_remedy(tmp_path):
    path = "configs/ve/cifar10_ncsnpp_continuous.py"
    words = ["--mode=train", f"--config.data.root={tmp_path}"]
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "main.py", f"--config={path}", f"--workdir={tmp_path}", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert time.perf_counter() - started < 30
    assert result.returncode != 0
    assert "--config.data.download=True" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    """SIGKILL in the middle of training; resumed by the same command."""
    options = {"training.snapshot_sampling": False, "training.n_iters": 60}
    run = command("--mode=train", workdir=tmp_path / "killed", **options)
    process = subprocess.Popen(run, cwd=ROOT, stderr=subprocess.DEVNULL)
    resume = tmp_path / "killed" / "checkpoints-meta" / "checkpoint.pth"
    deadline = time.time() + 60
    while not resume.exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < weights(tmp_path / "killed")["step"] <= 60
    assert call("--mode=train", workdir=tmp_path / "killed", **options)[0] == 0
    assert call("--mode=train", workdir=tmp_path / "whole", **options)[0] == 0
    assert weights(tmp_path / "killed")["step"] == 60
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_help_is_quick_and_loads_no_torch():
    code = "import sys, main; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "False", io.StringIO(result.stderr).read()
