"""The perceptron: a plain field, and the gradient of a potential, under everything that asks it."""

import pytest
import torch
from torch.func import jacrev, vmap

import likelihood
import sampling
import sde_lib
from configs.validation import complete
from divergence import get_trace
from models.utils import create_model, get_score_fn


def network(dtype=torch.float32, *, dim=2, size=1, **model):
    options = {"name": "mlp", "nf": 24, "num_res_blocks": 2, "dropout": 0.0, "init_scale": 1.0}
    options |= {"scale_by_sigma": False, "fourier_scale": 0.5, "time_input": "", **model}
    if options.get("parametrization") == "preconditioned":
        options["time_input"] = "sigma"  # whose logarithm the embedding takes
    data = {"num_channels": dim, "image_size": size}
    config = complete({"data": data, "model": options, "device": "cpu"})
    torch.manual_seed(0)
    return create_model(config).to(dtype)


def points(n=6, dtype=torch.float64):
    gen = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 2, generator=gen, dtype=torch.float64).to(dtype),
        (torch.rand(n, generator=gen, dtype=torch.float64) + 0.1).to(dtype),
    )


def jacobians(fn, x, t):
    return vmap(jacrev(lambda a, b: fn(a[None], b[None])[0]))(x, t)


@pytest.mark.parametrize("output", ["", "noise", "data", "v", "velocity", "preconditioned"])
def test_the_score_of_an_energy_has_no_curl_whatever_the_output_means(output):
    model = network(torch.float64, energy=True, parametrization=output)
    score_fn = get_score_fn(sde_lib.VPSDE(), model, continuous=True)
    x, t = points()
    J = jacobians(score_fn, x, t)
    assert (J - J.mT).abs().max() < 1e-10 * J.abs().max()


def test_a_plain_field_has_curl():
    J = jacobians(network(torch.float64), *points())
    assert (J - J.mT).abs().max() > 1e-3


def test_the_output_is_the_gradient_of_the_potential():
    model, (x, t) = network(torch.float64, energy=True), points()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model.potential(x, t).sum(), x)
    assert torch.allclose(model(x, t), gradient, atol=1e-14)


@pytest.mark.parametrize("energy", [False, True])
def test_samples_of_another_dimension_or_number_of_labels_are_refused(energy):
    model = network(energy=energy)
    for x, labels in (((3, 3), 3), ((3, 2), 2), ((3, 2), 1), ((3, 1), 3)):
        with pytest.raises(ValueError, match="samples of 2 numbers and one label each"):
            model(torch.zeros(x), torch.ones(labels))
    assert model(torch.zeros(0, 2), torch.ones(0)).shape == (0, 2)


@pytest.mark.parametrize("energy", [False, True])
def test_under_autocast_the_output_has_the_type_of_the_input(energy):
    model, (x, t) = network(energy=energy), points(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, model(x, t), rtol=0.05, atol=0.05)


def test_a_plain_field_has_no_potential():
    with pytest.raises(ValueError, match=r"model\.energy=True"):
        network().potential(*points(dtype=torch.float32))


@pytest.mark.parametrize("energy", [False, True])
def test_every_weight_learns_and_none_is_idle(energy):
    model, (x, t) = network(torch.float64, energy=energy), points(64)
    model(x, t).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_gradients_of_weights_pass_through_an_energy_rightly():
    model, (x, t) = network(torch.float64, energy=True), points(16)
    weight = model.net.blocks[0].first.weight

    def loss():
        return model(x, t).square().sum()

    loss().backward()
    found, h = weight.grad[0, 0].item(), 1e-5
    with torch.no_grad():
        weight[0, 0] += h
        above = loss()
        weight[0, 0] -= 2 * h
        below = loss()
    assert found == pytest.approx(((above - below) / (2 * h)).item(), rel=1e-3)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_an_energy_keeps_no_graph(context):
    model, (x, t) = network(torch.float64, energy=True), points()
    expected = model(x, t).detach()
    with context():
        output = model(x, t)
    assert not output.requires_grad and torch.equal(output, expected)


@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_the_divergence_is_that_of_the_jacobian(energy, mode):
    model, (x, t) = network(torch.float64, energy=energy), points()
    trace = get_trace("exact", mode=mode)
    with torch.no_grad():
        value, columns = trace(lambda y: model(y, t), x, trace.draw(x))
    exact = jacobians(model, x, t).diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(columns[:, 0], exact, atol=1e-12) and torch.allclose(value, model(x, t))


def test_an_energy_is_sampled_and_scored_as_any_network():
    sde, model = sde_lib.VPSDE(), network(energy=True)
    sampler = sampling.get_pc_sampler(
        sde,
        (5, 2),
        sampling.get_predictor("heun"),
        None,
        lambda x: x,
        0.1,
        continuous=True,
        steps=8,
    )
    samples, evaluations = sampler(model)
    assert samples.shape == (5, 2) and torch.isfinite(samples).all() and evaluations == 15
    found = likelihood.get_ode_likelihood_fn(sde, trace="exact", rtol=1e-4, atol=1e-4)(
        model, samples
    )
    assert torch.isfinite(found.logp).all()


def test_data_may_have_any_shape():
    model = network(dim=3, size=4)
    x = torch.randn(2, 3, 4, 4)
    assert model(x, torch.ones(2)).shape == x.shape
    flat = model(x.flatten(1), torch.ones(2))
    assert torch.equal(flat.reshape(x.shape), model(x, torch.ones(2)))


def test_random_frequencies_are_never_trained_and_leave_an_energy_an_energy():
    model, (x, t) = network(torch.float64, energy=True, coordinate_scale=1.0), points()
    J = jacobians(model, x, t)
    assert (J - J.mT).abs().max() < 1e-10 * J.abs().max()
    assert not model.net.coordinates.W.requires_grad


def test_an_unconditional_network_ignores_the_time():
    model, (x, t) = network(torch.float64, conditional=False), points()
    assert torch.equal(model(x, t), model(x, 2 * t))


def test_with_scale_by_sigma_the_output_is_divided_by_the_labels():
    plain, scaled = network(torch.float64), network(torch.float64, scale_by_sigma=True)
    x, t = points()
    assert torch.allclose(scaled(x, t), plain(x, t) / t[:, None])


def test_an_unknown_embedding_is_refused():
    with pytest.raises(ValueError, match="'fourier' or 'positional'"):
        network(embedding_type="learned")
