"""Likelihoods by the ODE: closed forms for every process, bits, evaluations, probes."""

import math

import pytest
import torch
import toys
from toys_paths import every_sde

import likelihood
import sampling
import sde_lib
from divergence import get_probe, get_trace, value_and_divergence
from parametrization import as_parametrization, as_score_function
from randomness import Draws

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


@pytest.mark.parametrize("levels", [2, 256])
def test_images_without_noise_are_refused_before_the_network_is_asked(levels):
    asked = []
    fn = likelihood.get_likelihood_fn(sde_lib.VPSDE(), centred, levels=levels)
    images = torch.randint(0, levels, (4, 3, 4, 4)) / (levels - 1)
    with pytest.raises(ValueError, match=f"4 of 4 images of {levels} discrete values"):
        fn(lambda x, y: asked.append(1), 2 * images - 1)
    assert not asked


def test_bits_of_logits_have_the_volume_of_their_own_place():
    """log p of u in [0, 1] is that of x = logit(a + (1 − 2a) u), and log |dx/du|."""
    sde, a = sde_lib.VPSDE(), 0.05
    u = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    s = a + (1 - 2 * a) * u
    fn = likelihood.get_likelihood_fn(sde, lambda x: (torch.sigmoid(x) - a) / (1 - 2 * a), levels=8)
    bits, z, _ = fn(LinearNet(sde), torch.logit(s))
    logp = likelihood.get_log_likelihood_fn(sde)(LinearNet(sde), torch.logit(s))[0]
    density = logp + (math.log(1 - 2 * a) - torch.log(s * (1 - s))).flatten(1).sum(1)
    torch.testing.assert_close(bits, -density / (16 * LN2) + 3)
    assert z.shape == u.shape


def test_discretely_trained_networks_are_scored_by_their_integer_labels():
    seen = []

    def model(x, labels):
        seen.append(labels)
        return 0 * x

    for name in ("ve", "vp"):
        sde = toys.all_sdes()[name]
        likelihood.get_likelihood_fn(sde, centred, continuous=False)(model, torch.zeros(2, 3))
    assert all(not y.is_floating_point() and 0 <= int(y[0]) <= 999 for y in seen)


# --- closed forms, for every process ------------------------------------------------------------

EVERY = [*every_sde(), "user", "long"]
MEAN = torch.tensor([0.4, -0.2, 0.0, 0.3], dtype=torch.float64).reshape(4, 1, 1)
STDS = torch.tensor([0.05, 0.3, 1.0, 0.5], dtype=torch.float64).reshape(4, 1, 1)


def make(name):
    others = {"user": toys.UserSDE, "long": toys.LongSDE}
    return others[name]() if name in others else every_sde()[name]


def moments(sde, t, std):
    """Mean and variance of x_t for data N(MEAN, std²), by coordinates."""
    a, s = sde_lib.alpha_sigma(sde, torch.tensor([t], dtype=torch.float64))
    return a.item() * MEAN, (a.item() * std) ** 2 + s.item() ** 2


def exact(sde, std):
    def score(x, t):
        a, s = (sde_lib.expand(c, x) for c in sde_lib.alpha_sigma(sde, t, x))
        return -(x - a * MEAN.to(x)) / (a**2 * std.to(x) ** 2 + s**2)

    return score


def start_of(sde):
    return sde.sampling_eps or 1e-5


def closed_form(sde, x, std):
    """The code and log p̂(x) with the prior as coded: numerics.md 2.1, with a spread per axis."""
    (m_T, v_T), (m, v) = moments(sde, float(sde.T), std), moments(sde, start_of(sde), std)
    z = m_T + torch.sqrt(v_T / v) * (x - m)
    half_log = 0.5 * torch.log(v_T / v).sum()
    return z, sde.prior_logp(z) + half_log


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "std", [torch.full_like(STDS, 0.3), STDS], ids=["isotropic", "anisotropic"]
)
def test_code_nats_and_terms_are_the_closed_form(name, std):
    sde = make(name)
    x = MEAN + std * torch.randn(3, 4, 1, 1, dtype=torch.float64)
    options = {"eps": start_of(sde), "rtol": 1e-7, "atol": 1e-7}
    found = likelihood.get_ode_likelihood_fn(sde, **options)(
        as_score_function(exact(sde, std), sde), x
    )
    z, logp = closed_form(sde, x, std)
    torch.testing.assert_close(found.code, z, rtol=1e-5, atol=1e-5 * getattr(sde, "prior_std", 1.0))
    torch.testing.assert_close(found.logp, logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.terms["prior"], sde.prior_logp(z), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.terms["prior"] + found.terms["trace"], found.logp)
    assert found.error.isnan().all() and found.nfe.shape == (3,) and (found.nfe > 10).all()


@pytest.mark.parametrize("name", EVERY)
def test_bits_per_dim_at_the_default_tolerance_are_the_closed_form(name):
    sde = make(name)
    x = (MEAN + STDS * torch.randn(6, 4, 1, 1, dtype=torch.float64)).float()
    fn = likelihood.get_likelihood_fn(sde, centred, eps=start_of(sde))
    bpd = fn(as_score_function(exact(sde, STDS), sde), x)[0]
    truth = likelihood.bits_per_dim(closed_form(sde, x.double(), STDS)[1], 4, centred)
    assert (bpd - truth).abs().max() < 5e-4


@pytest.mark.parametrize("name", EVERY)
def test_codes_decode_to_the_data(name):
    sde = make(name)
    score = as_score_function(exact(sde, STDS), sde)
    x = MEAN + STDS * torch.randn(3, 4, 1, 1, dtype=torch.float64)
    options = {"eps": start_of(sde), "rtol": 1e-7, "atol": 1e-7}
    z, nfe = sampling.encode(sde, score, x, **options)
    scale = getattr(sde, "prior_std", 1.0)
    assert (z - closed_form(sde, x, STDS)[0]).abs().max() < 1e-4 * scale
    assert nfe > 10
    torch.testing.assert_close(sampling.decode(sde, score, z, **options)[0], x, rtol=0, atol=1e-5)
    assert sampling.round_trip_error(sde, score, x, **options).max() < 1e-5


# --- every image by itself ------------------------------------------------------------------------


class Diagonal(torch.nn.Module):
    """The exact score of the anisotropic data, as a network whose rows are free to leave."""

    def __init__(self, sde):
        super().__init__()
        self.inner = toys.AsModel(sde, exact(sde, STDS))
        self.rows = []

    def forward(self, x, labels):
        self.rows.append(len(x))
        return self.inner(x, labels)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
@pytest.mark.parametrize("as_module", [True, False])
def test_value_of_an_image_is_the_same_bits_in_any_batch(name, as_module):
    sde = make(name)
    x = torch.randn(13, 4, 2, 3) * torch.logspace(-2, 1.5, 13)[:, None, None, None]
    net = Diagonal(sde)
    fn = likelihood.get_ode_likelihood_fn(sde, trace="gaussian", probes=2)

    def part(a, b):
        draws = Draws(seed=5, step=0, first=a, count=b - a, total=13)
        return fn(net if as_module else net.forward, x[a:b], draws=draws)

    whole = part(0, 13)
    assert whole.nfe.min() < whole.nfe.max() == len(net.rows)
    assert (net.rows[-1] < 13) == as_module  # images that are done leave a network's batch
    for a, b in ((0, 1), (4, 7), (1, 13)):
        found = part(a, b)
        for name in ("logp", "error", "code", "nfe"):
            assert torch.equal(getattr(found, name), getattr(whole, name)[a:b]), name


def test_seeded_samples_of_the_ode_are_the_same_bits_in_any_batch():
    for name in ("ve", "vp", "subvp"):
        sde, seeds = make(name), [3, 14, 15, 92, 6]
        net = Diagonal(sde)

        def sample(seeds, sde=sde, net=net):
            shape = (len(seeds), 4, 2, 2)
            return sampling.get_ode_sampler(sde, shape, uncentred, seeds=seeds)(net)[0]

        whole = sample(seeds)
        assert torch.equal(whole[1:2], sample(seeds[1:2]))
        assert torch.equal(whole[1:4], sample(seeds[1:4]))


def test_rows_of_a_bound_process_and_of_bound_conditions_stay():
    """A batch of conditions fits only the whole batch."""
    y = torch.tensor([0.1, 0.2, 1.5])

    def score(x, t, y=y):
        assert len(x) == len(y) == 3
        return -(1 + y[:, None] ** 2) * x

    sde = sde_lib.VPSDE()
    found = likelihood.get_ode_likelihood_fn(sde)(as_score_function(score, sde), torch.ones(3, 2))
    assert found.nfe.max() > found.nfe.min()
    bound = sde.bind(torch.ones(3, 2))
    fn = likelihood.get_ode_likelihood_fn(bound)
    fn(as_score_function(lambda x, t: score(x, t), bound), torch.ones(3, 2))


# --- probes ---------------------------------------------------------------------------------------


class Coupled(torch.nn.Module):
    """Noise prediction with a Jacobian that is not diagonal."""

    def __init__(self, d):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.A = torch.nn.Parameter(
            0.4 * torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
        )

    def forward(self, x, labels):
        return torch.tanh(x @ self.A.to(x)) + 0.5 * x


def test_error_of_k_probes_is_the_spread_of_their_values_and_covers_the_exact_one():
    sde, n, d = sde_lib.VPSDE(), 40, 6
    net, x = Coupled(d), torch.randn(1, d, dtype=torch.float64).expand(n, d)
    exact_value = likelihood.get_ode_likelihood_fn(sde, trace="exact")(net, x[:1])
    assert (exact_value.error == 0).all()
    for name, probes in (("rademacher", 4), ("gaussian", 8), ("hutch++", 6)):
        torch.manual_seed(0)
        found = likelihood.get_ode_likelihood_fn(sde, trace=name, probes=probes)(net, x)
        off = (found.logp - exact_value.logp) / found.error.square().mean().sqrt()
        assert off.mean().abs() < 4 / n**0.5 * off.std()
        assert 0.6 < off.std() < 1.6
        torch.testing.assert_close(found.code, exact_value.code.expand(n, d), rtol=1e-4, atol=1e-4)


def test_a_trace_object_is_taken_and_the_modes_agree():
    sde, net = sde_lib.VPSDE(), Coupled(5)
    x = torch.randn(3, 5, dtype=torch.float64)
    values = [
        likelihood.get_ode_likelihood_fn(sde, trace=get_trace("exact", mode=mode))(net, x).logp
        for mode in ("reverse", "forward")
    ]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    legacy = likelihood.get_log_likelihood_fn(sde)
    torch.manual_seed(1)
    nats, z, nfe = legacy(net, x)
    torch.manual_seed(1)
    found = likelihood.get_ode_likelihood_fn(sde)(net, x)
    assert torch.equal(nats, found.logp) and torch.equal(z, found.code) and nfe == found.nfe.max()


@pytest.mark.parametrize("probe", ["Rademacher", "Gaussian"])
def test_device_and_scipy_agree_within_the_tolerance(probe):
    sde, net = sde_lib.subVPSDE(), Coupled(12)
    x = torch.randn(5, 12, dtype=torch.float64)
    results = []
    for method in ("dopri5", "bosh3", "RK45"):
        torch.manual_seed(4)
        options = {"rtol": 1e-6, "atol": 1e-6, "method": method, "eps": 1e-3}
        results.append(likelihood.get_log_likelihood_fn(sde, probe, **options)(net, x))
    for nats, z, _ in results[:2]:
        assert ((nats - results[2][0]) / 12).abs().max() < 2e-5
        assert (z - results[2][1]).abs().max() < 2e-5


def test_an_empty_batch_has_no_likelihoods():
    sde = sde_lib.VPSDE()
    found = likelihood.get_ode_likelihood_fn(sde)(Coupled(3), torch.zeros(0, 3))
    assert found.logp.shape == found.error.shape == found.nfe.shape == (0,)
    assert found.code.shape == (0, 3)
    bits, code, nfe = likelihood.get_likelihood_fn(sde, centred)(Coupled(3), torch.zeros(0, 3))
    assert bits.shape == (0,) and code.shape == (0, 3) and nfe == 0


def test_wrapped_and_compiled_networks_give_the_bare_ones_value():
    sde, x = sde_lib.VPSDE(), torch.randn(4, 3)
    fn = likelihood.get_ode_likelihood_fn(sde)
    bare, results = Coupled(3), []
    for net in (bare, torch.nn.DataParallel(bare), torch.compile(bare, backend="eager")):
        torch.manual_seed(2)
        results.append(fn(net, x))
    for found in results[1:]:
        torch.testing.assert_close(found.logp, results[0].logp)
        assert torch.equal(found.nfe, results[0].nfe)


def test_too_many_evaluations_and_unknown_methods_are_refused():
    sde = sde_lib.VPSDE()
    with pytest.raises(RuntimeError, match="Raise max_nfe = 20"):
        likelihood.get_ode_likelihood_fn(sde, max_nfe=20)(Coupled(3), torch.randn(2, 3))
    with pytest.raises(ValueError, match="'rk4' does not choose its own steps"):
        likelihood.get_ode_likelihood_fn(sde, method="rk4")
    with pytest.raises(ValueError, match="trace 'magic' is unknown"):
        likelihood.get_ode_likelihood_fn(sde, trace="magic")


def test_samples_of_one_number_without_an_axis_of_their_own_have_bits():
    sde, x = sde_lib.VPSDE(), 0.3 * torch.randn(5)
    score = as_score_function(toys.gaussian_score(sde, 0.0, 0.3), sde)
    flat, _, _ = likelihood.get_likelihood_fn(sde, centred)(score, x)
    column, _, _ = likelihood.get_likelihood_fn(sde, centred)(score, x[:, None])
    torch.testing.assert_close(flat, column, rtol=1e-4, atol=1e-4)


# --- the drift that is integrated -------------------------------------------------------------


class FlowNet(torch.nn.Module):
    """The exact velocity of N(0, 0.3²) under rectified flow; it may hide its derivative."""

    parametrization = as_parametrization("velocity", "t")

    def __init__(self, hides=False):
        super().__init__()
        self.hides, self.w = hides, torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        t = t.double()
        slope = (t - 0.09 * (1 - t)) / (0.09 * (1 - t) ** 2 + t**2)
        return self.w * sde_lib.expand(slope, x) * (x.detach() if self.hides else x)


def test_a_flow_in_float32_has_the_likelihood_of_float64():
    """Through the score, whose part cancels f x near T, they were 3e-4 nats apart."""
    x = 0.3 * torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    flow = likelihood.get_ode_likelihood_fn(sde_lib.RectifiedFlow(), eps=1e-3, trace="exact")
    apart = flow(FlowNet(), x).logp - flow(FlowNet(), x.double()).logp
    assert apart.abs().max() < 1e-5


def test_a_flow_in_float32_is_decoded_as_in_float64():
    """Through the score it was 6e-6 apart."""
    sde, net, options = sde_lib.RectifiedFlow(), FlowNet(), {"method": "rk4", "steps": 50}
    sampler = sampling.get_ode_sampler(sde, (16, 2), lambda x: x, eps=1e-3, **options)
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    apart = sampler(net, z)[0] - sampler(net.double(), z.double())[0]
    assert apart.abs().max() < 2e-6


def test_a_network_that_hides_its_derivative_behind_its_weights_is_refused():
    flow = likelihood.get_ode_likelihood_fn(sde_lib.RectifiedFlow(), eps=1e-3)
    with pytest.raises(ValueError, match="depends on x but carries no gradient"):
        flow(FlowNet(hides=True), torch.randn(2, 3))


@pytest.mark.parametrize("name", ["sde", "reverse"])
def test_what_a_users_process_replaces_is_what_is_integrated(name):
    asked = []

    class Mine(sde_lib.VPSDE):
        pass

    def replaced(self, *args, **options):
        asked.append(1)
        return getattr(sde_lib.VPSDE, name)(self, *args, **options)

    setattr(Mine, name, replaced)
    x = torch.randn(2, 3)
    found = [
        likelihood.get_ode_likelihood_fn(sde, trace="exact")(LinearNet(sde), x).logp
        for sde in (Mine(), sde_lib.VPSDE())
    ]
    assert asked
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_evaluations_are_counted_on_the_score_that_was_given():
    sde, x = sde_lib.VPSDE(), torch.randn(2, 3)
    score = as_score_function(toys.gaussian_score(sde, 0.0, 0.3), sde)
    _, _, nfe = likelihood.get_log_likelihood_fn(sde)(score, x)
    assert score.nfe == nfe > 0
