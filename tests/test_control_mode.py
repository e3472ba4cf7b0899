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
import sde_lib
from run_lib_control import control
from run_lib_control_inverse import quality
from run_lib_control_job import Job
from run_lib_control_tasks import get_task
from run_lib_images import read_images
from run_lib_state import complete_here, create_state

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


# --- what users hand over ---------------------------------------------------------------------


def test_pictures_of_every_kind_are_read_or_refused_with_the_reason(run, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(np.stack([grey] * 3, -1)).save(folder / "b.png")
    Image.fromarray(grey).convert("P").save(folder / "c.png")
    Image.fromarray(grey.astype(np.int32) * 257).convert("I;16").save(folder / "d.png")
    Image.fromarray(grey).convert("LA").save(folder / "e.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "f.png").mkdir()
    config = tiny(**{**QUICK, "control__num_images": 9}, control__image=str(folder))
    names, levels = read_images(config)
    assert names == list("abcde")
    assert all(torch.equal(levels[0], image) for image in levels)
    clear = Image.fromarray(grey).convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(folder / "z.png")
    with pytest.raises(ValueError, match="without transparent pixels"):
        read_images(config)


def test_files_of_one_name_and_two_kinds_keep_their_samples_apart(run, tmp_path):
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "a.bmp")
    folder = control(tiny(**QUICK, control__image=str(tmp_path / "in")), run, tmp_path / "o")
    assert len(pixels(folder)) == 6


def test_a_smaller_run_leaves_no_samples_of_a_larger_one(run, tmp_path):
    (tmp_path / "mine_00.png").write_bytes(b"mine")
    control(tiny(**QUICK), run, tmp_path)
    control(tiny(**{**QUICK, "control__num_samples": 1}), run, tmp_path)
    assert len(list(tmp_path.glob("held_out_*.png"))) == 2
    assert (tmp_path / "mine_00.png").read_bytes() == b"mine"


def test_a_mask_is_black_and_white_and_of_the_images_size(run, tmp_path):
    def masked(name, **options):
        return control(
            tiny(**QUICK, control__mask=str(tmp_path / name), **options), run, tmp_path / "o"
        )

    half = np.zeros((8, 8), np.uint8)
    half[:4] = 255
    Image.fromarray(half).convert("1").save(tmp_path / "bits.png")
    Image.fromarray(np.stack([half] * 3, -1)).save(tmp_path / "colour.png")
    assert len(pixels(masked("bits.png"))) == len(pixels(masked("colour.png"))) == 6
    Image.fromarray(np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)).save(
        tmp_path / "ramp.png"
    )
    with pytest.raises(ValueError, match=r"expected black and white, got .* grey pixels"):
        masked("ramp.png")
    Image.fromarray(half.repeat(2, 0).repeat(2, 1)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="16 x 16"):
        masked("large.png")
    assert len(pixels(masked("large.png", control__fit=True))) == 6
    hole = Image.fromarray(np.stack([half] * 4, -1), "RGBA")
    hole.save(tmp_path / "hole.png")
    with pytest.raises(ValueError, match="transparent"):
        masked("hole.png")


# --- methods ----------------------------------------------------------------------------------


def test_noise_is_respected_by_every_default_and_refused_by_the_papers_sampler(run, tmp_path):
    assert results(control(tiny(**QUICK, control__noise=0.1), run, tmp_path))["method"] == "mmps"
    config = tiny(**QUICK, control__noise=0.1, control__method="pc")
    with pytest.raises(ValueError, match="for measurements without noise"):
        control(config, run, tmp_path)


@pytest.mark.parametrize(
    "method",
    ["ddnm", "ddrm", "dps", "mmps", "pc", "pigdm", "projection", "repaint", "replacement",
     "sdedit", "smc", "tmpd"],
)  # fmt: skip
def test_every_method_fills_in_shows_its_way_and_is_the_same_at_any_batch_size(
    run, tmp_path, method
):
    noise = 0.05 if method == "smc" else 0.0
    options = {"jump": 2, "resamplings": 2} if method == "repaint" else {}
    options = {"particles": 2} if method == "smc" else options
    settings = {"control__method": method, "control__noise": noise, "control__options": options}
    found = []
    for size in (1, 6):
        config = tiny(**{**QUICK, "eval__batch_size": size}, **settings)
        folder = control(config, run, tmp_path / str(size))
        found.append(pixels(folder))
        with Image.open(folder / "sampling.webp") as image:
            assert getattr(image, "n_frames", 1) > 1
    assert results(folder)["evaluations"] >= 4
    assert max(np.abs(found[0][name] - found[1][name]).max() for name in found[0]) <= 1


def test_posterior_methods_are_told_of_the_data_in_the_networks_units(run, monkeypatch):
    import run_lib_control_inverse as inverse

    told = []

    def spy(*args, data_std=1.0, **options):
        told.append(data_std)
        return lambda model: None

    monkeypatch.setattr(inverse, "get_inverse_solver", lambda name: spy)
    config = complete_here(tiny(**QUICK, control__method="pigdm"))
    sde, state = sde_lib.get_sde(config), create_state(config)
    inverse.invert(Job(config, sde, state["model"]))
    config.control.options.data_std = 0.3
    inverse.invert(Job(config, sde, state["model"]))
    assert told == [0.5, 0.3]


def test_the_paper_colours_by_the_mean_and_other_greys_go_by_another_method(tmp_path):
    settings = {"data__num_channels": 3, "control__task": "colorize", "control__num_images": 2}
    config = tiny(**{**QUICK, **settings})
    config.data.dataset = "folder"
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(
            tmp_path / "data" / f"{i}.png"
        )
    config.data.path, config.training.batch_size = str(tmp_path / "data"), 4
    config.data.levels = 256
    run_lib.train(config, tmp_path / "run")
    found = results(control(config, tmp_path / "run", tmp_path / "o"))
    assert found["method"] == "pc" and found["constraint_error"] < 1e-6
    config.control.operator.weights = (0.299, 0.587, 0.114)
    found = results(control(config, tmp_path / "run", tmp_path / "o"))
    assert found["method"] == "ddnm" and found["constraint_error"] < 1e-5
    config.control.method = "pc"
    with pytest.raises(ValueError, match="for the mean of the channels"):
        control(config, tmp_path / "run", tmp_path / "o")


def test_a_conditional_network_fills_in_a_class_and_must_be_told_one(tmp_path):
    settings = {"model__num_classes": 10}
    run_lib.train(tiny(**settings), tmp_path / "run")
    for task in ("inpaint", "edit", "interpolate"):
        config = tiny(**QUICK, **settings, control__task=task)
        with pytest.raises(ValueError, match=r"set --config\.control\.label"):
            control(config, tmp_path / "run", tmp_path / task)
        config.control.label = 3
        assert pixels(control(config, tmp_path / "run", tmp_path / task))
    options = {"control__method": "smc", "control__noise": 0.1, "control__label": 3}
    config = tiny(**QUICK, **settings, **options, control__options={"particles": 2})
    assert pixels(control(config, tmp_path / "run", tmp_path / "smc"))


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling__sde": "edm", "sampling__predictor": "ddim"},
        {"sampling__method": "ode", "control__method": "ddnm"},
        {"control__num_images": 1, "control__num_samples": 1},
    ],
)
def test_other_processes_and_single_samples_work(run, tmp_path, settings):
    config = tiny(**{**QUICK, **settings})
    assert pixels(control(config, run, tmp_path))


@pytest.mark.parametrize(
    ("task", "options", "method"),
    [
        ("inpaint", {}, "pc"),
        ("superres", {"factor": 2}, "ddnm"),
        ("superres_bicubic", {"factor": 2}, "ddnm"),
        ("deblur", {}, "mmps"),
        ("deblur_motion", {"length": 5}, "mmps"),
    ],
)
def test_a_measurement_from_a_file_has_been_rounded(run, tmp_path, task, options, method):
    size = 4 if "superres" in task else 8
    path = picture(tmp_path / "y.png", size=size)
    settings = {"control__measured": True, "control__operator": options, "control__image": path}
    found = results(control(tiny(**QUICK, control__task=task, **settings), run, tmp_path / "o"))
    assert found["method"] == method
    rounding = 1 / (16 * 12**0.5)
    assert found["noise"] == (pytest.approx(rounding) if method == "mmps" else 0.0)


def test_a_killed_run_leaves_what_was_there(run, tmp_path, monkeypatch):
    control(tiny(**QUICK), run, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.[pjw]*")}
    import run_lib_control

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_lib_control, "write_outcome", killed)
    with pytest.raises(KeyboardInterrupt):
        control(tiny(**QUICK, control__mask="left"), run, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.[pjw]*")}


def test_a_network_of_the_exploding_process_fills_in(tmp_path):
    settings = {"training__sde": "vesde", "model__sigma_max": 10.0, "data__centered": False}
    settings |= {"training__continuous": False, "sampling__predictor": "reverse_diffusion"}
    settings |= {"sampling__corrector": "Langevin"}
    run_lib.train(tiny(**settings), tmp_path / "run")
    for method in ("pc", "ddnm", "mmps"):
        quick = {**QUICK, "eval__batch_size": 6, "control__method": method}
        folder = control(tiny(**quick, **settings), tmp_path / "run", tmp_path / method)
        assert len(pixels(folder)) == 6


@pytest.mark.parametrize("settings", [{"control__task": "interpolate"}, {"control__task": "edit"}])
def test_evaluations_are_all_that_were_made(settings):
    config = complete_here(tiny(**{**QUICK, **settings, "control__num_samples": 2}))
    sde, state = sde_lib.get_sde(config), create_state(config)
    calls = []
    state["model"].register_forward_hook(lambda *_: calls.append(1))
    outcome = get_task(config)(Job(config, sde, state["model"]))()
    assert outcome.numbers["evaluations"] == len(calls)


# --- settings that every method hears ----------------------------------------------------------


def test_the_grid_of_every_method_goes_by_the_configured_rho(run):
    config = complete_here(tiny(**QUICK, sampling__schedule="karras", sampling__rho=3.0))
    sde, state = sde_lib.get_sde(config), create_state(config)
    assert Job(config, sde, state["model"]).grid()["rho"] == 3.0


def test_samples_are_drawn_in_the_configured_precision(run, tmp_path, monkeypatch):
    import run_lib_control_job

    seen, kept = [], run_lib_control_job.sampling_precision

    def spy(config):
        seen.append(config.sampling.precision)
        return kept(config)

    monkeypatch.setattr(run_lib_control_job, "sampling_precision", spy)
    control(tiny(**QUICK, sampling__precision="bf16"), run, tmp_path)
    assert seen == ["bf16"] * 2
    settings = {**QUICK, "control__task": "superres_bicubic", "control__operator": {"factor": 2}}
    found = control(tiny(**settings, sampling__precision="bf16"), run, tmp_path / "bicubic")
    assert results(found)["constraint_error"] < 1e-5
    for noise in (0.0, 0.1):
        config = tiny(**settings, sampling__precision="bf16", control__method="mmps")
        config.control.noise = noise
        assert pixels(control(config, run, tmp_path / f"mmps{noise}"))


def test_codes_go_by_batches_and_are_the_same_at_any_size(run, tmp_path, monkeypatch):
    import sampling

    sizes, kept = [], sampling.encode

    def spy(sde, model, x, **options):
        sizes.append(len(x))
        return kept(sde, model, x, **options)

    monkeypatch.setattr(sampling, "encode", spy)
    settings = {**QUICK, "control__task": "interpolate", "control__num_images": 3}
    found = []
    for size in (2, 8):
        config = tiny(**{**settings, "eval__batch_size": size})
        found.append(results(control(config, run, tmp_path / str(size))))
    assert sizes == [2, 1, 3]
    assert found[0]["round_trip_rms"] == pytest.approx(found[1]["round_trip_rms"], rel=0.2)


def test_classes_are_not_guided_by_a_network_that_was_never_trained_without_one(run):
    settings = {"model__num_classes": 10, "control__task": "class"}
    for weight, refused in ((1.0, True), (0.0, False)):
        config = complete_here(tiny(**QUICK, **settings, control__weight=weight))
        sde, state = sde_lib.get_sde(config), create_state(config)
        job = Job(config, sde, state["model"])
        if refused:
            with pytest.raises(ValueError, match=r"set --config\.control\.weight=0"):
                get_task(config)(job)
        else:
            assert callable(get_task(config)(job))


@pytest.mark.parametrize("method", ["ddnm", "mmps", "repaint", "smc"])
def test_a_mistaken_option_is_named_before_the_sampling(run, tmp_path, method):
    config = tiny(**QUICK, control__method=method, control__noise=0.1)
    config.control.options.itterations = 3
    with pytest.raises(ValueError, match="has no option 'itterations'"):
        control(config, run, tmp_path)
