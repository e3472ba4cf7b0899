"""Processes that score_sde lacks, processes towards an observation, and a change of process, each
held to closed forms for Gaussian data N(MEAN, STD²)."""

import copy
import math

import pytest
import torch
import toys
from toys_paths import by_hand, every_sde, new_sdes

import likelihood
import losses
import parametrization as par
import sampling
import sde_lib
from parametrization import ScoreFunction, as_score_function, on_process
from sde_lib import EDM, VESDE, VPSDE, AffineSDE, CosineVP, RectifiedFlow, common_stretch, expand

NEW = list(new_sdes())
EVERY = list(every_sde())
MEAN, STD = 0.4, 0.3
Y = torch.tensor([[1.5, -0.7]], dtype=torch.float64)


def make(name, N=1000):
    return every_sde(N)[name]


def inner_times(sde, n=101):
    """Times from sampling_eps to T, both ends included."""
    return torch.linspace(sde.sampling_eps, float(sde.T), n, dtype=torch.float64)


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gaussian(sde, t, y=0.0):
    """Mean and variance of x_t, where x_0 ~ N(MEAN, STD²) and the process is bound to y."""
    a, s = sde_lib.alpha_sigma(sde, torch.as_tensor(t, dtype=torch.float64))
    return y + a * (MEAN - y), (a * STD) ** 2 + s**2


def exact(sde, y=0.0, mean=MEAN, std=STD):
    """The exact score of x_t as a ScoreFunction."""

    def score(x, t):
        a, s = (expand(c, x) for c in sde_lib.alpha_sigma(sde, t, x))
        origin = y.to(x.dtype) if torch.is_tensor(y) else y
        return -(x - origin - a * (mean - origin)) / (a**2 * std**2 + s**2)

    return as_score_function(score, sde)


# --- coefficients -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_coefficients_are_those_by_hand(name):
    sde = make(name)
    t = inner_times(sde)
    a, s, da, _, g = by_hand(name, t)
    torch.testing.assert_close(sde.alpha(t), a, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sde.sigma(t), s, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sde.f(t), da / a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sde.g2(t), g**2, rtol=1e-10, atol=1e-15)
    x = torch.full((len(t), 2), 3.0, dtype=torch.float64)
    mean, std = sde.marginal_prob(x, t)
    torch.testing.assert_close(mean, 3 * a[:, None].expand_as(x))
    torch.testing.assert_close(std, s)


@pytest.mark.parametrize("name", NEW)
def test_g_squared_is_minus_two_sigma_squared_lambda_prime(name):
    sde = make(name)
    t = inner_times(sde)
    torch.testing.assert_close(sde.lambda_(t), AffineSDE.lambda_(sde, t), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(sde.f(t), AffineSDE.f(sde, t), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(sde.g2(t), AffineSDE.g2(sde, t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NEW)
def test_inverse_lambda_is_the_inverse_to_1e_10(name):
    sde = make(name)
    t = inner_times(sde)
    lam = sde.lambda_(t)
    assert (lam.diff() < 0).all()
    assert (sde.inverse_lambda(lam) - t).abs().max() < 1e-10
    torch.testing.assert_close(AffineSDE.inverse_lambda(sde, lam), t, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_finite_from_sampling_eps_to_T(name, dtype):
    sde = make(name)
    t = inner_times(sde).to(dtype)
    x = torch.ones(len(t), 2, 3, dtype=dtype)
    for method in (sde.sde, sde.marginal_prob, sde.discretize, sde.reverse(lambda x, t: -x).sde):
        vector, number = method(x, t)
        assert vector.shape == x.shape and vector.dtype == number.dtype == dtype
        assert torch.isfinite(vector).all() and torch.isfinite(number).all()
    assert (sde.marginal_prob(x, t)[1] > 0).all()
    assert sde_lib.half_log_snr(sde, t[-1:]).item() > -10.001


@pytest.mark.parametrize("name", NEW)
def test_prior_is_the_marginal_at_T_but_for_the_data(name):
    sde = make(name)
    end = torch.tensor([float(sde.T)], dtype=torch.float64)
    assert sde.prior_std == pytest.approx(sde.sigma(end).item(), rel=1e-4)
    z = images(3, 2, 2)
    truth = torch.distributions.Normal(0.0, sde.prior_std).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(sde.prior_logp(z), truth)
    assert sde.prior_sampling((2000, 3)).std().item() == pytest.approx(sde.prior_std, rel=0.05)


def test_cosine_and_rectified_flow_end_at_lambda_minus_ten():
    for sde in (CosineVP(), RectifiedFlow(), RectifiedFlow(sigma_min=1e-3)):
        end = torch.tensor(sde.T, dtype=torch.float64)
        assert sde.lambda_(end).item() == pytest.approx(-10, abs=1e-9)
        assert pytest.approx(1, abs=1e-4) == sde.T


def test_uniform_times_of_edm_are_the_grid_of_karras():
    n = 18
    i = torch.arange(n, dtype=torch.float64)
    wanted = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sde = EDM()
    times = sampling.time_grid(sde, sde.sampling_eps, n)
    torch.testing.assert_close(sde.sigma(times), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(times, sampling.time_grid(sde, 0.0, n, "karras"), atol=1e-9, rtol=0)


def test_edm_of_rho_one_is_linear_ve():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    one, other = EDM(0.01, 50, rho=1), sde_lib.LinearVE(0.01, 50)
    torch.testing.assert_close(one.sigma(t), other.sigma(t))
    torch.testing.assert_close(one.g2(t), other.g2(t))


def test_impossible_parameters_are_refused():
    for cls in (EDM, sde_lib.LinearVE):
        with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
            cls(2.0, 1.0)
    with pytest.raises(ValueError, match="rho > 0"):
        EDM(rho=0)
    with pytest.raises(ValueError, match="sigma_min < 1"):
        RectifiedFlow(sigma_min=1.0)
    with pytest.raises(ValueError, match="theta > 0"):
        sde_lib.OUVE(theta=0)


# --- discretisation -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_a_chain_of_discretised_steps_has_the_exact_marginals(name):
    sde = make(name, N=40)
    mean, var = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for i in range(40):
        # The first step starts from the data, as VE's does with σ_{−1} = 0.
        t = torch.tensor([(i + 1 - 1e-9 * (i == 0)) * sde.T / 40], dtype=torch.float64)
        f, G = sde.discretize(mean, t)
        ratio = 1 + (f / mean)[0]
        mean, var = mean + f, ratio**2 * var + G**2
        a, s = sde_lib.alpha_sigma(sde, t)
        torch.testing.assert_close(mean[0], a, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(var, s**2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", NEW)
def test_the_last_step_of_reverse_diffusion_goes_to_the_data(name):
    """x_mean at a time below T/N is Tweedie's D, so a point mass is found exactly."""
    sde = make(name, N=5)
    t = torch.full((3,), 0.1 * sde.T, dtype=torch.float64)
    a, s = (expand(c, images(3, 2)) for c in sde_lib.alpha_sigma(sde, t))
    x = a * MEAN + s * images(3, 2)
    predictor = sampling.ReverseDiffusionPredictor(sde, exact(sde, std=0.0))
    found = predictor.update_fn(x, t)[1]
    D = exact(sde, std=0.0).denoise(x, t)
    torch.testing.assert_close(D, torch.full_like(D, MEAN))
    if name in ("edm", "linear_ve"):  # α = 1
        torch.testing.assert_close(found, D)
    else:
        torch.testing.assert_close(found, x * (2 - a) - s * (x - a * D) / s)


# --- the reverse family, the ODE, likelihoods ------------------------------------------------


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
def test_every_member_of_the_reverse_family_has_the_same_marginals(name, tau):
    """For dx = (A x + b) dt + τ g dw̄ backwards: μ' = A μ + b and v' = 2 A v − τ² g²."""
    sde = make(name)
    t = inner_times(sde, 41)
    rsde = sde.reverse(exact(sde), tau=tau)
    zero, one = (torch.full((len(t), 1), k, dtype=torch.float64) for k in (0.0, 1.0))
    (b, g), (slope, _) = rsde.sde(zero, t), rsde.sde(one, t)
    b, slope = b[:, 0], (slope - b)[:, 0]
    a, s, da, ds, _ = by_hand(name, t)
    mean, var = gaussian(sde, t)
    scale = 1 + sde.g2(t) / var + sde.f(t).abs()  # of the numbers that cancel
    assert ((slope * mean + b - da * MEAN).abs() / scale).max() < 1e-9
    assert ((2 * slope * var - g**2 - 2 * (a * da * STD**2 + s * ds)).abs() / scale).max() < 1e-9


@pytest.mark.parametrize("name", NEW)
def test_ode_sampler_is_the_closed_map(name):
    """x_eps = μ_eps + √(v_eps/v_T) (x_T − μ_T)."""
    sde = make(name)
    z = sde.prior_std * images(4, 3)
    sampler = sampling.get_ode_sampler(
        sde, z.shape, lambda x: x, rtol=1e-9, atol=1e-9, eps=sde.sampling_eps
    )
    (m_T, v_T), (m, v) = gaussian(sde, sde.T), gaussian(sde, sde.sampling_eps)
    truth = m + torch.sqrt(v / v_T) * (z - m_T)
    torch.testing.assert_close(sampler(exact(sde), z)[0], truth, rtol=1e-6, atol=1e-6)


def coded_logp(sde, x, eps, y=0.0):
    """log p̂(x) by the ODE from eps with the prior as coded: numerics.md 2.1."""
    (m_T, v_T), (m, v) = gaussian(sde, sde.T, y), gaussian(sde, eps, y)
    z = m_T + torch.sqrt(v_T / v) * (x - m)
    std = getattr(sde, "prior_std", 1.0)
    logp = torch.distributions.Normal(y, std).log_prob(z) + 0.5 * torch.log(v_T / v)
    return logp.flatten(1).sum(1)


@pytest.mark.parametrize("name", NEW)
def test_likelihood_is_the_closed_number(name):
    sde, x = make(name), MEAN + STD * images(5, 3)
    eps = sde.sampling_eps or 1e-5
    fn = likelihood.get_log_likelihood_fn(sde, eps=eps, rtol=1e-8, atol=1e-8)
    logp, _, _ = fn(exact(sde), x)
    torch.testing.assert_close(logp, coded_logp(sde, x, eps), rtol=1e-5, atol=1e-5)
    bpd = likelihood.get_likelihood_fn(sde, lambda x: (x + 1) / 2, eps=eps)(exact(sde), x)[0]
    torch.testing.assert_close(bpd, -logp / (3 * math.log(2)) + 7, rtol=1e-3, atol=1e-3)


# --- losses -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_of_the_exact_score_is_the_closed_form(name, weighted):
    sde, eps = make(name), 0.05
    t = eps + (sde.T - eps) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    a, s = sde_lib.alpha_sigma(sde, t)
    truth = (a * STD) ** 2 / ((a * STD) ** 2 + s**2)
    if weighted:
        truth = truth * sde_lib.drift_diffusion(sde, t)[1] ** 2 / s**2
    loss_fn = losses.get_sde_loss_fn(sde, False, True, likelihood_weighting=weighted, eps=eps)
    model = toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD))
    torch.manual_seed(0)
    values = torch.stack([loss_fn(model, MEAN + STD * images(4000, 4)) for _ in range(20)])
    error = values.std().item() / 20**0.5
    assert abs(values.mean().item() - truth.mean().item()) < 5 * error < 0.5 * truth.mean()


# --- predictors and correctors --------------------------------------------------------------

STATE = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
NOISE = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)


def on_moments(cls):
    """`cls` on a batch of four that carries mean and variance exactly: see test_oracles.py."""

    def gather(x):
        mean = x.mean(0)
        return mean + (x - mean).square().mean(0).sqrt() * STATE[:, None]

    class OnMoments(cls):
        def randn_like(self, x):
            return NOISE[:, None].expand_as(x)

        def update_fn(self, x, t):
            return super().update_fn(gather(x), t)

        def step(self, x, t, s):
            return super().step(gather(x), t, s)

    return OnMoments


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(
    ("predictor", "corrector"),
    [
        ("euler_maruyama", "none"),
        ("reverse_diffusion", "none"),
        ("ancestral_sampling", "none"),
        ("reverse_diffusion", "langevin"),
        ("reverse_diffusion", "ald"),
    ],
)
@pytest.mark.parametrize("grid", ["legacy", "logsnr"])
def test_every_predictor_and_corrector_gives_the_data(name, predictor, corrector, grid):
    """Started from p_T itself, 300 or 200 steps, within 5 per cent."""
    sde = make(name, N=300)
    m, v = gaussian(sde, sde.T)
    sde.prior_sampling = lambda shape: m + v.sqrt() * STATE[:, None].expand(shape)
    options = {} if grid == "legacy" else {"steps": 200, "schedule": "logsnr"}
    sampler = sampling.get_pc_sampler(
        sde,
        (4, 1),
        on_moments(sampling.get_predictor(predictor)),
        on_moments(sampling.get_corrector(corrector)),
        lambda x: x,
        0.1,
        continuous=True,
        denoise=False,
        eps=sde.sampling_eps,
        dtype=torch.float64,
        **options,
    )
    x = sampler(exact(sde))[0]
    mean, var = gaussian(sde, sde.sampling_eps)
    # 300 uniform steps of linear VE are 0.17 in σ, coarse beside data of 0.3; and legacy steps are
    # T/N on a grid that ends at eps, 0.03 for OUVE.
    bound = {"linear_ve": 0.3, "ouve": 0.06}.get(name, 0.05) if grid == "legacy" else 0.05
    assert abs(x.mean() - mean) / STD < (0.06 if name == "ouve" else 0.01)
    assert abs(x.var(unbiased=False).sqrt() / var.sqrt() - 1) < bound


# --- towards an observation -----------------------------------------------------------------


def bound_to_y(name, N=1000):
    """A process bound to Y, with the shape that a user's process asks for."""
    y = Y.reshape(1, 2, 1, 1) if name == "user" else Y
    return make(name, N).bind(y), make(name, N), y


@pytest.mark.parametrize("name", EVERY)
def test_x_minus_y_follows_the_free_process(name):
    sde, free, y = bound_to_y(name)
    assert isinstance(sde, type(free)) and sde.N == free.N
    t = inner_times(free, 7)
    x = images(7, *y.shape[1:])
    (mean, std), (free_mean, free_std) = sde.marginal_prob(x, t), free.marginal_prob(x - y, t)
    torch.testing.assert_close(mean, y + free_mean)
    torch.testing.assert_close(std, free_std)
    for method in ("sde", "discretize"):
        pair = getattr(sde, method)(x, t), getattr(free, method)(x - y, t)
        for one, other in zip(*pair, strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(sde.prior_logp(x), free.prior_logp(x - y))
    torch.manual_seed(0)
    one = sde.prior_sampling(x.shape)
    torch.manual_seed(0)
    torch.testing.assert_close(one, free.prior_sampling(x.shape) + y.float())
    for ask in (sde_lib.alpha_sigma, sde_lib.drift_diffusion):
        for one, other in zip(ask(sde, t, x), ask(free, t, x), strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(sde_lib.half_log_snr(sde, t), sde_lib.half_log_snr(free, t))
    assert sde_lib.is_affine(sde)


@pytest.mark.parametrize("name", EVERY)
def test_binding_leaves_the_process_alone_and_can_be_repeated(name):
    free = make(name)
    one, two = free.bind(Y), free.bind(Y).bind(2 * Y)
    assert sde_lib.unbound(free) is free and type(one) is type(two)
    assert torch.equal(sde_lib.origin(one, Y), Y) and torch.equal(sde_lib.origin(two, Y), 2 * Y)
    assert sde_lib.origin(free, Y) is None
    again = sde_lib.unbound(one)
    assert type(again) is type(free) and sde_lib.origin(again, Y) is None
    one.N = 60
    assert (again.N, free.N, two.N) == (60, 1000, 1000)
    rsde = one.reverse(lambda x, t: x)
    assert isinstance(rsde, type(free)) and rsde.N == 60
    assert torch.equal(sde_lib.origin(copy.deepcopy(one), Y), Y)
    with pytest.raises(TypeError, match="bind first"):
        rsde.bind(Y)


def test_prior_of_a_bound_process_is_refused_for_another_batch():
    sde = EDM().bind(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"y of shape \(3, 2\).*shape \(1, 2\)"):
        sde.prior_sampling((1, 2))


def shifted_truth(name, sde, x, t, y):
    """Every output for a bound process, μ_t = y + α (MEAN − y): numerics.md 2.1."""
    a, s, da, ds, g = (expand(c, x) for c in by_hand(name, t))
    v, m = a**2 * STD**2 + s**2, y + a * (MEAN - y)
    centred, tilde, sd = x - m, s / a, par.SIGMA_DATA
    data, noise = MEAN + a * STD**2 / v * centred, s / v * centred
    root = torch.sqrt(tilde**2 + sd**2)
    x_tilde = (x - (1 - a) * y) / a
    return {
        "data": data,
        "noise": noise,
        "score": -centred / v,
        "drift": -g * centred / v,
        "v": a * noise - s * data,
        "velocity": da * (MEAN - y) + (a * da * STD**2 + s * ds) / v * centred,
        "preconditioned": (data - sd**2 / root**2 * x_tilde) / (tilde * sd / root),
    }


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("source", par.OUTPUTS)
def test_conversions_know_the_shifted_origin(name, source):
    sde, _, y = bound_to_y(name)
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)
    x = images(5, *y.shape[1:])
    truth = shifted_truth(name, sde, x, t, y)
    for target in par.OUTPUTS:
        value = par.convert(truth[source], source, target, par.Point(sde, t, x))
        torch.testing.assert_close(value, truth[target], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(exact(sde, y).denoise(x, t), truth["data"], rtol=1e-7, atol=1e-7)
    drift = sde.reverse(exact(sde, y), probability_flow=True).sde(x, t)[0]
    torch.testing.assert_close(drift, truth["velocity"], rtol=1e-9, atol=1e-7)


def test_conversions_know_the_shift_of_a_users_own_process():
    """A process written with its own pull towards 0.7, not bound: its mean for x_0 = 0 is read."""

    class Pulled(toys.UserSDE):
        def sde(self, x, t):
            return super().sde(x - 0.7, t)

        def marginal_prob(self, x, t):
            mean, std = super().marginal_prob(x - 0.7, t)
            return mean + 0.7, std

    sde, t = Pulled(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = images(3, 1, 2, 2)
    truth = shifted_truth("user", sde, x, t, 0.7)
    for source in par.OUTPUTS:
        for target in par.OUTPUTS:
            value = par.convert(truth[source], source, target, par.Point(sde, t, x))
            torch.testing.assert_close(value, truth[target], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_preconditioned_network_gets_the_centred_input(name):
    sde, _, y = bound_to_y(name)
    t, seen = torch.tensor([0.2, 0.7], dtype=torch.float64), {}
    x = images(2, *y.shape[1:])

    def F(scaled, labels):
        seen["x"] = scaled
        return torch.zeros_like(scaled)

    D = ScoreFunction(F, sde, par.as_parametrization("preconditioned")).denoise(x, t)
    a, s = (expand(c, x) for c in sde_lib.alpha_sigma(sde, t, x))
    clean = (x - (1 - a) * y) / a
    torch.testing.assert_close(seen["x"], clean / torch.sqrt((s / a) ** 2 + 0.25))
    torch.testing.assert_close(D, 0.25 / ((s / a) ** 2 + 0.25) * clean)


@pytest.mark.parametrize("name", EVERY)
def test_bound_ode_sampler_and_likelihood_are_the_closed_forms(name):
    sde, free, y = bound_to_y(name)
    eps = sde.sampling_eps or 1e-5
    z = y + getattr(sde, "prior_std", 1.0) * images(3, *y.shape[1:])
    sampler = sampling.get_ode_sampler(sde, z.shape, lambda x: x, rtol=1e-9, atol=1e-9, eps=eps)
    (m_T, v_T), (m, v) = gaussian(free, sde.T, y), gaussian(free, eps, y)
    x = m + torch.sqrt(v / v_T) * (z - m_T)
    torch.testing.assert_close(sampler(exact(sde, y), z)[0], x, rtol=1e-6, atol=1e-6)
    fn = likelihood.get_log_likelihood_fn(sde, eps=eps, rtol=1e-8, atol=1e-8)
    logp, code, _ = fn(exact(sde, y), x)
    torch.testing.assert_close(logp, coded_logp(free, x, eps, y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(code, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_on_a_bound_process_is_that_of_the_free_one(name, weighted):
    """Same noise, same times, x_0 − y in place of x_0."""
    sde, free, y = bound_to_y(name)
    x_0 = MEAN + STD * images(64, *y.shape[1:])
    values = []
    for process, data, score in (
        (sde, x_0, exact(sde, y)),
        (free, x_0 - y, exact(free, mean=MEAN - y)),
    ):
        torch.manual_seed(0)
        loss_fn = losses.get_sde_loss_fn(
            process, False, True, likelihood_weighting=weighted, eps=0.05
        )
        values.append(loss_fn(score, data))
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral_sampling"])
@pytest.mark.parametrize(
    ("corrector", "options"),
    [
        ("none", {}),
        ("ald", {"steps": 12, "schedule": "quadratic", "seeds": [3, 4, 5]}),
    ],
    ids=["N", "steps"],
)
def test_samples_on_a_bound_process_are_those_of_the_free_one_moved(
    name, predictor, corrector, options
):
    """For a batch of three observations, one each."""
    y = torch.cat([k * bound_to_y(name)[2] for k in (1, 2, -1)])
    free, found = make(name, 24), []
    sde = free.bind(y)
    for process, score in ((sde, exact(sde, y)), (free, exact(free, mean=MEAN - y))):
        sampler = sampling.get_pc_sampler(
            process,
            tuple(y.shape),
            sampling.get_predictor(predictor),
            sampling.get_corrector(corrector),
            lambda x: x,
            0.1,
            continuous=True,
            eps=process.sampling_eps,
            dtype=torch.float64,
            **options,
        )
        torch.manual_seed(1)
        found.append(sampler(score)[0])
    scale = found[1].abs().max().item()
    torch.testing.assert_close(found[0], found[1] + y, rtol=0, atol=1e-5 * max(scale, 1))


def test_a_network_trained_towards_y_is_trained_by_the_same_loss():
    """SGMSE's use: the observation is the network's condition and the process's origin."""
    torch.manual_seed(0)
    y = torch.randn(64, 2)
    clean = 0.5 * y + 0.1 * torch.randn(64, 2)
    net = torch.nn.Linear(5, 2)
    net.parametrization = "data"

    class Conditioned(torch.nn.Module):
        parametrization = "data"

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, labels, y):
            return self.net(torch.cat([x, y, labels[:, None] / 999], dim=1))

    model, sde = Conditioned(), sde_lib.OUVE().bind(y)
    loss_fn = losses.get_sde_loss_fn(sde, True, likelihood_weighting=False, eps=0.03)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    history = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = loss_fn(model, clean, y=y)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-20:]) < 0.3 * sum(history[:20])


# --- a change of process after training -----------------------------------------------------


def network(name, output="noise", time="t*999", dtype=torch.float64):
    """The exact network of one output, which knows its process by the labels alone."""
    sde = make(name)

    def model(x, labels):
        t = labels * (sde.T / 999)
        point = par.Point(sde, t, x)
        score = exact(sde)(x, t)
        return par.convert(score, "score", output, point)

    return ScoreFunction(model, sde, par.Parametrization(output, time))


@pytest.mark.parametrize("source", ["vp", "edm", "rectified_flow", "ve"])
@pytest.mark.parametrize("target", ["vp", "subvp", "ve", "edm", "linear_ve", "rectified_flow"])
@pytest.mark.parametrize("output", [o for o in par.OUTPUTS if o != "preconditioned"])
def test_exact_network_of_one_process_is_exact_on_another(source, target, output):
    score, sde = network(source, output), common_stretch(make(target), make(source))
    moved = on_process(score, sde)
    t = torch.linspace(sde.sampling_eps, sde.T, 9, dtype=torch.float64)
    mean, var = gaussian(sde, t)
    x = mean[:, None] + var.sqrt()[:, None] * images(9, 3)
    truth = exact(sde)
    for face in ("__call__", "denoise", "noise", "velocity"):
        value, wanted = getattr(moved, face)(x, t), getattr(truth, face)(x, t)
        bound = 1e-10 * wanted.abs().max().clamp(min=1)
        if "rectified_flow" in (source, target) or face == "velocity":
            bound = 1e3 * bound  # 1/α is 2e4 at T, and the truth cancels there too
        assert (value - wanted).abs().max() < bound, face
    assert moved.nfe == 4 and score.nfe == 0 and moved.sde is sde


def test_change_of_process_is_undone_by_the_way_back():
    score = network("vp")
    there = on_process(score, EDM(0.01, 50))
    back = on_process(there, score.sde)
    assert back.trained is None and back.sde is score.sde
    x, t = images(3, 2), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    assert torch.equal(back(x, t), score(x, t))


def test_change_of_process_between_bound_processes():
    """A score learnt on OUVE towards y, used on EDM towards another origin."""
    y, other = Y, 3 * Y
    trained, sde = sde_lib.OUVE().bind(y), sde_lib.LinearVE(0.05, 0.3).bind(other)
    moved = on_process(exact(trained, y), sde, eps=1e-3)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    x = images(3, 2)
    for face in ("__call__", "denoise", "velocity"):
        torch.testing.assert_close(
            getattr(moved, face)(x, t), getattr(exact(sde, other), face)(x, t)
        )


@pytest.mark.parametrize("target", ["ve", "edm", "rectified_flow", "cosine", "linear_ve"])
def test_samples_by_the_ode_agree_with_the_direct_route(target):
    """A stretch that begins at VP's end has VP's prior carried over: equal noise, equal samples."""
    trained = VPSDE()
    sde = common_stretch(make(target), trained)
    moved = on_process(network("vp"), sde)
    lam = sde_lib.half_log_snr(sde, torch.tensor([sde.sampling_eps, sde.T], dtype=torch.float64))
    ends = trained.inverse_lambda(lam)
    (a_eps, a_T), _ = sde_lib.alpha_sigma(sde, inner_times(sde, 2))
    ratio_eps, ratio_T = a_eps / trained.alpha(ends[0]), a_T / trained.alpha(ends[1])
    z = images(3, 2)
    options = {"rtol": 1e-9, "atol": 1e-9}
    direct = sampling.get_ode_sampler(trained, z.shape, lambda x: x, eps=ends[0].item(), **options)
    route = sampling.get_ode_sampler(sde, z.shape, lambda x: x, eps=sde.sampling_eps, **options)
    if ends[1] < 1 - 1e-9:  # the target ends inside VP's range: start the direct route there
        m, v = gaussian(trained, ends[1].item())
        m_T, v_T = gaussian(trained, 1.0)
        start = m_T + torch.sqrt(v_T / v) * (z - m)
    else:
        start = z
        assert sde.prior_std == pytest.approx(ratio_T.item(), rel=1e-6)
    wanted = ratio_eps * direct(network("vp"), start)[0]
    torch.testing.assert_close(route(moved, ratio_T * z)[0], wanted, rtol=1e-5, atol=1e-5)


def test_likelihood_of_another_process_is_the_closed_number():
    sde, x = EDM(0.01, 50), MEAN + STD * images(4, 3)
    fn = likelihood.get_log_likelihood_fn(sde, eps=1e-5, rtol=1e-8, atol=1e-8)
    logp, _, _ = fn(on_process(network("vp"), sde), x)
    torch.testing.assert_close(logp, coded_logp(sde, x, 1e-5), rtol=1e-5, atol=1e-5)


def test_labels_and_inputs_are_those_of_the_training():
    seen = {}

    def model(x, labels):
        seen["x"], seen["labels"] = x, labels
        return torch.zeros_like(x)

    vp, edm = VPSDE(), EDM(0.01, 50)
    score = ScoreFunction(model, vp, par.as_parametrization("noise"))
    t = torch.tensor([0.3, 0.9])
    on_process(score, edm)(torch.ones(2, 3), t)
    own = vp.inverse_lambda(edm.lambda_(t.double()))
    torch.testing.assert_close(seen["labels"], (999 * own).float())
    assert seen["x"].dtype == torch.float32
    torch.testing.assert_close(
        seen["x"].double(), vp.alpha(own)[:, None].expand(2, 3), rtol=1e-6, atol=0
    )


def test_processes_that_leave_the_trained_range_are_refused_with_the_remedy():
    score = network("ve")
    with pytest.raises(ValueError, match=r"trained from -3\.912 to 4\.605.*common_stretch"):
        on_process(score, RectifiedFlow())
    part = common_stretch(RectifiedFlow(), score.sde)
    on_process(score, part)
    lam = sde_lib.half_log_snr(part, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(lam, score.sde.lambda_(torch.tensor([1e-5, 1.0]).double()))
    inside = EDM(0.02, 40)
    assert common_stretch(inside, score.sde) is inside
    with pytest.raises(ValueError, match="nothing is in common"):
        common_stretch(EDM(100, 200), score.sde)


def test_wrapped_scores_and_processes_that_are_not_affine_are_refused():
    class Wrapped(ScoreFunction):
        def _face(self, target, x, t, conditions):
            return x

    vp = VPSDE()
    with pytest.raises(TypeError, match="change the process first"):
        on_process(Wrapped(None, vp, par.as_parametrization("noise")), VESDE())

    class Cubic(toys.UserSDE):
        def sde(self, x, t):
            return -(x**3), torch.ones_like(t)

    with pytest.raises(ValueError, match="not affine"):
        on_process(network("vp"), Cubic())


@pytest.mark.parametrize("name", ["vp", "edm", "rectified_flow", "user"])
def test_a_stretch_is_its_process_between_two_times(name):
    whole = make(name)
    start, stop = 0.2 * float(whole.T), 0.7 * float(whole.T)
    part = sde_lib.Stretch(whole, start, stop, prior_std=2.0)
    u = torch.linspace(0, 1, 21, dtype=torch.float64)
    t = start + u * (stop - start)
    for one, other in zip(sde_lib.alpha_sigma(part, u), sde_lib.alpha_sigma(whole, t), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(part.f(u), AffineSDE.f(part, u), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(part.g2(u), AffineSDE.g2(part, u), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(part.inverse_lambda(part.lambda_(u)), u, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="start < stop"):
        sde_lib.Stretch(whole, stop, start, 1.0)


# --- from a config ------------------------------------------------------------------------


def config(training_sde, sampling_sde="", **model):
    from configs.validation import complete

    return complete(
        {"training": {"sde": training_sde}, "sampling": {"sde": sampling_sde}, "model": model}
    )


def test_processes_are_made_from_a_config():
    model = {"sigma_min": 0.02, "sigma_max": 30.0, "rho": 5.0, "theta": 2.0, "num_scales": 77}
    made = {
        name: sde_lib.get_sde(config(name, **model))
        for name in ("cosine", "edm", "linear_ve", "rectified_flow", "ouve")
    }
    assert {sde.N for sde in made.values()} == {77}
    assert (made["edm"].sigma_min, made["edm"].sigma_max, made["edm"].rho) == (0.02, 30.0, 5.0)
    assert (made["linear_ve"].sigma_min, made["linear_ve"].sigma_max) == (0.02, 30.0)
    assert (made["ouve"].theta, made["ouve"].sigma_max) == (2.0, 30.0)
    for name in ("edm", "linear_ve", "ouve"):
        with pytest.raises(ValueError, match=r"sigma_min <= config\.model\.sigma_max"):
            config(name, sigma_min=2.0, sigma_max=1.0)
        config("cosine", sigma_min=2.0, sigma_max=1.0)


def test_new_processes_take_the_defaults_of_the_vp_family():
    filled = config("rectified_flow")
    assert filled.model.embedding_type == "positional" and filled.data.centered
    assert not filled.model.scale_by_sigma and filled.sampling.predictor == "reverse_diffusion"
    assert config("vesde").model.embedding_type == "fourier"


def test_sampling_process_is_read_from_the_config():
    vp = VPSDE()
    for name in ("", "vpsde", "VPSDE"):
        assert sde_lib.sampling_process(config("vpsde", name), vp) is vp
    ve = sde_lib.sampling_process(config("vpsde", "vesde"), vp)
    assert isinstance(ve, VESDE)
    part = sde_lib.sampling_process(config("vpsde", "rectified_flow"), vp)
    assert isinstance(part, sde_lib.Stretch) and isinstance(part.whole, RectifiedFlow)
    with pytest.raises(ValueError, match=r"sampling\.sde='vqsde' is unknown; known"):
        sde_lib.sampling_process(config("vpsde", "vqsde"), vp)


def test_declared_parametrization_is_read_from_the_config():
    def declared(**model):
        return par.declared_parametrization(config("vpsde", **model))

    assert declared() is None
    made = declared(parametrization="preconditioned", sigma_data=0.3)
    assert (made.output, made.time, made.sigma_data) == ("preconditioned", "log_sigma/4", 0.3)
    assert declared(parametrization="v").time == "t*999"
    assert declared(parametrization="preconditioned", time_input="sigma").time == "sigma"
    with pytest.raises(ValueError, match="time_input='sigma' needs"):
        declared(time_input="sigma")
    with pytest.raises(ValueError, match="time_input 'steps' is unknown"):
        declared(parametrization="v", time_input="steps")
    with pytest.raises(ValueError, match="sigma_data"):
        config("vpsde", sigma_data=0.0)
