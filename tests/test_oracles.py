"""Samplers, the ODE map and likelihoods against closed forms for Gaussian data.

Linear samplers map Gaussians to Gaussians. A batch of four rows carries a Gaussian's first two
moments exactly: the state is m + √V·(+, +, −, −) and the noise (+, −, +, −), orthogonal to it, so
the empirical moments of the result are those of the true result. The real loop runs on such a
batch in float64, without Monte Carlo; even Langevin's norms take the value that they tend to.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import toys

import likelihood
import sampling
import sde_lib
from parametrization import as_score_function

STATE = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
NOISE = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
MEAN, STD, SNR = 0.5, 0.3, 0.16
DIMS = [(1,), (2,), (3, 8, 8)]
SDES = ["ve", "vp", "subvp"]
PREDICTORS = ["euler_maruyama", "reverse_diffusion", "ancestral_sampling"]
LN2 = math.log(2)


def make(name, N=1000):
    return toys.UserSDE(N=N) if name == "user" else toys.all_sdes(N)[name]


def dims(name):
    return [(3, 8, 8)] if name == "user" else DIMS


def pattern(rows, x):
    return rows.to(x.dtype).reshape(4, *(1,) * (x.ndim - 1)).expand_as(x)


def moments(x):
    mean = x.mean(0)
    return mean, (x - mean).square().mean(0).sqrt()


def gather(x):
    """The same moments, carried by the rows that are orthogonal to the noise."""
    mean, std = moments(x)
    return mean + std * pattern(STATE, x)


def on_moments(cls):
    """`cls`, a Predictor or Corrector, made to act on moments."""

    class OnMoments(cls):
        def randn_like(self, x):
            return pattern(NOISE, x)

        def update_fn(self, x, t):
            return super().update_fn(gather(x), t)

        def step(self, x, t, s):
            return super().step(gather(x), t, s)

    return OnMoments


def marginal(sde, t, std=STD):
    """α_t and the standard deviation √(α² c² + σ²) of x_t."""
    a, s = sde_lib.alpha_sigma(sde, torch.tensor(float(t), dtype=torch.float64))
    return a.item(), math.hypot(a.item() * std, s.item())


def data_mean(dim):
    """A mean that differs between coordinates, 0.5 first."""
    return MEAN * torch.cos(torch.arange(math.prod(dim), dtype=torch.float64)).reshape(dim)


def exact_score(sde, dim, std=STD):
    return as_score_function(toys.gaussian_score(sde, data_mean(dim), std), sde)


def propagate(sde, predictor, corrector, dim, score=None, denoise=False, **options):
    """Mean and standard deviation that get_pc_sampler gives, by its own loop on moments."""
    prior = getattr(sde, "prior_std", 1.0)
    sde.prior_sampling = lambda shape: prior * pattern(STATE, torch.ones(shape).double())
    sampler = sampling.get_pc_sampler(
        sde,
        (4, *dim),
        on_moments(sampling.get_predictor(predictor)),
        on_moments(sampling.get_corrector(corrector)),
        lambda x: x,
        SNR,
        continuous=options.pop("continuous", True),
        denoise=denoise,
        eps=sde.sampling_eps,
        dtype=torch.float64,
        **options,
    )
    return moments(sampler(exact_score(sde, dim) if score is None else score)[0])


# --- predictors and correctors ------------------------------------------------------------


def worst_errors(sde, dim, mean, std, truth=None):
    a, truth_std = marginal(sde, sde.sampling_eps) if truth is None else truth
    off = (mean - a * data_mean(dim)).abs().max().item() / truth_std
    return off, (std / truth_std - 1).abs().max().item()


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_predictors_give_the_truth_within_8_per_mille(name, predictor):
    for dim in DIMS:
        sde = make(name)
        mean, std = propagate(sde, predictor, "none", dim)
        assert max(worst_errors(sde, dim, mean, std)) < 8e-3


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_denoised_samples_give_the_truth_within_8_per_mille(name, predictor):
    sde = make(name)
    mean, std = propagate(sde, predictor, "none", (2,), denoise=True)
    # x_mean of the last step estimates the data, up to the coefficient at eps.
    assert max(worst_errors(sde, (2,), mean, std, (1.0, STD))) < 8e-3


class Closed:
    """Coefficients of the built-in processes, written anew in NumPy."""

    def __init__(self, name, N):
        self.name, self.N = name, N
        i = np.arange(N) / (N - 1)
        self.sigmas = 0.01 * 5000**i
        self.betas = (0.1 + i * 19.9) / N

    def B(self, t):
        return 0.1 * t + 9.95 * t * t

    def a(self, t):
        return 1.0 if self.name == "ve" else math.exp(-self.B(t) / 2)

    def s(self, t):
        if self.name == "ve":
            return 0.01 * 5000**t
        e = 1 - math.exp(-self.B(t))
        return math.sqrt(e) if self.name == "vp" else e

    def f(self, t):
        return 0.0 if self.name == "ve" else -(0.1 + 19.9 * t) / 2

    def g2(self, t):
        if self.name == "ve":
            return 2 * math.log(5000) * self.s(t) ** 2
        beta = 0.1 + 19.9 * t
        return beta if self.name == "vp" else beta * (1 - math.exp(-2 * self.B(t)))

    def predictor(self, kind, t, i):
        """(p, q, r) of x ← p x + q s(x) + r z."""
        if kind == "ancestral_sampling" and self.name == "subvp":
            s = max(t - 1 / self.N, 0.0)
            a_t, s_t, a_s, s_s = self.a(t), self.s(t), self.a(s), self.s(s)
            k = a_t * s_s / (a_s * s_t)
            var = 1 - k * k
            # D = (x + σ² score)/α
            return s_s / s_t * k + a_s * var / a_t, a_s * var / a_t * s_t**2, s_s * math.sqrt(var)
        if kind == "euler_maruyama" or self.name == "subvp":
            g2 = self.g2(t) / self.N
            return 1 - self.f(t) / self.N, g2, math.sqrt(g2)
        if self.name == "ve":
            s1, s0 = self.sigmas[i], self.sigmas[i - 1] if i else 0.0
            var = s1**2 - s0**2
            return 1.0, var, math.sqrt(var) * (s0 / s1 if kind == "ancestral_sampling" else 1)
        b = self.betas[i]
        if kind == "ancestral_sampling":
            return 1 / math.sqrt(1 - b), b / math.sqrt(1 - b), math.sqrt(b)
        return 2 - math.sqrt(1 - b), b, math.sqrt(b)

    def langevin(self, kind, t, i, score_power):
        alpha = 1.0 if self.name == "ve" else 1 - self.betas[i]
        scale = 1 / score_power if kind == "langevin" else self.s(t) ** 2
        return 2 * alpha * SNR**2 * scale


def closed_propagation(name, predictor, corrector, N, eps):
    """The moments by recursions of our own, on ideal table rows N − 1, …, 0."""
    c = Closed(name, N)
    m, V = 0.0, 2500.0 if name == "ve" else 1.0
    for k in range(N):
        t, i = 1 - k * (1 - eps) / (N - 1), N - 1 - k
        mu, v = c.a(t) * MEAN, (c.a(t) * STD) ** 2 + c.s(t) ** 2
        if corrector != "none":
            e = c.langevin(corrector, t, i, ((m - mu) ** 2 + V) / v**2)
            m, V = m - e * (m - mu) / v, (1 - e / v) ** 2 * V + 2 * e
        p, q, r = c.predictor(predictor, t, i)
        m, V = p * m - q * (m - mu) / v, (p - q / v) ** 2 * V + r * r
    return m, math.sqrt(V)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("corrector", ["none", "ald", "langevin"])
def test_pc_sampler_follows_the_published_recursions(name, predictor, corrector):
    sde = make(name)
    mean, std = propagate(sde, predictor, corrector, (2,))
    m, s = closed_propagation(name, predictor, corrector, sde.N, sde.sampling_eps)
    assert std[0].item() == pytest.approx(s, rel=3e-3)
    assert mean[0].item() == pytest.approx(m, abs=3e-3 * s)


def test_langevin_at_snr_016_is_1_2_per_cent_wide():
    for name in SDES:
        _, std = propagate(make(name), "reverse_diffusion", "langevin", (3, 8, 8), denoise=True)
        assert std.mean().item() == pytest.approx(0.3037, abs=2e-4)


class DiscreteGaussian:
    """The exact network of SMLD or DDPM for N(MEAN, STD²): labels index tables of its own."""

    def __init__(self, name, N=1000):
        self.name, self.closed = name, Closed(name, N)

    def __call__(self, x, labels):
        if self.name == "ve":
            sigma = torch.tensor(self.closed.sigmas[::-1].copy())[labels][:, None]
            return -(x - data_mean(x.shape[1:])) / (STD**2 + sigma**2)
        a2 = torch.tensor(np.cumprod(1 - self.closed.betas))[labels][:, None]
        noise = (x - a2.sqrt() * data_mean(x.shape[1:])) / (a2 * STD**2 + 1 - a2)
        return (1 - a2).sqrt() * noise


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_discretely_trained_networks_sample_the_truth(name, predictor):
    sde = make(name)
    mean, std = propagate(
        sde, predictor, "none", (2,), score=DiscreteGaussian(name), continuous=False
    )
    assert max(worst_errors(sde, (2,), mean, std)) < 1.2e-2


@pytest.mark.parametrize("name", SDES)
def test_monte_carlo_agrees_with_propagation(name):
    n, dim, sde = 4000, (2,), make(name, 200)
    mean, std = propagate(make(name, 200), "reverse_diffusion", "langevin", dim)
    sampler = sampling.get_pc_sampler(
        sde,
        (n, *dim),
        sampling.ReverseDiffusionPredictor,
        sampling.LangevinCorrector,
        lambda x: x,
        SNR,
        continuous=True,
        denoise=False,
        eps=sde.sampling_eps,
    )
    x, _ = sampler(toys.AsModel(sde, toys.gaussian_score(sde, data_mean(dim), STD)))
    assert ((x.mean(0) - mean) / (std / n**0.5)).abs().max() < 5
    assert ((x.std(0) / std - 1) * (2 * n) ** 0.5).abs().max() < 5


# --- steps of any length ------------------------------------------------------------------


def stepped(sde, predictor, times, std=STD, probability_flow=False):
    """Moments at times[-1] from the exact ones at times[0], by step(x, t, s) alone."""
    dim = (3, 1, 1)
    cls = on_moments(sampling.get_predictor(predictor))
    p = cls(sde, exact_score(sde, dim, std), probability_flow)
    a, start = marginal(sde, times[0], std)
    x = a * data_mean(dim) + start * pattern(STATE, torch.ones(4, *dim).double())
    for t, s in itertools.pairwise(times):
        x, _ = p.step(x, t, s)
    return moments(x)


@pytest.mark.parametrize("name", [*SDES, "user"])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("schedule", ["uniform", "quadratic", "logsnr", "karras"])
def test_steps_are_of_weak_order_one_on_any_grid(name, predictor, schedule):
    sde, end = make(name), 0.1
    _, truth = marginal(sde, end)

    def error(n):
        _, std = stepped(sde, predictor, sampling.time_grid(sde, end, n + 1, schedule))
        return abs(std[0].item() / truth - 1)

    coarse, fine = error(200), error(400)
    # Euler–Maruyama's leading term nearly vanishes for VE: 7e-4 where the others have 1e-2.
    assert fine < 2e-2
    assert math.log2(coarse / fine) > 0.95 or fine < 1e-3


@pytest.mark.parametrize("name", [*SDES, "user"])
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
def test_probability_flow_steps_are_of_order_one(name, predictor):
    sde = make(name)
    times = [sampling.time_grid(sde, 1e-2, n + 1, "logsnr") for n in (200, 400)]
    _, truth = marginal(sde, 1e-2)
    coarse, fine = (
        abs(stepped(sde, predictor, t, probability_flow=True)[1][0].item() - truth) for t in times
    )
    assert 0.85 < math.log2(coarse / fine) < 1.3


@pytest.mark.parametrize("name", [*SDES, "user"])
@pytest.mark.parametrize("schedule", ["uniform", "karras", "logsnr"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_ancestral_steps_are_exact_for_a_point_mass(name, schedule, steps):
    sde = make(name)
    times = sampling.time_grid(sde, sde.sampling_eps, steps + 1, schedule)
    mean, std = stepped(sde, "ancestral_sampling", times, std=0.0)
    a, truth = marginal(sde, sde.sampling_eps, 0.0)
    assert std[0].item() == pytest.approx(truth, rel=1e-9)
    torch.testing.assert_close(mean, a * data_mean((3, 1, 1)), rtol=0, atol=1e-9)


# --- the ODE and likelihoods --------------------------------------------------------------


def encode(sde, x, mean, std, eps):
    """numerics.md 2.1: the exact latent code, and log p with the coded prior, in nats."""
    (a0, s0), (a1, s1) = marginal(sde, eps, std), marginal(sde, sde.T, std)
    z = a1 * mean + s1 / s0 * (x.double() - a0 * mean)
    prior = 50.0 if isinstance(sde, sde_lib.VESDE) else 1.0
    logp = -0.5 * math.log(2 * math.pi * prior**2) - z**2 / (2 * prior**2) + math.log(s1 / s0)
    return z, logp.flatten(1).sum(1)


def gaussian_batch(dim, n=8, dtype=torch.float64):
    return (data_mean(dim) + STD * torch.randn(n, *dim, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("name", [*SDES, "user"])
@pytest.mark.parametrize("tolerance", [1e-5, 1e-6])
def test_ode_map_is_exact_to_the_tolerance(name, tolerance):
    for dim in dims(name):
        sde = make(name)
        x = gaussian_batch(dim)
        z, _ = encode(sde, x, data_mean(dim), STD, 1e-3)
        sampler = sampling.get_ode_sampler(
            sde, x.shape, lambda x: x, rtol=tolerance, atol=tolerance, eps=1e-3
        )
        decoded, _ = sampler(exact_score(sde, dim), z)
        assert decoded.dtype == torch.float64
        error = decoded - x
        assert error.square().mean().sqrt() < 10 * tolerance
        assert error.abs().max() < 30 * tolerance


@pytest.mark.parametrize("name", [*SDES, "user"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance, bound", [(1e-5, 2e-4), (1e-6, 2e-5)])
def test_bits_per_dim_of_every_image_is_the_closed_form(name, dtype, tolerance, bound):
    for dim in dims(name):
        sde, x = make(name), gaussian_batch(dim, 16, dtype)
        fn = likelihood.get_likelihood_fn(
            sde, lambda x: (x + 1) / 2, rtol=tolerance, atol=tolerance, eps=1e-5
        )
        bpd, z, _ = fn(exact_score(sde, dim), x)
        code, logp = encode(sde, x, data_mean(dim), STD, 1e-5)
        truth = -logp / (x[0].numel() * LN2) + 7
        assert (bpd - truth).abs().max() < bound
        assert ((z - code) / marginal(sde, 1)[1]).abs().max() < 10 * bound


@pytest.mark.parametrize("name", SDES)
def test_gaussian_probe_has_the_variance_of_the_closed_form(name):
    sde, n, d = make(name), 2000, 2
    x = gaussian_batch((d,), n)
    fn = likelihood.get_log_likelihood_fn(sde, "Gaussian", eps=1e-5)
    logp, _, _ = fn(exact_score(sde, (d,)), x)
    error = logp - encode(sde, x, data_mean((d,)), STD, 1e-5)[1]
    # error = (‖v‖² − d) ½ log(v_T/v_eps), of variance 2 d (½ log …)² and kurtosis 3 + 12/d
    scale = math.log(marginal(sde, 1)[1] / marginal(sde, 1e-5)[1])
    variance = 2 * d * scale**2
    assert abs(error.mean()) < 5 * math.sqrt(variance / n)
    assert abs(error.var() / variance - 1) < 5 * math.sqrt((2 + 12 / d) / n)
