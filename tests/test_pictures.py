"""Figures of networks on points: exact where the network is, and left beside the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import main
import run_lib
import run_lib_eval
import run_lib_journal
import run_lib_pictures
import run_lib_toys
import sde_lib
from data_lib_points import get_density
from models.utils import create_model
from parametrization import as_score_function
from run_lib_pictures import Pictures

ROOT = Path(__file__).resolve().parent.parent
TOYS = ("ring", "bird", "face", "swissroll", "moons", "mixture")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name assets/ring.png
    for name, value in {"CELLS": 20, "BINS": 16, "ARROWS": 5, "STEPS": 12, "SAMPLES": 400}.items():
        monkeypatch.setattr(run_lib_pictures, name, value)


def exact(name, **training):
    """The figures of a toy whose network is the exact score."""
    config = main.load_config(str(ROOT / "configs" / "toy" / f"{name}.py"))
    config.device = torch.device("cpu")
    config.training.update(training)
    sde, density = sde_lib.get_sde(config), get_density(config)

    def score(x, t):
        return density.score(x, *sde_lib.alpha_sigma(sde, t.double())).to(x)

    return Pictures(config, sde, as_score_function(score, sde))


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


@pytest.mark.parametrize("name", TOYS)
def test_the_exact_score_is_drawn_as_the_exact_score(name):
    figure = exact(name).fields()
    assert titles(figure) == [
        f"{kind}, σ/α = {level}" for level in (0.1, 0.5) for kind in ("learned", "exact")
    ]
    arrows = [
        torch.from_numpy(np.stack([ax.collections[0].U, ax.collections[0].V])) for ax in figure.axes
    ]
    assert torch.allclose(arrows[0], arrows[1], atol=1e-5)
    assert torch.allclose(arrows[2], arrows[3], atol=1e-5)


def test_a_field_is_sigma_times_the_score_of_the_density_at_its_level():
    pictures = exact("mixture")
    alpha, sigma, t = pictures._at_level(0.5)
    assert sigma / alpha == pytest.approx(0.5) and 0 < t < 1
    figure = pictures.fields()
    quiver = figure.axes[3].collections[0]
    x = torch.from_numpy(quiver.XY)
    field = sigma * get_density(pictures.config).score(alpha * x, alpha, sigma)
    length = torch.asinh(2 * field.norm(dim=1)) * 0.25 * 5 / 5  # the space between two arrows is 1
    drawn = torch.from_numpy(np.stack([quiver.U, quiver.V], axis=1))
    assert torch.allclose(drawn.norm(dim=1), length, atol=1e-9)
    assert torch.allclose(drawn / length[:, None], field / field.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("name", ["swissroll", "mixture"])
def test_the_last_marginal_is_the_data_and_the_levels_fall(name):
    pictures = exact(name)
    figure = pictures.marginals()
    levels = [float(title.split("= ")[1]) for title in titles(figure)]
    assert levels == sorted(levels, reverse=True) and len(figure.axes) == 2 * len(levels)
    p = torch.from_numpy(figure.axes[len(levels) - 1].images[0].get_array())
    truth = torch.exp(pictures.log_p - pictures.log_p.max()).reshape(p.shape)
    assert (p - truth).abs().max() < 0.05
    model = torch.from_numpy(figure.axes[-1].images[0].get_array())
    assert model.shape == (16, 16) and model.max() == 1


def test_the_model_s_marginals_are_those_of_the_density_where_its_score_is_exact(monkeypatch):
    for key, value in {"SAMPLES": 50_000, "CELLS": 40, "BINS": 40}.items():
        monkeypatch.setattr(run_lib_pictures, key, value)
    figure = exact("mixture").marginals()
    panels = [torch.from_numpy(ax.images[0].get_array()) for ax in figure.axes]
    panels = torch.stack([p / p.sum() for p in panels])
    exact_ones, models = panels.chunk(2)
    apart = (exact_ones[:, None] - models).abs().sum(dim=(2, 3))  # L¹, of at most 2
    assert (apart.diagonal() < 0.25).all()
    assert (apart.argmin(dim=0) == torch.arange(len(apart))).all()


@pytest.mark.parametrize("name", TOYS)
def test_ways_begin_in_the_prior_and_end_in_the_data(name):
    pictures = exact(name)
    for lam in (0.0, 0.9, 1.0):
        states, times = pictures._member(lam)
        assert states.shape == (12, 5, 2) and len(times) == 12
        assert times == sorted(times, reverse=True) and times[-1] == pytest.approx(pictures.eps)
        ends = states[-1] * pictures._size(times[-1])
        near = pictures.density.log_density(ends, 1.0, 0.15)
        assert (near > -5).all()  # of the data with a little noise
    assert torch.equal(pictures._member(0.0)[0][0], pictures._member(1.0)[0][0])
    forward, times = pictures._forward()
    assert times == sorted(times)
    near = pictures.density.log_density(forward[0], 1.0, 0.15)
    assert (near > -5).all()


def test_ways_end_where_the_samples_end():
    pictures = exact("moons")
    way, times, samples = pictures._way("tau_exponential", 5, pictures._member(0.0)[1], tau=1.0)
    assert torch.allclose(
        pictures._member(0.0)[0][-1] * pictures._size(times[-1]), samples.double()
    )
    assert way.shape == (12, 5, 2) and not torch.equal(way[-1].float(), samples)


def test_the_panels_of_ways_and_of_the_family_are_named():
    pictures = exact("mixture")
    assert titles(pictures.paths()) == ["forward SDE", "reverse SDE", "probability-flow ODE"]
    assert titles(pictures.family()) == ["λ = 0 (SDE)", "λ = 0.5", "λ = 0.9", "λ = 1 (ODE)"]


def test_one_noise_level_has_its_score_and_its_steps_alone():
    pictures = exact("ring_langevin")
    pictures.config.sampling.steps = 20
    assert list(pictures.pictures()) == ["score", "steps"]
    assert titles(pictures.fields()) == ["learned, σ/α = 0.1", "exact, σ/α = 0.1"]
    assert titles(pictures.langevin()) == ["1 step", "2 steps", "4 steps", "9 steps", "20 steps"]


def test_pictures_are_the_same_twice_and_leave_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    a, b = exact("moons"), exact("moons")
    a.marginals()
    assert torch.equal(a._member(0.0)[0], b._member(0.0)[0])
    assert torch.equal(a._forward()[0], b._forward()[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_another_drawing_than_the_trained_one_has_files_of_its_own(tmp_path):
    config = main.load_config("configs/toy/ring.py")
    (tmp_path / "config.json").write_text(json.dumps(run_lib_journal.plain(config)))
    assert run_lib_eval.suffix_of(config, tmp_path) == ""
    config.data.image = "drawings/Owl.png"
    assert run_lib_eval.suffix_of(config, tmp_path) == "_owl"
    config.data.dataset = "moons"
    assert run_lib_eval.suffix_of(config, tmp_path) == "_moons"


def test_a_network_is_shown_on_the_process_that_it_is_sampled_on():
    config = main.load_config("configs/toy/swissroll.py")
    config.device, config.sampling.sde = torch.device("cpu"), "edm"
    sde, density = sde_lib.get_sde(config), get_density(config)

    def score(x, t):  # exact on VP, where it was trained
        return density.score(x, *sde_lib.alpha_sigma(sde, t.double())).to(x)

    pictures = Pictures(config, sde, as_score_function(score, sde))
    assert type(pictures.sde).__name__ != type(sde).__name__
    arrows = [ax.collections[0].U for ax in pictures.fields().axes]
    assert np.allclose(arrows[0], arrows[1], atol=1e-3)


def test_one_noise_level_has_no_likelihood(tmp_path):
    config = main.load_config("configs/toy/ring_langevin.py")
    config.device, config.model.nf = torch.device("cpu"), 8
    sde, model = sde_lib.get_sde(config), create_model(config)
    with pytest.raises(ValueError, match=r"training.sigma=0.1, has no likelihood"):
        run_lib_toys.Likelihoods(config, sde, model, None)


def test_a_figure_that_fails_is_logged_and_the_others_are_there(tmp_path, monkeypatch, caplog):
    config = main.load_config("configs/toy/moons.py")
    config.device, config.model.nf = torch.device("cpu"), 8

    def broken(self):
        raise ValueError("no such figure")

    monkeypatch.setattr(Pictures, "marginals", broken)
    sde, model = sde_lib.get_sde(config), create_model(config)
    captions = run_lib_pictures.write_pictures(config, sde, model, tmp_path / "ckpt_1")
    assert set(captions) == {"score", "paths", "family"}
    assert "no such figure" in caplog.text and "'marginals'" in caplog.text
    assert {p.name for p in tmp_path.iterdir()} == {f"ckpt_1_{name}.png" for name in captions}


def test_an_evaluation_leaves_every_figure_and_a_report_with_all_of_them(tmp_path, monkeypatch):
    from PIL import Image

    config = main.load_config("configs/toy/mixture.py")
    config.device = torch.device("cpu")
    config.training.update(n_iters=4, snapshot_freq=4, batch_size=32, num_snapshot_samples=8)
    config.data.num_points = 200
    config.model.update(nf=8, num_res_blocks=1)
    config.sampling.steps = 5
    config.eval.update(
        num_samples=20, batch_size=16, bpd_num_images=6, elbo_points=2, keep_frames=True
    )
    monkeypatch.setattr("run_lib_toys.GRID_SIZE", 5)
    run_lib.train(config, tmp_path)
    run_lib.evaluate(config, tmp_path)
    folder = tmp_path / "eval"
    names = ("score", "marginals", "paths", "family", "likelihood")
    for name in names:
        with Image.open(folder / f"ckpt_1_{name}.png") as picture:
            assert picture.width > 400
    frames = sorted(p.name for p in (folder / "ckpt_1_frames").iterdir())
    assert frames == [f"{i:04d}.png" for i in range(5)]
    assert (folder / "ckpt_1_sampling.webp").exists()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure class=wide>") == len(names) and "In the plane" in page
    assert "true points, held out" in page and "outside [0, 1]" not in page
    assert json.loads((folder / "ckpt_1.json").read_text())["likelihood"]["kl"]
