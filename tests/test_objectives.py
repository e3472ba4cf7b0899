"""Objectives in every parametrization on every process: closed-form optima, one error under many
weights, importance sampling, and random numbers that belong to their image."""

import functools
import math

import pytest
import torch
import toys

import losses
import losses_weights
import parametrization as par
import sde_lib
from configs.validation import complete
from parametrization import OUTPUTS, Parametrization, Point
from randomness import Draws
from sde_lib import expand

PROCESSES = {
    **{name: functools.partial(toys.all_sdes().get, name) for name in toys.all_sdes()},
    "user": toys.UserSDE,
    "long": toys.LongSDE,
    "cosine": sde_lib.CosineVP,
    "edm": sde_lib.EDM,
    "linear_ve": sde_lib.LinearVE,
    "rectified_flow": sde_lib.RectifiedFlow,
    "ouve": sde_lib.OUVE,
}
MEAN, STD, SIGMA_DATA, GAMMA = 0.4, 0.3, par.SIGMA_DATA, 5.0
SHARES = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 0.97], dtype=torch.float64)


def make(name):
    return PROCESSES[name]()


def times_of(sde):
    return SHARES * float(sde.T)


def closed_form(name, t):
    """α, σ, α', σ' by hand, for the processes that have no derivation elsewhere in these tests."""
    a, s = (c.double() for c in sde_lib.alpha_sigma(make(name), t))
    f, g = sde_lib.drift_diffusion(make(name), t)
    slope = -(g**2) / (2 * s**2)  # λ', numerics.md 2.0
    return a, s, f * a, s * (f - slope)


def weight_in_noise(weighting, a, s, da, ds):
    """What ‖ε̂ − z‖² is multiplied by, from the papers: numerics.md 2.7."""
    snr, tilde, slope = (a / s) ** 2, s / a, da / a - ds / s  # λ' = α'/α − σ'/σ
    g2 = -2 * s**2 * slope
    edm = (tilde**2 + SIGMA_DATA**2) / (tilde * SIGMA_DATA) ** 2 * tilde**2
    return {
        "dsm": torch.ones_like(a),
        "simple": torch.ones_like(a),
        "noise": torch.ones_like(a),
        "data": 1 / snr,
        "score": 1 / s**2,
        "likelihood": g2 / s**2,
        "drift": g2 / s**2,
        "v": ((a**2 + s**2) / a) ** 2,
        "velocity": (s * slope) ** 2,
        "edm": edm,
        "preconditioned": edm,
        "min_snr": torch.minimum(snr, torch.full_like(a, GAMMA)) / snr,
    }[weighting]


class Fixed:
    """Draws whose times and noise are given."""

    total = 0

    def __init__(self, z=None, u=None):
        self.z, self.u = z, u

    def randn(self, stream, shape=(), dtype=torch.float32):
        return self.z.to(dtype)

    def rand(self, stream, shape=(), dtype=torch.float32):
        return self.u

    def indices(self):
        return torch.arange(len(self.u))


class At:
    """A time sampler whose times are given."""

    importance = False

    def __init__(self, t):
        self.t = t

    def __call__(self, n, device, draws=None):
        return self.t


class Predictor(torch.nn.Module):
    """A network of any parametrization with the denoiser y + denoise(x − y), for a process bound to
    y, by default a free one."""

    def __init__(self, sde, output, denoise, y=0.0):
        super().__init__()
        self.sde, self.denoise, self.y = sde, denoise, y
        self.theta = torch.nn.Parameter(torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64))
        self.parametrization = Parametrization(output, "t")

    def forward(self, x, t):
        output, y, point = self.parametrization.output, self.y, Point(self.sde, t, x)
        a, s = expand(point.alpha, x), expand(point.sigma, x)
        if output == "preconditioned":  # it is given x − m, m = (1 − α) y
            x = x * a * torch.sqrt((s / a) ** 2 + SIGMA_DATA**2) + (1 - a) * y
        D = self.denoise(x - y, a, s, self.theta.to(x.dtype))
        p, r = (expand(c, x) for c in OUTPUTS[output](point))
        noise = (x - y - a * D) / s
        return p * (D if output == "velocity" else D + y) + r * noise  # m' = −α' y


def gaussian(x, a, s, theta):
    """The exact D of N(MEAN, STD²)."""
    return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)


def learned(x, a, s, theta):
    return torch.tanh(theta[0] * x + theta[1]) + theta[2] * s / (a + s)


def design(t):
    """Data and noise of two values each, in all four pairs, at every time: a squared error that
    is linear in both has the Gaussian's mean exactly."""
    pairs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    x_0 = (MEAN + STD * pairs[:, 0]).repeat(len(t)).reshape(-1, 1, 1, 1)
    return x_0, pairs[:, 1].repeat(len(t)).reshape(-1, 1, 1, 1), t.repeat_interleave(4)


def objective(sde, weighting, t=None, **options):
    sampler = None if t is None else At(t)
    return losses.get_sde_loss_fn(
        sde, True, weighting=weighting, time_sampler=sampler, likelihood_weighting=False, **options
    )


# --- closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("weighting", losses_weights.NAMES)
def test_optimal_loss_at_each_time_is_the_closed_form(name, weighting):
    sde = make(name)
    t = times_of(sde)
    x_0, z, each = design(t)
    coefficients = closed_form(name, t)
    a, s, *_ = coefficients
    optimum = (a * STD) ** 2 / ((a * STD) ** 2 + s**2)  # of ‖ε̂ − z‖²: numerics.md 2.1
    expected = optimum * weight_in_noise(weighting, *coefficients)
    for output in ("noise", "preconditioned"):
        net = Predictor(sde, output, gaussian)
        found, at = objective(sde, weighting, each).per_image(net, x_0, draws=Fixed(z))
        assert torch.equal(at, each) and found.dtype == torch.float64
        torch.testing.assert_close(found.reshape(-1, 4).mean(dim=1), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["edm", "ve", "linear_ve"])
def test_edm_objective_of_data_with_its_sigma_is_one_at_every_noise_level(name, monkeypatch):
    class Zero(torch.nn.Module):
        parametrization = "preconditioned"

        def forward(self, x, labels):
            return torch.zeros_like(x)

    sde = make(name)
    x_0, z, each = design(times_of(sde))
    x_0 = (x_0 - MEAN) * (SIGMA_DATA / STD)  # F ≡ 0 is the exact denoiser of N(0, σ_d²)
    found, _ = objective(sde, "edm", each).per_image(Zero(), x_0, draws=Fixed(z))
    found = found.reshape(-1, 4).mean(dim=1)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-9, atol=0)


def test_flow_matching_optimum_is_the_variance_share():
    sde = sde_lib.RectifiedFlow()
    t = times_of(sde)
    x_0, z, each = design(t)
    net = Predictor(sde, "velocity", gaussian)
    found, _ = objective(sde, "velocity", each).per_image(net, x_0, draws=Fixed(z))
    expected = STD**2 / ((1 - t) ** 2 * STD**2 + t**2)  # c²/v: numerics.md 2.1
    torch.testing.assert_close(found.reshape(-1, 4).mean(dim=1), expected, rtol=1e-9, atol=0)


def test_min_snr_is_the_papers_in_noise_data_and_v():
    sde = sde_lib.CosineVP()
    t = times_of(sde)
    a, s = sde_lib.alpha_sigma(sde, t)
    snr, point = (a / s) ** 2, Point(sde, t, torch.zeros(len(t), 1))
    cut = snr.clamp(max=3.0)
    for output, expected in (("noise", cut / snr), ("data", cut), ("v", cut / (snr + 1))):
        found = losses_weights.relative_weight("min_snr", output, point, 3.0)
        torch.testing.assert_close(found, expected)


# --- one error, whatever the network predicts -----------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("weighting", losses_weights.NAMES)
def test_every_parametrization_has_the_same_loss_and_gradient(name, weighting):
    sde = make(name)
    torch.manual_seed(2)
    x_0, z = torch.randn(2, 6, 1, 1, 3, dtype=torch.float64)
    found = {}
    for output in OUTPUTS:
        net = Predictor(sde, output, learned)
        loss = objective(sde, weighting, times_of(sde))(net, x_0, draws=Fixed(z))
        found[output] = torch.cat([loss[None], torch.autograd.grad(loss, net.theta)[0]]).detach()
    for value in found.values():
        torch.testing.assert_close(value, found["noise"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp", "user"])
@pytest.mark.parametrize("likelihood_weighting", [False, True])
@pytest.mark.parametrize("reduce_mean", [False, True])
def test_published_objectives_are_two_of_these_weights(name, likelihood_weighting, reduce_mean):
    sde = make(name)

    class Legacy(torch.nn.Module):
        def forward(self, x, labels):
            return 0.3 * x + 0.1

    x_0 = torch.randn(5, 1, 4, 4)
    weighting = "likelihood" if likelihood_weighting else "dsm"
    options = dict(reduce_mean=reduce_mean, likelihood_weighting=likelihood_weighting, eps=1e-3)
    published, named = (
        losses.get_sde_loss_fn(sde, True, weighting=w, **options) for w in ("", weighting)
    )
    rows = Draws(1, 0, 0, 5)
    torch.testing.assert_close(
        published.per_image(Legacy(), x_0, draws=rows)[0],
        named.per_image(Legacy(), x_0, draws=rows)[0],
    )


@pytest.mark.parametrize(
    ("name", "output"), [("rectified_flow", "velocity"), ("edm", "preconditioned"), ("cosine", "v")]
)
@pytest.mark.parametrize("weighting", ["own", "dsm", "edm"])
def test_nothing_cancels_in_float32_at_either_end(name, output, weighting):
    sde = make(name)
    weighting = output if weighting == "own" else weighting
    t = torch.tensor([max(sde.sampling_eps, 1e-5), 0.5 * sde.T, float(sde.T)])
    x_0, z = torch.randn(2, 3, 50)
    found = []
    for dtype in (torch.float32, torch.float64):
        # The network's own output must not depend on the precision of x: a constant.
        class Constant(torch.nn.Module):
            parametrization = Parametrization(output, "t")

            def forward(self, x, labels):
                return torch.full_like(x, 0.25)

        value, _ = objective(sde, weighting, t).per_image(Constant(), x_0.to(dtype), draws=Fixed(z))
        found.append(value.double())
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_conditions_reach_the_network_and_a_wrong_shape_is_refused():
    class Cropping(torch.nn.Module):
        parametrization = "v"

        def forward(self, x, labels, y):
            assert y == "digit"
            return x[:, :1]

    with pytest.raises(ValueError, match=r"returned shape \(2, 1\)"):
        objective(make("cosine"), "")(Cropping(), torch.zeros(2, 3), y="digit")


@pytest.mark.parametrize("weighting", ["dsm", "velocity", "edm"])
def test_a_process_bound_to_an_observation_is_the_free_one_about_it(weighting):
    torch.manual_seed(4)
    y, x_0, z = torch.randn(3, 6, 1, 2, 2, dtype=torch.float64)
    free = make("ouve")
    found = []
    for output in OUTPUTS:
        for sde, origin in ((free, 0.0), (free.bind(y), y)):
            net = Predictor(free, output, learned, origin)
            loss = objective(sde, weighting, times_of(free))(net, x_0 + origin, draws=Fixed(z))
            found.append(torch.cat([loss[None], torch.autograd.grad(loss, net.theta)[0]]).detach())
    for value in found:
        torch.testing.assert_close(value, found[0], rtol=1e-6, atol=0)


# --- times ----------------------------------------------------------------------------------


class Squares(sde_lib.TimeSampler):
    """t = eps + (T − eps) u², whose density is known by hand."""

    importance = True

    def quantile(self, u):
        return self.eps + (self.T - self.eps) * u**2

    def density(self, t):
        return 0.5 / torch.sqrt((t.double() - self.eps) * (self.T - self.eps))


@pytest.mark.parametrize("name", ["vp", "ve", "edm", "rectified_flow"])
@pytest.mark.parametrize("kind", ["squares", "likelihood"])
def test_importance_sampling_keeps_the_mean(name, kind):
    sde, eps, n = make(name), 1e-2, 4000
    sampler = (Squares if kind == "squares" else sde_lib.LikelihoodTimes)(sde, eps)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # the mean over u by the midpoint rule
    net = Predictor(sde, "noise", gaussian)
    x_0, z, _ = design(torch.zeros(n, dtype=torch.float64))
    means, spread = [], []
    for times in (sde_lib.TimeSampler(sde, eps), sampler):
        fn = losses.get_sde_loss_fn(sde, True, eps=eps, time_sampler=times)
        draws = Fixed(z, u.repeat_interleave(4))
        value = fn.per_image(net, x_0, draws=draws)[0].reshape(-1, 4).mean(dim=1)
        means.append(value.mean())
        spread.append(value.std())
    torch.testing.assert_close(*means, rtol=2e-4, atol=0)
    if kind == "likelihood":
        assert spread[1] < spread[0] or name in ("ve", "edm")


def test_times_that_are_no_importance_sampler_change_the_objective():
    sde = make("edm")
    fn = losses.get_sde_loss_fn(
        sde, True, weighting="edm", time_sampler=sde_lib.LogNormalTimes(sde, 1e-5)
    )
    t = fn.per_image(Predictor(sde, "data", gaussian), torch.zeros(20000, 1))[1]
    log_sigma = torch.log(sde_lib.alpha_sigma(sde, t)[1])
    assert log_sigma.mean() == pytest.approx(-1.2, abs=0.05)
    assert log_sigma.std() == pytest.approx(1.2, abs=0.05)


# --- random numbers -------------------------------------------------------------------------


def kinds_of_losses():
    vp, ve = make("vp"), make("ve")
    return {
        "sde": losses.get_sde_loss_fn(vp, True),
        "velocity": losses.get_sde_loss_fn(vp, True, weighting="velocity"),
        "smld": losses.get_smld_loss_fn(ve, True),
        "ddpm": losses.get_ddpm_loss_fn(vp, True),
    }


def network(x, labels):
    return 0.3 * x + 0.01 * labels.reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("kind", kinds_of_losses())
def test_losses_of_an_image_do_not_depend_on_its_batch(kind):
    loss_fn, batch = kinds_of_losses()[kind], torch.randn(6, 1, 3, 3)
    draws, before = Draws(7, 3, 10, 6), torch.get_rng_state()
    whole, t = loss_fn.per_image(network, batch, draws=draws)
    for a, b in ((0, 1), (1, 4), (4, 6)):
        part, at = loss_fn.per_image(network, batch[a:b], draws=draws.rows(a, b))
        torch.testing.assert_close(part, whole[a:b], rtol=1e-6, atol=0)
        assert torch.equal(at, t[a:b])
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(loss_fn(network, batch, draws=draws), whole.mean())
    other = loss_fn.per_image(network, batch, draws=Draws(7, 4, 10, 6))
    assert not torch.equal(other[0], whole)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_without_draws_torchs_numbers_come_in_the_originals_order(name):
    sde, batch = make(name), torch.randn(5, 1, 3, 3)
    seen = []

    def recording(x, labels):
        seen.append(x)
        return torch.zeros_like(x)

    torch.manual_seed(4)
    t = torch.rand(5) * (1 - 1e-5) + 1e-5
    z = torch.randn_like(batch)
    mean, std = sde.marginal_prob(batch, t)
    for weighting in ("", "edm"):
        torch.manual_seed(4)
        found = losses.get_sde_loss_fn(sde, True, weighting=weighting).per_image(recording, batch)
        assert torch.equal(found[1], t)
        assert torch.equal(seen[-1], mean + expand(std, batch) * z)


@pytest.mark.parametrize(("kind", "name"), [("smld", "ve"), ("ddpm", "vp")])
def test_discrete_losses_name_the_times_of_their_labels(kind, name):
    labels = []

    def recording(x, i):
        labels.append(i)
        return torch.zeros_like(x)

    sde = make(name)
    t = kinds_of_losses()[kind].per_image(recording, torch.zeros(200, 1))[1]
    if kind == "smld":
        sigma = torch.exp(torch.linspace(math.log(50), math.log(0.01), 1000))[labels[0]]
    else:
        sigma = sde.sqrt_1m_alphas_cumprod[labels[0]]
    found = sde_lib.alpha_sigma(sde, t)[1].float()
    torch.testing.assert_close(found, sigma, rtol=1e-4 if kind == "smld" else 0.02, atol=0.01)


# --- configurations -------------------------------------------------------------------------


def from_config(**training):
    parametrization = training.pop("parametrization", "")
    config = complete({"training": training, "model": {"parametrization": parametrization}})
    return losses.loss_fn_from_config(config, sde_lib.get_sde(config), True)


def test_config_chooses_weight_and_times():
    batch = torch.randn(4, 1, 3, 3)
    fn = from_config(
        sde="vpsde", weighting="min_snr", min_snr_gamma=2.0, time_sampler="logitnormal"
    )
    sde = make("vp")
    by_hand = losses.get_sde_loss_fn(
        sde,
        True,
        weighting="min_snr",
        min_snr_gamma=2.0,
        time_sampler=sde_lib.LogitNormalTimes(sde, 1e-5),
    )
    for a, b in zip(*(f.per_image(network, batch, draws=Draws(1, 2, 0, 4)) for f in (fn, by_hand))):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (dict(weighting="edn"), "'edn' is unknown; known: data, drift, dsm, edm"),
        (dict(weighting="edm", likelihood_weighting=True), "both choose the weight"),
        (dict(weighting="edm", continuous=False), "needs continuous=True"),
        (dict(parametrization="v", continuous=False), "needs training.continuous=True"),
        (dict(stratified=True, continuous=False), "stratified=True need training.continuous=True"),
    ],
)
def test_contradictory_settings_are_refused(training, message):
    with pytest.raises(ValueError, match=message):
        from_config(**training)
