"""Adaptive samplers: orders, errors against tolerances, independence of batch mates, failures."""

import functools
import itertools
import math
import types

import pytest
import torch
import toys
from toys_sampling import Gaussian, processes

import sampling
import sde_lib
from parametrization import Parametrization, ScoreFunction
from sampling_noise import NoiseSource
from solvers_adaptive import (
    BrownianPath,
    dpm_solver_pair,
    get_dpm_solver_adaptive,
    get_gotta_go_fast,
    stochastic_pair,
)

SDES = processes()
BUILTIN = [(name, order) for name in SDES if name != "user" for order in (2, 3)]
MEAN, STD = 0.2, 0.3
# Coordinates of different scales: of an isotropic Gaussian all errors would vanish together.
SPREAD = torch.logspace(-1, 0, 8, dtype=torch.float64)
METHODS = {"dpm_solver_adaptive": get_dpm_solver_adaptive, "gotta_go_fast": get_gotta_go_fast}


class TanhSDE(toys.UserSDE):
    """A process whose drift is not affine."""

    def sde(self, x, t):
        return -torch.tanh(x), torch.ones_like(t)


def identity(x):
    return x


def data_for(sde, mean=MEAN, std=STD):
    """Images for the user's process, which is written for them; else vectors."""
    return Gaussian(sde, mean, std)


def shape_for(sde, batch, dim):
    return (batch, 1, 1, dim) if isinstance(sde, toys.UserSDE) else (batch, dim)


def slope(errors, counts):
    return math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])


# --- the pairs, at fixed steps ------------------------------------------------------------------


# The user's process has its λ inverted by bisection, which is slow: one order of it in each test.
@pytest.mark.parametrize(("name", "order"), [*BUILTIN, ("user", 3)])
def test_dpm_solver_pair_has_its_two_orders(name, order):
    sde = SDES[name]
    bed = data_for(sde, MEAN, SPREAD)
    ends = torch.tensor([sde.sampling_eps, float(sde.T)], dtype=torch.float64)
    start = max(float(sde_lib.half_log_snr(sde, ends)[1]), -3.0)
    end = -math.log(STD)  # beyond, the errors of an exact solver of one order vanish faster
    x0 = torch.randn(shape_for(sde, 4, 8), dtype=torch.float64) * math.exp(-start)
    t0, t1 = (
        sde_lib.time_of_half_log_snr(sde, torch.tensor(v, dtype=torch.float64))
        for v in (start, end)
    )
    exact = bed.flow(x0, t0, t1)
    for member, declared in ((0, order - 1), (1, order)):
        errors = []
        for n in (counts := (16, 32)):
            x, h = x0, torch.full((4,), (end - start) / n, dtype=torch.float64)
            for i in range(n):
                lam = torch.full((4,), start, dtype=torch.float64) + i * h
                x = dpm_solver_pair(sde, bed.model().noise, x, lam, h, order)[member]
            errors.append(float((x - exact).abs().max()))
        assert slope(errors, counts) > declared - 0.25


def weak_errors(sde, counts):
    """Errors of the variance after fixed steps of the improved member, by its affine map."""
    bed = data_for(sde)
    rsde = sde.reverse(bed.model())
    start, end = 0.6 * sde.T, 0.2 * sde.T
    probe = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    probe = probe.reshape(shape_for(sde, 3, 1))
    dw = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).reshape(probe.shape)
    wanted = float(bed.moments(end, probe)[1].flatten()[0])
    errors = []
    for n in counts:
        var = bed.moments(start, probe)[1].flatten()[0]
        h = torch.full((3,), (start - end) / n, dtype=torch.float64)
        for i in range(n):
            t = torch.full((3,), start, dtype=torch.float64) - i * h
            out = stochastic_pair(rsde, probe, t, h, dw)[1].flatten()
            var = (out[1] - out[0]) ** 2 * var + (out[2] - out[0]) ** 2 * h[0]
        errors.append(abs(float(var) - wanted))
    return errors


@pytest.mark.parametrize("name", SDES)
def test_stochastic_pair_has_weak_order_2(name):
    counts = (64, 128)
    assert slope(weak_errors(SDES[name], counts), counts) > 1.8


# --- the Brownian path -------------------------------------------------------------------------


def test_a_rejected_step_stays_on_its_brownian_path():
    torch.manual_seed(0)
    x = torch.zeros(3, 4, dtype=torch.float64)
    path, every = BrownianPath(NoiseSource(), x), torch.ones(3, dtype=torch.bool)

    def propose(length):
        h, dw = path.propose(torch.full((3,), length, dtype=torch.float64))
        return float(h[0]), dw

    _, whole = propose(1.0)
    _, first = propose(0.6)
    h, again = propose(2.0)  # as much as the top segment holds
    assert h == 0.6 and torch.equal(again, first)
    _, quarter = propose(0.25)
    parts = [quarter]
    path.accept(every)
    for expected in (0.35, 0.4):
        h, dw = propose(5.0)
        assert h == pytest.approx(expected)
        parts.append(dw)
        path.accept(every)
    torch.testing.assert_close(sum(parts), whole)
    assert propose(0.7)[0] == 0.7  # new ground


def test_bridged_increments_are_those_of_a_brownian_motion():
    torch.manual_seed(0)
    n = 40_000
    path, every = BrownianPath(NoiseSource(), torch.zeros(n, 1)), torch.ones(n, dtype=torch.bool)
    parts = []
    for length in (1.0, 0.7, 0.2):
        h, dw = path.propose(torch.full((n,), length, dtype=torch.float64))
    for expected in (0.2, 0.5, 0.3):
        h, dw = path.propose(torch.full((n,), 9.0, dtype=torch.float64))
        assert float(h[0]) == pytest.approx(expected)
        assert float(dw.var()) == pytest.approx(expected, rel=5 * (2 / n) ** 0.5)
        parts.append(dw[:, 0] / expected**0.5)
        path.accept(every)
    correlation = torch.corrcoef(torch.stack(parts)) - torch.eye(3)
    assert correlation.abs().max() < 5 / n**0.5


# --- whole samplers ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [*BUILTIN, ("user", 2)])
def test_error_of_dpm_solver_adaptive_falls_with_its_tolerance(name, order):
    sde = SDES[name]
    bed, shape = data_for(sde, MEAN, SPREAD), shape_for(sde, 20, 8)
    seeds = list(range(20))
    z = NoiseSource(seeds=seeds).prior(sde, shape).double()
    exact = bed.flow(z, sde.T, sde.sampling_eps)
    errors, evaluations = [], []
    for tol in (1e-2, 1e-3) if name == "user" else (1e-2, 1e-3, 1e-4):
        sampler = get_dpm_solver_adaptive(
            sde,
            shape,
            identity,
            order=order,
            rtol=tol,
            atol=tol,
            denoise=False,
            dtype=torch.float64,
            seeds=seeds,
        )
        x, nfe = sampler(bed.model())
        assert nfe % order == 0
        errors.append(float((x - exact).square().mean().sqrt()))
        evaluations.append(nfe)
        assert errors[-1] < 10 * tol
    assert all(a > b for a, b in itertools.pairwise(errors))
    # N ~ tol^{-1/p}, loosely: 100 times the accuracy for 100^{1/p} times the steps.
    assert evaluations[-1] / evaluations[0] < 1.5 * 100 ** (1 / order)


@pytest.mark.parametrize("name", ["vesde", "vpsde", "cosine", "rectified_flow", "edm"])
def test_default_tolerances_give_the_data_their_spread(name):
    """As published it was 1.34 for VE, whose state shrinks from 50 to 0.3 within the tolerance of
    a step, and 0.47 for cosine, where an error that happened to vanish allowed a leap."""
    sde, n = SDES[name], 1000
    bed = Gaussian(sde, MEAN, STD)
    x, nfe = get_dpm_solver_adaptive(sde, (n, 2), identity, seeds=range(n))(bed.model())
    assert float(x.std()) == pytest.approx(STD, rel=0.15) and nfe < 80


@pytest.mark.parametrize("name", SDES)
def test_gotta_go_fast_samples_the_marginal_at_eps(name):
    sde, n = SDES[name], 1000
    bed, shape = data_for(sde), shape_for(sde, n, 2)
    # Without the bridge, few numbers a sample gave a standard deviation of 0.41 for VP.
    x, nfe = get_gotta_go_fast(sde, shape, identity, rtol=0.1, denoise=False)(bed.model())
    mean, var = (float(v.flatten()[0]) for v in bed.moments(sde.sampling_eps, x))
    # ouve and the user's process begin at a prior that is off by their α_T.
    assert float(x.mean()) == pytest.approx(mean, abs=0.05)
    assert float(x.std()) == pytest.approx(var**0.5, rel=0.06)
    assert nfe % 2 == 0


@pytest.mark.parametrize("method", METHODS)
def test_denoising_returns_D_at_eps_and_is_one_evaluation_more(method):
    sde, seeds = SDES["vpsde"], [1, 2, 3]
    bed = Gaussian(sde, MEAN, SPREAD)
    make = functools.partial(METHODS[method], sde, (3, 8), identity, seeds=seeds)
    (x, nfe), (mean, more) = make(denoise=False)(bed.model()), make()(bed.model())
    assert more == nfe + 1
    torch.testing.assert_close(mean, bed.model().denoise(x, torch.full((3,), sde.sampling_eps)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vpsde", "vesde", "rectified_flow"])
def test_a_sample_is_bit_equal_whatever_its_batch_mates(method, name):
    sde = SDES[name]
    bed = Gaussian(sde, MEAN, STD)
    seeds = [7, 0, 123456789, 2**40 + 1, 17, 3, 99]

    def sample(seeds):
        return METHODS[method](sde, (len(seeds), 3, 4), identity, seeds=seeds, rtol=0.1)(
            bed.model()
        )[0]

    whole = sample(seeds)
    assert torch.equal(whole, torch.cat([sample(s) for s in (seeds[:1], seeds[1:4], seeds[4:])]))
    assert torch.equal(whole.flip(0), sample(seeds[::-1]))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_bound_to_the_samples_of_a_batch_stays_with_them(method):
    """Samples arrive at different times; labels of the batch must go on to fit."""
    sde, n = SDES["vpsde"], 40
    labels = torch.arange(n) % 2

    def model_fn(x, t, y):
        return Gaussian(sde, 4.0 * y[:, None] - 2, STD).score(x, t)

    score_fn = ScoreFunction(model_fn, sde, Parametrization("score", "t"))
    x, _ = METHODS[method](sde, (n, 2), identity, rtol=0.05)(score_fn.with_conditions(y=labels))
    assert (x - (4.0 * labels[:, None] - 2)).abs().max() < 5 * STD


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_calls_of_the_network_and_noise_is_of_its_source(method):
    sde = SDES["vpsde"]
    model = toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD))
    calls = []

    def network(x, labels):
        calls.append(len(x))
        return model(x, labels)

    results = []
    for _ in range(2):
        before = torch.get_rng_state()
        sampler = METHODS[method](
            sde, (4, 3), identity, generator=torch.Generator().manual_seed(5), rtol=0.1
        )
        calls.clear()
        x, nfe = sampler(network)
        assert nfe == len(calls) and torch.equal(torch.get_rng_state(), before)
        results.append(x)
    assert torch.equal(*results) and results[0].dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_process_bound_to_an_observation_is_sampled(method):
    y = torch.tensor([[2.0, -1.0]]).repeat(1000, 1)
    sde = SDES["vpsde"].bind(y)
    bed = Gaussian(sde, MEAN, STD)
    options = {"eps": 0.3, "rtol": 0.05, "atol": 1e-3, "denoise": False}  # halfway to y
    x, _ = METHODS[method](sde, (1000, 2), identity, **options)(bed.model())
    mean, var = bed.moments(0.3, x)
    assert 0.3 < float(mean[0, 0] - MEAN) < 1.7
    assert (x.mean(0) - mean[0]).abs().max() < 0.1
    assert (x.std(0) / var[0].sqrt() - 1).abs().max() < 0.1


def test_callbacks_see_falling_times_and_states_of_their_own():
    sde = SDES["vpsde"]
    for method in METHODS.values():
        path = sampling.Trajectory()
        method(sde, (4, 3), identity, callback=path, rtol=0.1)(Gaussian(sde, MEAN, STD).model())
        assert (path.times.diff() <= 0).all() and path.times[-1] == pytest.approx(1e-3)
        assert path.states.shape == (len(path.times), 4, 3)
        assert not torch.equal(path.states[0], path.states[-1])


# --- refusals and failures -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_nan_and_exhaustion_are_errors_that_name_t(method):
    sde = SDES["vpsde"]

    def nan_below(x, labels):
        return torch.where(labels[:, None] < 500, torch.nan, x)

    make = functools.partial(METHODS[method], sde, (4, 3), identity)
    with pytest.raises(FloatingPointError, match=r"t = 0\.\d"):
        make(h0=0.05)(nan_below)
    with pytest.raises(RuntimeError, match=r"\d+ evaluations at t = .*raise rtol=1e-09"):
        make(rtol=1e-9, atol=1e-9, max_nfe=50)(Gaussian(sde, MEAN, STD).model())


def test_refusals_say_why_and_what_to_do():
    sde, make = SDES["vpsde"], get_dpm_solver_adaptive
    for options, why in (
        ({"order": 4}, "order 2 or 3"),
        ({"rtol": 0.0}, "rtol > 0, got 0.0"),
        ({"seeds": [1]}, "expected 4 seeds"),
        ({"eps": 1.0}, "eps < 1"),
        ({"eps": 0.0}, "use 0.001"),
    ):
        with pytest.raises(ValueError, match=why):
            make(sde, (4, 3), identity, **options)
    with pytest.raises(ValueError, match="use gotta_go_fast"):
        make(TanhSDE(), (4, 1, 2, 2), identity)
    x, _ = get_gotta_go_fast(TanhSDE(), (4, 1, 2, 2), identity)(lambda x, y: torch.zeros_like(x))
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("method", METHODS)
def test_adaptive_samplers_are_chosen_by_the_config(method):
    sde = toys.LongSDE()
    settings = types.SimpleNamespace(
        sampling=types.SimpleNamespace(method=method, solver={"rtol": 0.1}, noise_removal=False),
        training=types.SimpleNamespace(continuous=True),
        device="cpu",
    )
    shape = (4, 1, 2, 2)
    make = functools.partial(sampling.get_sampling_fn, settings, sde, shape, identity, 1e-3)
    model = toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD))
    few, many = make(progress=False)(model)[1], 0
    settings.sampling.solver = {"rtol": 1e-3, "atol": 1e-3}
    many = make(seeds=range(4))(model)[1]
    assert many > few
    settings.sampling.solver = {"rtoll": 1e-3}
    with pytest.raises(ValueError, match=rf"{method}' has no option 'rtoll'; .*max_nfe.*rtol"):
        make()


@pytest.mark.parametrize("name", METHODS)
def test_growth_without_bound_leaves_the_samples_that_have_arrived_alone(name):
    """0 times an infinite growth is no number, of which a table has no row."""
    seen = []

    def network(x, labels):
        seen.append(bool(torch.isfinite(x).all() and (labels >= 0).all()))
        return 0.9 * x * (1 + 0.3 * torch.sin(3 * x))

    torch.manual_seed(0)
    sde = sde_lib.VPSDE()
    make = METHODS[name](sde, (16, 2), identity, max_growth=math.inf, continuous=False)
    samples, _ = make(network)
    assert samples.isfinite().all() and all(seen)


@pytest.mark.parametrize("name", METHODS)
def test_an_attempt_looks_at_the_device_at_most_four_times(name, monkeypatch):
    looks, calls = [], []
    for method in ("__bool__", "__float__", "__int__", "item", "nonzero", "tolist"):
        kept = getattr(torch.Tensor, method)

        def look(self, *args, kept=kept, method=method, **options):
            if self.ndim == 0 or method == "nonzero":
                looks.append(1)
            return kept(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, method, look)

    def network(x, labels):
        calls.append(1)
        return 0.9 * x

    METHODS[name](sde_lib.VPSDE(), (16, 2), identity)(network)
    attempts = len(calls) / (2 if name == "gotta_go_fast" else 3)
    assert len(looks) <= 4 * attempts + 40
