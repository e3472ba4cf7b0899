"""Guidance named by a configuration: `--mode sample` and `eval` with a second network's workdir."""

import numpy as np
import pytest
import torch
from toys_processes import tiny

import run_lib
import sde_lib
from models.utils import create_model, get_score_fn
from run_lib_samples import Sampler
from run_lib_state import checkpoint_path, complete_here

QUICK = {"sampling__steps": 4, "eval__batch_size": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a network, a worse one, one told of classes, and a classifier."""
    settings = {
        "plain": {"training__n_iters": 6},
        "weak": {"training__n_iters": 2, "model__num_res_blocks": 2},
        "flow": {
            "training__n_iters": 2,
            "training__sde": "rectified_flow",
            "model__parametrization": "data",
        },
        "conditional": {"model__num_classes": 10, "model__label_dropout": 0.1},
        "classifier": {
            "training__objective": "classifier",
            "training__weighting": "",
            "training__likelihood_weighting": False,
            "model__name": "classifier",
            "model__num_classes": 10,
        },
    }
    paths = {}
    for name, changes in settings.items():
        paths[name] = str(tmp_path_factory.mktemp(name))
        run_lib.train(tiny(**changes), paths[name])
    return paths


def drawn(config, workdir, path, **options):
    with np.load(run_lib.sample(config, workdir, path / "x.npz", num=4, **options)) as file:
        return {key: file[key] for key in file.files}


def sampler(config, **options):
    config = complete_here(config)
    sde = sde_lib.get_sde(config)
    torch.manual_seed(0)
    model = create_model(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.05)
    return Sampler(config, sde, model, **options), get_score_fn(sde, model, continuous=True)


def batch():
    return torch.randn(4, 1, 8, 8), torch.tensor([0.2, 0.4, 0.6, 0.9])


@pytest.mark.parametrize("process", ["", "rectified_flow"])
@pytest.mark.parametrize("other", ["weak", "flow"])
def test_autoguidance_is_the_lerp_with_the_other_network_on_any_process(runs, process, other):
    guide = {"sampling__guidance": "autoguidance", "sampling__guidance_network": runs[other]}
    guide |= {"sampling__sde": process, "sampling__predictor": "ddim"}
    with_w = [
        sampler(tiny(**QUICK, **guide, sampling__guidance_weight=w))[0].told({}).denoise
        for w in (0.0, 1.0, 2.0)
    ]
    x, t = batch()
    plain, one, two = (fn(x, t) for fn in with_w)
    assert (one - plain).abs().max() > 1e-3
    assert torch.allclose(two - plain, 2 * (one - plain), atol=1e-5)
    bare = sampler(tiny(**QUICK, sampling__sde=process, sampling__predictor="ddim"))[0]
    assert torch.allclose(plain, bare.told({}).denoise(x, t), atol=1e-6)


def test_the_same_process_is_asked_without_a_rounding_of_its_times(runs):
    guide = {"sampling__guidance": "autoguidance", "sampling__guidance_network": runs["weak"]}
    draw, strong = sampler(tiny(**QUICK, **guide, sampling__guidance_weight=1.0))
    weak = draw.guidance._other()
    assert weak.sde is draw.sde and weak.trained is None
    x, t = batch()
    s, w = strong(x, t), weak(x, t)
    assert torch.equal(draw.told({})(x, t), s + (s - w))


def test_the_interval_says_where_guidance_acts(runs):
    guide = {"sampling__guidance": "autoguidance", "sampling__guidance_network": runs["weak"]}
    narrow = tiny(**QUICK, **guide, sampling__guidance_interval=(0.5, 2.0))
    draw, strong = sampler(narrow)
    x, t = batch()
    moved = (draw.told({}).denoise(x, t) - strong.denoise(x, t)).flatten(1).abs().amax(1)
    alpha, sigma = sde_lib.alpha_sigma(draw.sde, t)
    inside = (sigma / alpha >= 0.5) & (sigma / alpha <= 2)
    assert inside.any() and not inside.all()
    assert ((moved > 1e-4) == inside).all()


def test_samples_are_guided_and_their_evaluations_counted(runs, tmp_path):
    guide = {"sampling__guidance": "autoguidance", "sampling__guidance_network": runs["weak"]}
    plain = drawn(tiny(**QUICK), runs["plain"], tmp_path)["samples"].astype(int)
    config = tiny(**QUICK, **guide, sampling__guidance_weight=3.0)
    guided = drawn(config, runs["plain"], tmp_path)["samples"].astype(int)
    assert np.abs(guided - plain).max() > 8
    assert sampler(config)[0](range(2))[1] == 2 * sampler(tiny(**QUICK))[0](range(2))[1]


def test_classifier_free_guidance_needs_labels_that_were_dropped(runs, tmp_path):
    known = {"model__num_classes": 10, "model__label_dropout": 0.1}
    config = tiny(**QUICK, **known, sampling__guidance="classifier_free")
    assert drawn(config, runs["conditional"], tmp_path)["labels"].tolist() == [0, 1, 2, 3]
    x, t = batch()
    draw, score_fn = sampler(config)
    y = torch.tensor([0, 1, 2, 3])
    told = score_fn.with_conditions(y=y)
    expected = 2 * told.denoise(x, t) - score_fn.denoise(x, t)
    assert torch.allclose(draw.told({"y": y}).denoise(x, t), expected, atol=1e-5)
    for wrong in ({}, {"model__num_classes": 10}):
        with pytest.raises(ValueError, match="needs a network trained with classes"):
            sampler(tiny(**QUICK, **wrong, sampling__guidance="classifier_free"))


def test_a_classifier_gives_classes_to_a_network_without(runs, tmp_path):
    guide = {"sampling__guidance": "classifier", "sampling__guidance_network": runs["classifier"]}
    config = tiny(**QUICK, **guide)
    assert drawn(config, runs["plain"], tmp_path)["labels"].tolist() == [0, 1, 2, 3]
    assert drawn(config, runs["plain"], tmp_path, label=7)["labels"].tolist() == [7] * 4
    with pytest.raises(ValueError, match="from 0 to 9"):
        run_lib.sample(config, runs["plain"], tmp_path / "y.npz", label=10)
    draw, score_fn = sampler(config)
    x, t = batch()
    y = torch.tensor([0, 1, 2, 3])
    from controllable_generation import classifier_score

    expected = classifier_score(score_fn, draw.guidance.trained.model, y)(x, t)
    assert torch.allclose(draw.told(draw.known(range(4)))(x, t), expected)


def test_what_samples_are_made_by_names_the_other_networks_weights(runs, tmp_path):
    config = tiny(**QUICK)
    guide = {"sampling__guidance": "autoguidance", "sampling__guidance_network": runs["weak"]}
    guided = sampler(tiny(**QUICK, **guide))[0]
    made_by = guided.made_by("weights")
    assert made_by["config"]["sampling"]["guidance"] == "autoguidance"
    assert len(made_by["guidance"]["guidance_weights"]) == 64
    assert guided.protocol()["guidance_step"] == 2
    assert "guidance" not in sampler(config)[0].made_by("weights")
    other = {**guide, "sampling__guidance_network": runs["plain"]}
    assert sampler(tiny(**QUICK, **other))[0].made_by("weights")["guidance"] != made_by["guidance"]


def test_an_evaluation_is_guided_and_says_so(runs):
    guide = {"sampling__guidance": "autoguidance", "sampling__guidance_network": runs["weak"]}
    settings = {"eval__num_samples": 4, "eval__enable_loss": False, "eval__enable_bpd": False}
    settings |= {"eval__enable_sampling": True, "eval__begin_ckpt": -1, "eval__end_ckpt": -1}
    run_lib.evaluate(tiny(**QUICK, **guide, **settings), runs["plain"])
    import json
    from pathlib import Path

    found = json.loads(next(Path(runs["plain"]).glob("eval/ckpt_*.json")).read_text())
    assert "guidance_weights" in json.dumps(found)


@pytest.mark.parametrize(
    ("guidance", "other", "error", "message"),
    [
        ("autoguidance", "", ValueError, "sampling.guidance_network=WORKDIR"),
        ("autoguidance", "/no/such", FileNotFoundError, "expected the workdir"),
        ("autoguidance", "classifier", ValueError, "num_classes"),
        ("autoguidance", "conditional", ValueError, "num_classes"),
        ("classifier", "weak", ValueError, "expected a classifier"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_sampling(
    runs, tmp_path, guidance, other, error, message
):
    where = runs.get(other, other)
    config = tiny(**QUICK, sampling__guidance=guidance, sampling__guidance_network=where)
    with pytest.raises(error, match=message):
        run_lib.sample(config, runs["plain"], tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())


def test_checkpoints_beside_the_newest_can_be_named(runs):
    from pathlib import Path

    path = str(checkpoint_path(Path(runs["weak"]), 1))
    guide = {"sampling__guidance": "autoguidance", "sampling__guidance_network": path}
    assert sampler(tiny(**QUICK, **guide))[0].protocol()["guidance_step"] == 2
