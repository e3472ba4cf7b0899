"""The configurations of sdeflow and ScoreFlow: what they say, and that they train."""

import importlib
from pathlib import Path

import pytest
import torch

import data_lib
import losses
import sde_lib
from configs.validation import complete
from likelihood_bits import log_volume_at, refuse_discrete
from models import utils
from parametrization import declared_parametrization

ROOT = Path(__file__).resolve().parents[1]
SDEFLOW = ["cifar10", "mnist", "swissroll"]
SCORES = ["cifar10_ddpmpp_deep_vp", "cifar10_ddpmpp_deep_subvp"]
DEQUANTIZERS = {
    "cifar10_ddpmpp_deep_vp_dequantizer": "configs.scoreflow.cifar10_ddpmpp_deep_vp",
    "cifar10_ddpmpp_deep_subvp_dequantizer": "configs.scoreflow.cifar10_ddpmpp_deep_subvp",
    "digits_dequantizer": "configs.vp.digits_ddpmpp_continuous",
    "mnist_dequantizer": "configs.vp.mnist_ddpmpp_continuous",
}


def load(name):
    config = importlib.import_module(name).get_config()
    config.device = "cpu"
    return complete(config)


def objective(config, train=True):
    return losses.loss_fn_from_config(config, sde_lib.get_sde(config), train)


def test_every_file_is_known_here():
    found = {p.stem for p in (ROOT / "configs/sdeflow").glob("*.py")} - {"__init__"}
    assert found == {name + suffix for name in SDEFLOW for suffix in ("", "_debiased")}
    found = {p.stem for p in (ROOT / "configs/scoreflow").glob("*.py")} - {"__init__"}
    assert found == {*SCORES, *DEQUANTIZERS}


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("name", SDEFLOW)
def test_sdeflow_trains_the_drift_on_the_vp_process_as_published(name, debiased):
    config = load(f"configs.sdeflow.{name}{'_debiased' if debiased else ''}")
    assert (config.training.sde, config.model.beta_min, config.model.beta_max) == ("vpsde", 0.1, 20)
    assert declared_parametrization(config).output == "drift"
    assert (config.optim.optimizer, config.optim.warmup) == ("Adam", 0)
    assert config.optim.grad_clip < 0 and config.model.ema_rate == 0
    t = config.training
    expected = (True, "likelihood", 1e-3) if debiased else (False, "uniform", 0.0)
    assert (t.likelihood_weighting, t.time_sampler, t.truncate) == expected
    assert not t.reduce_mean
    if name != "swissroll":
        assert config.data.logit_alpha == 0.05 and config.data.uniform_dequantization
        assert (config.optim.lr, config.model.dropout, config.model.name) == (1e-4, 0, "ddpm")


def test_the_debiased_objective_is_the_bound_up_to_a_factor_and_the_plain_one_is_not():
    """Where t > truncate the weight is g², times are drawn from g²/σ²: 1/p and the weight leave
    half the squared error of the noise at a constant factor."""
    configs = [load("configs.sdeflow.mnist"), load("configs.sdeflow.mnist_debiased")]
    batch, ratios = torch.rand(128, 1, 28, 28), []
    for config in configs:
        sde = sde_lib.get_sde(config)
        torch.manual_seed(0)
        network = utils.create_model(config)
        with torch.no_grad():
            losses_, t = objective(config).per_image(network, batch)
        assert network.parametrization.output == "drift"
        # The last layer of a new DDPM is nearly zero, so that the error is z itself.
        late = t > 1e-3
        ratios.append(losses_[late] / (0.5 * 784))
        assert late.sum() > 25
    plain, debiased = (r.std() / r.mean() for r in ratios)
    assert plain < 0.08 and debiased < 0.08
    sde = sde_lib.get_sde(configs[1])
    times = sde_lib.get_time_sampler(configs[1], sde)
    half = torch.tensor([0.5], dtype=torch.float64)
    g2, sigma = 0.1 + 19.9 * 0.5, sde_lib.alpha_sigma(sde, half)[1]
    factor = g2 / sigma**2 / times.density(half) / (1 - 1e-5)
    assert ratios[1].mean().item() == pytest.approx(factor.item(), rel=0.02)


@pytest.mark.parametrize("name", SCORES)
def test_scoreflow_is_published_but_for_nothing_that_changes_the_loss(name):
    config = load(f"configs.scoreflow.{name}")
    t, eps = config.training, 1e-2 if "subvp" in name else 1e-5
    assert (t.likelihood_weighting, t.time_sampler, t.eps) == (True, "likelihood", eps)
    assert (t.batch_size, t.n_iters, t.reduce_mean) == (128, 950001, True)
    assert (config.optim.lr, config.optim.warmup, config.optim.grad_clip) == (2e-4, 5000, 1)
    assert (config.model.num_res_blocks, config.model.nf, config.model.ema_rate) == (8, 128, 0.9999)
    assert config.sampling.method == "ode" and config.eval.likelihood_eps == eps
    assert (config.eval.begin_ckpt, config.eval.end_ckpt) == (19, 19)


@pytest.mark.parametrize(("name", "of"), DEQUANTIZERS.items())
def test_a_dequantizers_configuration_fits_its_score_models(name, of):
    from run_lib_dequantization import _IMAGES, _PROCESS

    mine, theirs = load(f"configs.scoreflow.{name}"), load(of)
    for key in (*_IMAGES, *_PROCESS):
        section, leaf = key.split(".")
        assert mine[section][leaf] == theirs[section][leaf], key
    assert mine.training.objective == "dequantization"
    assert mine.training.eps == theirs.training.eps
    assert not mine.data.uniform_dequantization and not mine.training.snapshot_sampling
    network = utils.create_model(mine)
    images = torch.randint(0, mine.data.levels, (2, *network.shape))
    u, log_q = network(images, torch.rand(images.shape))
    assert u.shape == images.shape and log_q.abs().max() < 1e-2
    with pytest.raises(ValueError, match="expected --config"):
        objective(mine)


# --- logits -------------------------------------------------------------------------------------


def test_pixels_come_back_from_logits_and_are_refused_without_noise():
    config = load("configs.sdeflow.mnist")
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    scale, unscale = data_lib.get_data_scaler(config), data_lib.get_data_inverse_scaler(config)
    x = data_lib.prepare(images, config, dequantize=True)
    assert x.abs().max() <= torch.logit(torch.tensor(0.95)) + 1e-4
    assert torch.equal(data_lib.quantize(unscale(x), config), images)
    refuse_discrete(x, unscale, 256)
    with pytest.raises(ValueError, match="4 of 4 images"):
        refuse_discrete(data_lib.prepare(images, config), unscale, 256)
    assert torch.allclose(scale(unscale(x)), x, atol=1e-5)


def test_the_volume_of_logits_is_that_of_the_logit_transform():
    """dy/dx = 0.9/(u (1 - u)) of y = logit(u), u = 0.05 + 0.9 x."""
    config = load("configs.sdeflow.mnist")
    v = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    x = data_lib.get_data_scaler(config)(v)
    volume = log_volume_at(x, data_lib.get_data_inverse_scaler(config), 256)
    u = 0.05 + 0.9 * v
    assert torch.allclose(x, torch.log(u / (1 - u)), rtol=1e-12)
    expected = torch.log(0.9 / (u * (1 - u)) / 256).flatten(1).sum(1)
    assert torch.allclose(volume, expected, rtol=1e-10)


def test_logits_and_centering_are_not_both_chosen():
    config = load("configs.sdeflow.mnist")
    config.data.centered = True
    with pytest.raises(ValueError, match="both choose"):
        data_lib.get_data_scaler(config)
