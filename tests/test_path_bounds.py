"""Bounds along simulated paths: the importance-weighted one of a discrete chain, and the family
between the SDE and the ODE."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from toys_bounds import (
    MEAN,
    NAMES,
    Bed,
    D,
    at_lambda,
    eps_of,
    every_sde,
    lambdas,
    log_normal,
    points,
)

import sde_lib
from likelihood_bounds import get_elbo_fn, path_factor, tau_of
from likelihood_family import get_family_bound_fn
from likelihood_paths import get_path_bound_fn, importance_error, importance_weighted
from parametrization import as_score_function
from randomness import Draws

X_0 = points(1)[0]


def rows(n, x_0=X_0):
    return torch.from_numpy(x_0).reshape(1, 1, 1, D).expand(n, 1, 1, D).clone()


# --- the discrete chain ----------------------------------------------------------------------


def chain_density(bed, eps, steps, tau):
    """Mean and covariance of x_0 under the chain, step by step."""
    mean, cov, eye = bed.m_T, bed.S_T, np.eye(D)
    lam = np.linspace(*lambdas(bed.sde, eps), steps + 1)

    def denoiser(a, s):
        K = bed.gamma * np.linalg.inv(a**2 * bed.C + s**2 * eye)
        return (eye - s**2 * K) / a, s**2 * K @ MEAN  # D = (x − σ² K (x − α m))/α

    for now, then in itertools.pairwise(lam):
        (a, s), (a_s, s_s), h = at_lambda(bed.sde, now), at_lambda(bed.sde, then), then - now
        slope, shift = denoiser(a, s)
        weight = -a_s * math.expm1(-(1 + tau**2) * h)
        A = s_s / s * math.exp(-(tau**2) * h) * eye + weight * slope
        mean = A @ mean + weight * shift
        cov = A @ cov @ A.T - s_s**2 * math.expm1(-2 * tau**2 * h) * eye
    a, s = at_lambda(bed.sde, lam[-1])
    slope, shift = denoiser(a, s)
    return slope @ mean + shift, slope @ cov @ slope.T + (s / a) ** 2 * eye


@pytest.mark.parametrize("lam", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_the_weights_of_paths_have_the_chains_own_density_as_their_mean(name, lam):
    bed, n = Bed(every_sde()[name], gamma=0.9, exact_prior=False), 20000
    eps, steps = 0.1, 10
    torch.manual_seed(0)
    fn = get_path_bound_fn(bed.sde, steps=steps, lam=lam, eps=eps)
    x_0 = MEAN + 0.1
    found = fn(bed.model(), rows(n, x_0))
    truth = log_normal(x_0, *chain_density(bed, eps, steps, tau_of(lam)))
    logw = found.logp
    assert logw.mean() < truth
    w = torch.exp(logw - truth)
    error = w.std() / n**0.5
    assert error < 0.15 and abs(w.mean() - 1) <= 4 * error


def test_the_chain_nears_the_bound_of_the_continuous_model_as_steps_grow():
    for lam, factor in ((0.0, 1.0), (0.5, path_factor(0.5))):
        bed, n = Bed(every_sde()["vp"], gamma=0.9, exact_prior=False), 1000
        eps = 1e-2
        limit = bed.bound(X_0, eps, factor) + bed.offset(X_0, eps)
        gaps = []
        for steps in (25, 50, 100):
            torch.manual_seed(0)
            found = get_path_bound_fn(bed.sde, steps=steps, lam=lam, eps=eps)(bed.model(), rows(n))
            error = found.logp.std() / n**0.5
            gaps.append((limit - found.logp.mean()).item())
        # First order in the step: the Richardson value is the limit within its noise.
        assert gaps[0] > gaps[1] > gaps[2] > 0
        assert abs(2 * gaps[2] - gaps[1]) < 0.25 * gaps[2] + 8 * error


def test_importance_weighting_is_monotone_over_all_subsets_of_one_set_of_weights():
    """The mean over the subsets of k weights rises in k, exactly (Burda et al. 2016)."""
    torch.manual_seed(0)
    logw = 3 * torch.randn(7, 5, dtype=torch.float64)
    means = [
        torch.stack(
            [importance_weighted(logw[list(s)]) for s in itertools.combinations(range(7), k)]
        ).mean(0)
        for k in range(1, 8)
    ]
    assert all((b >= a).all() for a, b in itertools.pairwise(means))
    assert (means[-1] > means[0] + 0.5).all()
    torch.testing.assert_close(means[0], logw.mean(0))
    torch.testing.assert_close(means[-1], logw.exp().mean(0).log())


def test_importance_weighting_does_not_overflow_and_takes_float32():
    logw = torch.tensor([[-9000.0, 9000.0], [-9001.0, 9001.0]])
    wanted = torch.tensor([-9000.0, 9001.0]).double() + math.log((1 + math.exp(-1)) / 2)
    torch.testing.assert_close(importance_weighted(logw), wanted)
    assert importance_error(logw).isfinite().all() and importance_error(logw[:1]).isnan().all()


def test_the_error_of_importance_weighting_is_the_spread_where_weights_are_even():
    torch.manual_seed(0)
    logw = 0.3 * torch.randn(64, 3000, dtype=torch.float64)
    spread = importance_weighted(logw).std()
    assert importance_error(logw).mean().item() == pytest.approx(spread.item(), rel=0.05)


def test_more_paths_raise_the_bound_towards_the_chains_density():
    bed, n, eps, steps = Bed(every_sde()["vp"], exact_prior=False), 400, 0.02, 20
    truth = log_normal(X_0, *chain_density(bed, eps, steps, 1.0))
    means = []
    for paths in (1, 4, 32):
        torch.manual_seed(paths)
        bed.calls = 0
        found = get_path_bound_fn(bed.sde, paths=paths, steps=steps, eps=eps)(bed.model(), rows(n))
        assert (found.nfe == bed.calls).all() and bed.calls == paths * (steps + 1)
        total = torch.stack(list(found.terms.values())).sum(0)
        torch.testing.assert_close(total, found.logp)
        assert (found.terms["importance"] >= -1e-12).all()
        means.append(found.logp.mean().item())
    assert means[0] < means[1] < means[2] < truth + 0.02
    assert truth - means[2] < 0.2 * (truth - means[0])


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_an_exact_posterior_is_tight_at_once(lam):
    """Data that are one point: every path has the same weight."""
    sde = every_sde()["vp"]
    bed = Bed(sde)
    bed.C = 1e-30 * np.eye(D)
    a, s = (c.item() for c in sde_lib.alpha_sigma(sde, torch.tensor([1.0], dtype=torch.float64)))
    bed.m_T, bed.S_T = a * MEAN, s**2 * np.eye(D)
    for paths in (1, 5):
        fn = get_path_bound_fn(bed.sde, paths=paths, steps=10, lam=lam, eps=1e-2)
        found = fn(bed.model(), rows(6, MEAN))
        a, s = at_lambda(sde, lambdas(sde, 1e-2)[1])
        truth = log_normal(np.zeros(D), np.zeros(D), (s / a) ** 2 * np.eye(D))
        torch.testing.assert_close(
            found.logp, torch.full_like(found.logp, truth), rtol=0, atol=1e-9
        )


BOUNDS = {
    "elbo": (get_elbo_fn, {}),
    "implicit": (get_elbo_fn, {"form": "implicit"}),
    "family": (get_family_bound_fn, {"lam": 0.5, "steps": 4}),
    "paths": (get_path_bound_fn, {"paths": 2, "steps": 4}),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_what_is_not_a_number_is_an_error_that_names_the_image(name):
    make, options = BOUNDS[name]
    sde, x = sde_lib.VPSDE(), torch.randn(4, 1, 2, 2)
    x[2] = float("nan")
    with pytest.raises(ValueError, match="finite data, got 1 of 4 samples"):
        make(sde, **options)(as_score_function(lambda y, t: -y, sde), x)
    with pytest.raises(FloatingPointError, match=r"image 0 of 2 such is not a number.*'path': nan"):
        make(sde, **options)(as_score_function(lambda y, t: y * float("nan"), sde), x[:2])


@pytest.mark.parametrize("name", BOUNDS)
def test_an_empty_batch_has_no_bounds(name):
    make, options = BOUNDS[name]
    sde = sde_lib.VPSDE()
    found = make(sde, **options)(as_score_function(lambda y, t: -y, sde), torch.zeros(0, 1, 2, 2))
    assert found.logp.shape == found.error.shape == found.nfe.shape == (0,)


@pytest.mark.parametrize("kind", ["paths", "family"])
def test_numbers_of_an_image_depend_on_neither_batch_nor_its_mates(kind):
    bed, n = Bed(every_sde()["vp"]), 4
    make = {"paths": get_path_bound_fn, "family": get_family_bound_fn}[kind]
    fn = make(bed.sde, paths=3, steps=6, eps=1e-2, lam=0.4)
    x = torch.randn(n, 1, 1, D, dtype=torch.float64)
    whole = fn(bed.model(), x, draws=Draws(1, 0, 0, n))
    parts = [fn(bed.model(), x[i : i + 2], draws=Draws(1, 0, i, 2)) for i in (0, 2)]
    for name in ("logp", "error", "nfe"):
        torch.testing.assert_close(
            torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)
        )
    with torch.inference_mode():
        inside = fn(bed.model(), x.clone(), draws=Draws(1, 0, 0, n))
    torch.testing.assert_close(inside.logp, whole.logp)


# --- the family by simulation ----------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_with_exact_score_and_prior_every_member_gives_log_p_eps(name, lam):
    bed, n = Bed(every_sde()[name]), 100
    eps = eps_of(bed.sde)
    torch.manual_seed(0)
    fn = get_family_bound_fn(bed.sde, lam=lam, steps=60, eps=eps, trace="exact")
    found = fn(bed.model(), rows(n))
    truth = bed.log_p_eps(X_0, eps)
    # Weak order 2: 0.1 at 60 steps, see below; and noise of order ½ that λ_H = 1 lacks.
    assert abs(found.logp.mean() - truth) <= 4 * found.logp.std() / n**0.5 + 0.2
    if lam == 1:
        assert found.logp.std() < 1e-12 and (found.error == 0).all()
        assert torch.isfinite(found.code).all()


def test_the_ode_end_of_the_family_has_order_two_and_is_the_ode():
    for gamma in (1.0, 0.8):
        bed, eps = Bed(every_sde()["vp"], gamma=gamma, exact_prior=False), 1e-3
        truth = bed.log_p_eps(X_0, eps, tau=0.0)
        errors = []
        for steps in (60, 120, 240):
            fn = get_family_bound_fn(bed.sde, lam=1.0, steps=steps, eps=eps, trace="exact")
            found = fn(bed.model(), rows(1))
            errors.append(abs(found.logp.item() - truth))
            assert found.nfe.item() == 2 * steps + 1
        orders = np.log2(np.divide(errors[:-1], errors[1:]))
        assert (orders > 1.8).all() and errors[-1] < 5e-3


def family_bound(bed, x_0, eps, lam):
    """E[log π(x_T) − …] of the family by its linear SDE's moments, on a fine grid.

    In y and V: dy = ½ λ_H γ (C + V)⁻¹ (y − m) dV + τ dW, and the rate of the integral is
    −½ τ² ‖s_y‖² − ½ (1 + τ²) ∇·s_y, s_y = −γ (C + V)⁻¹ (y − m).
    """
    tau2 = 1 - lam
    values, U = np.linalg.eigh(bed.C)
    low, high = lambdas(bed.sde, eps)
    grid = np.linspace(high, low, 40001)
    V = np.exp(-2 * grid)[:, None]
    (a_T, _), (a, _) = at_lambda(bed.sde, low), at_lambda(bed.sde, high)
    start = U.T @ (x_0 / a - MEAN)
    p = lam * bed.gamma  # mean ∝ (c + V)^{p/2}; var' = p var/(c + V) + τ²
    mean = start * ((values + V) / (values + V[0])) ** (p / 2)
    up, down = values + V, values + V[0]
    var = tau2 * up**p * (up ** (1 - p) - down ** (1 - p)) / (1 - p) if p != 1 else None
    K = bed.gamma / up
    rate = -0.5 * tau2 * (K**2 * (mean**2 + var)).sum(1) + 0.5 * (1 + tau2) * K.sum(1)
    path = trapezoid(rate * V[:, 0], -2 * grid)
    m_T = a_T * (U @ mean[-1] + MEAN)
    C_T = a_T**2 * U @ np.diag(var[-1]) @ U.T
    prior = log_normal(m_T, bed.m_T, bed.S_T) - 0.5 * np.trace(np.linalg.solve(bed.S_T, C_T))
    return prior + path + D * math.log(a_T / a)


@pytest.mark.parametrize("exact", [True, False])
def test_with_a_wrong_score_members_lack_a_gap_that_closes_towards_the_ode(exact):
    """Against closed forms alone; with the exact score and prior there is no gap."""
    bed = Bed(every_sde()["vp"], gamma=1.0 if exact else 0.8, exact_prior=exact)
    eps, gaps = 1e-3, []
    for lam in (0.0, 0.5, 0.9, 0.99, 0.999):
        bound, truth = family_bound(bed, X_0, eps, lam), bed.log_p_eps(X_0, eps, tau_of(lam))
        gaps.append(truth - bound)
    if exact:
        assert np.abs(gaps).max() < 1e-5
    else:
        assert min(gaps) > 0 and gaps[-1] < 2e-3 and gaps[-1] < gaps[-2] < gaps[-3]
        ode = bed.log_p_eps(X_0, eps, 0.0)
        assert abs(bound - ode) < 0.02


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9])
def test_simulated_bounds_are_the_closed_form_within_four_errors(lam):
    bed, n = Bed(every_sde()["vp"], gamma=0.8, exact_prior=False), 500
    eps = 1e-2
    torch.manual_seed(1)
    fn = get_family_bound_fn(bed.sde, lam=lam, steps=100, paths=2, eps=eps, trace="exact")
    found = fn(bed.model(), rows(n))
    error = found.logp.std() / n**0.5
    assert abs(found.logp.mean() - family_bound(bed, X_0, eps, lam)) <= 4 * error + 0.02
    assert (found.error**2).mean().sqrt().item() == pytest.approx(found.logp.std().item(), rel=0.15)


def test_the_sde_end_of_the_family_is_the_bound_without_simulation():
    bed, eps = Bed(every_sde()["vp"], gamma=0.9, exact_prior=False), 1e-2
    n = 3000
    one = get_elbo_fn(bed.sde, eps=eps, form="implicit", start="eps", points=4)
    torch.manual_seed(2)
    found = one(bed.model(), rows(n))
    error = found.logp.std() / n**0.5
    assert abs(found.logp.mean() - family_bound(bed, X_0, eps, 0.0)) <= 4 * error


def test_a_bound_process_and_float32_go_through_the_family_and_the_chain():
    free = sde_lib.OUVE()
    y = torch.randn(1, 1, 1, D)
    bound, x = free.bind(y), 0.5 * torch.randn(4, 1, 1, D)

    def score(x, t):
        a, s = (sde_lib.expand(c, x) for c in sde_lib.alpha_sigma(free, t, x))
        return -x / (a**2 * 0.25 + s**2)

    for make in (get_path_bound_fn, get_family_bound_fn):
        draws = Draws(0, 0, 0, 4)
        fns = [make(sde, steps=20, eps=0.03, lam=0.5) for sde in (free, bound)]
        one = fns[0](as_score_function(score, free), x, draws=draws)
        two = fns[1](as_score_function(lambda u, t: score(u - y, t), bound), x + y, draws=draws)
        torch.testing.assert_close(one.logp, two.logp, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (get_path_bound_fn, {"lam": 1.0}, "get_ode_likelihood_fn"),
        (get_path_bound_fn, {"paths": 0}, "paths ≥ 1"),
        (get_path_bound_fn, {"eps": 0.0}, "0 < eps < 1"),
        (get_family_bound_fn, {"lam": 1.2}, "0 ≤ lam ≤ 1"),
        (get_family_bound_fn, {"steps": 0}, "steps ≥ 1"),
        (get_family_bound_fn, {"trace": "hutch"}, "trace 'hutch' is unknown"),
    ],
)
def test_impossible_settings_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(sde_lib.VPSDE(), **options)
    for make in (get_path_bound_fn, get_family_bound_fn):
        with pytest.raises(ValueError, match="dequantised data in floating point"):
            make(sde_lib.VPSDE())(lambda x, y: x, torch.zeros(2, 3, dtype=torch.uint8))
