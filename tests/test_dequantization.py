"""Dequantisation: noise, its density, the bound, and what is refused."""

import itertools
import math

import pytest
import torch

import data_lib
from configs import defaults
from configs.validation import complete
from likelihood_bits import bits_per_dim, log_volume, log_volume_at, refuse_discrete
from likelihood_dequantization import (
    UniformDequantizer,
    VariationalDequantizer,
    add_noise,
    bits_loss,
    levels_of,
    log_weights,
)
from models import utils
from models.dequantizer import Dequantizer, spline
from randomness import Draws


def settings(levels=17, size=4, channels=1, nf=8, **model):
    config = defaults.get_default_configs()
    config.device = "cpu"
    config.data.update(levels=levels, image_size=size, num_channels=channels, centered=True)
    config.model.update(name="dequantizer", nf=nf, num_res_blocks=1, **model)
    return complete(config)


def flow(levels=17, size=4, channels=1, spread=0.0, seed=0, **model):
    """A flow in float64, its weights moved from the first ones by normal numbers."""
    torch.manual_seed(seed)
    network = Dequantizer(settings(levels, size, channels, **model)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += spread * torch.randn_like(parameter)
    return network


def images_of(levels, *shape, seed=1):
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed))


def noise_of(*shape, seed=2):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CENTERED = {"scaler": lambda v: 2 * v - 1, "inverse_scaler": lambda x: (x + 1) / 2}
LOGIT = {
    "scaler": lambda v: torch.logit(0.05 + 0.9 * v),
    "inverse_scaler": lambda x: (torch.sigmoid(x) - 0.05) / 0.9,
}


# --- noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_draws", [True, False])
def test_the_uniform_dequantizer_makes_the_training_batches_number_for_number(with_draws):
    config, images = settings(levels=256), images_of(256, 3, 1, 4, 4).byte()
    draws = Draws(7, "step", 5, 3) if with_draws else None
    torch.manual_seed(0)
    expected = data_lib.prepare(images, config, dequantize=True, draws=draws)
    torch.manual_seed(0)
    u, log_q = UniformDequantizer()(images, draws)
    x = data_lib.get_data_scaler(config)(add_noise(images, u, 256))
    assert torch.equal(x, expected)
    assert torch.equal(log_q, torch.zeros(3))


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_noise_never_takes_a_number_to_another_level(levels):
    images = images_of(levels, 4, 3, 8, 8)
    for u in (torch.rand(images.shape), torch.full(images.shape, 1 - 2.0**-24)):
        v = add_noise(images, u, levels)
        assert v.max() < 1 and v.min() >= 0
        assert torch.equal((v.double() * levels).floor().long(), images)


def test_levels_are_found_again_in_images_without_noise():
    for levels in (2, 17, 256, 65536):
        for scaler in (CENTERED, {"scaler": lambda v: v, "inverse_scaler": lambda x: x}):
            images = torch.arange(levels).reshape(1, 1, -1, 1)
            x = scaler["scaler"](images.float() / (levels - 1))
            assert torch.equal(levels_of(x, scaler["inverse_scaler"], levels), images)


# --- the flow ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (1, 28), (1, 5), (2, 1)])
def test_a_new_flow_is_uniform_noise(channels, size):
    network = flow(17, size, channels).float()
    images, e = images_of(17, 2, channels, size, size), noise_of(2, channels, size, size).float()
    u, log_q = network(images, e)
    assert torch.allclose(u, e, rtol=0, atol=1e-6)
    assert log_q.abs().max() < 1e-6 * e[0].numel()


@pytest.mark.parametrize(("channels", "size"), [(1, 4), (3, 3)])
def test_log_q_is_the_jacobian_of_autograd(channels, size):
    network, count = flow(17, size, channels, spread=0.15), 2
    images, e = images_of(17, count, channels, size, size), noise_of(count, channels, size, size)
    u, log_q = network(images, e)
    jacobian = torch.autograd.functional.jacobian(lambda e: network(images, e)[0], e)
    d = e[0].numel()
    blocks = torch.stack([jacobian[b, ..., b, :, :, :].reshape(d, d) for b in range(count)])
    assert (u - e).abs().max() > 0.05
    assert torch.allclose(-torch.linalg.slogdet(blocks)[1], log_q, rtol=0, atol=1e-10)
    across = jacobian[0, ..., 1, :, :, :]
    assert torch.equal(across, torch.zeros_like(across))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 5), (1, 1)])
def test_the_flow_is_inverted_with_the_same_density(channels, size):
    network = flow(256, size, channels, spread=0.15)
    images, e = images_of(256, 3, channels, size, size), noise_of(3, channels, size, size)
    u, log_q = network(images, e)
    back, log_q_back = network.inverse(images, u)
    assert torch.allclose(back, e, rtol=0, atol=1e-9)
    assert torch.allclose(log_q_back, log_q, rtol=0, atol=1e-8)


def test_the_density_of_one_pixel_integrates_to_one_at_every_level():
    network, points = flow(5, 1, 1, spread=0.2), 2000
    u = ((torch.arange(points, dtype=torch.float64) + 0.5) / points).view(-1, 1, 1, 1)
    found = [network.inverse(torch.full(u.shape, level), u)[1] for level in range(5)]
    assert [log_q.exp().mean().item() for log_q in found] == pytest.approx([1.0] * 5, abs=1e-5)
    assert not torch.allclose(found[0], found[4], atol=0.05)
    assert max(log_q.max() for log_q in found) > 0.1


def test_the_density_of_four_pixels_averages_to_one_under_uniform_noise():
    network = flow(5, 2, 1, spread=0.1)
    u = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**12, dtype=torch.float64)
    images = images_of(5, 1, 1, 2, 2).expand(len(u), -1, -1, -1)
    log_q = network.inverse(images, u.reshape(-1, 1, 2, 2))[1]
    assert log_q.std() > 0.05
    assert log_q.exp().mean().item() == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_the_ends_of_the_interval_stay_inside_with_finite_densities(spread):
    network = flow(17, 4, 3, spread=spread).float()
    images = images_of(17, 4, 3, 4, 4)
    e = torch.rand(4, 3, 4, 4)
    e[0], e[1], e[2] = 0.0, 1 - 2.0**-24, 2.0**-24
    u, log_q = network(images, e)
    assert u.min() >= 0 and u.max() < 1 and log_q.isfinite().all()
    log_q.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_a_steep_spline_is_inverted_with_finite_slopes_in_float32():
    generator = torch.Generator().manual_seed(0)
    u, raw = torch.rand(20_000, generator=generator), torch.randn(20_000, 25, generator=generator)
    x, log_slope = spline(u, 10 * raw, inverse=True)
    exact, _ = spline(u.double(), 10 * raw.double(), inverse=True)
    assert log_slope.isfinite().all() and x.min() >= 0 and x.max() <= 1
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-3)


def test_a_spline_is_the_identity_at_zero_and_keeps_the_ends():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    v, log_slope = spline(u, torch.zeros(101, 25, dtype=torch.float64))
    assert torch.allclose(v, u, atol=1e-14) and log_slope.abs().max() < 1e-14
    raw = torch.randn(101, 25, dtype=torch.float64)
    raw[:] = raw[0]
    v, log_slope = spline(u, raw)
    assert v[0].item() == 0 and v[-1].item() == pytest.approx(1, abs=1e-12)
    assert (v.diff() > 0).all()
    back, log_back = spline(v, raw, inverse=True)
    assert torch.allclose(back, u, atol=1e-10) and torch.allclose(log_back, -log_slope, atol=1e-9)


def test_an_images_noise_does_not_depend_on_its_batch():
    network = VariationalDequantizer(flow(17, 8, 1, spread=0.1).float())
    images, draws = images_of(17, 6, 1, 8, 8), Draws(1, "s", 10, 6)
    u, log_q = network(images, draws)
    for rows in (slice(0, 1), slice(2, 6)):
        u_part, log_q_part = network(images[rows], draws.rows(rows.start, rows.stop))
        assert torch.allclose(u_part, u[rows], atol=1e-6)
        assert torch.allclose(log_q_part, log_q[rows], atol=1e-5)


def test_the_registry_builds_the_flow_and_it_explains_itself():
    network = utils.create_model(settings(17, 8))
    assert isinstance(network, Dequantizer)
    with pytest.raises(ValueError, match="no score model"):
        network(torch.zeros(2, 1, 8, 8), torch.ones(2))
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\)"):
        network(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_what_is_no_image_of_levels_is_refused():
    for dequantizer in (UniformDequantizer(), VariationalDequantizer(flow())):
        for images in (torch.rand(2, 1, 4, 4), torch.zeros(2, 2, dtype=torch.int64)):
            with pytest.raises(ValueError, match="integer levels"):
                dequantizer(images)


def test_a_dequantizer_says_what_it_is():
    assert UniformDequantizer().protocol() == {"dequantization": "uniform"}
    about = VariationalDequantizer(flow(), {"dequantizer": "here"}).protocol()
    assert about == {"dequantization": "variational", "dequantizer": "here"}


# --- volumes and weights ----------------------------------------------------------------------


def test_the_volume_of_an_affine_scaler_is_the_same_everywhere_and_that_of_a_logit_is_autograds():
    v = noise_of(3, 2, 4, 4)
    x = CENTERED["scaler"](v)
    constant = log_volume(32, CENTERED["inverse_scaler"], 17)
    assert constant == pytest.approx(32 * math.log(2 / 17))
    found = log_volume_at(x, CENTERED["inverse_scaler"], 17)
    assert torch.allclose(found, torch.full((3,), constant, dtype=torch.float64))
    s = 0.05 + 0.9 * v
    closed = (math.log(0.9 / 17) - torch.log(s * (1 - s))).flatten(1).sum(1)
    x = LOGIT["scaler"](v).requires_grad_(True)
    found = log_volume_at(x, LOGIT["inverse_scaler"], 17)
    assert torch.allclose(found, closed)
    (slope,) = torch.autograd.grad(found.sum(), x)
    # d/dx of −log σ'(x) is 2σ(x) − 1
    assert torch.allclose(slope, 2 * torch.sigmoid(x) - 1)
    with torch.inference_mode():
        again = log_volume_at(LOGIT["scaler"](v), LOGIT["inverse_scaler"], 17)
    assert torch.allclose(again, closed)


def test_the_volume_of_a_scaler_that_bends_is_refused_where_x_is_not_known():
    assert log_volume(32, lambda x: x.clamp(0, 1), 17) == pytest.approx(-32 * math.log(17))
    for fn in (log_volume, lambda *args: bits_per_dim(torch.zeros(2), *args)):
        with pytest.raises(ValueError, match="log_volume_at"):
            fn(32, LOGIT["inverse_scaler"], 17)


class GaussianPixel:
    """One pixel whose x is N(mean, std²): its probabilities, and the exact posterior of u."""

    mean, std = 0.3, 0.5

    def __init__(self, levels, scaler, inverse_scaler):
        self.levels, self.scaler, self.inverse_scaler = levels, scaler, inverse_scaler
        self.normal = torch.distributions.Normal(
            torch.tensor(self.mean, dtype=torch.float64),
            torch.tensor(self.std, dtype=torch.float64),
        )

    def log_density(self, x, draws=None):
        return self.normal.log_prob(x).flatten(1).sum(1)

    def edges(self, images):
        k = images.double()
        ends = [k / self.levels, ((k + 1) / self.levels).clamp(max=1)]
        return [self.normal.cdf(self.scaler(v)) for v in ends]

    def log_probability(self, images):
        low, high = self.edges(images)
        return torch.log(high - low).flatten(1).sum(1)

    def __call__(self, images, draws=None):
        """The exact posterior, as a dequantizer: by the inverse of the distribution function."""
        low, high = self.edges(images)
        x = self.normal.icdf(low + (high - low) * torch.rand(images.shape, dtype=torch.float64))
        u = self.inverse_scaler(x) * self.levels - images
        volume = log_volume_at(x, self.inverse_scaler, self.levels)
        return u, self.log_density(x) + volume - self.log_probability(images)


class Uniform64:
    def __call__(self, images, draws=None):
        u = torch.rand(images.shape, dtype=torch.float64)
        return u, u.new_zeros(len(u))


@pytest.mark.parametrize("scalers", [CENTERED, LOGIT], ids=["centered", "logit"])
def test_every_weight_of_the_exact_posterior_is_the_probability_itself(scalers):
    pixel = GaussianPixel(4, **scalers)
    images = torch.tensor([0, 1, 2, 3]).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    weights = log_weights(images, pixel, pixel.log_density, levels=4, count=7, **scalers)
    assert weights.shape == (7, 4)
    expected = pixel.log_probability(images).expand(7, 4)
    assert torch.allclose(weights, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scalers", [CENTERED, LOGIT], ids=["centered", "logit"])
def test_uniform_weights_average_to_the_probability_and_bound_it_monotonically_in_K(scalers):
    pixel, count = GaussianPixel(4, **scalers), 2**10
    images = torch.tensor([0, 1, 2, 3]).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    weights = log_weights(images, Uniform64(), pixel.log_density, levels=4, count=count, **scalers)
    exact = pixel.log_probability(images)
    values = weights.exp() / exact.exp()
    error = values.std(0) / count**0.5
    assert ((values.mean(0) - 1).abs() < 4 * error).all()
    bounds = []
    for size in (1, 2, 4, 16, 128, 1024):
        groups = weights.reshape(-1, size, 4)
        bounds.append((torch.logsumexp(groups, 1) - math.log(size)).mean(0))
    assert all((b >= a).all() for a, b in itertools.pairwise(bounds))
    assert (bounds[0] < exact).all()
    assert torch.allclose(bounds[-1], exact, atol=0.1)


def test_the_bound_of_the_flow_never_exceeds_the_probability():
    pixel = GaussianPixel(4, **CENTERED)
    images = torch.tensor([0, 1, 2, 3]).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    for seed in range(2):
        network = flow(4, 1, 1, spread=0.4, seed=seed)
        u = noise_of(1000, 1, 1, 1, seed=seed)
        for level in images:
            k = level.expand(len(u), 1, 1, 1)
            bits = bits_loss(
                lambda images, e, network=network, u=u: network(images, u),
                k, pixel.log_density, levels=4, **CENTERED,
            )  # fmt: skip
            bound = -bits.mean() * math.log(2)
            error = bits.std() * math.log(2) / len(u) ** 0.5
            assert bound < pixel.log_probability(level.unsqueeze(0)).item() + 4 * error


def test_the_first_of_several_dequantisations_is_that_of_one_and_all_see_one_probe():
    images, seen = images_of(17, 3, 1, 4, 4), []

    def log_density(x, draws):
        seen.append(draws.randn("probe", (2,)))
        return x.flatten(1).sum(1)

    def weights(count, draws):
        return log_weights(
            images, UniformDequantizer(), log_density, levels=17, count=count, draws=draws,
            **CENTERED,
        )  # fmt: skip

    draws = Draws(0, "bpd", 4, 3)
    one, three = weights(1, draws), weights(3, draws)
    assert torch.equal(one[0], three[0])
    assert len({row.item() for row in three[:, 0]}) == 3
    assert all(torch.equal(seen[0], probe) for probe in seen)
    part = log_weights(
        images[1:], UniformDequantizer(), log_density, levels=17, count=3, draws=draws.rows(1, 3),
        **CENTERED,
    )  # fmt: skip
    assert torch.equal(part, three[:, 1:])
    with pytest.raises(ValueError, match="count"):
        weights(0, draws)


# --- training the flow ------------------------------------------------------------------------


def test_a_trained_flow_closes_most_of_the_gap_of_correlated_pixels():
    """Four pixels of two levels, a Gaussian whose correlation within a cell is large."""
    covariance = 0.3**2 * (0.1 * torch.eye(4) + 0.9 * torch.ones(4, 4))
    normal = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)

    def log_density(x, draws=None):
        return normal.log_prob(x.flatten(1))

    images = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]).view(3, 1, 2, 2)
    common = {"levels": 2, **CENTERED}
    torch.manual_seed(0)
    network = Dequantizer(settings(2, 2, nf=16, couplings=4))
    many = images.repeat(20000, 1, 1, 1)
    weights = log_weights(many, UniformDequantizer(), log_density, **common).reshape(-1, 3)
    exact = (torch.logsumexp(weights, 0) - math.log(len(weights))).mean() / (-4 * math.log(2))
    uniform = -weights.mean() / (4 * math.log(2))

    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(120):
        loss = bits_loss(network, images.repeat(24, 1, 1, 1), log_density, **common).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        bits = bits_loss(network, many[:6000], log_density, **common)
    gap, left = (uniform - exact).item(), (bits.mean() - exact).item()
    assert gap > 1.0
    assert -0.03 < left < 0.25 * gap, (gap, left)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("scalers", [CENTERED, LOGIT], ids=["centered", "logit"])
def test_discrete_images_are_refused_and_dequantised_ones_pass(levels, scalers):
    if scalers is LOGIT and levels == 65536:
        pytest.skip("float32 cannot tell so many levels in logits")
    images = images_of(levels, 4, 1, 8, 8)
    scaler, inverse = scalers["scaler"], scalers["inverse_scaler"]
    smooth = scaler(add_noise(images, torch.rand(images.shape), levels))
    refuse_discrete(smooth, inverse, levels)
    refuse_discrete(smooth.double(), inverse, levels)
    for unit in (images.float() / (levels - 1), images.float() / levels):
        with pytest.raises(ValueError, match="dequantize=True"):
            refuse_discrete(scaler(unit), inverse, levels)
    mixed = smooth.clone()
    mixed[2] = scaler(images[2].float() / (levels - 1))
    with pytest.raises(ValueError, match="1 of 4 images"):
        refuse_discrete(mixed, inverse, levels)


def test_integers_are_refused():
    for dtype in (torch.uint8, torch.int64):
        with pytest.raises(ValueError, match=str(dtype)):
            refuse_discrete(torch.zeros(2, 1, 4, 4, dtype=dtype), CENTERED["inverse_scaler"], 256)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 1, 8, 8),
        torch.cartesian_prod(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256)),
        torch.linspace(-1, 1, 511).unsqueeze(1),
        torch.zeros(0, 1, 8, 8),
    ],
    ids=["one colour", "a plane", "a line", "nothing"],
)
def test_points_and_images_of_one_colour_are_no_discrete_images(x):
    for levels in (2, 256, 65536):
        refuse_discrete(x, CENTERED["inverse_scaler"], levels)


def test_noise_that_rounding_took_away_is_refused_and_levels_too_fine_to_tell_are_not():
    images = images_of(256, 4, 3, 8, 8)
    smooth = CENTERED["scaler"](add_noise(images, torch.rand(images.shape), 256))
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="float32 or float64"):
            refuse_discrete(smooth.to(dtype), CENTERED["inverse_scaler"], 256)
    points = torch.rand(10_000, 8, generator=torch.Generator().manual_seed(0))
    refuse_discrete(points, lambda x: x, 65536)
