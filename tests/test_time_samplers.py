"""Distributions of training times: densities by quadrature, reproducibility, variance."""

import math

import pytest
import torch
import toys
from toys_paths import every_sde

import sde_lib
from configs.validation import complete
from randomness import Draws
from sde_lib import get_time_sampler

NAMES = ["uniform", "likelihood", "lognormal", "logitnormal"]
SDES = ["ve", "vp", "subvp", "user", "cosine", "edm", "linear_ve", "rectified_flow", "ouve", "long"]
EPS = 1e-3
MEAN, STD = 0.4, 0.3


def make(name):
    return toys.LongSDE() if name == "long" else every_sde()[name]


def sampler_of(name, sde, eps=EPS, **training):
    settings = {"sde": "vpsde", "eps": eps, "time_sampler": name, **training}
    return get_time_sampler(complete({"training": settings}), sde)


def cases():
    for name in NAMES:
        for sde in SDES:
            yield pytest.param(name, {}, sde, id=f"{name}-{sde}")
    for sde in ("vp", "edm", "rectified_flow"):
        yield pytest.param("likelihood", {"truncate": 0.02}, sde, id=f"truncated-{sde}")
        for name in ("lognormal", "logitnormal"):
            options = {"time_mean": 0.7, "time_std": 0.6}
            yield pytest.param(name, options, sde, id=f"{name}-set-{sde}")


def mass(sampler, low, high, n=20_000):
    """∫ p dt from low to high, (k,), by the midpoint rule in logit(t/T): both ends are steep."""
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    low, high = (
        torch.logit(torch.as_tensor(v, dtype=torch.float64) / sampler.T, eps=1e-15).reshape(-1, 1)
        for v in (low, high)
    )
    share = torch.sigmoid(low + middle * (high - low))
    p = sampler.density(sampler.T * share.reshape(-1)).reshape(share.shape)
    return ((p * sampler.T * share * (1 - share)).mean(1) * (high - low)[:, 0]).squeeze()


@pytest.mark.parametrize(("name", "options", "sde"), list(cases()))
def test_density_is_normalised_and_is_that_of_the_quantiles(name, options, sde):
    sampler = sampler_of(name, make(sde), **options)
    low, high = sampler.eps, sampler.T
    assert mass(sampler, low, high, 100_000).item() == pytest.approx(1, abs=1e-6)
    u = torch.linspace(0.01, 0.99, 15, dtype=torch.float64)
    t = sampler.quantile(u)
    assert ((t >= low) & (t <= high)).all() and (t.diff() > 0).all()
    shares = mass(sampler, t[:-1], t[1:])
    torch.testing.assert_close(shares, u.diff(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "options", "sde"), list(cases()))
def test_times_are_float32_within_eps_and_T_and_rise_with_the_number(name, options, sde):
    sde = make(sde)
    sampler = sampler_of(name, sde, **options)
    t = sampler(1000, "cpu")
    assert t.dtype == torch.float32 and t.shape == (1000,)
    ends = sampler.quantile(torch.tensor([0.0, 1 - 2**-24]))
    assert torch.isfinite(ends).all() and ends[0].item() == pytest.approx(EPS, rel=1e-3)
    assert t.min() >= EPS * (1 - 1e-5) and t.max() <= float(sde.T) * (1 + 1e-6)
    assert torch.isfinite(sampler.density(t)).all() and (sampler.density(t) > 0).all()
    assert sampler.importance == (name == "likelihood")


def test_uniform_times_are_bit_for_bit_those_of_score_sde():
    sde = make("vp")
    torch.manual_seed(5)
    wanted = torch.rand(64, device="cpu") * (sde.T - EPS) + EPS
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(sampler_of("uniform", sde)(64, "cpu"), wanted)
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stratified", [False, True])
def test_times_depend_on_seed_step_and_global_index_alone(name, stratified):
    sampler = sampler_of(name, make("vp"), stratified=stratified)
    whole = sampler(12, "cpu", Draws(1, 7, 0, 12))
    parts = [sampler(4, "cpu", Draws(1, 7, first, 4, 12)) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    second_half = Draws(1, 7, 0, 12).rows(6, 12)
    assert torch.equal(sampler(6, "cpu", second_half), whole[6:])
    assert not torch.equal(sampler(12, "cpu", Draws(1, 8, 0, 12)), whole)
    with pytest.raises(ValueError, match="draws for 5 images, got 12"):
        sampler(5, "cpu", Draws(1, 7, 0, 12))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draws", [None, Draws(3, 1, 0, 64)], ids=["global", "draws"])
def test_a_stratified_batch_has_one_time_in_every_part_of_the_distribution(name, draws):
    sampler = sampler_of(name, make("vp"), stratified=True)
    t, _ = sampler(64, "cpu", draws).double().sort()
    low = torch.full_like(t, sampler.eps)
    u = mass(sampler, low, t.clamp(min=sampler.eps * (1 + 1e-9)), 5_000)
    # Parts are moved by a shared number, so gaps between neighbours are below two parts.
    assert (u.diff() < 2 / 64 + 1e-3).all() and u[0] < 2 / 64 and u[-1] > 1 - 2 / 64


def test_each_stratified_time_has_the_whole_distribution():
    """Over steps the first image's time is uniform: no image always gets the smallest times."""
    sampler = sampler_of("uniform", make("vp"), stratified=True)
    first = torch.cat([sampler(1, "cpu", Draws(1, step, 0, 1, 8)) for step in range(2000)])
    counts = torch.histc(first, 10, 0, 1)
    assert ((counts - 200).abs() < 5 * 200**0.5).all()


# --- what importance sampling is for ------------------------------------------------------------


def moments_of_the_loss(sampler, sde, n=50_000):
    """Mean and variance over t, z and x_0 of g² ‖s + z/σ‖²/(p (T − eps)) for the score s = 0.

    Per number g²/σ² z², with E z² = 1 and E z⁴ = 3, integrated by quadrature over u.
    """
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t = sampler.quantile(u).clamp(sampler.eps, sampler.T)
    sigma = sde_lib.alpha_sigma(sde, t)[1]
    weight = (sde_lib.drift_diffusion(sde, t)[1] / sigma) ** 2
    if sampler.importance:
        weight = weight / (sampler.density(t) * (sampler.T - sampler.eps))
    mean = weight.mean()
    return mean.item(), (3 * (weight**2).mean() - mean**2).item()


@pytest.mark.parametrize("sde", SDES)
def test_importance_sampled_times_leave_the_likelihood_loss_unbiased(sde):
    """The mean is ∫ g²/σ² dt/(T − eps) = 2 (λ_eps − λ_T)/(T − eps), for any truncation."""
    process = make(sde)
    ends = torch.tensor([EPS, float(process.T)], dtype=torch.float64)
    high, low = sde_lib.half_log_snr(process, ends).tolist()
    truth = 2 * (high - low) / (float(process.T) - EPS)
    for options in ({}, {"truncate": 0.02}):
        mean, _ = moments_of_the_loss(sampler_of("likelihood", process, **options), process)
        assert mean == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("sde", SDES)
def test_importance_sampled_times_have_the_smaller_variance(sde):
    """The least possible, that of z² alone; the uniform one's is 6 times larger for VP."""
    process = make(sde)
    mean, least = moments_of_the_loss(sampler_of("likelihood", process), process)
    assert least == pytest.approx(2 * mean**2, rel=1e-3)
    _, uniform = moments_of_the_loss(sampler_of("uniform", process), process)
    times = {"vp": 6, "subvp": 11, "cosine": 150, "rectified_flow": 100, "linear_ve": 20}
    assert times.get(sde, 1 - 1e-6) * least < uniform
    _, between = moments_of_the_loss(sampler_of("likelihood", process, truncate=0.02), process)
    assert least * (1 - 1e-6) < between < uniform * (1 + 1e-6)


def test_lognormal_times_are_those_of_edm():
    sde = make("edm")
    sampler = sampler_of("lognormal", sde, eps=1e-5)
    torch.manual_seed(0)
    log_sigma = torch.log(sde.sigma(sampler(40_000, "cpu").double()))
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)


def test_lambda_of_likelihood_times_is_uniform():
    for name in ("vp", "edm", "rectified_flow"):
        sde = make(name)
        u = torch.linspace(0, 1, 11, dtype=torch.float64)
        steps = sde_lib.half_log_snr(sde, sampler_of("likelihood", sde).quantile(u)).diff()
        torch.testing.assert_close(steps, steps.mean().expand(10), rtol=1e-6, atol=1e-9)


def test_truncated_density_is_constant_below_the_cut():
    sampler = sampler_of("likelihood", make("vp"), truncate=0.02)
    p = sampler.density(torch.linspace(EPS, 0.02, 5, dtype=torch.float64))
    torch.testing.assert_close(p, p[-1].expand(5))
    assert sampler.density(torch.tensor([0.021]).double()) < p[-1]
    assert sampler_of("likelihood", make("vp"), truncate=1e-9).density(p * 0 + 0.5)[0] > 0


# --- registry and refusals --------------------------------------------------------------------


def test_a_users_time_sampler_needs_quantile_and_density_only(monkeypatch):
    import sde_lib_times

    monkeypatch.setattr(sde_lib_times, "_TIME_SAMPLERS", dict(sde_lib_times._TIME_SAMPLERS))

    @sde_lib.register_time_sampler(name="squares")
    class Squares(sde_lib.TimeSampler):
        def quantile(self, u):
            return self.eps + (self.T - self.eps) * u**2

        def density(self, t):
            return 0.5 / torch.sqrt((t - self.eps) * (self.T - self.eps))

    sampler = sampler_of("Squares", make("vp"), stratified=True)
    assert isinstance(sampler, Squares) and sampler.stratified
    assert sampler(100, "cpu").mean().item() == pytest.approx(1 / 3, abs=0.03)
    with pytest.raises(ValueError, match="already registered"):
        sde_lib.register_time_sampler(Squares, name="uniform")


def test_impossible_settings_are_refused():
    vp = make("vp")
    with pytest.raises(ValueError, match=r"time_sampler='even' is unknown; known"):
        sampler_of("even", vp)
    with pytest.raises(ValueError, match="0 ≤ eps < 1, got 1"):
        sampler_of("uniform", vp, eps=1.0)
    with pytest.raises(ValueError, match="truncate: expected 0 to 1"):
        sampler_of("likelihood", vp, truncate=1.5)
    with pytest.raises(ValueError, match=r"time_mean=1.0 needs training\.time_std"):
        sampler_of("lognormal", vp, time_mean=1.0)
    with pytest.raises(ValueError, match=r"outside of \(eps, T\)"):
        sampler_of("lognormal", vp, time_mean=90.0, time_std=1.0)
    with pytest.raises(ValueError, match=r"time_std.*-1"):
        sampler_of("lognormal", vp, time_std=-1.0)
    with pytest.raises(ValueError, match="λ is infinite"):
        sde_lib.LikelihoodTimes(vp, 0.0)

    class Cubic(toys.UserSDE):
        def sde(self, x, t):
            return -(x**3), torch.ones_like(t)

    with pytest.raises(ValueError, match="not affine"):
        sampler_of("likelihood", Cubic())
    assert math.isfinite(sampler_of("uniform", Cubic())(1, "cpu").item())
