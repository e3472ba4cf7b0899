"""Evaluation runs: the same numbers however they are split, killed and resumed; nothing stale."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import toys_processes
from PIL import Image
from toys_inception import write_weights
from toys_processes import ROOT, tiny

import data_lib
import divergence
import evaluation_features
import evaluation_metrics
import evaluation_stats
import likelihood
import run_lib
import run_lib_checks
import run_lib_eval
import run_lib_journal
import run_lib_results
import run_lib_samples
import run_lib_shards
import run_lib_state

OFF = {"eval__enable_loss": False, "eval__enable_bpd": False, "eval__enable_sampling": False}
FEW = {
    "eval__num_samples": 24,
    "eval__batch_size": 10,
    "eval__bpd_num_images": 13,
    "eval__bpd_repeats": 2,
    "eval__rtol": 1e-2,
    "eval__atol": 1e-2,
    "sampling__steps": 6,
    "training__snapshot_freq": 2,
}


def few(*parts, **changes):
    """A configuration that evaluates only these parts."""
    asked = {**OFF, **{f"eval__enable_{part}": True for part in parts}}
    return tiny(**{**FEW, **asked, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run with checkpoints 1 to 3, and pixel statistics of its data."""
    workdir = tmp_path_factory.mktemp("run")
    run_lib.train(few(), workdir)
    run_lib.statistics(scored(workdir), None)
    return workdir


def scored(workdir, **changes):
    stats = {"eval__stats": str(workdir / "pixels.npz"), "eval__extractor": "pixels"}
    return few(
        "sampling", **{**stats, "eval__metrics": ("fid", "kid", "is", "prdc")[:2], **changes}
    )


def write_noise(folder, count):
    """A folder of 8 x 8 images of noise."""
    folder.mkdir()
    for i in range(count):
        pixels = np.random.RandomState(i).randint(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


def numbers(result):
    """The numbers of a result, without the protocol, flat."""
    flat = {}

    def walk(value, key):
        if isinstance(value, dict):
            for name, entry in value.items():
                walk(entry, f"{key}/{name}") if name != "protocol" else None
        elif isinstance(value, int | float):
            flat[key] = float(value)

    walk(result, "")
    return flat


def same(a, b, tolerance=1e-4):
    a, b = numbers(a), numbers(b)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key


# --- the same numbers however they are split --------------------------------------------------


def _noise_and_probe(*args, **kwargs):
    """In place of the likelihood, which takes long: the noise of each image."""

    def likelihood_fn(model, data, *, draws):
        values = data.flatten(1).double() @ torch.linspace(0, 1, 64, dtype=torch.float64)
        probes = divergence.get_probe("Rademacher")(data, draws).flatten(1)
        logp = values + 100 * (probes @ torch.linspace(0, 1, 64))
        calls = torch.full((len(data),), 44)
        return likelihood.Likelihood(logp, torch.full_like(logp, torch.nan), None, calls, {})

    return likelihood_fn


def _evaluate(workdir, folder, changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "get_ode_likelihood_fn", _noise_and_probe)
        config = few("loss", "bpd", "sampling", **changes)
        return run_lib.evaluate(config, workdir, folder)[3]


@pytest.mark.parametrize(("batch", "processes"), [(4, 1), (300, 1), (10, 2)])
def test_numbers_do_not_depend_on_batch_size_and_processes(run, batch, processes):
    changes = {"eval__batch_size": batch}
    reference = _evaluate(run, "whole", {})
    folder = f"split_{batch}_{processes}"
    if processes == 1:
        results = [_evaluate(run, folder, changes)]
    else:
        results = toys_processes.run(processes, _evaluate, run, folder, changes)
    for result in results:
        same(reference, result)
    for name, tolerance in (("samples", 1), ("bpd", 1e-4)):
        a, b = (np.load(run / f / f"ckpt_3_{name}.npz")[name] for f in ("whole", folder))
        assert np.abs(a.astype(float) - b.astype(float)).max() <= tolerance


def test_every_image_is_scored_once_per_repeat(run, monkeypatch):
    config = few("bpd", eval__bpd_num_images=0, eval__batch_size=128)
    monkeypatch.setattr(likelihood, "get_ode_likelihood_fn", _noise_and_probe)
    bpd = run_lib.evaluate(config, run, "all")[3]["bpd"]
    saved = np.load(run / "all" / "ckpt_3_bpd.npz")
    assert (bpd["images"], saved["bpd"].shape) == (300, (300, 2))
    assert sorted(saved["index"]) == list(range(300))
    assert np.isfinite(saved["bpd"]).all()
    assert (saved["bpd"][:, 0] != saved["bpd"][:, 1]).all()


def test_the_loss_is_that_of_the_training_at_the_same_checkpoint(run):
    loss = run_lib.evaluate(few("loss"), run, "loss")[3]["loss"]
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    (logged,) = [r["eval_loss"] for r in lines if r["step"] == 6 and "eval_loss" in r]
    assert loss["mean"] == pytest.approx(logged, rel=1e-5)


def test_samples_beyond_the_first_ones_extend_them(run):
    result = run_lib.evaluate(few("sampling", eval__num_samples=7), run, "more")[3]
    path = run / "more" / "ckpt_3_samples.npz"
    first = np.load(path)["samples"]
    assert (len(first), result["sampling"]["images"]) == (7, 7)
    run_lib.evaluate(few("sampling"), run, "more")
    assert np.array_equal(np.load(path)["samples"][:7], first)


# --- killed and resumed -----------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("part", ["bpd", "sampling"])
def test_what_a_killed_evaluation_left_is_kept_and_counted_once(run, monkeypatch, part, after):
    folder, calls = f"killed_{part}_{after}", []
    whole = run_lib_shards.Shards._write
    monkeypatch.setattr(likelihood, "get_ode_likelihood_fn", _noise_and_probe)

    def die(self, path, arrays, places):
        if len(calls) == after:
            raise Killed
        calls.append(places)
        whole(self, path, arrays, places)

    monkeypatch.setattr(run_lib_shards.Shards, "_write", die)
    with pytest.raises(Killed):
        run_lib.evaluate(few(part), run, folder)
    computed = []

    def note(self, path, arrays, places):
        computed.extend(places if path != self.path else ())
        whole(self, path, arrays, places)

    monkeypatch.setattr(run_lib_shards.Shards, "_write", note)
    result = run_lib.evaluate(few(part, eval__batch_size=7), run, folder)[3]
    kept = [place for places in calls for place in places]
    count = 24 if part == "sampling" else 13
    assert sorted(kept + computed) == list(range(count))
    same(run_lib.evaluate(few(part), run, f"whole_{part}")[3], result)
    assert not list((run / folder).glob("*.parts"))


def test_a_finished_evaluation_is_not_done_again(run, monkeypatch):
    config = scored(run)
    first = run_lib.evaluate(config, run, "again")[3]
    monkeypatch.setattr(run_lib_samples.Sampler, "__call__", None)
    monkeypatch.setattr(evaluation_features.Extractor, "_part", lambda s, x: 1 / 0)
    monkeypatch.setattr(run_lib_eval.FeatureMetrics, "__init__", _without_a_probe)
    same(first, run_lib.evaluate(config, run, "again")[3])


def _without_a_probe(self, config):
    self.config = config
    self.reference = evaluation_stats.read_statistics(config.eval.stats)
    self.extractor, self.notes = evaluation_features.get_extractor("pixels"), []


@pytest.mark.parametrize(
    "change",
    [
        {"sampling__steps": 5},
        {"sampling__predictor": "reverse_diffusion"},
        {"sampling__noise_removal": False},
        {"sampling__eps": 2e-3},
        {"data__uniform_dequantization": False},
        {"sampling__solver": {"order": 2}, "sampling__predictor": "exp_ab"},
        {"seed": 43},
    ],
)
def test_samples_of_another_protocol_are_made_anew(run, change, monkeypatch):
    run_lib.evaluate(few("sampling"), run, "stale")
    drawn, whole = [], run_lib_samples.Sampler.__call__

    def note(self, places):
        drawn.extend(places)
        return whole(self, places)

    monkeypatch.setattr(run_lib_samples.Sampler, "__call__", note)
    run_lib.evaluate(few("sampling", **change), run, "stale")
    assert sorted(drawn) == list(range(24))
    fresh = run_lib.evaluate(few("sampling", **change), run, f"fresh{list(change)}")[3]
    again = json.loads((run / "stale" / "ckpt_3.json").read_text())
    same(fresh, again)


def test_parts_of_other_weights_are_never_mixed(tmp_path):
    def shards(weights):
        return run_lib_shards.Shards(tmp_path / "x.npz", {"weights": weights})

    def work(value):
        return lambda places: {"x": np.full(len(places), value)}

    old = shards("old")
    old.folder.mkdir()
    old._write(old.folder / "000000000.npz", work(1)(range(3)), range(3))
    shards("new").fill(5, 2, work(2), "x", "row")
    assert shards("new").read(5)["x"].tolist() == [2] * 5
    shards("old").fill(4, 2, work(3), "x", "row")
    assert shards("old").read(4)["x"].tolist() == [3] * 4


def test_shards_fill_what_is_missing_whatever_is_there(tmp_path):
    rng, made = np.random.RandomState(0), {"a": 1}
    for trial in range(20):
        shards = run_lib_shards.Shards(tmp_path / f"{trial}.npz", made)
        shards.folder.mkdir()
        for start in rng.choice(40, 3, replace=False):
            places = range(start, start + rng.randint(1, 9))
            shards._write(shards.folder / f"{start:09d}.npz", {"x": np.array(places)}, places)
        (shards.folder / "000000039.npz").write_bytes(b"half a file")
        done = []

        def work(places, done=done):
            done.extend(places)
            return {"x": np.array(places)}

        count = int(rng.randint(20, 45))
        shards.fill(count, int(rng.randint(1, 8)), work, "x", "row")
        assert shards.read(count)["x"].tolist() == list(range(count))
        assert len(done) == len(set(done))


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard_is_made_anew(tmp_path, damage, finished):
    shards = run_lib_shards.Shards(tmp_path / "x.npz", {})
    rows = {"x": np.random.RandomState(0).rand(6, 50)}
    path = shards.path if finished else shards.folder / "000000000.npz"
    shards._write(path, rows, range(6))
    content = bytearray(path.read_bytes())
    middle = bytes(content).index(rows["x"].tobytes()[:64])
    content[middle + 8] ^= 1
    broken = {"empty": b"", "torn": content[: len(content) // 2], "flipped": content}
    path.write_bytes(broken[damage])
    done = []

    def work(places):
        done.extend(places)
        return {"x": rows["x"][places.start : places.stop]}

    shards.fill(6, 4, work, "x", "row")
    assert done == list(range(6))
    assert np.array_equal(shards.read(6)["x"], rows["x"])


def test_a_part_goes_on_without_the_files_of_another_that_were_removed(run):
    run_lib.evaluate(few("sampling"), run, "gone")
    (run / "gone" / "ckpt_3_samples.npz").unlink()
    (run / "gone" / "ckpt_3_frames.npz").write_bytes(b"")
    known = run_lib.evaluate(few("loss"), run, "gone")[3]
    assert {"loss", "sampling"} <= known.keys()
    run_lib.evaluate(few("sampling"), run, "gone")


# --- samplers that cannot have a seed per sample ----------------------------------------------


def test_langevin_on_few_numbers_has_a_seed_per_batch_and_says_so(run):
    config = few("sampling", sampling__corrector="langevin")
    result = run_lib.evaluate(config, run, "langevin")[3]
    assert result["sampling"]["seeds"].startswith("one per batch of 10: 'langevin'")
    parts = toys_processes.run(2, _langevin, run)
    same(result, parts[0])
    a, b = (np.load(run / f / "ckpt_3_samples.npz")["samples"] for f in ("langevin", "langevin2"))
    assert np.array_equal(a, b)


def _langevin(workdir):
    config = few("sampling", sampling__corrector="langevin")
    return run_lib.evaluate(config, workdir, "langevin2")[3]


# --- what is checked before the work, and what is loaded --------------------------------------


def test_only_what_is_asked_for_is_loaded(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(run_lib_eval, "FeatureMetrics", refuse)
    config = few("bpd", eval__metrics=("fid",), eval__extractor="legacy_tensorflow")
    assert "bpd" in run_lib.evaluate(config, run, "only")[3]


def _bpd_alone(workdir):
    run_lib.evaluate(few("bpd", eval__bpd_num_images=2, eval__metrics=("fid",)), workdir, "light")
    return [name for name in ("torchvision", "cleanfid", "diffusers") if name in sys.modules]


def test_bits_alone_import_no_inception_and_no_torchvision(run):
    code, loaded, _ = toys_processes.Child(_bpd_alone, run).end()
    assert (code, loaded) == (0, [])


def test_a_folder_that_cannot_be_written_or_is_in_use_is_refused_before_the_work(run, monkeypatch):
    monkeypatch.setattr(run_lib_eval.Evaluation, "run", lambda *a: pytest.fail("evaluated"))
    (run / "file").touch()
    with pytest.raises(OSError, match="expected a folder to write in"):
        run_lib.evaluate(few("loss"), run, "file")
    (run / "held").mkdir()
    with run_lib_checks.lock(run / "held"):
        code, _, message = toys_processes.Child(_loss_in, run, "held").end()
    assert code == 1
    assert "is in use: process" in message


def _loss_in(workdir, folder):
    run_lib.evaluate(few("loss"), workdir, folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eval__metrics": ("fit",)}, ValueError, "got 'fit'"),
        ({"eval__metrics": ("is",)}, ValueError, "needs an extractor that classifies"),
        ({"eval__stats": "/nowhere.npz"}, FileNotFoundError, "--mode stats"),
        ({"eval__extractor": "legacy_tensorflow"}, FileNotFoundError, "eval.inception_path"),
        ({"eval__num_samples": 3}, ValueError, "needs at least 4"),
        ({"sampling__predictor": "magic"}, ValueError, "unknown"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_sample(run, monkeypatch, changes, error, message):
    monkeypatch.setattr(run_lib_samples.Sampler, "__call__", lambda *a: pytest.fail("sampled"))
    with pytest.raises(error, match=message):
        run_lib.evaluate(scored(run, **changes), run, "wrong")


def test_statistics_of_another_resolution_are_refused(run, tmp_path):
    made = evaluation_stats.read_statistics(run / "pixels.npz")
    made.protocol["resolution"] = [16, 16]
    path = evaluation_stats.write_statistics(tmp_path / "other.npz", made)
    with pytest.raises(ValueError, match=r"expected resolution \[8, 8\], got \[16, 16\]"):
        run_lib.evaluate(scored(run, eval__stats=str(path)), run, "wrong")


# --- whose weights ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run whose checkpoint holds three averages."""
    workdir = tmp_path_factory.mktemp("averaged")
    others = {"model__ema_rates": (0.01,), "model__ema_profiles": (0.1,)}
    run_lib.train(few(**others, training__snapshot_freq=6), workdir)
    return workdir


@pytest.mark.parametrize(
    ("which", "words"), [(0, "decay 0.998"), (0.998, "decay 0.998"), (0.01, "decay 0.01"),
                         (0.1, "relative width 0.1")],
)  # fmt: skip
def test_the_average_that_eval_ema_names_is_evaluated_and_recorded(averaged, which, words):
    saved = torch.load(averaged / "checkpoints" / "checkpoint_1.pth", weights_only=True)["ema"]
    held = {**saved["rates"], **saved["profiles"]}.get(which, saved)["shadow_params"]
    config = run_lib_state.complete_here(few(eval__ema=which))  # which names no other average
    state = run_lib_state.create_state(config)
    digest = run_lib_state.load_averages(config, averaged, 1, state)
    trained = [p for p in state["model"].parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(trained, held, strict=True))
    result = run_lib.evaluate(few("loss", eval__ema=which, eval__begin_ckpt=-1), averaged)[1]
    assert result["protocol"]["loss"]["weights"] == f"exponential moving average, {words}"
    assert result["weights_sha256"] == digest
    assert words in (averaged / "report.html").read_text()


def test_an_average_that_the_checkpoint_lacks_is_refused_even_where_the_configuration_names_it(
    averaged, monkeypatch
):
    monkeypatch.setattr(run_lib_eval.Evaluation, "run", lambda *a: pytest.fail("evaluated"))
    config = few("loss", eval__ema=0.5, model__ema_rates=(0.5,), eval__begin_ckpt=-1)
    with pytest.raises(ValueError, match=r"eval.ema=0.5, got 0.998, 0.01, 0.1; choose"):
        run_lib.evaluate(config, averaged)
    with pytest.raises(ValueError, match=r"eval.ema=0.5, got 0.998, 0.01, 0.1; choose"):
        run_lib.sample(config, averaged, num=1)


@pytest.mark.parametrize(("words", "steps"), [("decay 0.9", [1, 2, 3]), ("decay 0.99", [2, 3])])
def test_a_curve_is_of_one_average(tmp_path, words, steps):
    for k, average in ((1, words), (2, "decay 0.9"), (3, "decay 0.9")):
        loss, protocol = {"mean": 1.0, "standard_error": 0.1}, {"loss": {"weights": average}}
        results = {"step": k, "loss": loss, "protocol": protocol}
        run_lib_journal.write_json(tmp_path / f"ckpt_{k}.json", results)
    assert run_lib_results.curves(tmp_path, "", results)["loss"][0] == steps


# --- results ----------------------------------------------------------------------------------


def test_the_json_holds_scores_and_protocol_and_the_report_shows_them(run):
    config = scored(run, eval__begin_ckpt=1, eval__end_ckpt=3, eval__enable_loss=True)
    results = run_lib.evaluate(config, run, "range")
    assert list(results) == [1, 2, 3]
    text = (run / "range" / "ckpt_3.json").read_text()
    saved = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert saved == json.loads(json.dumps(results[3]))
    assert saved["metrics"].keys() >= {"fid", "fid_se", "kid", "kid_se", "fid_num_samples", "notes"}
    features = saved["protocol"]["sampling"]["features"]
    assert features["extractor"]["extractor"] == "pixels"
    assert features["reference"]["n"] == 1497
    assert len(features["reference"]["sha256"]) == len(saved["weights_sha256"]) == 64
    page = (run / "report.html").read_text()
    for part in ("Over checkpoints", "FID", "Protocol", features["reference"]["sha256"], "Loss"):
        assert part in page


def test_scores_go_to_tensorboard_at_the_checkpoints_step(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = {"step": 17, "bpd": {"mean": 3.5, "dataset": "x"}, "metrics": {"fid": 2.5}}
    run_lib_results.to_tensorboard(tmp_path, results, "")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/fid")] == [(17, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/bpd/mean")] == [(17, 3.5)]


def test_other_data_are_scored_beside_those_of_the_training(run, tmp_path):
    folder = tmp_path / "noise"
    write_noise(folder, 20)
    run_lib.evaluate(few("bpd"), run, "other")
    changes = {"data__dataset": "folder", "data__path": str(folder), "data__levels": 256}
    config = few("bpd", **changes, data__eval_fraction=0.5, data__workers=0)
    bpd = run_lib.evaluate(config, run, "other")[3]["bpd"]
    known = json.loads((run / "other" / "ckpt_3.json").read_text())["bpd"]
    assert bpd["dataset"] == "folder/eval"
    assert known["dataset"] == "digits/held-out"
    assert (run / "other" / "ckpt_3_noise.json").exists()
    assert (run / "report_noise.html").exists()


def test_waiting_takes_checkpoints_that_come_later_and_ends(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "checkpoint_1.pth").touch()
    config = few(eval__begin_ckpt=1, eval__end_ckpt=3, eval__wait_s=1)
    found = []
    for number in run_lib_state.each_checkpoint(config, tmp_path):
        found.append(number)
        if number == 1:
            (folder / "checkpoint_2.pth").touch()
    assert found == [1, 2]
    config.eval.wait_s = 0
    assert list(run_lib_state.each_checkpoint(config, tmp_path)) == [1, 2]


# --- from statistics to report, with Inception ------------------------------------------------


def _command(mode, workdir, inception, *words):
    path = "configs/vp/digits_ddpmpp_continuous.py"
    small = {"model.nf": 8, "model.num_res_blocks": 1, "model.num_scales": 30}
    options = {
        **small,
        "data.dataset": "folder",
        "data.path": workdir / "images",
        "data.levels": 256,
        "data.workers": 0,
        "eval.inception_path": inception,
        "eval.extractor": "legacy_tensorflow",
        "eval.stats": workdir / "stats.npz",
        "eval.metrics": "('fid','kid','is','prdc')",
        "eval.num_samples": 64,
        "eval.batch_size": 8,
        "eval.enable_bpd": False,
        "sampling.steps": 10,
        "sampling.predictor": "heun",
        "training.n_iters": 4,
        "training.snapshot_freq": 4,
        "device": "cpu",
    }
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    return ["main.py", f"--config={path}", f"--workdir={workdir}", f"--mode={mode}", *flags, *words]


@pytest.mark.slow
def test_killed_and_resumed_on_two_processes_gives_the_json_of_one_uninterrupted(tmp_path):
    inception = tmp_path / "inception.pth"
    write_noise(tmp_path / "images", 160)
    write_weights(inception)
    for mode in ("train", "stats"):
        command = [sys.executable, *_command(mode, tmp_path, inception)]
        subprocess.run(command, cwd=ROOT, check=True)
    for part in ("samples", "features"):
        command = _command("eval", tmp_path, inception, "--eval_folder=killed")
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        parts = tmp_path / "killed" / f"ckpt_1_{part}.parts"
        while len(list(parts.glob("*.npz"))) < 2 and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert list(parts.glob("*.npz"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, *command], cwd=ROOT, check=True)
    command = _command("eval", tmp_path, inception, "--eval_folder=whole")
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    a, b = (json.loads((tmp_path / f / "ckpt_1.json").read_text()) for f in ("killed", "whole"))
    same(a, b)
    assert a["metrics"].keys() >= {"fid", "kid", "is", "precision", "recall", "density", "coverage"}


def test_a_set_against_its_own_statistics_has_no_distance(run):
    made = evaluation_stats.read_statistics(run / "pixels.npz")
    extractor = evaluation_features.get_extractor("pixels")
    train_set, _ = data_lib.get_image_sets(few())
    images = evaluation_features.as_bytes(train_set.take(range(len(train_set))), 17)
    result = evaluation_metrics.feature_metrics(extractor(images).pool, None, made, ("fid",))
    assert result["fid"] < 1e-3
