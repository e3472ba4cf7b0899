"""Twisted SMC against the exact posterior and evidence of the model that it discretises."""

import math

import pytest
import torch
from toys import UserSDE
from toys_inverse import COV2, MEAN2, Dense, random_operator, sampler_moments

import controllable_generation_methods as methods
import sde_lib
from benchmarks.inverse_beds import (
    GaussianBed,
    MixtureBed,
    distance,
    stationary,
    total_variation,
)
from controllable_generation_posterior import posterior_score
from controllable_generation_smc import Particles, twisted_smc
from parametrization import as_score_function
from sampling_grids import time_grid

FIRST = Dense(torch.tensor([[1.0, 0.0]]), (2,))
Y = torch.tensor([[1.2]], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def discretised(bed, steps, tau=1.0, denoise=True, eps=None):
    """Mean and covariance of what the exponential integrator draws from the prior, exactly."""
    sde = bed.sde
    times = time_grid(sde, eps or sde.sampling_eps, steps, "logsnr")
    lam = sde_lib.half_log_snr(sde, times)
    alpha, sigma = sde_lib.alpha_sigma(sde, times)
    m, eye = bed.mean.reshape(-1), torch.eye(bed.d, dtype=torch.float64)
    mean, cov = torch.zeros(bed.d, dtype=torch.float64), float(sde.prior_std) ** 2 * eye

    def denoiser(i):
        K = alpha[i] * bed.cov @ torch.linalg.inv(alpha[i] ** 2 * bed.cov + sigma[i] ** 2 * eye)
        return K, m - alpha[i] * K @ m

    for i in range(steps - 1):
        K, k = denoiser(i)
        h = lam[i + 1] - lam[i]
        kappa = -alpha[i + 1] * torch.expm1(-(1 + tau**2) * h)
        F = sigma[i + 1] / sigma[i] * torch.exp(-(tau**2) * h) * eye + kappa * K
        noise = sigma[i + 1] ** 2 * -torch.expm1(-2 * tau**2 * h)
        mean, cov = F @ mean + kappa * k, F @ cov @ F.T + noise * eye
    if not denoise:
        return mean, cov
    K, k = denoiser(steps - 1)
    return K @ mean + k, K @ cov @ K.T


def within(values, truth, errors=4.0):
    """The mean of independent values (n, ...) is `truth` within 4 standard errors."""
    off = (values.mean(0) - truth).abs()
    error = values.std(0) / math.sqrt(len(values))
    assert (off <= errors * error + 1e-12).all(), (off / error, values.mean(0), truth)


# --- the evidence is unbiased, the posterior exact ------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resample_below": 1.0},
        {"resample_below": 0.0},
        {"method": "mmps"},
        {"method": "tmpd", "tau": 0.7},
        {"data_std": 0.4, "resample_below": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("sde", [sde_lib.VPSDE(), sde_lib.EDM()], ids=["vp", "edm"])
def test_the_evidence_is_unbiased_for_the_discretised_model(sde, options):
    bed, noise, steps, repeats = GaussianBed(sde, MEAN2, COV2), 0.4, 12, 3000
    y = Y.expand(repeats, 1)  # as many independent runs
    result = twisted_smc(
        bed.score_fn,
        sde,
        FIRST,
        y,
        noise,
        particles=6,
        steps=steps,
        dtype=torch.float64,
        generator=generator(),
        **options,
    )
    mean, cov = discretised(bed, steps, options.get("tau", 1.0))
    truth = bed.log_evidence(FIRST, Y, noise, mean, cov)
    within(torch.exp(result.log_evidence - truth), 1.0)
    # And the product of the evidence and the mean of any function, such as x_0 itself.
    posterior = bed.posterior(FIRST, Y, noise, mean, cov)[0]
    within(torch.exp(result.log_evidence - truth)[:, None] * result.mean(), posterior)


def test_the_discretised_evidence_tends_to_that_of_the_data():
    sde = sde_lib.EDM()
    bed = GaussianBed(sde, MEAN2, COV2)
    truth = bed.log_evidence(FIRST, Y, 0.4)
    off = [
        abs(bed.log_evidence(FIRST, Y, 0.4, *discretised(bed, steps)) - truth)
        for steps in (50, 100, 200)
    ]
    assert off[2] < 0.01 and off[0] / off[1] > 1.7 and off[1] / off[2] > 1.7


@pytest.mark.parametrize("method", ["pigdm", "mmps", "tmpd"])
def test_many_particles_have_the_posterior_mean_and_covariance_of_images(method):
    sde, shape, steps = sde_lib.VPSDE(), (1, 4, 4), 20
    bed = GaussianBed(sde, torch.zeros(shape), stationary(shape, 1.0, 0.5))
    A, y = random_operator(shape, 3), torch.tensor([[0.5, -1.0, 0.3]], dtype=torch.float64)
    model = discretised(bed, steps)
    mean, cov = bed.posterior(A, y, 0.3, *model)
    runs = []
    for seed in range(8):
        r = twisted_smc(
            bed.score_fn,
            sde,
            A,
            y.expand(4, 3),
            0.3,
            particles=500,
            steps=steps,
            method=method,
            generator=generator(seed),
            dtype=torch.float64,
        )
        x, w = r.x.flatten(2), r.log_weights.exp()
        off = x - mean
        runs.append((r.mean().flatten(1), torch.einsum("bk,bki,bkj->bij", w, off, off)))
    means, covs = (torch.cat(v) for v in zip(*runs, strict=True))
    # 32 runs; a standard error estimated from them, and 16 + 256 claims at once.
    within(means, mean, 6.0)
    within(covs, cov, 6.0)


def test_it_returns_the_denoised_state_or_the_state():
    sde, times = sde_lib.VPSDE(), torch.tensor([0.02], dtype=torch.float64)
    bed = GaussianBed(sde, MEAN2, COV2)
    x, D = (small(eps=0.02, denoise=denoise).x for denoise in (False, True))
    assert torch.allclose(bed.score_fn.denoise(x.flatten(0, 1), times.expand(30)), D.flatten(0, 1))
    assert not torch.allclose(x, D, atol=1e-3)


def test_weights_mend_a_biased_guide():
    sde, steps, noise, poor = sde_lib.VPSDE(), 60, 0.5, {"data_std": 0.3}
    bed = GaussianBed(sde, MEAN2, COV2)
    exact = bed.posterior(FIRST, Y, noise, *discretised(bed, steps))
    score = posterior_score(bed.score_fn, sde, FIRST, Y, noise, "pigdm", **poor)
    mean, low, _ = distance(*sampler_moments(bed, score, "tau_exponential", steps), *exact)
    assert mean > 0.1 and low < 0.9
    result = twisted_smc(
        bed.score_fn,
        sde,
        FIRST,
        Y,
        noise,
        particles=20_000,
        steps=steps,
        generator=generator(),
        dtype=torch.float64,
        **poor,
    )
    mean, low, high = distance(*weighted_moments(result), *exact)
    assert max(mean, 1 - low, abs(high - 1)) < 0.03


def weighted_moments(result):
    """Of the particles of the first measurement."""
    x, w = result.x[0].flatten(1), result.log_weights[0].exp()
    mean = (w[:, None] * x).sum(0)
    return mean, (w[:, None] * (x - mean)).T @ (x - mean)


# --- a mixture -------------------------------------------------------------------------------


def mixture(sde):
    return MixtureBed(
        sde,
        torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.3]]),
        torch.tensor([0.25, 0.25, 0.4]),
        torch.tensor([0.2, 0.5, 0.3]),
    )


def test_on_a_mixture_the_particles_are_exact_where_guidance_is_not():
    sde, noise = sde_lib.VPSDE(), 0.5
    bed, A = mixture(sde), Dense(torch.tensor([[0.8, 0.6]]), (2,))
    y = torch.tensor([[0.3]], dtype=torch.float64)
    truth = bed.posterior(A, y, noise)
    edges = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)
    result = twisted_smc(
        bed.score_fn, sde, A, y, noise, particles=5000, steps=100, generator=generator()
    )
    ours = total_variation(result.x[0], result.log_weights[0], truth, edges)
    assert abs(result.log_evidence[0] - bed.log_evidence(A, y, noise)) < 0.05
    maker = methods.get_inverse_solver("mmps")
    sampler = maker(
        sde,
        (5000, 2),
        A,
        y,
        noise=noise,
        steps=100,
        schedule="logsnr",
        generator=generator(),
    )
    guided = total_variation(sampler(bed.score_fn)[0], None, truth, edges)
    assert ours < 0.09 < 0.12 < guided


# --- options ---------------------------------------------------------------------------------


def small(**options):
    sde = options.pop("sde", sde_lib.VPSDE())
    bed = GaussianBed(sde, MEAN2, COV2)
    given = {"particles": 10, "steps": 8, "generator": generator(), "dtype": torch.float64}
    y = options.pop("y", torch.tensor([[1.2], [-0.4], [0.1]], dtype=torch.float64))
    noise = options.pop("noise", 0.3)
    if "seeds" in options:
        given.pop("generator")
    model = options.pop("model", bed.score_fn)
    operator = options.pop("operator", FIRST)
    return twisted_smc(model, sde, operator, y, noise, **{**given, **options})


def test_shapes_counts_and_weights():
    r = small(method="mmps", iterations=1, tol=0.0)
    assert r.x.shape == (3, 10, 2) and r.log_weights.shape == (3, 10)
    assert r.log_evidence.shape == (3,) and r.ess.shape == (8, 3)
    assert (r.nfe, r.vjps) == (8, 14)  # no guidance at the last time
    assert torch.allclose(r.log_weights.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert (r.ess >= 1 - 1e-9).all() and (r.ess <= 10 + 1e-9).all()


def test_chunks_change_nothing_but_memory():
    seen = []
    bed = GaussianBed(sde_lib.VPSDE(), MEAN2, COV2)

    def score(x, t):
        seen.append(len(x))
        return bed.score(x, t)

    whole = small()
    parts = small(model=as_score_function(score, bed.sde), chunk=7)
    assert max(seen) == 7
    assert torch.allclose(whole.x, parts.x, atol=1e-9)
    assert torch.allclose(whole.log_evidence, parts.log_evidence, atol=1e-9)
    assert (whole.nfe, whole.vjps) == (parts.nfe, parts.vjps)


def test_seeds_make_a_measurement_independent_of_the_others():
    y = torch.tensor([[1.2], [-0.4], [0.1]], dtype=torch.float64)
    for share in (0.5, 1.0):
        whole = small(seeds=[1, 2, 3], resample_below=share)
        alone = small(y=y[1:2], seeds=[2], resample_below=share)
        assert torch.allclose(whole.x[1], alone.x[0], atol=1e-9)
        assert torch.allclose(whole.log_evidence[1], alone.log_evidence[0], atol=1e-9)
        drawn, same = whole.draw(4, seeds=[1, 2, 3]), alone.draw(4, seeds=[2])
        assert torch.allclose(drawn[1], same[0], atol=1e-9)
    assert torch.equal(small().x, small().x)  # the same generator


def test_conditions_have_a_row_for_each_measurement():
    bed = GaussianBed(sde_lib.VPSDE(), MEAN2, COV2)

    class Told(torch.nn.Module):
        parametrization = "score"

        def forward(self, x, t, y=None):
            assert y is not None and len(y) == len(x)
            return bed.score(x, t / 999) * y[:, None]

    model = Told().double()
    labels = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    r = small(model=model, conditions={"y": labels}, chunk=4)
    plain = small()
    assert torch.allclose(r.x[:2], plain.x[:2], atol=1e-9)
    assert not torch.allclose(r.x[2], plain.x[2], atol=1e-3)


def test_resampling_follows_the_effective_sample_size():
    never, always = small(resample_below=0.0), small(resample_below=1.0)
    assert (never.ess[-1] < always.ess[-1] + 10).all()
    never = small(noise=0.05, resample_below=0.0, data_std=0.3)
    ours = small(noise=0.05, resample_below=0.5, data_std=0.3)
    assert torch.equal(never.ess[0], ours.ess[0])
    assert never.ess[-1].mean() < ours.ess[-1].mean()


def test_drawn_samples_follow_the_weights():
    x = torch.arange(4.0).reshape(1, 4, 1)
    log_w = torch.log(torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64))
    p = Particles(x, log_w, torch.zeros(1), torch.zeros(1, 1), 1, 1)
    drawn = p.draw(4000, generator())
    counts = torch.bincount(drawn.long().flatten(), minlength=4)
    assert (counts - torch.tensor([2000, 1000, 1000, 0])).abs().max() <= 1
    assert torch.allclose(p.mean(), torch.tensor([[0.75]]))


def test_the_callback_sees_every_time():
    seen = []
    small(callback=lambda i, t, x, ess: seen.append((i, t, tuple(x.shape), tuple(ess.shape))))
    assert [s[0] for s in seen] == list(range(8))
    assert seen[0][1] == 1.0 and seen[-1][1] == pytest.approx(1e-3)
    assert seen[0][2:] == ((3, 10, 2), (3,))


def test_a_users_process_and_a_bound_one_will_do():
    sde = UserSDE()
    bed = GaussianBed(sde, torch.zeros(1, 2, 2), 0.3 * torch.eye(4).double())
    A = random_operator((1, 2, 2), 2)
    y = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    r = small(sde=sde, model=bed.score_fn, operator=A, y=y, particles=1000, steps=50)
    mean, cov = bed.posterior(A, y, 0.3)
    assert ((r.mean()[0].flatten() - mean).abs() < 6 * (cov.diagonal() / 500).sqrt()).all()
    towards = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    bound = sde_lib.OUVE().bind(towards)
    bed = GaussianBed(bound, MEAN2, 0.1 * COV2)
    r = small(sde=bound, model=bed.score_fn, y=Y, particles=50, steps=20)
    # The data lie away from y, so the process's prior is far from its law at T: only the
    # likelihood's pull is claimed here, and that nothing depends on where the origin is.
    free = GaussianBed(sde_lib.OUVE(), MEAN2 - towards[0], 0.1 * COV2)
    same = small(
        sde=free.sde,
        model=free.score_fn,
        y=Y - FIRST(towards),
        particles=50,
        steps=20,
    )
    assert torch.allclose(r.x, same.x + towards, atol=1e-8)
    assert torch.allclose(r.log_evidence, same.log_evidence, atol=1e-8)


def test_by_name_it_draws_samples_without_weights():
    sde = sde_lib.VPSDE()
    bed, maker = GaussianBed(sde, MEAN2, COV2), methods.get_inverse_solver("smc")
    options = {"noise": 0.3, "steps": 30, "generator": generator()}
    x, nfe = maker(sde, (2000, 2), FIRST, Y, **options)(bed.score_fn)
    mean, cov = bed.posterior(FIRST, Y, 0.3)
    assert x.shape == (2000, 2) and nfe == 30
    assert ((x.mean(0) - mean).abs() < 6 * (cov.diagonal() / 1000).sqrt() + 0.02).all()
    y = Y.expand(5, 1)
    x, _ = maker(sde, (5, 2), FIRST, y, **options)(bed.score_fn)
    assert x.shape == (5, 2)


def test_wrong_arguments_are_refused():
    for words, options in (
        ("noise > 0", {"noise": 0.0}),
        ("particles ≥ 1", {"particles": 0}),
        ("tau > 0", {"tau": 0.0}),
        ("resample_below", {"resample_below": 1.5}),
        ("chunk ≥ 1", {"chunk": 0}),
        ("3 seeds", {"seeds": [1]}),
        ("measurement of shape", {"y": torch.zeros(3, 2)}),
        ("'dps' approximates no", {"method": "dps"}),
        ("has no option 'zeta'", {"zeta": 1.0}),
        ("unknown; known", {"method": "magic"}),
        ("steps ≥ 1", {"steps": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            small(**options)


def test_a_state_that_is_not_finite_is_named_with_its_time():
    with pytest.raises(FloatingPointError, match="t = "):
        small(model=lambda x, t: x * math.nan)


def test_the_noise_of_the_proposal_is_that_of_the_model():
    """p(x_s | x_t)/q(x_s | x_t), against the two densities written out."""
    from controllable_generation_smc import _Run
    from sampling_noise import NoiseSource

    sde = sde_lib.VPSDE()
    bed = GaussianBed(sde, MEAN2, COV2)
    score = posterior_score(bed.score_fn, sde, FIRST, Y, 0.3, "pigdm")
    run = _Run(score, Y, 5, 5, {})
    run.noise = NoiseSource(generator())
    t, s = torch.tensor([0.6, 0.5], dtype=torch.float64)
    x = torch.randn(1, 5, 2, generator=generator(), dtype=torch.float64)
    guide = run.guide(x, t)
    moved, log_ratio = run.move(x, guide.D, guide.shift, t, s, 1.0)
    (a_t, s_t), (a_s, s_s) = sde_lib.alpha_sigma(sde, t), sde_lib.alpha_sigma(sde, s)
    var = s_s**2 * (1 - (a_t / a_s) ** 2 * s_s**2 / s_t**2)

    def mean(D):
        return a_t / a_s * s_s**2 / s_t**2 * x + a_s * (1 - (a_t * s_s / (a_s * s_t)) ** 2) * D

    p = torch.distributions.Normal(mean(guide.D), var.sqrt()).log_prob(moved).sum(2)
    q = torch.distributions.Normal(mean(guide.D + guide.shift), var.sqrt()).log_prob(moved).sum(2)
    assert torch.allclose(log_ratio, p - q, atol=1e-6)


def test_a_denoiser_that_fails_at_the_last_time_is_named():
    bed = GaussianBed(sde_lib.VPSDE(), MEAN2, COV2)

    def score(x, t):
        return torch.where((t < 2e-3)[:, None], math.nan, bed.score_fn(x, t))

    with pytest.raises(FloatingPointError, match=r"t = 0\.001"):
        small(model=as_score_function(score, bed.sde))


def test_half_precision_and_what_is_no_count_are_refused():
    for words, options in (
        ("float32 or torch.float64", {"dtype": torch.bfloat16}),
        ("particles: expected an integer", {"particles": 2.5}),
        ("chunk: expected an integer", {"chunk": "a"}),
        ("tau: expected a number", {"tau": "a"}),
        ("one per measurement", {"seeds": 3}),
    ):
        with pytest.raises(ValueError, match=words):
            small(**options)
