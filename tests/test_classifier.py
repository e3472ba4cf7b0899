"""The noise-conditional classifier: network, objective, training by its config, accuracy."""

import math

import pytest
import torch
from toys_gaussian_images import GaussianImages

import controllable_generation as cg
import losses
import sde_lib
from models.classifier import get_classifier_fn
from models.utils import create_model
from randomness import Draws


def tiny(**model):
    from configs.classifier.digits import get_config

    config = get_config()
    config.device = torch.device("cpu")
    config.model.update(nf=16, num_res_blocks=1, dropout=0.0, **model)
    return config


def classifier(**model):
    torch.manual_seed(0)
    return create_model(tiny(**model)).eval()


def test_it_maps_images_and_noise_levels_to_logits():
    network = classifier()
    with torch.no_grad():  # a fresh one has residual branches of zero, and hears no noise level
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([-1.0, 0.0, 1.0])
    logits = network(x, labels)
    assert logits.shape == (3, 10)
    assert torch.isfinite(logits).all()
    assert (network(x, labels + 0.5) - logits).abs().max() > 1e-4
    torch.testing.assert_close(network(x[:1], labels[:1]), logits[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_configs_build_their_networks(name):
    import importlib

    config = importlib.import_module(f"configs.classifier.{name}").get_config()
    config.device = torch.device("cpu")
    config.model.update(nf=8)
    size, channels = config.data.image_size, config.data.num_channels
    assert create_model(config)(torch.zeros(2, channels, size, size), torch.zeros(2)).shape == (
        2,
        10,
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 8), "images of shape"),
        ((2, 1, 7, 8), "divisible by 2"),
        ((2, 1, 8, 7), "NoiseConditionalClassifier needs a height and width divisible by 2"),
        ((3, 1, 8, 8), "one label per image"),
    ],
)
def test_other_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        classifier()(torch.zeros(shape), torch.zeros(2))


def test_fewer_than_two_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes ≥ 2, got 1"):
        classifier(num_classes=1)


def test_it_serves_every_process_that_reaches_the_noise_level():
    """x_t/α_t and σ_t/α_t are all that it sees: one image, one λ, the same logits."""
    network, x0, z = (
        classifier(),
        torch.randn(4, 1, 8, 8).double(),
        torch.randn(4, 1, 8, 8).double(),
    )
    lam, found = torch.linspace(-1.5, 1.5, 4, dtype=torch.float64), []
    for sde in (sde_lib.VPSDE(), sde_lib.VESDE(), sde_lib.RectifiedFlow(), sde_lib.EDM()):
        t = sde_lib.time_of_half_log_snr(sde, lam)
        mean, std = sde.marginal_prob(x0, t)
        found.append(get_classifier_fn(sde, network)(mean + sde_lib.expand(std, x0) * z, t))
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=1e-3, atol=1e-4)


def test_a_function_of_x_and_t_is_asked_as_it_is():
    def logits(x, t):
        return x.flatten(1)

    assert get_classifier_fn(sde_lib.VPSDE(), logits) is logits


def test_the_gradient_of_a_network_is_that_of_its_log_likelihood():
    sde, network, y = sde_lib.VPSDE(), classifier().double(), torch.tensor([3, 7])
    x, t = torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.6]).double()
    gradient = cg.classifier_gradient(sde, network, y)(x, t)
    v, h = torch.randn_like(x), 1e-5

    def log_p(x):
        return torch.log_softmax(get_classifier_fn(sde, network)(x, t), 1)[range(2), y]

    slope = (log_p(x + h * v) - log_p(x - h * v)) / (2 * h)
    torch.testing.assert_close((gradient * v).sum((1, 2, 3)), slope, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in network.parameters())


def test_the_gradient_is_the_same_in_inference_mode_and_of_a_compiled_network():
    sde, network, y = sde_lib.VPSDE(), classifier(), torch.tensor([3, 7])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.6])
    gradient = cg.classifier_gradient(sde, network, y)
    expected = gradient(x, t)
    with torch.inference_mode():
        torch.testing.assert_close(gradient(x.clone(), t), expected)
    network.compile(backend="eager")
    torch.testing.assert_close(gradient(x, t), expected)


def test_the_loss_is_the_cross_entropy_on_perturbed_images():
    sde, network = sde_lib.VPSDE(), classifier()
    with torch.no_grad():
        network.out.weight.zero_()
        network.out.bias.zero_()
    loss_fn = losses.get_classifier_loss_fn(sde, train=False)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    each, t = loss_fn.per_image(network, x, y=y)
    torch.testing.assert_close(each, torch.full((6,), math.log(10)))
    assert t.shape == (6,)
    with pytest.raises(ValueError, match="trained on labels y"):
        loss_fn(network, x)


def test_the_loss_of_an_image_does_not_depend_on_its_batch():
    sde, network, x, y = sde_lib.VPSDE(), classifier(), torch.randn(6, 1, 8, 8), torch.arange(6)
    loss_fn = losses.get_classifier_loss_fn(sde, train=False)
    draws = Draws(1, 0, 0, 6, 6, "cpu")
    with torch.no_grad():
        whole = loss_fn.per_image(network, x, y=y, draws=draws)[0]
        part = loss_fn.per_image(network, x[2:4], y=y[2:4], draws=draws.rows(2, 4))[0]
    torch.testing.assert_close(part, whole[2:4], rtol=1e-4, atol=1e-5)


def test_the_config_names_the_objective_and_refuses_what_contradicts_it():
    config, sde = tiny(), sde_lib.VPSDE()
    objective = losses.loss_fn_from_config(config, sde, train=True)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert objective.per_image(create_model(config), x, y=y)[0].shape == (4,)
    config.model.label_dropout = 0.1
    with pytest.raises(ValueError, match="no label_dropout"):
        losses.loss_fn_from_config(config, sde, train=True)


def test_accuracy_of_the_exact_classifier_falls_from_one_to_chance():
    """Two classes of Gaussian images, ±m: Φ(α‖m‖/√(α²s² + σ²)) at time t."""
    sde, n = sde_lib.VPSDE(), 20000
    m, s = torch.tensor([0.3, -0.4]), 0.25
    bed = GaussianImages(torch.zeros(1, 1, 2), s**2 * torch.eye(2))
    y = torch.arange(n) % 2
    images = (bed.sample(n) + (2 * y - 1).reshape(-1, 1, 1, 1) * m).float()

    def logits(x, t):
        alpha, sigma = sde_lib.alpha_sigma(sde, t, x)
        half = (x.flatten(1) @ m) * (alpha / (alpha**2 * s**2 + sigma**2)).to(x.dtype)
        return torch.stack([-half, half], dim=1)

    times = torch.tensor([1e-4, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    found = cg.classifier_accuracy(sde, logits, images, y, times.tolist(), generator=generator)
    alpha, sigma = sde_lib.alpha_sigma(sde, times)
    z = alpha * 0.5 / torch.sqrt(alpha**2 * s**2 + sigma**2)
    torch.testing.assert_close(found, torch.special.ndtr(z), rtol=0, atol=0.015)


@pytest.mark.slow
def test_the_digits_classifier_learns_by_its_config(tmp_path):
    import data_lib
    import run_lib
    import run_lib_state

    config = tiny()
    config.training.update(n_iters=400, snapshot_freq=400, eval_freq=400)
    run_lib.train(config, tmp_path)
    config = run_lib_state.complete_here(config)
    state = run_lib_state.create_state(config)
    run_lib_state.load_averages(config, tmp_path, 1, state)
    held_out = data_lib.get_image_sets(config)[1]
    images, labels = held_out.batch(torch.arange(len(held_out)))
    x = data_lib.prepare(images, config, config.device)
    sde = sde_lib.get_sde(config)
    accuracy = cg.classifier_accuracy(sde, state["model"].eval(), x, labels, [0.001, 0.1, 1.0])
    assert accuracy[0] > 0.9
    assert accuracy[1] > 0.85
    assert accuracy[2] < 0.3
