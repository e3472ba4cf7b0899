"""Training a dequantizer on a frozen score model with the ordinary loop, and using it."""

import json
import shutil

import pytest
import torch
import toys_processes
from toys import AsModel, gaussian_score
from toys_processes import tiny

import checkpoints
import data_lib
import distributed
import likelihood_bounds
import losses
import run_lib
import run_lib_train
import sde_lib
from configs import families
from configs.validation import complete
from likelihood_bits import bits_per_dim
from likelihood_dequantization import (
    UniformDequantizer,
    VariationalDequantizer,
    get_differentiable_elbo_fn,
)
from models import utils
from randomness import Draws
from run_lib_dequantization import dequantization_objective, get_dequantizer, load_trained


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    """The workdir of a small score model."""
    workdir = tmp_path_factory.mktemp("score")
    run_lib.train(tiny(optim__lr=1e-2, optim__warmup=0), workdir)
    return workdir


def settings(score, **changes):
    """A small dequantizer's, to be trained on the score model in `score`."""
    config = families.dequantizer(tiny())
    config.training.score_checkpoint = str(score)
    config.model.update(nf=8, num_res_blocks=1, couplings=2, spline_bins=4)
    config.optim.update(lr=1e-3, warmup=0)
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def content(path):
    return torch.load(path, weights_only=True)


def resume_file(workdir):
    return workdir / "checkpoints-meta" / "checkpoint.pth"


def same(a, b):
    pairs = zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True)
    return all(torch.equal(p, q) for p, q in pairs) and all(
        torch.equal(a["model"][key], b["model"][key]) for key in a["model"]
    )


# --- the bound that is trained ------------------------------------------------------------------


def toy(dtype=torch.float64):
    sde = sde_lib.VPSDE(0.1, 20, 1000)
    return sde, AsModel(sde, gaussian_score(sde, 0.2, 0.5)), torch.randn(4, 1, 2, 2, dtype=dtype)


def test_the_differentiable_bound_has_the_mean_of_the_elbo():
    sde, model, x = toy()
    many = x.repeat(5000, 1, 1, 1)
    found, t = get_differentiable_elbo_fn(sde, eps=1e-3)(model, many)
    found = found.reshape(5000, 4)
    expected = likelihood_bounds.get_elbo_fn(sde, eps=1e-3, points=2)(model, many).logp
    expected = expected.reshape(5000, 4)
    error = (found.var(0) / 5000 + expected.var(0) / 5000).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 4 * error).all()
    assert error.max() < 0.75 and t.min() >= 1e-3 and t.max() <= 1


def test_the_gradient_in_the_image_is_that_of_differences():
    sde, model, x = toy()
    elbo, draws = get_differentiable_elbo_fn(sde, eps=1e-3), Draws(0, "s", 0, 4)
    (gradient,) = torch.autograd.grad(elbo(model, x.requires_grad_(True), draws=draws)[0].sum(), x)
    direction = torch.randn_like(x)
    ends = [elbo(model, x.detach() + h * direction, draws=draws)[0] for h in (1e-5, -1e-5)]
    expected = (ends[0] - ends[1]) / 2e-5
    assert torch.allclose((gradient * direction).flatten(1).sum(1), expected, rtol=1e-6)


def test_a_new_dequantizer_scores_the_bits_of_uniform_noise(score):
    config = complete(settings(score))
    sde, network = sde_lib.get_sde(config), utils.create_model(config)
    images = data_lib.get_image_sets(config)[1].take(range(4))
    draws = Draws(3, "s", 0, 4)
    batch = data_lib.prepare(images, config, draws=draws)
    objective = dequantization_objective(config, sde, train=False)
    bits, t = objective.per_image(network, batch, draws=draws)

    frozen, elbo = load_trained(str(score), "", "cpu").model, get_differentiable_elbo_fn(sde)
    smooth = data_lib.prepare(images, config, dequantize=True, draws=draws)
    unscale = data_lib.get_data_inverse_scaler(config)
    expected = bits_per_dim(elbo(frozen, smooth, draws=draws)[0], 64, unscale, 17)
    assert torch.allclose(bits, expected, rtol=1e-5)
    assert t.shape == (4,)


def test_the_gradient_goes_through_the_frozen_network_and_stops_there(score):
    config = complete(settings(score))
    network = utils.create_model(config)
    objective = dequantization_objective(config, sde_lib.get_sde(config), train=True)
    images = data_lib.get_image_sets(config)[0].take(range(8))
    objective(network, data_lib.prepare(images, config)).backward()
    last = network.couplings[-1].leave.weight.grad
    assert last.isfinite().all() and last.abs().max() > 0
    frozen = load_trained(str(score), "", "cpu").model
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not frozen.training


# --- the ordinary loop --------------------------------------------------------------------------


def test_a_dequantizer_trains_is_kept_and_is_found_again(score, tmp_path):
    before = content(resume_file(score))
    run_lib.train(settings(score, training__eval_freq=3), tmp_path / "deq")
    assert same(before, content(resume_file(score)))
    lines = (tmp_path / "deq" / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {"loss", "eval_loss"} <= set().union(*rows)
    assert not (tmp_path / "deq" / "samples").exists()

    saved = content(tmp_path / "deq" / "checkpoints" / "checkpoint_1.pth")
    config = complete(tiny(eval__dequantization="variational"))
    for where in ("deq", "deq/checkpoints/checkpoint_1.pth", "deq/checkpoints-meta/checkpoint.pth"):
        config.eval.dequantizer = str(tmp_path / where)
        dequantizer = get_dequantizer(config)
        assert isinstance(dequantizer, VariationalDequantizer)
        weights = list(dequantizer.network.parameters())
        averages = saved["ema"]["shadow_params"]
        assert all(torch.equal(p, q) for p, q in zip(weights, averages, strict=True))
        about = dequantizer.protocol()
        assert about["dequantization"] == "variational" and about["dequantizer_step"] == 6
        assert len(about["dequantizer_weights"]) == 64
    assert isinstance(get_dequantizer(complete(tiny())), UniformDequantizer)


def test_a_resumed_training_ends_as_an_uninterrupted_one(score, tmp_path):
    run_lib.train(settings(score), tmp_path / "whole")
    run_lib.train(settings(score, training__n_iters=3), tmp_path / "parts")
    run_lib.train(settings(score), tmp_path / "parts")
    whole, parts = (content(resume_file(tmp_path / name)) for name in ("whole", "parts"))
    assert same(whole, parts) and whole["step"] == parts["step"] == 6


def curve(score, n):
    with distributed.process_group():
        config = run_lib.complete_here(settings(score))
        state = run_lib.create_state(config)
        sets = data_lib.get_image_sets(config)
        steps = run_lib_train.Steps(config, sde_lib.get_sde(config), *sets)
        state = {**state, "model": distributed.parallel(state["model"], False)}
        return [float(steps.train(state)) for _ in range(n)]


def test_two_processes_train_it_as_one_does(score):
    one = curve(score, 4)
    for losses_of_two in toys_processes.run(2, curve, score, 4):
        assert losses_of_two == pytest.approx(one, rel=1e-4)


def test_its_own_evaluation_is_the_bound_on_held_out_images(score, tmp_path):
    config = settings(score)
    run_lib.train(config, tmp_path)
    result = run_lib.evaluate(config, tmp_path)[1]
    assert result["loss"]["images"] == 300 and "bpd" not in result
    assert losses.get_objective("dequantization") is dequantization_objective


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__score_checkpoint": ""}, "expected --config.training.score_checkpoint"),
        ({"training__score_checkpoint": "/nowhere"}, "got no /nowhere"),
        ({"training__sde": "subvpsde"}, "training.sde: 'vpsde' there, 'subvpsde' here"),
        ({"model__beta_max": 10.0}, "model.beta_max: 20.0 there, 10.0 here"),
        ({"data__image_size": 16}, "data.image_size: 8 there, 16 here"),
        ({"data__centered": False}, "data.centered: True there, False here"),
        ({"model__num_classes": 10}, "model.num_classes: 0 there, 10 here"),
        ({"data__uniform_dequantization": True}, "data.uniform_dequantization=False"),
        ({"training__snapshot_sampling": True}, "training.snapshot_sampling=False"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(score, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run_lib.train(settings(score, **changes), tmp_path / "deq")
    assert message in str(error.value)
    assert not (tmp_path / "deq" / "checkpoints").exists()


def test_a_score_model_is_no_dequantizer_and_the_other_way_round(score, tmp_path):
    config = complete(tiny(eval__dequantization="variational", eval__dequantizer=str(score)))
    with pytest.raises(ValueError, match="expected a dequantizer, got a 'ncsnpp'"):
        get_dequantizer(config)
    run_lib.train(settings(score, training__n_iters=1), tmp_path)
    with pytest.raises(ValueError, match="expected a score model, got a 'dequantizer'"):
        run_lib.train(settings(tmp_path), tmp_path / "other")
    config.eval.dequantizer = str(tmp_path)
    config.data.levels = 256
    with pytest.raises(ValueError, match=r"data.levels: 17 there, 256 here"):
        get_dequantizer(config)


def test_a_checkpoint_without_its_configuration_is_refused(score, tmp_path):
    path = tmp_path / "checkpoints" / "checkpoint_1.pth"
    path.parent.mkdir()
    shutil.copy(score / "checkpoints" / "checkpoint_1.pth", path)
    with pytest.raises(FileNotFoundError, match=r"got no .*config.json"):
        load_trained(str(path), "training.score_checkpoint", "cpu")
    shutil.copy(score / "config.json", tmp_path)
    assert load_trained(str(path), "training.score_checkpoint", "cpu").step == 6
    damaged = content(path)
    damaged["model"].popitem()
    checkpoints.write_atomically(path, lambda file: torch.save(damaged, file))
    with pytest.raises(ValueError):
        load_trained(str(path), "training.score_checkpoint", "cpu")


def test_a_run_does_not_go_on_with_another_score_model(score, tmp_path):
    run_lib.train(settings(score, training__n_iters=1), tmp_path / "deq")
    shutil.copytree(score, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"training.score_checkpoint"):
        run_lib.train(settings(tmp_path / "copy"), tmp_path / "deq")
