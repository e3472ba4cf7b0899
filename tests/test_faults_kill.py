"""kill -9 at chosen points of every mode: nothing written is lost or torn, and a restart ends as
a run that was never killed. Random moments: test_resume.py (train), test_eval_run.py (eval)."""

import shutil

import pytest
from toys_faults import MODES, check, configuration, contents, files_of, killed, left, same

import run_lib

#: Faults by mode, one after the other in one life. Each is killed by the fault, restarted with the
#: next, and at last goes on to its end.
LIVES = {
    "train": [
        ("calls", "run_lib_train.Run.restore", 1),
        ("writes", "config.json", 1),
        ("calls", "run_lib_train.Steps.train", 1),
        ("calls", "run_lib_train.Steps.train", 4),
        ("writes", "checkpoint_1.pth", 2),
        ("writes", "checkpoint.pth", 3),
        ("renames", "checkpoint.pth", 2),
        ("renames", "checkpoint_2.pth", 1),
        ("calls", "run_lib_train.Steps.evaluate", 1),
        ("writes", "history.jsonl", 1),
        ("renames", "history.jsonl", 1),
        ("calls", "run_lib_train.Run._draw_samples", 1),
        ("writes", "sample.png", 1),
    ],
    "eval": [
        ("calls", "run_lib_eval.Evaluation.loss", 1),
        ("renames", "ckpt_1.json", 1),
        ("writes", "00000000*.npz", 3),
        ("renames", "00000000*.npz", 2),
        ("calls", "run_lib_shards.Shards._merge", 1),
        ("writes", "ckpt_1_bpd_elbo.npz", 5),
        ("renames", "ckpt_1_bpd_elbo.npz", 1),
        ("writes", "ckpt_1_frames.npz", 2),
        ("calls", "run_lib_samples.Sampler.__call__", 2),
        ("writes", "ckpt_1_samples.npz", 7),
        ("calls", "shutil.rmtree", 1),
        ("calls", "evaluation_features.Extractor.__call__", 3),
        ("writes", "ckpt_1_features.npz", 4),
        ("calls", "evaluation_metrics.feature_metrics", 1),
        ("writes", "ckpt_1_samples.png", 1),
        ("writes", "ckpt_1_sampling.webp", 1),
        ("writes", "ckpt_1.json", 3),
        ("calls", "run_lib_eval.to_tensorboard", 1),
        ("calls", "run_lib_eval.write_report", 1),
        ("writes", "report.html", 1),
    ],
    "stats": [
        ("calls", "evaluation_features.Extractor.__call__", 2),
        ("calls", "evaluation_stats.write_statistics", 1),
        ("writes", "stats.npz", 3),
        ("renames", "stats.npz", 1),
    ],
    "sample": [
        ("calls", "run_lib_samples.Sampler.__call__", 2),
        ("writes", "000003.png", 1),
        ("renames", "000005.png", 1),
    ],
    "sample npz": [("writes", "drawn.npz", 2), ("renames", "drawn.npz", 1)],
    "sample png": [("writes", "drawn.png", 1)],
    "control": [
        ("calls", "run_lib_control_job.Job.draw", 1),
        ("writes", "*_01.png", 1),
        ("writes", "comparison.png", 1),
        ("writes", "sampling.webp", 1),
        ("writes", "results.json", 1),
    ],
    "convert": [
        ("calls", "checkpoints_convert.export_content", 1),
        ("writes", "out.pth", 2),
        ("renames", "out.pth", 1),
    ],
    "convert score_sde": [("writes", "original.pth", 3)],
    "convert safetensors": [
        ("writes", "out.safetensors", 1),
        ("writes", "out.json", 1),
        ("renames", "out.safetensors", 1),
    ],
}
QUICK = ("stats", "sample", "convert safetensors")
#: A shorter life, of those that cost seconds.
SHORT = {
    "train": [
        ("calls", "run_lib_train.Steps.train", 4),
        ("writes", "checkpoint_1.pth", 2),
        ("renames", "checkpoint.pth", 2),
    ],
}
#: Parts that a finished file takes the place of.
REMOVED = ("*.parts/*",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints and the statistics of its data."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run_lib.train(configuration(workdir), workdir)
    MODES["stats"](workdir)
    return workdir


def begin(mode, trained, workdir):
    """What this mode begins with."""
    if mode != "train":
        shutil.copytree(trained, workdir)
    if mode == "stats":
        (workdir / "stats.npz").unlink()


def live(mode, workdir, faults) -> None:
    """Be killed by each fault in turn, which must happen, then go on to the end."""
    for fault in faults:
        before = files_of(workdir)
        assert killed(mode, workdir, fault), f"{fault} did not happen"
        check(workdir, before, REMOVED)
    MODES[mode](workdir)


def cases():
    for mode, faults in SHORT.items():
        yield pytest.param(mode, faults, id=f"{mode}, short")
    for mode, faults in LIVES.items():
        marks = () if mode in QUICK else pytest.mark.slow
        yield pytest.param(mode, faults, id=mode, marks=marks)


@pytest.mark.parametrize(("mode", "faults"), cases())
def test_a_life_of_kills_ends_as_one_without(mode, faults, trained, tmp_path):
    begin(mode, trained, tmp_path / "whole")
    MODES[mode](tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    begin(mode, trained, tmp_path / "killed")
    live(mode, tmp_path / "killed", faults)
    print(f"{mode}: killed {len(faults)} times")
    same(tmp_path / "killed", expected)
    assert left(tmp_path / "killed") == []


def test_the_faults_are_counted():
    counts = {mode: len(faults) for mode, faults in LIVES.items()}
    print(counts, "in all", sum(counts.values()))
    assert sum(counts.values()) >= 55
    assert {mode.split()[0] for mode in counts} == {
        "train", "eval", "stats", "sample", "control", "convert"
    }  # fmt: skip
