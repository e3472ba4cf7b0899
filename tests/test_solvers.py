"""What solvers promise beside their order: identities, refusals, dtypes, devices, history."""

import functools
import itertools
import math

import pytest
import torch
import toys
import toys_solvers
from toys_solvers import MEAN, PATHS, Gaussian, Mixture, grid, ids, paths, run, start_points

import sampling
import sde_lib
import solvers
import solvers_base
from sampling import get_pc_sampler, get_predictor, time_grid

NAMES = [
    *("ddim", "heun", "edm", "dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m"),
    *("dpmpp_2m_sde", "exp_ab", "unipc", "sa_solver", "tau_euler", "tau_exponential"),
]
AFFINE = [n for n in NAMES if n != "tau_euler"]
CASES = solvers.catalogue()


class TanhSDE(toys.UserSDE):
    """A process whose drift is not affine."""

    def sde(self, x, t):
        return -torch.tanh(x), torch.ones_like(t)


def end(cls, sde, score, x, times, seed=0, **options):
    torch.manual_seed(seed)
    return run(cls(sde, score, **options), x, times)[0]


@pytest.fixture
def vp():
    sde = sde_lib.VPSDE()
    times = time_grid(sde, 1e-3, 12, "logsnr")
    return sde, Mixture(sde), start_points(sde, times[0]), times


# --- in the library -------------------------------------------------------------------------


def test_every_name_is_registered_and_in_the_catalogue():
    classes = {get_predictor(name) for name in NAMES}
    assert len(classes) == len(NAMES)
    assert classes == {cls for _, cls, _ in CASES}
    assert len({label for label, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_samples_through_the_loop_on_any_shape(name):
    sde = sde_lib.VPSDE()
    for shape in ((3, 2), (3, 5, 2), (3, 1, 2, 2)):
        sampler = get_pc_sampler(
            sde, shape, get_predictor(name), None, lambda x: x, 0.16, continuous=True, steps=8
        )
        x, nfe = sampler(toys.AsModel(sde, toys.gaussian_score(sde, 0.5, 0.2)))
        assert x.shape == shape and x.dtype == torch.float32 and torch.isfinite(x).all()
        assert nfe == 7 * get_predictor(name)(sde, None).nfe_per_step + 1
        assert abs(float(x.mean()) - 0.5) < 0.5


EXPONENTIAL = [case for case in CASES if "euler" not in case[0]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", EXPONENTIAL, ids=ids(EXPONENTIAL))
def test_twenty_steps_of_float32_come_close_to_the_data(path, case):
    _, cls, options = case
    sde = paths()[path]
    model = toys.AsModel(sde, toys.gaussian_score(sde, 0.5, 0.2))
    sampler = get_pc_sampler(
        sde,
        (512, 1, 1, 1),
        functools.partial(cls, **options),
        None,
        lambda x: x,
        0.16,
        continuous=True,
        steps=20,
        schedule="logsnr",
        eps=sde.sampling_eps,
        generator=torch.Generator().manual_seed(0),
    )
    x = sampler(model)[0]
    if path == "ouve":  # whose prior leaves out what is left of the data at T
        assert torch.isfinite(x).all()
        return
    assert abs(float(x.mean()) - 0.5) < 0.1
    assert 0.1 < float(x.std()) < 0.45


def test_multistep_solvers_refuse_a_corrector_and_others_take_it():
    sde = sde_lib.VPSDE()
    ald = sampling.get_corrector("ald")
    for label, cls, options in CASES:
        make = functools.partial(cls, **options)
        build = functools.partial(
            get_pc_sampler, sde, (2, 1, 2, 2), make, ald, lambda x: x, 0.1, continuous=True, steps=5
        )
        if make(sde, None).multistep:
            with pytest.raises(ValueError, match="use corrector 'none'"):
                build()
        else:
            x, _ = build()(toys.AsModel(sde, toys.gaussian_score(sde, 0.5, 0.2)))
            assert torch.isfinite(x).all(), label
    assert not solvers.ExponentialAdamsBashforthPredictor(sde, None, order=1).multistep
    assert not solvers.UniPCPredictor(sde, None, order=1, corrector=False).multistep


def test_classes_declare_what_they_are_by_default():
    for name in NAMES:
        cls = get_predictor(name)
        made = cls(sde_lib.VPSDE(), None)
        for attribute in ("order", "nfe_per_step", "stochastic", "multistep"):
            assert getattr(made, attribute) == getattr(cls, attribute), (name, attribute)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AFFINE)
def test_a_process_that_is_not_affine_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=r"not affine in x; use euler_maruyama.*tau_euler"):
        get_predictor(name)(TanhSDE(), None)


def test_tau_euler_runs_on_a_process_that_is_not_affine():
    times = torch.linspace(1, 1e-2, 6, dtype=torch.float64)
    x = run(
        solvers.TauEulerPredictor(TanhSDE(), lambda x, t: -x, tau=0.5),
        torch.ones(2, 1, 1, 1),
        times[:-1],
    )
    assert torch.isfinite(x[0]).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"eta": 1.5}, "0 ≤ eta ≤ 1"),
        ("ddim", {"eta": -0.1}, "0 ≤ eta ≤ 1"),
        ("heun", {"alpha": 0.0}, "0 < alpha ≤ 1"),
        ("heun", {"alpha": 1.2}, "0 < alpha ≤ 1"),
        ("edm", {"S_churn": -1.0}, "S_churn ≥ 0"),
        ("edm", {"S_min": 2.0, "S_max": 1.0}, "S_min ≤ S_max"),
        ("dpm_solver_2", {"r": 1.0}, "0 < r < 1"),
        ("dpmpp_2s", {"r": 0.0}, "0 < r < 1"),
        ("dpmpp_2m_sde", {"tau": -1.0}, "tau ≥ 0"),
        ("tau_euler", {"tau": -1.0}, "tau ≥ 0"),
        ("exp_ab", {"order": 5}, "order from 1 to 4"),
        ("exp_ab", {"order": 2.5}, "order from 1 to 4"),
        ("exp_ab", {"form": "score"}, "'data' and 'noise'"),
        ("unipc", {"order": 0}, "order from 1 to 4"),
        ("unipc", {"variant": "bh3"}, "'bh1' and 'bh2'"),
        ("sa_solver", {"predictor_order": 0}, "predictor_order from 1"),
        ("sa_solver", {"corrector_order": 5}, "corrector_order from 0"),
        ("sa_solver", {"interval": (0.8, 0.2)}, "interval"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_predictor(name)(sde_lib.VPSDE(), None, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"eta": 1.0}),
        ("edm", {"S_churn": 10.0}),
        ("tau_euler", {"tau": 0.5}),
        ("tau_exponential", {"tau": 0.5}),
        ("dpmpp_2m_sde", {"tau": 1.0}),
        ("sa_solver", {"tau": 1.0}),
        ("sa_solver", {"tau": lambda t: 0.5}),
    ],
)
def test_noise_and_the_probability_flow_exclude_each_other(name, options):
    with pytest.raises(ValueError, match="leave one of the two out"):
        get_predictor(name)(sde_lib.VPSDE(), None, True, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_probability_flow_makes_every_solver_deterministic(name, vp):
    sde, score, x, times = vp
    solver = get_predictor(name)(sde, score, True)
    assert not solver.stochastic
    solver.randn_like = None  # a call would fail
    run(solver, x, times)


def test_an_infinite_lambda_on_the_grid_is_refused_at_start():
    class Full(sde_lib.CosineVP):
        T = 1.0

        def lambda_(self, t):
            return torch.where(t >= 1, -math.inf, super().lambda_(t))

    solver = solvers.DDIMPredictor(Full(), lambda x, t: -x)
    with pytest.raises(
        ValueError, match=r"finite λ.*none at t = 1; start the schedule where λ = −10"
    ):
        solver.start(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    solver.start(torch.tensor([0.99, 0.5, 0.1], dtype=torch.float64))


# --- identities -----------------------------------------------------------------------------


def test_members_that_are_the_same_method_agree(vp):
    sde, score, x, times = vp
    s = solvers
    sa, ab, flow = s.SASolverPredictor, s.ExponentialAdamsBashforthPredictor, {"tau": 0.0}
    pairs = [
        ((s.DDIMPredictor, {}), (s.TauExponentialPredictor, flow)),
        ((s.DDIMPredictor, {"eta": 1.0}), (s.TauExponentialPredictor, {"tau": 1.0})),
        ((s.DDIMPredictor, {}), (ab, {"order": 1})),
        ((s.DDIMPredictor, {}), (ab, {"order": 1, "form": "noise"})),
        ((s.DDIMPredictor, {}), (s.UniPCPredictor, {"order": 1, "corrector": False})),
        ((s.DPMpp2MPredictor, {}), (s.DPMpp2MSDEPredictor, flow)),
        ((ab, {"order": 3}), (sa, flow | {"corrector_order": 0})),
        ((s.HeunPredictor, {}), (s.EDMPredictor, {})),
    ]
    for (cls, options), (other, others) in pairs:
        a, b = end(cls, sde, score, x, times, **options), end(other, sde, score, x, times, **others)
        assert torch.allclose(a, b, rtol=1e-10), (cls, other)


def test_third_order_predictors_in_data_form_are_one_method():
    # From the third step on; UniPC and 3M begin by the published second-order step.
    sde = sde_lib.VPSDE()
    score = Mixture(sde)
    times = grid(sde, 64)
    x = start_points(sde, times[0])
    a, b, c = (
        end(cls, sde, score, x, times, **options)
        for cls, options in (
            (solvers.DPMpp3MPredictor, {}),
            (solvers.ExponentialAdamsBashforthPredictor, {"order": 3}),
            (solvers.UniPCPredictor, {"order": 3, "corrector": False}),
        )
    )
    assert torch.allclose(a, b, rtol=1e-6) and torch.allclose(c, b, rtol=1e-6)


def test_ddim_with_eta_one_is_ancestral_sampling(vp):
    sde, score, x, times = vp
    ancestral = sampling.AncestralSamplingPredictor(sde, score)
    ddim = solvers.DDIMPredictor(sde, score, eta=1.0)
    for t, s in itertools.pairwise(times):
        for p in (ancestral, ddim):
            p.randn_like = torch.ones_like
        assert torch.allclose(ancestral.step(x, t, s)[0], ddim.step(x, t, s)[0], rtol=1e-10)


def test_tau_euler_with_tau_one_is_euler_maruyama(vp):
    sde, score, x, times = vp
    ours, theirs = (
        solvers.TauEulerPredictor(sde, score),
        sampling.EulerMaruyamaPredictor(sde, score),
    )
    for t, s in itertools.pairwise(times):
        for p in (ours, theirs):
            p.randn_like = torch.ones_like
        assert torch.allclose(ours.step(x, t, s)[0], theirs.step(x, t, s)[0], rtol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_a_bound_process_is_solved_about_its_observation(path, case):
    _, cls, options = case
    free, y = paths()[path], torch.tensor([1.5, -2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    times, data = grid(free, 8), Gaussian(free)
    x = start_points(free, times[0], 3)
    torch.manual_seed(0)
    expected = run(cls(free, data, **options), x, times)
    torch.manual_seed(0)
    found = run(cls(free.bind(y), lambda x, t: data(x - y, t), **options), x + y, times)
    assert all(torch.allclose(a + y, b, rtol=1e-9) for a, b in zip(expected, found, strict=True))


# --- noise of EDM and of SA-Solver ----------------------------------------------------------


def test_churn_lifts_the_noise_within_the_process_and_the_interval():
    sde = sde_lib.EDM()
    times = time_grid(sde, 0.0, 10)
    seen = []

    def score(x, t):
        seen.append(float(sde.sigma(t.double())[0]))
        return -x

    options = {"S_churn": 5.0, "S_min": 0.1, "S_max": 20.0}
    solver = solvers.EDMPredictor(sde, score, **options)
    run(solver, torch.zeros(1, 1, dtype=torch.float64), times)
    sigmas = sde.sigma(times).tolist()
    for sigma, first in zip(sigmas[:-1], seen[::2], strict=False):
        gamma = min(0.5, math.sqrt(2) - 1) if 0.1 <= sigma <= 20 else 0.0
        assert math.isclose(first, sigma * (1 + gamma), rel_tol=1e-9)
    seen.clear()
    run(
        solvers.EDMPredictor(sde, score, S_churn=5.0), torch.zeros(1, 1, dtype=torch.float64), times
    )
    assert max(seen) <= 80 * (1 + 1e-12)


def test_sa_solver_draws_noise_in_its_interval_alone():
    sde, draws = sde_lib.VPSDE(), []
    times = torch.linspace(1, 1e-3, 12, dtype=torch.float64)
    solver = solvers.SASolverPredictor(sde, Gaussian(sde), interval=(0.3, 0.6))
    solver.randn_like = lambda x: draws.append(1) or torch.zeros_like(x)
    run(solver, start_points(sde, times[0]), times)
    assert len(draws) == int(((times[:-1] >= 0.3) & (times[:-1] <= 0.6)).sum()) > 0


# --- history --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_start_forgets_what_was_before(case, vp):
    _, cls, options = case
    sde, score, x, times = vp
    solver = cls(sde, score, **options)
    torch.manual_seed(0)
    first = run(solver, x, times)
    solver.start(times)
    solver.step(x, times[0], times[1])
    torch.manual_seed(0)
    again = run(solver, x, times)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_a_step_from_elsewhere_uses_no_history(case, vp):
    _, cls, options = case
    sde, score, x, times = vp
    fresh, used = cls(sde, score, **options), cls(sde, score, **options)
    for solver in (fresh, used):
        solver.start(torch.linspace(1, 1e-3, 20, dtype=torch.float64))
        solver.randn_like = torch.ones_like
    for t, s in itertools.pairwise(times[:4]):
        used.step(x, t, s)
    a, b = (solver.step(x, times[6], times[8])[0] for solver in (fresh, used))
    assert torch.equal(a, b)


def test_the_last_steps_of_a_short_grid_lower_their_order(vp):
    sde, score, x, times = vp
    for cls, options in ((solvers.DPMpp3MPredictor, {}), (solvers.UniPCPredictor, {"order": 3})):
        orders = {}
        for low in (True, False):
            solver = cls(sde, score, lower_order_final=low, **options)
            used = orders[low] = []
            predict = solver.predict
            solver.predict = lambda x, t, s, q, used=used, predict=predict: (
                used.append(q) or predict(x, t, s, q)
            )
            run(solver, x, times[:8])
        assert orders[True] == [1, 2, 3, 3, 3, 3, 2] and orders[False] == [1, 2, 3, 3, 3, 3, 3]


# --- numbers and devices --------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_keeps_its_dtype_and_the_network_gets_times_of_it(case, dtype, vp):
    _, cls, options = case
    sde, mixture, x, times = vp

    def score(x, t):
        assert t.shape == (len(x),) and t.dtype == x.dtype == dtype
        return mixture(x.double(), t.double()).to(dtype)

    a = end(cls, sde, score, x.to(dtype), times, **options)
    assert a.dtype == dtype
    b = end(cls, sde, mixture, x.to(dtype).double(), times, **options)
    if not cls(sde, None, **options).stochastic:  # else other noise
        assert torch.allclose(a.double(), b, atol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_no_step_asks_the_device_for_a_value(case):
    # A tensor of the meta device has none to give.
    _, cls, options = case
    sde = sde_lib.VPSDE()
    times = torch.linspace(1, 1e-3, 6, dtype=torch.float64)
    solver = cls(sde, lambda x, t: -x, **options)
    out = run(solver, torch.zeros(2, 3, 4, 4, device="meta"), times)
    assert all(v.device.type == "meta" and v.dtype == torch.float32 for v in out)


# --- quadrature -----------------------------------------------------------------------------


def test_phi_functions_are_their_integrals_at_every_size():
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(60)
    v, w = torch.as_tensor((nodes + 1) / 2), torch.as_tensor(weights / 2)
    for z in (-30.0, -5.0, -1.0, -0.999, -0.1, -1e-5, 0.0, 1e-9, 1e-3, 0.7, 1.0, 4.0, 12.0):
        phi = solvers_base.phi(5, torch.tensor(z, dtype=torch.float64))
        for k in range(1, 6):
            exact = (w * torch.exp((1 - v) * z) * v ** (k - 1)).sum() / math.factorial(k - 1)
            assert math.isclose(phi[k - 1], exact, rel_tol=1e-12), (z, k)


@pytest.mark.parametrize("kappa", [-1.0, 1.0, 2.0])
@pytest.mark.parametrize("h", [1e-6, 1e-2, 0.5, 6.0])
def test_weights_integrate_polynomials_exactly(kappa, h):
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, w = torch.as_tensor((nodes + 1) / 2 * h), torch.as_tensor(weights / 2 * h)
    offsets = [torch.tensor(r * h, dtype=torch.float64) for r in (1.0, 0.0, -0.7, -2.0)]
    b = solvers_base.lagrange_weights(offsets, torch.tensor(h, dtype=torch.float64), kappa)
    for n in range(4):
        exact = (w * torch.exp(-kappa * (h - u)) * u**n).sum()
        found = sum(b_j * x**n for b_j, x in zip(b, offsets, strict=True))
        assert math.isclose(found, exact, rel_tol=1e-9)


def test_an_exact_start_gives_the_data_back():
    # The mean of a point mass is found in one call whatever the noise.
    sde = sde_lib.RectifiedFlow()
    score = Gaussian(sde, MEAN, 0 * MEAN)
    times = torch.tensor([0.5, 0.25], dtype=torch.float64)
    x = start_points(sde, times[0])
    for _, cls, options in CASES:
        mean = run(cls(sde, score, **options), x, times)[1]
        assert torch.allclose(mean, MEAN.expand_as(mean), atol=1e-9)


def test_the_toys_and_the_library_share_one_catalogue():
    labels = [label for flag in (True, False) for label, *_ in toys_solvers.members(flag)]
    assert sorted(labels) == sorted(label for label, *_ in CASES)
