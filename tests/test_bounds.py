"""Bounds on the likelihood against closed forms, for every process and estimator; the bound as an
objective; the logit transform."""

import functools
import math

import numpy as np
import pytest
import torch
import toys
import toys_paths
from toys_bounds import COVARIANCES, MEAN, NAMES, Bed, D, Design, eps_of, every_sde, points

import losses
import sampling
import sde_lib
from likelihood_bounds import get_elbo_fn, path_factor, tau_of
from likelihood_objective import get_elbo_loss_fn
from parametrization import as_score_function
from randomness import Draws

X_0 = points(1)[0]


def exact_mean(bed, x_0=X_0, **options):
    """The bound's exact mean over z, its time integral by the midpoint rule.

    The rule's error falls as the square of its points where the integrand has a slope at the ends
    in λ, as OUVE's has at T; else it is smaller than any power.
    """
    many = 600 if isinstance(bed.sde, sde_lib.OUVE) else 200
    options = {"eps": eps_of(bed.sde), "points": many} | options
    if options.get("form") == "implicit":
        options["trace"] = "exact"
    design = Design()
    result = get_elbo_fn(bed.sde, **options)(bed.model(), design.batch(x_0), draws=design)
    return {k: v.mean().item() for k, v in result.terms.items()} | {
        "logp": result.logp.mean().item()
    }


@pytest.mark.parametrize("form", ["score", "implicit"])
@pytest.mark.parametrize("name", NAMES)
def test_with_exact_score_and_prior_the_bound_is_log_p_eps_by_quadrature(name, form):
    bed = Bed(every_sde()[name])
    eps = eps_of(bed.sde)
    found = exact_mean(bed, form=form, offset=False)
    assert found["logp"] == pytest.approx(bed.log_p_eps_given(X_0, eps), abs=1e-6)
    if form == "implicit":
        found = exact_mean(bed, form=form, start="eps")
        assert found["logp"] == pytest.approx(bed.log_p_eps(X_0, eps), abs=1e-6)


@pytest.mark.parametrize("covariance", sorted(COVARIANCES))
@pytest.mark.parametrize("form", ["score", "implicit"])
@pytest.mark.parametrize("name", NAMES)
def test_with_exact_score_and_prior_the_bound_is_log_p_eps_within_four_errors(
    name, form, covariance
):
    bed, n = Bed(every_sde()[name], covariance), 500
    eps = eps_of(bed.sde)
    x = torch.from_numpy(X_0).reshape(1, 1, 1, D).expand(n, 1, 1, D)
    fn = get_elbo_fn(bed.sde, eps=eps, points=4, form=form, offset=False)
    found = fn(bed.model(), x, draws=Draws(3, 0, 0, n))
    error = (found.error**2).sum().sqrt() / n
    assert abs(found.logp.mean() - bed.log_p_eps_given(X_0, eps)) <= 4 * error
    # …and the errors that are reported are those of the spread between images.
    assert error.item() == pytest.approx((found.logp.std() / n**0.5).item(), rel=0.25)


@pytest.mark.parametrize("form", ["score", "implicit"])
@pytest.mark.parametrize("name", NAMES)
def test_with_a_wrong_score_and_the_coded_prior_the_bound_lacks_the_closed_form_gap(name, form):
    bed = Bed(every_sde()[name], gamma=0.8, exact_prior=False)
    eps = eps_of(bed.sde)
    x_0 = points(2, seed=1)[1]
    gap, exact = bed.gap(x_0, eps), bed.log_p_eps_given(x_0, eps)
    found = exact_mean(bed, x_0, form=form, offset=False)["logp"]
    assert gap > 0.02 and found < exact
    assert found == pytest.approx(exact - gap, abs=2e-6)
    assert bed.bound(x_0, eps) == pytest.approx(exact - gap, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_offset_is_the_closed_form_and_vanishes_with_eps_for_exact_scores(name):
    bed = Bed(every_sde()[name], gamma=0.9)
    eps = eps_of(bed.sde)
    found = exact_mean(bed, points=2)
    assert found["offset"] == pytest.approx(bed.offset(X_0, eps), abs=1e-10)
    assert found["logp"] == pytest.approx(sum(found[k] for k in ("prior", "path", "offset")))
    if name in ("vp", "rectified_flow", "cosine"):
        bed = Bed(every_sde()[name])
        gaps = [
            bed.log_p_eps_given(X_0, e) + bed.offset(X_0, e) - _log_p_0(X_0, bed)
            for e in (1e-2, 1e-3, 1e-4)
        ]
        assert abs(gaps[2]) < 1e-4 and abs(gaps[0]) > abs(gaps[1]) > abs(gaps[2])
        found = exact_mean(bed, eps=1e-4, points=400)["logp"]
        assert found == pytest.approx(_log_p_0(X_0, bed), abs=1e-4)


def _log_p_0(x, bed):
    normal = torch.distributions.MultivariateNormal(torch.from_numpy(MEAN), torch.from_numpy(bed.C))
    return normal.log_prob(torch.from_numpy(x)).item()


@pytest.mark.parametrize("times", [("likelihood", 0.0), ("likelihood", 0.05), ("uniform", 0.0)])
@pytest.mark.parametrize("form", ["score", "implicit"])
@pytest.mark.parametrize("name", ["vp", "ve", "edm", "rectified_flow"])
def test_every_density_of_times_has_the_same_mean(name, form, times):
    bed, n = Bed(every_sde()[name], gamma=0.9), 2000
    eps = 0.02
    x = torch.from_numpy(X_0).reshape(1, 1, 1, D).expand(n, 1, 1, D)
    options = {"times": times[0], "truncate": times[1], "offset": False}
    fn = get_elbo_fn(bed.sde, eps=eps, points=2, form=form, **options)
    found = fn(bed.model(), x, draws=Draws(5, 0, 0, n))
    error = found.logp.std() / n**0.5
    assert abs(found.logp.mean() - bed.bound(X_0, eps)) <= 4 * error


def test_times_uniform_in_lambda_have_less_variance_than_uniform_ones():
    bed, n = Bed(every_sde()["vp"]), 1000
    x = torch.from_numpy(X_0).reshape(1, 1, 1, D).expand(n, 1, 1, D)
    spread = {}
    for times, truncate in (("likelihood", 0.0), ("likelihood", 1e-3), ("uniform", 0.0)):
        fn = get_elbo_fn(bed.sde, eps=1e-5, times=times, truncate=truncate, form="implicit")
        spread[times, truncate] = fn(bed.model(), x, draws=Draws(6, 0, 0, n)).logp.std().item()
    assert spread["likelihood", 0.0] < spread["likelihood", 1e-3] < spread["uniform", 0.0]


def test_more_points_cost_evaluations_and_lower_the_error():
    bed, n = Bed(every_sde()["vp"]), 300
    x = torch.from_numpy(X_0).reshape(1, 1, 1, D).expand(n, 1, 1, D)
    errors = []
    for count in (2, 8, 32):
        bed.calls = 0
        found = get_elbo_fn(bed.sde, eps=1e-3, points=count)(bed.model(), x)
        assert (found.nfe == bed.calls).all() and bed.calls == count + max(2, count // 8)
        errors.append((found.error**2).mean().sqrt().item())
    # Strata gain more than a square root.
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]
    one = get_elbo_fn(bed.sde, eps=1e-3, points=1)(bed.model(), x)
    assert one.error.isnan().all() and one.logp.isfinite().all() and (one.nfe == 2).all()


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9])
def test_the_family_without_simulation_costs_huangs_factor_and_stays_a_bound(lam):
    bed = Bed(every_sde()["vp"], gamma=0.9, exact_prior=False)
    eps, c = 1e-3, path_factor(lam)
    assert c == pytest.approx((1 - lam / 2) ** 2 / (1 - lam)) and c >= 1
    for form in ("score", "implicit"):
        found = exact_mean(bed, lam=lam, form=form)
        bound = bed.bound(X_0, eps, c)
        assert found["prior"] + found["path"] == pytest.approx(bound, abs=2e-6 * c)
        assert bound < bed.log_p_eps_given(X_0, eps, tau_of(lam))


def test_the_ode_is_refused_with_the_remedy():
    for lam in (1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"0 ≤ lam < 1.*get_ode_likelihood_fn"):
            get_elbo_fn(sde_lib.VPSDE(), lam=lam)
    assert tau_of(0.0) == 1 and tau_of(1.0) == 0 and tau_of(0.75) == 0.5


@pytest.mark.parametrize(
    ("name", "predictor"),
    [
        *((n, "tau_exponential") for n in ("vp", "ve", "rectified_flow", "edm", "user")),
        ("vp", "tau_euler"),
    ],
)
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_family_samples_the_data_for_every_lambda(name, predictor, lam):
    bed, n = Bed(every_sde()[name], "anisotropic"), 4000
    cls = functools.partial(sampling.get_predictor(predictor), tau=tau_of(lam))
    options = {"eps": 1e-3 if name != "user" else 1e-5, "steps": 100, "schedule": "logsnr"}
    sampler = sampling.get_pc_sampler(bed.sde, (n, 1, 1, D), cls, None, lambda x: x, 0.1, **options)
    torch.manual_seed(0)
    x = sampler(bed.model())[0].reshape(n, D)
    std = torch.tensor(np.sqrt(np.diag(bed.C)), dtype=x.dtype)
    # Four standard errors of the mean, and of the deviation with 5 % for the steps.
    assert ((x.mean(0) - torch.tensor(MEAN, dtype=x.dtype)) / std).abs().max() < 0.08
    assert (x.std(0) / std - 1).abs().max() < 0.045 + 0.05


@pytest.mark.parametrize("form", ["score", "implicit"])
def test_an_images_bound_depends_on_neither_batch_nor_its_mates(form):
    bed, n = Bed(every_sde()["vp"]), 6
    x = torch.randn(n, 1, 1, D, dtype=torch.float64)
    fn = get_elbo_fn(bed.sde, eps=1e-3, points=4, form=form)
    whole = fn(bed.model(), x, draws=Draws(1, 0, 0, n))
    parts = [fn(bed.model(), x[i : i + 2], draws=Draws(1, 0, i, 2)) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat([p.logp for p in parts]), whole.logp)
    torch.testing.assert_close(torch.cat([p.error for p in parts]), whole.error)
    assert not torch.equal(fn(bed.model(), x, draws=Draws(2, 0, 0, n)).logp, whole.logp)


@pytest.mark.parametrize("form", ["score", "implicit"])
def test_inference_mode_and_gradients_change_nothing(form):
    sde = sde_lib.VPSDE()
    net = toys.AsModel(sde, toys.gaussian_score(sde, 0.0, 0.3))
    x, draws = 0.3 * torch.randn(3, 2, 4), Draws(0, 0, 0, 3)
    fn = get_elbo_fn(sde, points=4, form=form)
    outside = fn(net, x, draws=draws)
    with torch.inference_mode():
        inside = fn(net, x.clone(), draws=draws)
    with torch.enable_grad():
        watched = fn(net, x.clone().requires_grad_(True), draws=draws)
    for other in (inside, watched):
        torch.testing.assert_close(other.logp, outside.logp)
        assert not other.logp.requires_grad


def test_float32_and_float64_agree():
    sde = sde_lib.VPSDE()
    x = 0.3 * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    score = as_score_function(toys.gaussian_score(sde, 0.0, 0.3), sde)
    fn, draws = get_elbo_fn(sde, points=8), Draws(0, 0, 0, 4)
    one, two = (fn(score, x.to(kind), draws=draws) for kind in (torch.float32, torch.float64))
    assert (one.logp - two.logp).abs().max() < 0.01  # of 192 dimensions
    assert one.logp.dtype == two.logp.dtype == torch.float64


def test_a_process_towards_an_observation_has_its_bound():
    """x − y follows the free process, so that its bound is the free one of x − y."""
    free = sde_lib.OUVE()
    y = torch.randn(1, 1, 1, D, dtype=torch.float64)
    bound, n = free.bind(y), 400
    score = toys.gaussian_score(free, 0.0, 0.5)
    x = 0.5 * torch.randn(n, 1, 1, D, dtype=torch.float64)
    for options in ({}, {"form": "implicit"}, {"form": "implicit", "start": "eps"}):
        draws = Draws(1, 0, 0, n)
        one = get_elbo_fn(free, eps=0.03, **options)(as_score_function(score, free), x, draws=draws)
        two = get_elbo_fn(bound, eps=0.03, **options)(
            as_score_function(lambda u, t: score(u - y, t), bound), x + y, draws=draws
        )
        torch.testing.assert_close(one.logp, two.logp)


def test_a_network_that_predicts_the_drift_is_scored_as_any_other():
    from parametrization import Parametrization, ScoreFunction

    bed = Bed(every_sde()["vp"])
    score = bed.model()

    def drift(x, t):
        g = sde_lib.drift_diffusion(bed.sde, t, x)[1]
        return sde_lib.expand(g, x) * score(x, t)

    net = ScoreFunction(drift, bed.sde, Parametrization("drift", "t"))
    x, draws = torch.randn(4, 1, 1, D, dtype=torch.float64), Draws(0, 0, 0, 4)
    for form in ("score", "implicit"):
        fn = get_elbo_fn(bed.sde, eps=1e-3, form=form)
        torch.testing.assert_close(fn(net, x, draws=draws).logp, fn(score, x, draws=draws).logp)


def test_hidden_derivatives_are_refused_by_the_implicit_form_alone():
    sde, x = sde_lib.VPSDE(), torch.randn(3, 1, 2, 2)
    model = torch.no_grad()(toys.AsModel(sde, toys.gaussian_score(sde, 0.0, 0.3)))
    assert get_elbo_fn(sde)(model, x).logp.isfinite().all()
    with pytest.raises(ValueError, match="carries no gradient"):
        get_elbo_fn(sde, form="implicit")(model, x)


class Cubic(toys.UserSDE):
    def sde(self, x, t):
        return -(x**3), torch.ones_like(t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "dsm"}, "form 'dsm' of a bound is unknown; known: score, implicit"),
        ({"times": "lognormal"}, "times 'lognormal' of a bound is unknown"),
        ({"points": 3}, "points=1 or even, got 3"),
        ({"points": 0}, "points=1 or even, got 0"),
        ({"eps": 0.0}, "0 < eps < 1, with σ"),
        ({"eps": 1.0}, "0 < eps < 1"),
        ({"start": "eps"}, "start='eps' needs form='implicit' and lam=0"),
        ({"start": "eps", "form": "implicit", "lam": 0.5}, "needs form='implicit' and lam=0"),
        ({"start": "T"}, "start 'T' of a bound is unknown"),
        ({"times": "uniform", "truncate": 0.1}, "truncate is of times='likelihood'"),
    ],
)
def test_impossible_bounds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get_elbo_fn(sde_lib.VPSDE(), **options)


def test_processes_that_are_not_affine_and_discrete_data_are_refused():
    with pytest.raises(ValueError, match="is not affine in x"):
        get_elbo_fn(Cubic())
    fn = get_elbo_fn(sde_lib.VPSDE())
    with pytest.raises(ValueError, match=r"dequantised data in floating point, got torch\.uint8"):
        fn(lambda x, y: x, torch.zeros(2, 3, dtype=torch.uint8))


# --- the objective ---------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(D + 1, 16), torch.nn.SiLU(), torch.nn.Linear(16, D)
        )

    def forward(self, x, labels):
        t = (labels / 999).reshape(-1, 1).to(x)
        return self.inner(torch.cat([x.flatten(1), t], dim=1)).reshape(x.shape)


def gradients(objective, net, x, draws):
    net.zero_grad()
    loss = objective(net, x, draws=draws)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().clone() for p in net.parameters()])


@pytest.mark.parametrize("truncate", [0.0, 0.05])
@pytest.mark.parametrize("reduce_mean", [True, False])
@pytest.mark.parametrize("name", ["vp", "subvp", "cosine", "rectified_flow", "user"])
def test_the_objective_is_the_likelihood_weighting_with_importance_sampling(
    name, reduce_mean, truncate
):
    sde, eps, n = every_sde()[name], 1e-3, 16
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(n, 1, 1, D, dtype=torch.float64)
    times = sde_lib.LikelihoodTimes(sde, eps, truncate=truncate)
    old = losses.get_sde_loss_fn(
        sde, True, reduce_mean, eps=eps, weighting="likelihood", time_sampler=times
    )
    new = get_elbo_loss_fn(sde, eps=eps, time_sampler=times, reduce_mean=reduce_mean)
    draws = Draws(0, 0, 0, n)
    (a, slope), (b, other) = (gradients(fn, net, x, draws) for fn in (old, new))
    # A mean there is of ‖·‖², a sum of ½ ‖·‖²; the bound's is the integral of ½ g² ‖·‖².
    factor = (sde.T - eps) * (0.5 if reduce_mean else 1.0)
    torch.testing.assert_close(b, factor * a, rtol=1e-4, atol=0)
    torch.testing.assert_close(other, factor * slope, rtol=1e-3, atol=1e-6)
    assert torch.equal(new.per_image(net, x, draws=draws)[1], old.per_image(net, x, draws=draws)[1])


def test_both_forms_of_the_objective_have_one_mean_and_one_gradient():
    sde, eps, n = sde_lib.VPSDE(), 0.1, 40000
    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(n, 1, 1, D, dtype=torch.float64)
    found = [
        gradients(get_elbo_loss_fn(sde, eps=eps, form=form), net, x, None)
        for form in ("score", "implicit")
    ]
    (a, slope), (b, other) = found
    assert b.item() == pytest.approx(a.item(), rel=0.03)
    assert torch.nn.functional.cosine_similarity(slope, other, dim=0) > 0.99
    assert other.norm().item() == pytest.approx(slope.norm().item(), rel=0.05)


def test_the_objective_is_the_path_term_of_the_bound():
    bed, n, eps = Bed(every_sde()["vp"], gamma=0.9), 4000, 1e-3
    x = torch.from_numpy(X_0).reshape(1, 1, 1, D).expand(n, 1, 1, D)
    path = exact_mean(bed, eps=eps)["path"]
    a, s = (sde_lib.alpha_sigma(bed.sde, torch.tensor([u]))[1].item() for u in (eps, 1.0))
    wanted = D * math.log(s / a) - path
    for form in ("score", "implicit"):
        objective = get_elbo_loss_fn(bed.sde, eps=eps, form=form, reduce_mean=False)
        with torch.no_grad():
            values, t = objective.per_image(bed.model(), x, draws=Draws(0, 0, 0, n))
        assert values.shape == t.shape == (n,) and not values.requires_grad
        assert abs(values.mean() - wanted) <= 4 * values.std() / n**0.5


def test_the_objective_takes_a_step_and_conditions_and_lowers_the_loss():
    sde, n = sde_lib.VPSDE(), 64
    torch.manual_seed(0)
    net = Net()
    objective = get_elbo_loss_fn(sde, eps=1e-3, lam=0.5)
    plain = get_elbo_loss_fn(sde, eps=1e-3)
    x, draws = 0.3 * torch.randn(n, 1, 1, D), Draws(0, 0, 0, n)
    ratio = objective(net, x, draws=draws) / plain(net, x, draws=draws)
    assert ratio.item() == pytest.approx(path_factor(0.5), rel=1e-5)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    before = plain(net, x, draws=draws).item()
    for _ in range(60):
        optimizer.zero_grad()
        plain(net, x, draws=draws).backward()
        optimizer.step()
    assert plain(net, x, draws=draws).item() < 0.7 * before
    seen = []

    def conditioned(x, labels, y):
        seen.append(y)
        return 0 * x

    plain(conditioned, x, y=torch.zeros(n))
    assert len(seen) == 1
    with pytest.raises(ValueError, match="form 'ism' of a bound is unknown"):
        get_elbo_loss_fn(sde, form="ism")


def test_every_process_of_the_toys_has_its_name():
    assert toys_paths.every_sde().keys() == set(NAMES)


def test_a_bound_of_no_data_is_no_number_for_every_trace():
    for trace in ("rademacher", "exact"):
        elbo = get_elbo_fn(sde_lib.VPSDE(), form="implicit", trace=trace)
        assert elbo(lambda x, t: -x, torch.randn(0, 3)).logp.shape == (0,)


def test_a_number_of_times_that_is_no_whole_number_is_refused():
    with pytest.raises(ValueError, match=r"points: expected an integer, got 2.0"):
        get_elbo_fn(sde_lib.VPSDE(), points=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lam: expected a number, got 'a'"):
        get_elbo_fn(sde_lib.VPSDE(), lam="a")  # type: ignore[arg-type]
