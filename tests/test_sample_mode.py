"""`--mode sample`: numbered samples of a checkpoint, as files, a grid or an array."""

import json
import subprocess
import sys

import numpy as np
import pytest
import toys_processes
from PIL import Image
from toys_processes import ROOT, tiny

import run_lib
import visualize

STEPS = {"sampling__steps": 5, "eval__batch_size": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run_lib.train(tiny(training__snapshot_freq=3), workdir)
    return workdir


def array(path):
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def test_files_grid_and_array_hold_the_same_samples(run, tmp_path):
    config = tiny(**STEPS)
    folder = run_lib.sample(config, run, tmp_path / "files", num=6)
    grid = run_lib.sample(config, run, tmp_path / "grid.png", num=6)
    samples = array(run_lib.sample(config, run, tmp_path / "x.npz", num=6))["samples"]
    assert (samples.shape, samples.dtype) == ((6, 1, 8, 8), np.uint8)
    assert [p.name for p in sorted(folder.iterdir())] == [f"{i:06d}.png" for i in range(6)]
    for i in range(6):
        with Image.open(folder / f"{i:06d}.png") as image:
            assert np.array_equal(np.asarray(image), samples[i, 0])
    import torch

    with Image.open(grid) as image:
        assert np.array_equal(image, visualize.image_grid(torch.from_numpy(samples)))


def test_a_sample_has_a_number_and_is_the_one_of_the_evaluation(run, tmp_path):
    config = tiny(**STEPS, eval__num_samples=9, eval__enable_loss=False, eval__enable_bpd=False)
    run_lib.evaluate(config, run)
    known = array(run / "eval" / "ckpt_2_samples.npz")["samples"]
    drawn = array(run_lib.sample(config, run, tmp_path / "x.npz", num=4, first=5))
    assert drawn["numbers"].tolist() == [5, 6, 7, 8]
    assert np.abs(drawn["samples"].astype(int) - known[5:].astype(int)).max() <= 1
    config.seed = 7
    other = array(run_lib.sample(config, run, tmp_path / "y.npz", num=4, first=5))["samples"]
    assert np.abs(other.astype(int) - known[5:].astype(int)).max() > 50


def _sample(run, path, first):
    run_lib.sample(tiny(**STEPS), run, path, num=7, first=first)


def test_samples_do_not_depend_on_the_number_of_processes(run, tmp_path):
    _sample(run, tmp_path / "one.npz", 2)
    toys_processes.run(2, _sample, run, tmp_path / "two.npz", 2)
    one, two = array(tmp_path / "one.npz"), array(tmp_path / "two.npz")
    assert one["numbers"].tolist() == two["numbers"].tolist() == list(range(2, 9))
    assert np.abs(one["samples"].astype(int) - two["samples"].astype(int)).max() <= 1
    toys_processes.run(2, _sample, run, tmp_path / "files", 0)
    assert len(list((tmp_path / "files").glob("*.png"))) == 7


def test_the_checkpoint_is_the_newest_or_the_one_that_is_named(run):
    assert run_lib.sample(tiny(**STEPS), run, num=1) == run / "samples" / "ckpt_2"
    assert run_lib.sample(tiny(**STEPS), run, num=1, checkpoint=1).name == "ckpt_1"
    with pytest.raises(FileNotFoundError, match="found 1, 2"):
        run_lib.sample(tiny(**STEPS), run, num=1, checkpoint=7)


def test_class_conditional_networks_take_a_label(tmp_path):
    config = tiny(model__num_classes=10, **STEPS)
    run_lib.train(config, tmp_path)
    every = array(run_lib.sample(config, tmp_path, tmp_path / "all.npz", num=12))
    assert every["labels"].tolist() == [*range(10), 0, 1]
    threes = array(run_lib.sample(config, tmp_path, tmp_path / "3.npz", num=12, label=3))
    assert threes["labels"].tolist() == [3] * 12
    with pytest.raises(ValueError, match="class label from 0 to 9"):
        run_lib.sample(config, tmp_path, label=10)


def test_what_is_wrong_is_said_before_sampling(run, tmp_path):
    with pytest.raises(ValueError, match="the network takes none"):
        run_lib.sample(tiny(**STEPS), run, label=1)
    with pytest.raises(ValueError, match="num ≥ 1"):
        run_lib.sample(tiny(**STEPS), run, num=0)
    with pytest.raises(ValueError, match="another experiment"):
        run_lib.sample(tiny(model__nf=16), run)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"ends in \.npz or \.png"):
        run_lib.sample(tiny(**STEPS), run, tmp_path / "file")


def test_another_process_of_the_same_noise_levels_samples_the_network(run, tmp_path):
    config = tiny(**STEPS, sampling__sde="rectified_flow", sampling__predictor="ddim")
    samples = array(run_lib.sample(config, run, tmp_path / "x.npz", num=3))["samples"]
    assert samples.shape == (3, 1, 8, 8)


def test_the_command_line_draws_samples(run, tmp_path):
    known = json.loads((run / "config.json").read_text())["model"]
    words = [f"--config.model.{key}={known[key]}" for key in ("nf", "num_res_blocks", "num_scales")]
    command = [sys.executable, "main.py", "--config=configs/vp/digits_ddpmpp_continuous.py",
               f"--workdir={run}", "--mode=sample", "--num=3", "--first=2", *words,
               "--config.sampling.steps=3", f"--output={tmp_path / 'out'}"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["000002.png", "000003.png", "000004.png"]
