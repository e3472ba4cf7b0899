"""What a training will take, said before it begins."""

import gc
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

import losses
import models.ema
import sde_lib
from configs.validation import complete
from models import utils
from models.estimate import Estimate, estimate


def small(name="ncsnpp", training=(), **model):
    model = {"name": name, "nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, **model}
    return complete(
        {
            "training": {"sde": "vpsde", "batch_size": 16, "n_iters": 100, **dict(training)},
            "model": {"attn_resolutions": (8,), "embedding_type": "positional", **model},
            "data": {"image_size": 16},
            "device": "cpu",
        }
    )


def published(path):
    config = importlib.import_module(f"configs.{path}").get_config()
    config.device = "cpu"
    return complete(config)


def numbers(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm"])
def test_parameters_are_exact(name):
    config = small(name)
    assert estimate(config).parameters == numbers(utils.create_model(config).parameters())


@pytest.mark.parametrize(
    ("path", "parameters", "gigaflops"),
    [
        # performance.md counts 21.8 and 21.7 with nearest upsampling and convolution apart, which
        # here are one transposed convolution of 4/9 of the products
        ("ve.cifar10_ncsnpp_continuous", 62_758_915, 21.8),
        ("vp.cifar10_ddpmpp_continuous", 61_804_419, 21.7),
    ],
)
def test_published_networks_have_their_known_size_and_work(path, parameters, gigaflops):
    found = estimate(published(path))
    assert found.parameters == parameters
    assert found.flops_forward / 1e9 == pytest.approx(gigaflops, rel=0.05)


def test_flops_are_those_of_a_forward_and_a_backward_pass():
    config = small()
    found = estimate(config)
    model = utils.create_model(config)
    with FlopCounterMode(display=False) as counter:
        y = model(torch.rand(3, 3, 16, 16), torch.tensor([1.0, 2.0, 3.0]))
        assert counter.get_total_flops() == 3 * found.flops_forward
        y.sum().backward()
    assert counter.get_total_flops() == pytest.approx(3 * found.flops_training, rel=0.03)


def peak_of_a_step(config):
    """Bytes at the peak of the second training step, all of them seen by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model = utils.prepare_for_training(utils.create_model(config), config)
        state = {
            "model": model,
            "optimizer": losses.get_optimizer(config, model.parameters()),
            "ema": models.ema.from_config(config, model.parameters()),
            "step": 0,
        }
        step = losses.step_fn_from_config(config, sde_lib.get_sde(config), True)
        for _ in range(2):
            step(state, torch.rand(config.training.batch_size, 3, 16, 16))
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 2},
        {"precision": "bf16"},
        {"grad_accumulation": 4},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_memory_is_that_of_a_measured_step_within_a_third(options):
    config = small(training=options, nf=32, ema_rates=(0.99,))
    # What the passes hold for a moment (a block computed again) comes on top.
    assert 0.75 < peak_of_a_step(config) / estimate(config).memory < 1.34


def test_each_option_moves_what_it_should():
    plain = estimate(small())
    assert plain.average_bytes == plain.gradient_bytes == plain.optimizer_bytes / 2
    more = estimate(small(ema_rates=(0.9,), ema_profiles=(0.05, 0.1)))
    assert more.average_bytes == 4 * plain.average_bytes
    low = estimate(small(training={"precision": "bf16"}))
    assert 0.5 < low.activation_bytes / plain.activation_bytes < 1
    recomputed = estimate(small(training={"activation_checkpointing": True}))
    assert recomputed.activation_bytes < plain.activation_bytes / 2
    parts = estimate(small(training={"grad_accumulation": 2}), processes=4)
    assert parts.activation_bytes == pytest.approx(plain.activation_bytes / 8, rel=0.1)
    compiled = estimate(small(training={"compile": True}))
    assert compiled == plain


def test_nothing_is_computed_and_no_random_number_drawn():
    before = torch.get_rng_state()
    config = small()
    estimate(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert config == small()


def fake_tensors():
    gc.collect()
    return sum(type(thing) is FakeTensor for thing in gc.get_objects())


@pytest.mark.parametrize("name", ["ncsnpp", "ddpm"])
def test_nothing_of_it_stays_in_memory(name):
    before = fake_tensors()
    estimate(small(name))
    assert fake_tensors() <= before


def test_the_line_says_it_in_units_of_people():
    found = Estimate(
        parameters=62_758_915,
        flops_forward=21_630_339_168,
        weight_bytes=251 * 10**6,
        gradient_bytes=251 * 10**6,
        optimizer_bytes=502 * 10**6,
        average_bytes=251 * 10**6,
        activation_bytes=11_958_953_984,
        images_per_step=128,
        steps=1_300_001,
    )
    assert found.line() == (
        "62.76 M parameters, 21.6 GFLOP forward and 64.9 GFLOP in training per image (10.8 EFLOP "
        "in all), about 12.3 GiB in training, 11.1 GiB of it activations"
    )
    assert found.line(images_per_second=1000).endswith(", 46.2 hours for 1,300,001 steps")
    assert found.seconds(128) == 1_300_001


class NeedsNumbers(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, labels):
        return self.layer(x) * labels.mean().item()


def test_a_network_that_needs_numbers_still_has_its_parameters_counted(monkeypatch):
    monkeypatch.setitem(utils._MODELS, "needs numbers", NeedsNumbers)
    found = estimate(small("needs numbers"))
    assert (found.parameters, found.flops_forward, found.activation_bytes) == (12, 0, 0)
    assert found.line() == "0.00 M parameters"
