"""`--mode control`: conditional generation from image files to image files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from toys_processes import ROOT, tiny

import run_lib
from run_lib_control import control
from run_lib_control_inverse import quality

QUICK = {
    "sampling__steps": 4,
    "control__num_images": 2,
    "control__num_samples": 3,
    "eval__batch_size": 4,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run_lib.train(tiny(training__snapshot_freq=3), workdir)
    return workdir


def picture(path, size=8, mode="L", value=None):
    rng = np.random.default_rng(0)
    shape = (size, size) if mode == "L" else (size, size, 3)
    pixels = rng.integers(0, 256, shape) if value is None else np.full(shape, value)
    Image.fromarray(pixels.astype(np.uint8), mode).save(path)
    return str(path)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def pixels(folder, pattern="*_0?.png"):
    found = {}
    for path in sorted(folder.glob(pattern)):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image).astype(int)
    return found


def test_inpainting_leaves_every_file_and_the_known_pixels_alone(run, tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    config = tiny(**QUICK, control__mask=str(tmp_path / "mask.png"))
    folder = control(config, run, tmp_path / "out")
    found = pixels(folder)
    assert len(found) == 6
    for name, image in found.items():
        first = found[name[:-6] + "00.png"]
        assert np.array_equal(image[:, :4], first[:, :4])
    assert any(np.any(image != first) for image in found.values())
    assert results(folder)["constraint_error"] < 1e-6
    assert results(folder)["psnr"] > 0
    with Image.open(folder / "comparison.png") as image:
        assert image.width > 6 * 90  # measurement, three samples, mean, truth
    with Image.open(folder / "sampling.webp") as image:
        assert getattr(image, "n_frames", 1) > 1


@pytest.mark.parametrize("task", ["superres", "deblur", "mri", "compressed_sensing", "ct"])
def test_every_measurement_is_undone_to_its_constraint(run, tmp_path, task):
    folder = control(tiny(**QUICK, control__task=task), run, tmp_path)
    assert results(folder)["method"] == "ddnm"
    assert results(folder)["constraint_error"] < 1e-4
    assert len(pixels(folder)) == 6


def test_noise_in_the_measurement_changes_the_default_method(run, tmp_path):
    config = tiny(**QUICK, control__task="superres", control__noise=0.05)
    found = results(control(config, run, tmp_path))
    assert found["method"] == "mmps"
    assert found["noise"] == 0.05


def test_a_measurement_may_come_from_a_file(run, tmp_path):
    low = picture(tmp_path / "low.png", size=4)
    settings = {"control__measured": True, "control__operator": {"factor": 2}}
    config = tiny(**QUICK, control__task="superres", control__image=low, **settings)
    folder = control(config, run, tmp_path / "out")
    with Image.open(low) as image:
        known = np.asarray(image).astype(float)
    sample = pixels(folder)["low_00.png"].astype(float)
    assert "psnr" not in results(folder)
    if sample.min() > 0 and sample.max() < 255:  # nothing was clipped
        assert np.abs(sample.reshape(4, 2, 4, 2).mean((1, 3)) - known).max() < 9  # 17 levels
    with pytest.raises(ValueError, match="is no picture"):
        control(tiny(**QUICK, control__task="mri", control__measured=True), run, tmp_path)


def test_samples_do_not_depend_on_the_batch_size(run, tmp_path):
    a = pixels(control(tiny(**QUICK), run, tmp_path / "a"))
    b = pixels(control(tiny(**{**QUICK, "eval__batch_size": 6}), run, tmp_path / "b"))
    assert a.keys() == b.keys()
    assert max(np.abs(a[name] - b[name]).max() for name in a) <= 1


def test_edit_keeps_the_guide_at_little_strength_and_forgets_it_at_much(run, tmp_path):
    few = tiny(**{**QUICK, "sampling__steps": 10}, control__task="edit", control__strength=0.05)
    much = tiny(**{**QUICK, "sampling__steps": 10}, control__task="edit", control__strength=1.0)
    near, far = (results(control(c, run, tmp_path)) for c in (few, much))
    assert near["guide_psnr"] > far["guide_psnr"]


def test_interpolation_reports_its_round_trip(run, tmp_path):
    folder = control(tiny(**QUICK, control__task="interpolate"), run, tmp_path)
    assert results(folder)["round_trip_rms"] < 0.05
    assert len(pixels(folder)) == 4  # three between, and the second image
    one = tiny(**{**QUICK, "control__num_images": 1}, control__task="interpolate")
    with pytest.raises(ValueError, match="two images or more"):
        control(one, run, tmp_path)


def test_classes_need_a_classifier_or_a_conditional_network(run, tmp_path):
    with pytest.raises(ValueError, match=r"control\.classifier=WORKDIR"):
        control(tiny(**QUICK, control__task="class"), run, tmp_path)
    workdir = tmp_path / "conditional"
    settings = {"model__num_classes": 10, "model__label_dropout": 0.1}
    run_lib.train(tiny(**settings), workdir)
    config = tiny(**QUICK, **settings, control__task="class", control__weight=1.0)
    assert len(pixels(control(config, workdir, tmp_path / "all"))) == 30
    config.control.label = 3
    assert len(pixels(control(config, workdir, tmp_path / "one"))) == 3
    config.control.label = 10
    with pytest.raises(ValueError, match="expected 0 to 9"):
        control(config, workdir, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control__task": "paint"}, r"'paint' is unknown; known: inpaint"),
        ({"control__method": "magic"}, "'magic' is unknown"),
        ({"control__mask": "no_such.png"}, "expected an image file"),
        ({"control__image": "no_such.png"}, "expected an image or a folder"),
        ({"control__task": "superres", "control__method": "pc"}, "is for 'inpaint'"),
        ({"control__operator": {"zoom": 2}}, "has no option 'zoom'"),
        ({"control__task": "superres", "control__operator": {"factor": 3}}, "3"),
        ({"control__task": "colorize"}, "channels"),
        ({"control__task": "edit", "control__strength": 2.0}, "share of T"),
    ],
)
def test_what_is_wrong_is_said_before_the_sampling(run, tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        control(tiny(**QUICK, **settings), run, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_images_that_do_not_fit_are_refused_or_made_to_fit(run, tmp_path):
    large = picture(tmp_path / "large.png", size=20)
    colour = picture(tmp_path / "colour.png", mode="RGB")
    (tmp_path / "text.png").write_text("not an image")
    for path, message in ((large, "20 x 20"), (colour, "in grey"), ("text.png", "decoded")):
        config = tiny(**QUICK, control__image=str(tmp_path / path))
        with pytest.raises(ValueError, match=message):
            control(config, run, tmp_path / "out")
    for path in (large, colour):
        config = tiny(**QUICK, control__image=path, control__fit=True)
        assert len(pixels(control(config, run, tmp_path / "out" / path[-9:-4]))) == 3
    white = picture(tmp_path / "white.png", value=255)
    with pytest.raises(ValueError, match="knows every pixel"):
        control(tiny(**QUICK, control__mask=white), run, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found none"):
        control(tiny(**QUICK, control__image=str(tmp_path / "empty")), run, tmp_path / "out")


def test_psnr_is_that_of_its_definition():
    truth = torch.full((2, 1, 4, 4), 0.5)
    samples = torch.stack([truth + 0.1, truth - 0.1], dim=1)
    found = quality(samples, truth)
    assert abs(found["psnr"] - 20) < 1e-4
    assert found["psnr_of_mean"] > 90
    assert abs(found["std_over_samples"] - 0.1 * 2**0.5) < 1e-6


def test_the_command_line_does_it_and_says_what_it_did(run, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from toys_processes import tiny\n"
        "def get_config():\n    return tiny()\n"
    )
    words = [
        f"--config={config}",
        f"--workdir={run}",
        "--mode=control",
        "--output=" + str(tmp_path / "o"),
    ]
    words += ["--config.control.task=superres", "--config.sampling.steps=3"]
    words += ["--config.control.operator={'factor': 4}"]
    done = subprocess.run(
        [sys.executable, "main.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "constraint error" in done.stderr + done.stdout
    assert (tmp_path / "o" / "comparison.png").exists()
