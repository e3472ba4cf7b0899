"""Likelihoods: nats, bits, evaluations, probes. The closed forms stand in test_oracles.py."""

import math

import pytest
import torch
import toys

import likelihood
from divergence import get_probe, value_and_divergence

NAMES = ["ve", "vp", "subvp"]
LN2 = math.log(2)


def centred(x):
    return (x + 1) / 2


def uncentred(x):
    return x


class LinearNet(torch.nn.Module):
    """Exact for N(0, 0.3²) under VP's conventions where `w` is one; counts its passes."""

    def __init__(self, sde):
        super().__init__()
        self.inner = toys.AsModel(sde, toys.gaussian_score(sde, 0.0, 0.3))
        self.w = torch.nn.Parameter(torch.ones(()))
        self.forwards = self.backwards = 0

    def forward(self, x, labels):
        self.forwards += 1
        y = self.w * self.inner(x, labels)
        if y.requires_grad:
            y.register_hook(self._count)
        return y

    def _count(self, gradient):
        self.backwards += 1


@pytest.mark.parametrize("name", NAMES)
def test_one_forward_and_one_vector_jacobian_product_per_evaluation(name):
    sde = toys.all_sdes()[name]
    net, data = LinearNet(sde), 0.3 * torch.randn(3, 2, 4)
    _, _, nfe = likelihood.get_likelihood_fn(sde, centred)(net, data)
    assert net.forwards == net.backwards == nfe > 20


def test_nothing_is_left_on_weights_or_data():
    sde = toys.all_sdes()["vp"]
    net, data = LinearNet(sde), 0.3 * torch.randn(3, 2, 4)
    kept = data.clone()
    bpd, z, _ = likelihood.get_likelihood_fn(sde, centred)(net, data)
    assert net.w.grad is None and net.w.requires_grad
    assert torch.equal(data, kept) and data.grad is None and not data.requires_grad
    assert not bpd.requires_grad and not z.requires_grad
    assert bpd.shape == (3,) and z.shape == data.shape
    with torch.enable_grad():
        watched = data.clone().requires_grad_(True)
        likelihood.get_likelihood_fn(sde, centred)(net, watched)
    assert watched.grad is None and torch.equal(watched.detach(), kept)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 1), (5, 2), (5, 3, 8, 8), (5, 2, 3, 2, 2)])
def test_probes_of_signs_have_no_variance_on_isotropic_gaussians(name, shape):
    sde, data = toys.all_sdes()[name], 0.3 * torch.randn(shape)
    fn = likelihood.get_log_likelihood_fn(sde, rtol=1e-6, atol=1e-6)
    one, two = (fn(LinearNet(sde), data)[0] for _ in range(2))
    d = data[0].numel()
    assert (one - two).abs().max() < 2e-5 * d


def test_gaussian_probes_have_variance():
    sde, data = toys.all_sdes()["vp"], 0.3 * torch.randn(5, 4)
    fn = likelihood.get_log_likelihood_fn(sde, "Gaussian")
    one, two = (fn(LinearNet(sde), data)[0] for _ in range(2))
    assert (one - two).abs().min() > 1e-3


@pytest.mark.parametrize("inverse_scaler", [centred, uncentred])
def test_bits_at_256_levels_are_score_sdes_seven_minus_inverse_scaler(inverse_scaler):
    logp, d = torch.tensor([-3.0, 10.0]), 12
    bpd = likelihood.bits_per_dim(logp, d, inverse_scaler)
    torch.testing.assert_close(bpd, -logp / (d * LN2) + 7 - inverse_scaler(-1.0))


def test_bits_are_the_same_for_any_scaling_of_the_data():
    """Densities transform by the Jacobian, so the discrete data's bits do not."""
    logp = torch.tensor([-3.0])
    for d, slope in ((1, 0.5), (7, 0.5), (7, 1 / 255)):
        scaled = logp + d * math.log(slope)  # log-density of y with x = slope · y
        bits = likelihood.bits_per_dim(scaled, d, lambda y, k=slope: k * y + 0.2, 32)
        torch.testing.assert_close(bits, likelihood.bits_per_dim(logp, d, uncentred, 32))


def test_uniform_data_of_k_levels_cost_log2_k_bits():
    for levels in (2, 32, 256):
        bits = likelihood.bits_per_dim(torch.zeros(1), 5, uncentred, levels)
        assert bits.item() == pytest.approx(math.log2(levels))


@pytest.mark.parametrize("levels", [2, 256])
def test_levels_shift_the_bits_and_not_the_nats(levels):
    sde, data = toys.all_sdes()["vp"], 0.3 * torch.randn(4, 3)
    nats, z, nfe = likelihood.get_log_likelihood_fn(sde)(LinearNet(sde), data)
    bpd, code, n = likelihood.get_likelihood_fn(sde, centred, levels=levels)(LinearNet(sde), data)
    wanted = -nats / (3 * LN2) + math.log2(levels) - 1
    torch.testing.assert_close(bpd, wanted, rtol=0, atol=2e-4)
    torch.testing.assert_close(code, z)
    assert n == nfe


@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 5), (6, 2, 3, 4)])
def test_divergence_estimate_is_the_quadratic_form_of_the_jacobian(shape):
    x, t = torch.randn(shape, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    d = x[0].numel()
    A = torch.randn(d, d, dtype=torch.float64)

    def fn(x, t):
        return torch.tanh(x.flatten(1) @ A.T).reshape(x.shape) * t.reshape(6, *(1,) * (x.ndim - 1))

    probe = torch.randn_like(x)
    value = likelihood.get_div_fn(fn)(x, t, probe)
    slope = (1 - torch.tanh(x.flatten(1) @ A.T) ** 2) * t[:, None]
    v = probe.flatten(1)
    torch.testing.assert_close(value, (v * slope * (v @ A.T)).sum(1))


def test_divergence_of_a_constant_field_is_zero():
    x = torch.randn(3, 2, 2)
    for fn in (torch.ones_like, lambda x: x.detach(), lambda x: torch.ones_like(x) * 0 * x):
        value, divergence = value_and_divergence(fn, x, torch.ones_like(x))
        assert divergence.shape == (3,) and (divergence == 0).all()
        assert not value.requires_grad


def test_divergence_of_point_data_of_one_axis():
    value, divergence = value_and_divergence(lambda x: 2 * x, torch.ones(4), torch.ones(4))
    assert value.shape == divergence.shape == (4,) and (divergence == 2).all()
    assert value_and_divergence(torch.zeros_like, torch.ones(4), torch.ones(4))[1].shape == (4,)


@pytest.mark.parametrize("name", ["Rademacher", "rademacher", "Gaussian"])
def test_probes_have_mean_zero_and_unit_variance(name):
    for dtype in (torch.float32, torch.float64):
        v = get_probe(name)(torch.zeros(5000, 4, dtype=dtype))
        assert v.dtype == dtype
        assert v.mean().abs() < 5 / 20000**0.5 and abs(v.var() - 1) < 0.06
        if name != "Gaussian":
            assert torch.equal(v.abs(), torch.ones_like(v))


def test_float64_data_give_float64_nats():
    sde = toys.all_sdes()["vp"]
    data = torch.zeros(2, 3, dtype=torch.float64)
    logp, z, _ = likelihood.get_log_likelihood_fn(sde)(
        toys.AsModel(sde, toys.gaussian_score(sde, 0.0, 0.3)), data
    )
    assert logp.dtype == z.dtype == torch.float64


def test_impossible_settings_are_refused():
    sde = toys.all_sdes()["vp"]
    with pytest.raises(ValueError, match="hutchinson_type 'Normal' is unknown"):
        likelihood.get_likelihood_fn(sde, centred, hutchinson_type="Normal")
    for eps in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="0 < eps < 1"):
            likelihood.get_likelihood_fn(sde, centred, eps=eps)


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_does_not_lose_the_divergence(name):
    sde, data = toys.all_sdes()[name], 0.3 * torch.randn(4, 3)
    fn = likelihood.get_likelihood_fn(sde, centred)
    net = LinearNet(sde)
    outside = fn(net, data)
    with torch.inference_mode():
        inside = fn(net, data.clone())
        field, probe = value_and_divergence(torch.sin, data.clone(), torch.ones(4, 3))
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(probe, torch.cos(data).sum(1))
    torch.testing.assert_close(field, torch.sin(data))


def test_network_without_gradients_is_refused_and_a_constant_one_is_not():
    sde, data = toys.all_sdes()["vp"], 0.3 * torch.randn(4, 3)
    fn = likelihood.get_likelihood_fn(sde, centred)
    with pytest.raises(ValueError, match="carries no gradient"):
        fn(torch.no_grad()(LinearNet(sde)), data)
    with pytest.raises(ValueError, match="carries no gradient"):
        fn(lambda x, y: x.detach(), data)
    assert torch.isfinite(fn(lambda x, y: torch.ones_like(x), data)[0]).all()


def test_discrete_data_are_refused():
    fn = likelihood.get_likelihood_fn(toys.all_sdes()["vp"], centred)
    with pytest.raises(ValueError, match=r"dequantised data in floating point, got torch\.uint8"):
        fn(lambda x, y: x, torch.zeros(2, 3, dtype=torch.uint8))


def test_discretely_trained_networks_are_scored_by_their_integer_labels():
    seen = []

    def model(x, labels):
        seen.append(labels)
        return 0 * x

    for name in ("ve", "vp"):
        sde = toys.all_sdes()[name]
        likelihood.get_likelihood_fn(sde, centred, continuous=False)(model, torch.zeros(2, 3))
    assert all(not y.is_floating_point() and 0 <= int(y[0]) <= 999 for y in seen)
