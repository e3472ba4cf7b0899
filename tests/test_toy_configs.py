"""Points from end to end: the configs, a short training, its evaluation and samples, Langevin."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data_lib
import losses
import main
import run_lib
import run_lib_objectives  # noqa: F401  (registers 'explicit' and 'elbo')
import sampling
import sde_lib
import visualize
from data_lib_points import get_density
from models.utils import create_model
from run_lib_samples import Sampler

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs" / "toy").glob("[!_]*.py"))


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs name assets/ring.png


def short(config):
    """The config with a training of a few small steps."""
    config.training.update(n_iters=4, snapshot_freq=4, batch_size=32, num_snapshot_samples=8)
    config.data.num_points = 200
    config.model.update(nf=8, num_res_blocks=1)
    config.sampling.steps = min(config.sampling.steps or 5, 5)
    config.eval.update(num_samples=20, batch_size=16, bpd_num_images=6, elbo_points=2)
    config.device = torch.device("cpu")
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_has_data_a_loss_and_a_sampler(path):
    config = short(main.load_config(str(path)))
    sde, model = sde_lib.get_sde(config), create_model(config)
    train, held_out = data_lib.get_image_sets(config)
    x = train.take(range(32))
    loss = losses.loss_fn_from_config(config, sde, True)(model, x)
    assert torch.isfinite(loss) and len(held_out)
    samples, evaluations = Sampler(config, sde, model)(range(4))
    assert samples.shape == (4, 2) and samples.dtype == torch.float32 and evaluations > 0


@pytest.mark.parametrize("drawing", ["ring", "bird", "face"])
def test_the_drawings_are_what_their_script_draws(drawing, tmp_path, monkeypatch):
    from PIL import Image

    import assets.draw as draw

    monkeypatch.setattr(draw, "HERE", tmp_path)
    getattr(draw, drawing)()
    a, b = (np.asarray(Image.open(p / f"{drawing}.png")) for p in (tmp_path, ROOT / "assets"))
    assert np.array_equal(a < 128, b < 128) and 0.05 < (b < 128).mean() < 0.5


def test_points_are_trained_evaluated_and_sampled(tmp_path, monkeypatch):
    config = short(main.load_config("configs/toy/mixture.py"))
    monkeypatch.setattr("run_lib_toys.GRID_SIZE", 5)
    monkeypatch.setattr("evaluation_points.POINTS", 10)
    run_lib.train(config, tmp_path)
    assert (tmp_path / "samples" / "iter_4" / "sample.png").exists()
    run_lib.evaluate(config, tmp_path)
    found = json.loads((tmp_path / "eval" / "ckpt_1.json").read_text())
    assert found["metrics"]["sliced_wasserstein_ratio"] > 0
    assert {"mmd2", "mmd2_true", "sliced_wasserstein_se"} <= set(found["metrics"])
    nats = found["likelihood"]
    for name in ("log_likelihood", "elbo", "truth", "kl"):
        assert nats[name]["standard_error"] > 0
    assert nats["kl"]["mean"] == pytest.approx(
        nats["truth"]["mean"] - nats["log_likelihood"]["mean"]
    )
    assert "bpd" not in found
    with np.load(tmp_path / "eval" / "ckpt_1_samples.npz") as file:
        assert file["samples"].shape == (20, 2) and file["samples"].dtype == np.float32
    with np.load(tmp_path / "eval" / "ckpt_1_likelihood.npz") as file:
        assert file["log_q"].shape == file["log_p"].shape == (25,)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    path = run_lib.sample(config, tmp_path, num=7)
    with np.load(path) as file:
        assert path.suffix == ".npz" and file["samples"].shape == (7, 2)
    assert run_lib.sample(config, tmp_path, tmp_path / "x.png", num=7).exists()
    with pytest.raises(ValueError, match=r"\.npz"):
        run_lib.sample(config, tmp_path, tmp_path / "folder", num=7)


def test_features_and_gaps_of_points_are_refused(tmp_path):
    config = short(main.load_config("configs/toy/mixture.py"))
    config.training.snapshot_sampling = False
    run_lib.train(config, tmp_path)
    config.eval.gap_report = True
    with pytest.raises(ValueError, match="no levels"):
        run_lib.evaluate(config, tmp_path)


def test_a_picture_of_points_is_dark_where_they_are():
    picture = np.asarray(visualize.image_grid(torch.tensor([[1.0, 2.0]])))  # right, and up
    row, column = np.argwhere(picture.sum(axis=2) < 500)[0]
    assert picture.shape == (400, 400, 3)
    assert row == pytest.approx(400 * 0.1, abs=3) and column == pytest.approx(400 * 0.7, abs=3)


# --- Langevin dynamics at one noise level -----------------------------------------------------


def langevin(start="prior", **options):
    sde, corrector = sde_lib.VESDE(0.01, 5.0), options.pop("corrector", None)
    given = {"sigma": 0.5, "start": start, "steps": 60, "continuous": True, "denoise": False}
    sampler = sampling.get_langevin_sampler(
        sde,
        (4000, 2),
        corrector or sampling.get_corrector("ald"),
        lambda x: x,
        0.3,
        **{**given, **options},
    )
    return sampler


def exact(x, sigma):  # data N(0, 0.7²)
    return -x / (0.7**2 + sigma[:, None] ** 2)


def test_langevin_dynamics_end_in_the_distribution_at_their_noise_level():
    """The stationary variance is v/(1 − ε/(2v)) with ε = 2 (r σ)² (numerics: ALD)."""
    v, eps = 0.7**2 + 0.5**2, 2 * (0.3 * 0.5) ** 2
    for start in ("prior", "uniform"):
        samples, evaluations = langevin(start, steps=150)(exact)
        assert evaluations == 150
        assert samples.var().item() == pytest.approx(v / (1 - eps / (2 * v)), rel=0.06)


def test_they_may_start_uniformly_on_the_canvas():
    seen = []
    langevin("uniform", steps=1, half_side=3.0, callback=lambda i, t, x, m: seen.append(m))(
        lambda x, sigma: torch.zeros_like(x)
    )
    x = seen[0]
    assert -3 <= x.min() < -2.9 and 2.9 < x.max() <= 3
    assert x.std().item() == pytest.approx(3 / 3**0.5, rel=0.03)


def test_sample_i_of_langevin_dynamics_is_a_function_of_its_seed():
    def one(seeds):
        sde = sde_lib.VESDE(0.01, 5.0)
        sampler = sampling.get_langevin_sampler(
            sde, (len(seeds), 2), sampling.get_corrector("ald"), lambda x: x, 0.3, 5,
            sigma=0.5, start="uniform", seeds=seeds,
        )  # fmt: skip
        return sampler(exact)[0]

    assert torch.equal(one([3, 4, 5])[1], one([4])[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sigma": 0.0}, "training.sigma"),
        ({"start": "corner"}, "'prior'|prior"),
        ({"steps": 0}, "steps"),
        ({"sigma": 1e-4}, r"noise levels σ/α from 0\.01 to 5, got sigma=0\.0001"),
        ({"sigma": 6.0}, "got sigma=6"),
        ({"corrector": sampling.NoneCorrector}, "'none' takes none"),
    ],
)
def test_what_langevin_dynamics_cannot_do_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        langevin(**options)


def test_langevin_dynamics_refuse_seeds_for_a_corrector_that_draws_its_own_noise():
    class Own(sampling.AnnealedLangevinDynamics):
        def randn_like(self, x):
            return torch.randn_like(x)

    with pytest.raises(ValueError, match="draws its own noise"):
        langevin(corrector=Own, seeds=range(4000), steps=1)(exact)
    assert langevin(sigma=0.01, steps=1)(exact)[0].isfinite().all()  # the last level there is


@pytest.mark.slow
def test_a_toy_is_learned():
    """The mixture, with an eighth of the config's training: within 2.5 times the truth's own
    distance."""
    config = main.load_config("configs/toy/mixture.py")
    config.training.update(n_iters=600, batch_size=128)
    config.device = torch.device("cpu")
    import evaluation_points

    sde, model = sde_lib.get_sde(config), create_model(config)
    optimizer = losses.get_optimizer(config, model.parameters())
    from models import ema

    state = {"model": model, "optimizer": optimizer, "step": 0}
    state["ema"] = ema.from_config(config, model.parameters())
    step = losses.step_fn_from_config(config, sde, True)
    points = data_lib.get_image_sets(config)[0]
    for batch, _ in (next(b) for b in [data_lib.train_batches(points, 128, 0)] * 600):
        step(state, batch)
    samples, _ = Sampler(config, sde, model)(range(2000))
    found = evaluation_points.compare(samples, get_density(config).sample)
    assert found["sliced_wasserstein_ratio"] < 2.5
