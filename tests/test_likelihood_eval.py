"""Evaluations of bits/dim: closed forms through evaluate(), what adds up, and what is refused."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import toys_processes
from toys import AsModel, gaussian_score

import checkpoints
import data_lib
import likelihood_dequantization
import run_lib
import run_lib_eval
import run_lib_gaps
import run_lib_likelihood
import run_lib_results
import run_lib_shards
import run_lib_state
import sde_lib
import visualize
from models.utils import register_model
from randomness import Draws

# Data N(MEAN, STD²) in the network's range [-1, 1], so wide that levels hold them all.
MEAN, STD, LEVELS, SIZE = 0.1, 0.25, 32, 2
DIM = SIZE * SIZE


@register_model(name="exact_gaussian")
class ExactGaussian(torch.nn.Module):
    """The noise that the exact score of N(MEAN, STD²) predicts, in VP's conventions."""

    def __init__(self, config):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(MEAN))
        sde = sde_lib.get_sde(config)
        self.predict = AsModel(sde, gaussian_score(sde, MEAN, STD))

    def forward(self, x, labels):
        return self.predict(x.double(), labels.double()).to(x.dtype) + 0 * self.mean


def gaussian_config(**changes):
    about = {
        "model__name": "exact_gaussian",
        "data__levels": LEVELS,
        "data__image_size": SIZE,
        "data__centered": True,
        "eval__enable_loss": False,
        "eval__enable_sampling": False,
        "eval__enable_bpd": True,
        "eval__begin_ckpt": 1,
        "eval__end_ckpt": 1,
        "eval__bpd_repeats": 2,
        "eval__batch_size": 64,
        "eval__rtol": 1e-6,
        "eval__atol": 1e-6,
        "eval__elbo_points": 64,
        "eval__iw_samples": 8,
        "eval__gap_images": 12,
    }
    return toys_processes.tiny(**{**about, **changes})


def gaussian_images():
    x = MEAN + STD * np.random.RandomState(0).randn(24, 1, SIZE, SIZE)
    k = np.floor((x + 1) / 2 * LEVELS).clip(0, LEVELS - 1).astype(np.uint8)
    return data_lib.ImageSet("gaussian", torch.from_numpy(k), None, LEVELS)


def without_report(patch):
    """Evaluations write their numbers, and no pictures."""
    patch.setattr(run_lib_eval, "write_report", lambda *a: None)
    patch.setattr(run_lib_eval, "to_tensorboard", lambda *a: None)


@pytest.fixture
def gaussian(tmp_path, monkeypatch):
    """A workdir whose checkpoint 1 is the exact network, and images of Gaussian data."""
    images = gaussian_images()
    monkeypatch.setattr(data_lib, "get_image_sets", lambda config: (images, images))
    without_report(monkeypatch)
    config = run_lib_state.complete_here(gaussian_config())
    state = run_lib_state.create_state(config)
    checkpoints.save_checkpoint(run_lib_state.checkpoint_path(tmp_path, 1), state)
    return tmp_path, images


def exact_bits(x, config):
    """−log p_eps(x) under the exact score and VP's own prior, in bits/dim: numerics.md 2.1."""
    sde = sde_lib.get_sde(config)
    times = torch.tensor([1e-5, 1.0], dtype=torch.float64)
    a, s = (c.double() for c in sde_lib.alpha_sigma(sde, times, times))
    v = a**2 * STD**2 + s**2
    z = a[1] * MEAN + (v[1] / v[0]).sqrt() * (x.double() - a[0] * MEAN)
    logp = -0.5 * (z**2 + math.log(2 * math.pi)) + 0.5 * (v[1] / v[0]).log()
    return -logp.flatten(1).mean(1) / math.log(2) + math.log2(LEVELS) - 1


def exact_discrete_bits(images):
    """−log₂ of the probability that N(MEAN, STD²) falls into the levels of each image, a dim."""
    normal = torch.distributions.Normal(MEAN, STD)
    low = 2 * images.double() / LEVELS - 1
    mass = normal.cdf(low + 2 / LEVELS) - normal.cdf(low)
    return -mass.log2().flatten(1).mean(1)


def seen(images, config, repeats):
    """What the network sees of the images in a run with these repeats: (n · repeats, …)."""
    order = run_lib_state.fixed_subset(len(images), len(images))
    copies = images.images[order].repeat_interleave(repeats, dim=0)
    draws = Draws(config.seed, ("bpd", repeats), 0, len(copies))
    return data_lib.prepare(copies, config, dequantize=True, draws=draws)


# --- closed forms -------------------------------------------------------------------------------


def test_every_estimator_gives_the_closed_form_of_gaussian_data_through_evaluate(gaussian):
    workdir, images = gaussian
    config = gaussian_config(eval__likelihood="ode+elbo+iw")
    result = run_lib.evaluate(config, workdir)[1]
    exact = exact_bits(seen(images, config, 2), config).reshape(-1, 2).numpy()

    ode = np.load(workdir / "eval" / "ckpt_1_bpd.npz")
    assert np.abs(ode["bpd"] - exact).max() < 1e-4
    assert result["bpd"]["mean"] == pytest.approx(exact.mean(), abs=1e-4)

    elbo = np.load(workdir / "eval" / "ckpt_1_bpd_elbo.npz")
    own = result["bpd_elbo"]["standard_error_points"]
    assert abs(elbo["bpd"].mean() - exact.mean()) < 4 * own + 1e-3
    assert own < 0.1

    iw = np.load(workdir / "eval" / "ckpt_1_bpd_iw.npz")
    assert np.allclose(iw["samples"][..., 0], ode["bpd"], atol=1e-5)  # the first is the same noise
    discrete = exact_discrete_bits(images.images)[iw["index"]].numpy()
    over = iw["bpd"] - discrete[:, None]  # the bound's own gap, small for 8 samples, and noise
    assert abs(over.mean()) < 4 * over.std() / over.size**0.5 + 1e-3
    assert np.abs(over).max() < 0.1
    assert result["bpd_iw"]["mean"] < result["bpd_iw"]["by_samples"]["1"]["mean"]


def test_the_exact_posterior_of_the_noise_makes_every_weight_the_probability(gaussian, monkeypatch):
    workdir, images = gaussian

    class Posterior(torch.nn.Module):
        """u | k under the data's density, by its inverse distribution function."""

        def forward(self, images, e):
            normal = torch.distributions.Normal(MEAN, STD)
            low = 2 * images.double() / LEVELS - 1
            start, mass = normal.cdf(low), normal.cdf(low + 2 / LEVELS) - normal.cdf(low)
            x = normal.icdf(start + e.double() * mass)
            log_q = normal.log_prob(x) - mass.log() + math.log(2 / LEVELS)
            u = ((x - low) / 2 * LEVELS).clamp(0, 1 - 1e-6)
            return u.float(), log_q.flatten(1).sum(1)

    def posterior(config, device):
        return likelihood_dequantization.VariationalDequantizer(Posterior())

    monkeypatch.setattr(run_lib_likelihood, "get_dequantizer", posterior)
    config = gaussian_config(eval__likelihood="iw", eval__dequantization="variational")
    config.eval.gap_report = True
    result = run_lib.evaluate(config, workdir)[1]
    saved = np.load(workdir / "eval" / "ckpt_1_bpd_iw.npz")
    discrete = exact_discrete_bits(images.images)[saved["index"]].numpy()
    # All but eps > 0 and a prior that is not quite p_T: α_T MEAN z = 7e-4 z nats a dimension.
    over = saved["samples"] - discrete[:, None, None]
    assert np.abs(over).max() < 3e-3 and abs(over.mean()) < 5e-4
    assert result["bpd_iw"]["effective_samples"] == pytest.approx(8, abs=1e-3)
    assert sum(result["bpd_iw"]["terms"].values()) == pytest.approx(result["bpd_iw"]["mean"])
    rows = {row["name"]: row for row in result["gaps"]["rows"]}
    on = discrete[:12].mean()
    assert rows["variational"]["alternative"] == pytest.approx(on, abs=5e-4)
    assert rows["variational_importance_weighting"]["alternative"] == pytest.approx(on, abs=5e-4)


def test_the_gap_report_of_gaussian_data_is_its_closed_form(gaussian):
    workdir, images = gaussian
    config = gaussian_config(eval__enable_bpd=False, eval__gap_report=True, eval__likelihood="ode")
    gaps = run_lib.evaluate(config, workdir)[1]["gaps"]
    rows = {row["name"]: row for row in gaps["rows"]}
    saved = np.load(workdir / "eval" / "ckpt_1_gaps.npz")

    sde = sde_lib.get_sde(config)
    end = torch.ones(1, dtype=torch.float64)
    a, s = (c.double().item() for c in sde_lib.alpha_sigma(sde, end, end))
    draws = Draws(config.seed, run_lib_gaps.WORDS, 0, 12)
    x = data_lib.prepare(images.images[saved["index"]], config, dequantize=True, draws=draws)
    kl = 0.5 * (s**2 - 1 - math.log(s**2)) + 0.5 * a**2 * x.double().flatten(1).pow(2).mean(1)
    assert rows["prior"]["value"] == pytest.approx(-kl.mean().item() / math.log(2), rel=2e-3)
    assert rows["trace"]["standard_error"] < 1e-6  # an isotropic Jacobian
    assert abs(rows["tolerance"]["value"]) < 1e-4
    assert abs(rows["eps"]["value"]) < 1e-3
    assert abs(rows["elbo"]["value"]) < 4 * rows["elbo"]["standard_error"] + 1e-3
    assert rows["importance_weighting"]["value"] < 0


@pytest.mark.parametrize("kind", ["exact", "hutch++", "gaussian"])
def test_other_traces_give_the_same_bits(gaussian, kind):
    workdir, images = gaussian
    probes = {"hutch++": 12, "gaussian": 64}.get(kind, 1)
    changes = {"eval__hutchinson_type": kind, "eval__probes": probes}
    config = gaussian_config(**changes)
    bpd = run_lib.evaluate(config, workdir, kind)[1]["bpd"]
    exact = exact_bits(seen(images, config, 2), config).mean().item()
    assert bpd["mean"] == pytest.approx(exact, abs=1e-4 + 4 * bpd["standard_error_probes"])


def test_repeats_probes_and_images_have_errors_of_their_own(gaussian):
    workdir, _ = gaussian
    changes = {"eval__hutchinson_type": "Gaussian", "eval__probes": 4, "eval__bpd_repeats": 3}
    result = run_lib.evaluate(gaussian_config(**changes), workdir)[1]["bpd"]
    saved = np.load(workdir / "eval" / "ckpt_1_bpd.npz")
    images = saved["bpd"].mean(1)
    assert result["standard_error"] == pytest.approx(images.std(ddof=1) / 24**0.5)
    probes = np.sqrt((saved["error"] ** 2).sum()) / 72
    assert result["standard_error_probes"] == pytest.approx(probes)
    # What differs over repeats is the probes and, much less, the place in the level.
    assert 0.6 * probes < result["standard_error_repeats"] < 2.5 * probes
    one = run_lib.evaluate(gaussian_config(eval__bpd_repeats=1), workdir, "one")[1]["bpd"]
    assert one["standard_error_repeats"] is one["standard_error_probes"] is None


# --- what adds up -------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.05], ids=["centered", "logit"])
def test_bits_are_the_sum_of_their_terms_and_gaps_of_theirs(gaussian, alpha):
    workdir, _ = gaussian
    scaled = {"data__centered": not alpha, "data__logit_alpha": alpha}
    config = gaussian_config(eval__likelihood="ode+elbo+iw", eval__gap_report=True, **scaled)
    result = run_lib.evaluate(config, workdir)[1]
    for part, names in (
        ("bpd", {"prior", "trace", "levels"}),
        ("bpd_elbo", {"prior", "path", "offset", "levels"}),
        ("bpd_iw", {"prior", "trace", "levels", "importance_weighting"}),
    ):
        assert result[part]["terms"].keys() == names
        assert sum(result[part]["terms"].values()) == pytest.approx(result[part]["mean"], abs=1e-6)

    gaps = result["gaps"]
    reference = gaps["reference"]["mean"]
    assert sum(gaps["terms"]["ode"].values()) == pytest.approx(reference, abs=1e-6)
    saved = np.load(workdir / "eval" / "ckpt_1_gaps.npz")
    samples = saved["ode_bpd"]
    assert samples.shape == (12, 8)
    rows = {row["name"]: row for row in gaps["rows"]}
    for row in gaps["rows"]:
        assert row["alternative"] == pytest.approx(reference + row["value"], abs=1e-12)
    uniform = samples.mean()
    weighted = -np.log2(np.exp2(-DIM * samples).mean(axis=1)).mean() / DIM
    assert reference == pytest.approx(uniform, abs=1e-12)
    assert rows["importance_weighting"]["value"] == pytest.approx(weighted - uniform, abs=1e-9)
    assert rows["importance_weighting"]["alternative"] == pytest.approx(weighted, abs=1e-9)
    change = (saved["elbo_bpd"] - samples[:, 0]).mean()
    assert rows["elbo"]["value"] == pytest.approx(change, abs=1e-9)


def test_more_dequantisations_in_a_bound_never_cost_bits():
    bits = 3 + 0.2 * np.random.RandomState(0).rand(50, 3, 24)
    sizes = run_lib_likelihood.nested_sizes(24)
    assert sizes == [1, 2, 4, 8, 24]
    tighter = [run_lib_likelihood.in_groups(bits, size, 64) for size in sizes]
    assert np.allclose(tighter[0], bits.mean(-1))
    assert np.allclose(tighter[-1], run_lib_likelihood.importance_weighted(bits, 64))
    for wide, tight in itertools.pairwise(tighter):
        assert (tight <= wide + 1e-12).all()


# --- the same however it is split ----------------------------------------------------------------


SPLIT = {
    "eval__likelihood": "ode+elbo+iw",
    "eval__gap_report": True,
    "eval__bpd_num_images": 9,
    "eval__gap_images": 5,
    "eval__iw_samples": 2,
    "eval__elbo_points": 4,
    "eval__hutchinson_type": "gaussian",  # whose noise belongs to the image
    "eval__rtol": 1e-2,
    "eval__atol": 1e-2,
}


def evaluated(workdir, folder, changes):
    """In any process: the estimators and the gap report on the images of Gaussian data."""
    images = gaussian_images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_lib, "get_image_sets", lambda config: (images, images))
        without_report(patch)
        return run_lib.evaluate(gaussian_config(**{**SPLIT, **changes}), workdir, folder)[1]


def values(result):
    found = {part: result[part]["mean"] for part, _ in run_lib_likelihood.ESTIMATORS.values()}
    rows = {row["name"]: row["value"] for row in result["gaps"]["rows"]}
    return {**found, **rows, "reference": result["gaps"]["reference"]["mean"]}


@pytest.mark.parametrize(("batch", "processes"), [(1, 1), (64, 1), (7, 2)])
def test_bits_and_gaps_do_not_depend_on_batch_size_and_processes(gaussian, batch, processes):
    workdir = gaussian[0]
    whole = values(evaluated(workdir, "whole", {"eval__batch_size": 7}))
    changes = {"eval__batch_size": batch}
    if processes == 1:
        results = [evaluated(workdir, "split", changes)]
    else:
        results = toys_processes.run(processes, evaluated, workdir, "split", changes)
    for result in results:
        assert values(result) == pytest.approx(whole, abs=1e-6)


@pytest.mark.slow
def test_bits_through_a_trained_network_do_not_depend_on_batch_size(tmp_path, monkeypatch):
    without_report(monkeypatch)
    asked = {"eval__enable_sampling": False, "eval__enable_loss": False, "eval__enable_bpd": True}
    few = {"eval__bpd_num_images": 3, "eval__bpd_repeats": 1, "eval__begin_ckpt": 1,
           "eval__rtol": 1e-3, "eval__atol": 1e-3, "eval__likelihood": "ode+elbo",
           "eval__elbo_points": 4}  # fmt: skip
    run_lib.train(toys_processes.tiny(), tmp_path)

    def bits(batch):
        config = toys_processes.tiny(**asked, **few, eval__batch_size=batch)
        result = run_lib.evaluate(config, tmp_path, f"{batch}")[1]
        return [result[part]["mean"] for part in ("bpd", "bpd_elbo")]

    assert bits(1) == pytest.approx(bits(64), abs=1e-4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("part", ["bpd_elbo", "bpd_iw", "gaps"])
def test_a_killed_part_goes_on_where_it_ended(gaussian, monkeypatch, part):
    workdir = gaussian[0]
    whole = evaluated(workdir, "whole", {"eval__batch_size": 7})
    write, folder, written = run_lib_shards.Shards._write, f"killed_{part}", []

    def die(self, path, arrays, places):
        if self.path.stem == f"ckpt_1_{part}":
            if written:
                raise Killed
            written.append(places)
        write(self, path, arrays, places)

    monkeypatch.setattr(run_lib_shards.Shards, "_write", die)
    with pytest.raises(Killed):
        evaluated(workdir, folder, {"eval__batch_size": 2})
    redone = []

    def note(self, path, arrays, places):
        redone.extend((self.path.stem, place) for place in places)
        write(self, path, arrays, places)

    monkeypatch.setattr(run_lib_shards.Shards, "_write", note)
    result = evaluated(workdir, folder, {"eval__batch_size": 2})
    assert not {(f"ckpt_1_{part}", place) for place in written[0]} & set(redone)
    assert values(result) == pytest.approx(values(whole), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"eval__elbo_points": 6}, {"bpd_elbo", "gaps"}),
        ({"eval__iw_samples": 3}, {"bpd_iw", "gaps"}),
        ({"eval__atol": 2e-2}, {"bpd", "bpd_iw", "gaps"}),
        ({"eval__likelihood_eps": 1e-4}, {"bpd", "bpd_elbo", "bpd_iw", "gaps"}),
        ({"eval__batch_size": 50}, set()),
    ],
)
def test_only_what_depends_on_a_setting_is_made_anew(gaussian, monkeypatch, change, again):
    evaluated(gaussian[0], "settings", {})
    fill, made = run_lib_shards.Shards._write, set()

    def note(self, path, *args, **options):
        made.add(self.path.stem.removeprefix("ckpt_1_"))
        fill(self, path, *args, **options)

    monkeypatch.setattr(run_lib_shards.Shards, "_write", note)
    evaluated(gaussian[0], "settings", change)
    assert made == again


# --- what is refused, before the work ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__likelihood": "magic"}, "eval.likelihood: expected 'ode', 'elbo' or 'iw'"),
        ({"eval__likelihood": ""}, "eval.likelihood"),
        ({"eval__ode_method": "euler"}, "ODE method 'euler' is unknown"),
        ({"eval__hutchinson_type": "magic"}, "magic"),
        ({"eval__hutchinson_type": "exact", "eval__probes": 2}, "takes no probes"),
        ({"eval__elbo_points": 3}, "even"),
        ({"eval__likelihood_eps": 2.0}, "got 2.0"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_image(gaussian, monkeypatch, changes, message):
    monkeypatch.setattr(run_lib_shards.Shards, "fill", lambda *a: pytest.fail("began"))
    with pytest.raises(ValueError, match=message):
        run_lib.evaluate(gaussian_config(**{"eval__gap_report": True, **changes}), gaussian[0])


def test_zero_stands_for_the_end_of_sampling_on_the_process(gaussian):
    config = gaussian_config(eval__likelihood_eps=0.0, eval__bpd_num_images=2)
    bpd = run_lib.evaluate(config, gaussian[0])[1]["bpd"]
    assert bpd["eps"] == sde_lib.get_sde(config).sampling_eps == 1e-3


# --- what is written down ------------------------------------------------------------------------


def test_json_and_report_hold_every_estimator_with_its_protocol_and_the_gaps(gaussian, monkeypatch):
    workdir, _ = gaussian
    monkeypatch.setattr(run_lib_eval, "write_report", run_lib_results.write_report)
    config = gaussian_config(eval__likelihood="elbo+ode+iw", eval__gap_report=True)
    run_lib.evaluate(config, workdir)
    text = (workdir / "eval" / "ckpt_1.json").read_text()
    saved = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    protocol = {"dequantization", "levels", "eps", "prior", "offset", "repeats", "dataset", "seeds"}
    ode = {"trace_estimator", "probes", "solver", "rtol", "atol"}
    found = {"evaluations_mean", "evaluations_max", "standard_error", "standard_error_repeats"}
    assert saved["bpd"].keys() >= protocol | ode | found
    assert saved["bpd_iw"].keys() >= protocol | ode | found | {"samples", "by_samples"}
    assert saved["bpd_elbo"].keys() >= protocol | found | {"points", "standard_error_points"}
    page = (workdir / "report.html").read_text()
    for words in ("Bits per dimension, ELBO", "Bits per dimension, importance-weighted"):
        assert words in page
    for words in ("<h2>Where the bits go</h2>", "Prior mismatch", "Trace noise", "no theorem"):
        assert words in page
    told = run_lib_gaps.table(saved["gaps"]).splitlines()
    assert len(told) == 1 + len(saved["gaps"]["rows"])
    assert told[0].startswith("where the bits go, on 12 images: ")


def test_the_default_is_one_line_for_the_ode(gaussian):
    result = run_lib.evaluate(gaussian_config(), gaussian[0])[1]
    lines = (gaussian[0] / "eval" / "log.txt").read_text().splitlines()
    (line,) = [line for line in lines if "bits/dim" in line]
    assert " ± " in line and "24 images of gaussian, 2 repeats" in line
    assert {"bpd_elbo", "bpd_iw", "gaps"}.isdisjoint(result)


def test_one_image_has_a_mean_and_no_error(gaussian, monkeypatch):
    monkeypatch.setattr(run_lib_eval, "write_report", run_lib_results.write_report)
    few = {"eval__gap_images": 1, "eval__bpd_num_images": 1, "eval__bpd_repeats": 1}
    result = run_lib.evaluate(gaussian_config(eval__gap_report=True, **few), gaussian[0])[1]
    assert result["bpd"]["standard_error"] is result["gaps"]["reference"]["standard_error"] is None
    assert "± ?" in run_lib_gaps.table(result["gaps"])
    assert "Where the bits go" in (gaussian[0] / "report.html").read_text()


def test_bars_stand_for_their_values():
    figure = visualize.bar_chart(["a", "b"], [-0.5, 0.25], [0.1, math.nan], "bits")
    bars = [patch.get_width() for patch in figure.axes[0].patches]
    assert bars == [-0.5, 0.25]
    assert [text.get_text() for text in figure.axes[0].texts] == ["-0.50 ± 0.10", "+0.25"]
    with pytest.raises(ValueError, match="for each of 1 names"):
        visualize.bar_chart(["a"], [1, 2], [0, 0], "bits")
