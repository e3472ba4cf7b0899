"""Solvers are held to the orders they declare, on data with closed forms, along every path.

Weak orders are exact numbers: a linear sampler's affine map gives mean and variance at eps, without
Monte Carlo.
"""

import math

import pytest
import torch
import toys_solvers as toys
from toys import gaussian_score
from toys_solvers import MEAN, PATHS, STD, Gaussian, Mixture, grid, ids, members, paths, run

import sde_lib
import solvers

ODES, SDES = list(members(False)), list(members(True))
STEPS = (64, 128)
#: In λ these are much as VP, VE and rectified flow.
ALIKE = ("subvp", "linear ve", "cosine")
EVERY_PATH = [pytest.param(p, marks=pytest.mark.slow) if p in ALIKE else p for p in PATHS]
SLACK = 0.2


def make(case, sde, score):
    _, cls, options = case
    return cls(sde, score, **options)


def observed_order(case, sde, data, lam_end):
    """log₂ of the ratio of errors at 64 and 128 steps, against the exact probability flow."""
    errors = []
    for steps in STEPS:
        times = grid(sde, steps, lam_end)
        x = toys.start_points(sde, times[0])
        exact = data.flow(x, times[0], times[-1])
        errors.append((run(make(case, sde, data), x, times)[0] - exact).square().mean().item())
    return 0.5 * math.log2(errors[0] / errors[1])


# --- deterministic --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ODES, ids=ids(ODES))
@pytest.mark.parametrize("path", EVERY_PATH)
def test_order_on_a_mixture_is_at_least_the_declared_one(path, case):
    sde = paths()[path]
    declared = make(case, sde, None).order
    assert observed_order(case, sde, Mixture(sde), 2.0) >= declared - SLACK


@pytest.mark.parametrize("case", ODES, ids=ids(ODES))
@pytest.mark.parametrize(
    "path", [p if p in ("vp", "ouve") else pytest.param(p, marks=pytest.mark.slow) for p in PATHS]
)
def test_order_on_an_anisotropic_gaussian_is_at_least_the_declared_one(path, case):
    # To λ = −log c: beyond, ∫ p p''' over all λ cancels the leading term of some.
    sde = paths()[path]
    declared = make(case, sde, None).order
    assert observed_order(case, sde, Gaussian(sde), -math.log(0.3)) >= declared - SLACK


def test_the_published_3m_is_of_order_2_and_the_right_one_of_order_3():
    sde = sde_lib.VPSDE()
    cls = solvers.DPMpp3MPredictor
    right, legacy = (
        observed_order(("", cls, {"legacy_3m": flag}), sde, Mixture(sde), 2.0)
        for flag in (False, True)
    )
    assert cls(sde, None).order == 3 and cls(sde, None, legacy_3m=True).order == 2
    assert right > 2.9 and 1.9 < legacy < 2.4


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_the_corrector_of_unipc_raises_the_order_by_one(p, variant):
    sde = sde_lib.VPSDE()
    options = {"order": p, "variant": variant}
    for corrector, order in ((False, p), (True, p + 1)):
        case = ("", solvers.UniPCPredictor, options | {"corrector": corrector})
        assert make(case, sde, None).order == order
        assert observed_order(case, sde, Mixture(sde), 2.0) >= order - SLACK


@pytest.mark.parametrize(
    ("q", "c"),
    [(1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (2, 2), (3, 3), (4, 4), (1, 2), (2, 3), (3, 1)],
)
def test_sa_solver_without_noise_is_of_order_q_and_corrected_of_one_more(q, c):
    sde = sde_lib.VPSDE()
    options = {"predictor_order": q, "corrector_order": c, "tau": 0.0}
    case = ("", solvers.SASolverPredictor, options)
    order = make(case, sde, None).order
    assert order == (min(q, c) + 1 if c else q)
    assert observed_order(case, sde, Mixture(sde), 2.0) >= order - SLACK


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("q", [1, 4])
def test_exp_ab_has_the_order_it_is_asked_for(form, q):
    sde = sde_lib.VPSDE()
    case = ("", solvers.ExponentialAdamsBashforthPredictor, {"order": q, "form": form})
    assert observed_order(case, sde, Mixture(sde), 2.0) >= q - SLACK


# --- stochastic -----------------------------------------------------------------------------


def weak_errors(case, sde, lam_end=2.0, steps=STEPS):
    errors = []
    for n in steps:
        data, times = Gaussian(sde), grid(sde, n, lam_end)
        mean, var = toys.moments_at_end(make(case, sde, data), data, times)
        exact_mean, exact_var = data.moments(times[-1:], mean)
        errors.append(max((mean - exact_mean).abs().max(), (var - exact_var).abs().max()).item())
    return errors


@pytest.mark.parametrize("case", SDES, ids=ids(SDES))
@pytest.mark.parametrize("path", EVERY_PATH)
def test_weak_order_is_at_least_the_declared_one(path, case):
    sde = paths()[path]
    coarse, fine = weak_errors(case, sde)
    assert math.log2(coarse / fine) >= make(case, sde, None).order - SLACK


@pytest.mark.parametrize(("q", "c"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (4, 4)])
def test_sa_solver_with_noise_has_weak_order_two_at_most(q, c):
    sde = sde_lib.VPSDE()
    options = {"predictor_order": q, "corrector_order": c, "interval": (0.0, 1.0)}
    case = ("", solvers.SASolverPredictor, options)
    order = make(case, sde, None).order
    assert order == (1 if (q, c) == (1, 0) else 2)
    coarse, fine = weak_errors(case, sde)
    assert order - SLACK <= math.log2(coarse / fine)


@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 1.0, 1.4])
def test_every_tau_has_the_same_marginals(path, tau):
    sde = paths()[path]
    sa = {"tau": tau, "interval": (0.0, 1.0)}
    assert max(weak_errors(("", solvers.SASolverPredictor, sa), sde, steps=(128,))) < 2e-3
    assert (
        max(weak_errors(("", solvers.TauExponentialPredictor, {"tau": tau}), sde, 2.0, (128,)))
        < 0.1
    )
    assert max(weak_errors(("", solvers.TauEulerPredictor, {"tau": tau}), sde, 2.0, (256,))) < 0.1


def test_tau_of_a_function_is_read_at_the_beginning_of_each_step():
    sde, seen = sde_lib.VPSDE(), []
    times = grid(sde, 4)
    tau = lambda t: seen.append(t) or 0.5  # noqa: E731
    run(
        solvers.SASolverPredictor(sde, Gaussian(sde), tau=tau),
        toys.start_points(sde, times[0]),
        times,
    )
    assert seen == times[:-1].tolist()


def test_exponential_integrator_of_the_reverse_sde_has_strong_order_one():
    # Driven by the fine run's noise: over a coarse step Σ_k e^{−(λ_s−λ_k)} √(1−e^{−2h_k}) z_k.
    sde, fine = sde_lib.VPSDE(), 256
    data = Gaussian(sde)
    lam = torch.linspace(-5, 2, fine + 1, dtype=torch.float64).clamp(min=-4.99)

    def influence(every):
        knots = lam[::every]
        solver = solvers.TauExponentialPredictor(sde, data)
        times = sde_lib.time_of_half_log_snr(sde, knots)
        return toys.affine_map(solver, times)[2]

    exact, errors = influence(1), []
    carry = torch.sqrt(-torch.expm1(-2 * lam.diff()))
    for every in (8, 4):
        coarse = influence(every).repeat_interleave(every, dim=0)
        end = lam[every::every].repeat_interleave(every)
        h = (lam[every::every] - lam[:-1:every]).repeat_interleave(every)
        share = torch.exp(lam[1:] - end) * carry / torch.sqrt(-torch.expm1(-2 * h))
        errors.append((share.reshape(-1, 1, 1, 1) * coarse - exact).square().sum().sqrt())
    assert math.log2(errors[0] / errors[1]) > 1 - SLACK


# --- exactness ------------------------------------------------------------------------------


#: Euler's method is exact for no process.
EXACT_ODES, EXACT_SDES = ([c for c in cases if "euler" not in c[0]] for cases in (ODES, SDES))


def coarse_grid(sde, intervals):
    """A few times uniform in λ, from −5 or T to 4 or eps."""
    ends = torch.tensor([float(sde.T), sde.sampling_eps], dtype=torch.float64)
    low, high = sde_lib.half_log_snr(sde, ends).clamp(-5, 4)
    u = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    return sde_lib.time_of_half_log_snr(sde, low + u * (high - low)).clamp(ends[1], ends[0])


@pytest.mark.parametrize("case", EXACT_ODES, ids=ids(EXACT_ODES))
@pytest.mark.parametrize("path", EVERY_PATH)
def test_ode_solvers_are_exact_for_a_point_mass_in_one_step(path, case):
    sde = paths()[path]
    times = coarse_grid(sde, 1)
    x = toys.start_points(sde, times[0])
    data = Gaussian(sde, MEAN, 0 * STD)
    out, mean = run(make(case, sde, data), x, times)
    exact = data.flow(x, *times)
    assert torch.allclose(out, exact, rtol=1e-8, atol=1e-9)
    assert torch.allclose(mean, MEAN.expand_as(mean), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", EXACT_SDES, ids=ids(EXACT_SDES))
@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("steps", [1, 3])
def test_sde_solvers_have_the_exact_variance_for_a_point_mass(path, case, steps):
    sde = paths()[path]
    times = coarse_grid(sde, steps)
    data = Gaussian(sde, MEAN, 0 * STD)
    mean, var = toys.moments_at_end(make(case, sde, data), data, times)
    exact_mean, exact_var = data.moments(times[-1:], mean)
    assert torch.allclose(mean, exact_mean, rtol=1e-8, atol=1e-8)
    assert torch.allclose(var, exact_var, rtol=1e-6)


# --- evaluations ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ODES + SDES, ids=ids(ODES + SDES))
def test_evaluations_are_as_declared(case):
    sde = sde_lib.VPSDE()
    data = Gaussian(sde)
    solver = make(case, sde, data)
    times = torch.linspace(1, 1e-3, 7, dtype=torch.float64)
    run(solver, toys.start_points(sde, times[0]), times)
    assert data.calls == 6 * solver.nfe_per_step + 1


def test_the_toy_score_is_the_shared_one():
    sde = sde_lib.VPSDE()
    x, t = torch.randn(3, 2, 1, 1).double(), torch.tensor([0.2, 0.5, 0.9]).double()
    assert torch.allclose(Gaussian(sde, 0.5, 0.3)(x, t), gaussian_score(sde, 0.5, 0.3)(x, t))
