"""The ODE solver on the device: orders, tolerances, independent samples, and what it refuses."""

import math

import pytest
import torch

import ode
from ode_tableaus import TABLEAUS

ADAPTIVE = ["dopri5", "bosh3"]
F64 = torch.float64


def times_of(t, y):
    return t.to(y.dtype).reshape(len(t), *(1,) * (y.ndim - 1))


def decay(t, state, rate):
    """y' = −rate y, elementwise."""
    return (-rate.to(state[0].dtype)[:, None] * state[0],)


def nonlinear(t, state, rate):
    """y' = −rate y³ + cos(rate t): elementwise, stiff where rate is large."""
    y, w = state[0], rate.to(state[0].dtype)[:, None]
    return (-w * y * y * y + torch.cos(w * times_of(t, y)),)


class Counting:
    """Counts calls, and rows that were handed over, by their name in the last of the args."""

    def __init__(self, fn, samples):
        self.fn, self.calls, self.rows = fn, 0, torch.zeros(samples, dtype=torch.long)

    def __call__(self, t, state, *args):
        self.calls += 1
        self.rows[args[-1]] += 1
        return self.fn(t, state, *args[:-1])


# --- orders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "order"), [("dopri5", 5), ("bosh3", 3), ("rk4", 4), ("heun", 2)])
def test_fixed_steps_converge_with_the_order_of_the_method(name, order):
    """y' = y cos t, and a system of two with a rotation in it."""
    y0 = torch.tensor([[1.0, 0.0], [0.3, -2.0]], dtype=F64)

    def fn(t, state):
        y, s = state
        return torch.stack([y[:, 1], -y[:, 0]], dim=1), s * torch.cos(t)

    def error(steps):
        state = (y0, torch.ones(2, dtype=F64))
        (y, s), nfe, _, calls = ode.solve(fn, state, 0.0, 2.0, method=name, steps=steps)
        c, n = math.cos(2), math.sin(2)
        truth = y0 @ torch.tensor([[c, -n], [n, c]], dtype=F64)
        assert (nfe == calls).all()
        assert calls == steps * TABLEAUS[name].evaluations + TABLEAUS[name].fsal
        return max((y - truth).abs().max().item(), abs(s[0].item() - math.exp(n)))

    slopes = [math.log2(error(n) / error(2 * n)) for n in (16, 32)]
    assert all(order - 0.15 < slope < order + 0.5 for slope in slopes), slopes
    assert TABLEAUS[name].order == order


@pytest.mark.parametrize("name", TABLEAUS)
def test_tableaus_are_consistent(name):
    tableau = TABLEAUS[name]
    assert sum(tableau.b) == pytest.approx(1, abs=1e-15)
    assert sum(tableau.error) == pytest.approx(0, abs=1e-15)
    for row, c in zip(tableau.a, tableau.c[1:], strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-14)
    for q in range(1, tableau.order):  # quadrature conditions Σ b c^q = 1/(q + 1)
        assert sum(b * c**q for b, c in zip(tableau.b, tableau.c, strict=True)) == pytest.approx(
            1 / (q + 1), abs=1e-14
        )
    for q in range(1, tableau.order - 1 if tableau.error else 0):  # the embedded method's, too
        moment = sum(e * c**q for e, c in zip(tableau.error, tableau.c, strict=True))
        assert moment == pytest.approx(0, abs=1e-15)


# --- tolerances -------------------------------------------------------------------------------

BEDS = {
    "harmonic": (
        lambda t, s: (torch.stack([s[0][:, 1], -s[0][:, 0]], dim=1),),
        lambda y, t: torch.stack(
            [y[:, 0] * math.cos(t) + y[:, 1] * math.sin(t),
             y[:, 1] * math.cos(t) - y[:, 0] * math.sin(t)], dim=1
        ),
        torch.tensor([[1.0, 0.0], [0.2, 3.0]], dtype=F64),
        6.0,
    ),
    "logistic": (
        lambda t, s: (s[0] * (1 - s[0]),),
        lambda y, t: y * math.exp(t) / (1 - y + y * math.exp(t)),
        torch.tensor([[0.01], [0.5], [1.7]], dtype=F64),
        8.0,
    ),
    "stiff": (
        lambda t, s: (-80 * (s[0] - torch.cos(times_of(t, s[0]))) - torch.sin(times_of(t, s[0])),),
        lambda y, t: math.cos(t) + (y - 1) * math.exp(-80 * t),
        torch.tensor([[1.0], [2.0]], dtype=F64),
        2.0,
    ),
}  # fmt: skip


TOLERANCES = [("dopri5", 10.0**-q) for q in (3, 5, 7, 9)] + [("bosh3", 10.0**-q) for q in (3, 5, 7)]


@pytest.mark.parametrize("bed", BEDS)
@pytest.mark.parametrize(("method", "tolerance"), TOLERANCES)
def test_error_is_at_most_ten_tolerances(bed, method, tolerance):
    fn, truth, y0, end = BEDS[bed]
    found = ode.solve(fn, (y0,), 0.0, end, rtol=tolerance, atol=tolerance, method=method)
    assert (found.state[0] - truth(y0, end)).abs().max() < 10 * tolerance * y0.abs().max()


@pytest.mark.parametrize("method", ADAPTIVE)
def test_evaluations_grow_as_the_order_says(method):
    fn, _, y0, end = BEDS["harmonic"]
    order = TABLEAUS[method].order

    def nfe(tolerance):
        return ode.solve(fn, (y0,), 0.0, end, rtol=tolerance, atol=tolerance, method=method).calls

    slope = math.log(nfe(1e-7) / nfe(1e-4)) / math.log(1e3)
    assert 0.7 / order < slope < 1.2 / order


def test_both_directions_of_time_and_an_interval_of_each_sample():
    y = torch.randn(4, 3, dtype=F64)
    rate = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    t0 = torch.tensor([0.0, 1.0, -2.0, 5.0], dtype=F64)
    t1 = torch.tensor([1.0, 0.0, -2.0, 9.0], dtype=F64)
    options = {"args": (rate,), "rtol": 1e-8, "atol": 1e-8}
    found = ode.solve(decay, (y,), t0, t1, **options)
    truth = y * torch.exp(-rate * (t1 - t0))[:, None]
    torch.testing.assert_close(found.state[0], truth, rtol=1e-5, atol=1e-6)
    assert found.nfe[2] == 0 and torch.equal(found.state[0][2], y[2])
    back = ode.solve(decay, found.state, t1, t0, **{**options, "args": (rate * (rate < 4),)})
    torch.testing.assert_close(back.state[0][:3], y[:3], rtol=1e-5, atol=1e-6)


def test_agrees_with_scipy():
    y, rate = torch.randn(3, 2, dtype=F64), torch.tensor([1.0, 5.0, 0.1], dtype=F64)
    options = {"args": (rate,), "rtol": 1e-8, "atol": 1e-8}
    ours = ode.solve(nonlinear, (y,), 0.3, 2.0, **options)
    for method in ("RK45", "DOP853"):
        theirs = ode.solve(nonlinear, (y,), 0.3, 2.0, method=method, **options)
        torch.testing.assert_close(ours.state[0], theirs.state[0], rtol=0, atol=2e-7)
        assert (theirs.nfe == theirs.calls).all() and theirs.calls > 10


def test_one_sample_takes_about_scipys_evaluations():
    for rate in (0.5, 20.0):
        w, y = torch.tensor([rate], dtype=F64), torch.tensor([[1.0, 0.3]], dtype=F64)
        options = {"args": (w,), "rtol": 1e-6, "atol": 1e-6}
        ours = ode.solve(nonlinear, (y,), 0.0, 4.0, **options).calls
        theirs = ode.solve(nonlinear, (y,), 0.0, 4.0, method="RK45", **options).calls
        assert 0.7 * theirs < ours < 1.15 * theirs


# --- samples by themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_sample_is_the_same_bits_in_any_batch(method, drop, dtype):
    g = torch.Generator().manual_seed(1)
    y = torch.randn(64, 5, generator=g, dtype=dtype)
    rate = torch.logspace(-1, 1.7, 64, dtype=F64)[torch.randperm(64, generator=g)]
    tolerance = {"rtol": 1e-4, "atol": 1e-4}

    def part(rows, drop=drop):
        options = {"args": (rate[rows],), "method": method, "drop": drop, **tolerance}
        return ode.solve(nonlinear, (y[rows],), 0.0, 1.5, **options)

    whole = part(slice(None))
    assert whole.nfe.max() > 3 * whole.nfe.min()
    for rows in (slice(7, 8), slice(20, 23), slice(0, 63), torch.arange(63, -1, -1)):
        found = part(rows)
        assert torch.equal(found.state[0], whole.state[0][rows])
        assert torch.equal(found.nfe, whole.nfe[rows])
        assert torch.equal(found.rejected, whole.rejected[rows])
    assert torch.equal(part(slice(None), not drop).state[0], whole.state[0])


def test_through_a_network_a_sample_is_the_same_to_1e_4():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(9, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8))
    y = torch.randn(33, 8)

    def fn(t, state):
        return (net(torch.cat([state[0], times_of(t, state[0])], dim=1)),)

    whole = ode.solve(fn, (y,), 0.0, 2.0).state[0]
    for rows in (slice(3, 4), slice(5, 12)):
        part = ode.solve(fn, (y[rows],), 0.0, 2.0).state[0]
        assert (part - whole[rows]).abs().max() < 1e-4 * whole[rows].abs().max()


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("drop", [True, False])
def test_evaluations_are_counted_truthfully(method, drop):
    rate, names = torch.tensor([0.1, 1.0, 30.0, 100.0, 3.0], dtype=F64), torch.arange(5)
    fn = Counting(nonlinear, 5)
    y = torch.ones(5, 2, dtype=F64)
    found = ode.solve(fn, (y,), 0.0, 1.0, args=(rate, names), method=method, drop=drop)
    assert found.calls == fn.calls == found.nfe.max() and found.nfe.dtype == torch.long
    assert (fn.rows >= found.nfe).all() and found.nfe.min() < found.nfe.max() / 3
    if drop:  # rows beyond their end were evaluated until a quarter of the batch was done
        assert fn.rows.sum() < 0.75 * 5 * fn.calls
    else:
        assert (fn.rows == fn.calls).all()
    accepted = (found.nfe - 2) / TABLEAUS[method].evaluations - found.rejected
    assert (accepted > 0).all() and (accepted == accepted.round()).all()


def test_a_state_of_several_tensors_of_several_dtypes():
    """x, a number of each sample in float64, and one of no numbers."""
    x, s = torch.randn(3, 2, 4), torch.zeros(3, dtype=F64)
    rate = torch.tensor([1.0, 10.0, 0.1], dtype=F64)

    def fn(t, state, rate):
        x, s, none = state
        assert t.dtype == F64 and t.shape == s.shape
        return -rate.float()[:, None, None] * x, torch.cos(t), none

    found = ode.solve(fn, (x, s, torch.zeros(3, 0)), 0.0, 1.0, args=(rate,), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        found.state[0], x * torch.exp(-rate).float()[:, None, None], rtol=1e-5, atol=1e-5
    )
    assert (found.state[1] - math.sin(1)).abs().max() < 1e-6
    assert [v.dtype for v in found.state] == [torch.float32, F64, torch.float32]
    assert found.state[2].shape == (3, 0)


def test_every_tensor_of_the_state_is_held_to_the_tolerance():
    """One number beside 3,072 is no easier a customer for it."""
    x, s = torch.ones(1, 3072, dtype=F64), torch.zeros(1, dtype=F64)

    def fn(t, state):
        return 0 * state[0], 50 * torch.cos(50 * t)

    found = ode.solve(fn, (x, s), 0.0, 1.0, rtol=1e-6, atol=1e-6)
    assert abs(found.state[1].item() - math.sin(50)) < 1e-5


@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4"])
def test_empty_batches_and_empty_intervals_cost_nothing(method):
    def fn(t, state):
        raise AssertionError("called")

    steps = None if method in ADAPTIVE else 3
    y = torch.randn(4, 3)
    if method in ADAPTIVE:
        found = ode.solve(fn, (y,), 0.5, 0.5, method=method)
        assert torch.equal(found.state[0], y) and found.calls == 0 and (found.nfe == 0).all()
        found = ode.solve(fn, (y[:0],), 0.0, 1.0, method=method)
        assert found.calls == 0 and found.nfe.shape == (0,)
    empty = ode.solve(lambda t, s: s, (y[:0],), 0.0, 1.0, method=method, steps=steps)
    assert empty.state[0].shape == (0, 3)


def test_the_state_given_is_left_alone_and_carries_no_graph():
    y = torch.ones(2, 3, requires_grad=True)
    w = torch.ones(2, requires_grad=True)
    found = ode.solve(lambda t, s, w: (w[:, None] * s[0],), (y,), 0.0, 1.0, args=(w,))
    assert torch.equal(y, torch.ones(2, 3)) and y.grad is None
    assert not found.state[0].requires_grad


def test_callback_follows_the_sample_that_is_furthest_behind():
    rate, y, seen = torch.tensor([0.1, 100.0, 1.0, 1.0], dtype=F64), torch.ones(4, 2), []
    found = ode.solve(
        nonlinear, (y,), 0.25, 1.0, args=(rate,), callback=lambda *given: seen.append(given)
    )
    calls, shares, times, states = zip(*seen, strict=True)
    assert calls[0] == 0 and calls[-1] == found.calls and list(calls) == sorted(calls)
    assert shares[0] == 0 and shares[-1] == 1 and list(shares) == sorted(shares)
    assert times[0] == 0.25 and times[-1] == 1 and list(times) == sorted(times)
    assert all(s[0].shape == y.shape for s in states)
    assert torch.equal(states[0][0], y) and torch.equal(states[-1][0], found.state[0])
    fixed = []
    ode.solve(decay, (y,), 1.0, 0.9, args=(rate,), method="heun", steps=3,
              callback=lambda *given: fixed.append(given[:3]))  # fmt: skip
    assert [c for c, *_ in fixed] == [0, 2, 4, 6] and fixed[-1][1:] == (1.0, 0.9)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.3 + 1e-4), (-2.0, 50.0)])
def test_no_time_beyond_the_ends_is_asked_for(method, t0, t1):
    """Slow right-hand sides, whose first step would be longer than the way."""
    seen = []

    def fn(t, state):
        seen.append(t)
        return (1e-6 * torch.cos(t)[:, None] * state[0],)

    ode.solve(fn, (torch.randn(7, 3, dtype=F64),), t0, t1, method=method)
    times = torch.cat(seen)
    assert times.min() == min(t0, t1) and times.max() == max(t0, t1)


# --- failures -----------------------------------------------------------------------------------


def nan_beyond(t, state, sick):
    """1, and nan for sick samples after t = 0.4."""
    bad = (sick & (t > 0.4))[:, None]
    return (torch.where(bad, float("nan"), torch.ones_like(state[0])),)


@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4"])
def test_nan_in_one_sample_is_an_error_that_names_it_and_t(method):
    y, sick = torch.zeros(5, 2), torch.tensor([False, False, True, False, False])
    steps = None if method in ADAPTIVE else 10
    with pytest.raises(FloatingPointError, match=r"at t = 0\.[4-9]\d*, in sample 2\b"):
        ode.solve(nan_beyond, (y,), 0.0, 1.0, args=(sick,), method=method, steps=steps)
    ode.solve(nan_beyond, (y,), 0.0, 0.35, args=(sick,), method=method, steps=steps)
    with pytest.raises(FloatingPointError, match=r"at t = 0\.7, in sample 2\b"):
        ode.solve(nan_beyond, (y,), 0.7, 1.0, args=(sick,), method=method, steps=steps)


def test_sample_is_named_by_its_place_in_the_batch_after_others_left():
    rate, sick = torch.tensor([50.0, 0.1, 0.1, 0.1]), torch.tensor([True, False, False, False])

    def fn(t, state, rate, sick):
        (slope,) = nonlinear(t, state, rate)
        return (torch.where((sick & (t > 0.99))[:, None], float("inf"), slope),)

    order = torch.tensor([1, 2, 0, 3])
    with pytest.raises(FloatingPointError, match=r"at t = (0\.99|1\b).*, in sample 2\b"):
        ode.solve(fn, (torch.ones(4, 2),), 0.0, 1.0, args=(rate[order], sick[order]))


def test_too_many_evaluations_are_an_error_with_the_remedy():
    rate = torch.tensor([0.1, 1e4, 0.1], dtype=F64)
    with pytest.raises(RuntimeError, match=r"sample 1 is at t = 0\.0.*Raise max_nfe = 100, loosen"):
        ode.solve(nonlinear, (torch.ones(3, 2),), 0.0, 1.0, args=(rate,), max_nfe=100)
    done = ode.solve(nonlinear, (torch.ones(3, 2),), 0.0, 1.0, args=(rate / 1e4,), max_nfe=100)
    assert done.calls <= 100


def test_underflow_of_the_step_is_an_error_that_names_t():
    def fn(t, state):  # y = −log(1 − t): no number beyond t = 1
        return (1 / (1 - t)[:, None].abs() ** 2 * torch.ones_like(state[0]),)

    with pytest.raises(RuntimeError, match=r"of sample 0 fell to .* at t = 1\b.*loosen"):
        ode.solve(fn, (torch.zeros(1, 2, dtype=F64),), 0.0, 2.0)


def test_a_kink_at_the_start_costs_few_refusals():
    """The error of a step from 0 of dy/dt = 1/√(t + δ) falls like √h, not like h⁵."""
    y = (torch.zeros(1, 1, dtype=torch.float64),)
    found = ode.solve(lambda t, y: ((t + 1e-9).rsqrt()[:, None],), y, 0.0, 1.0)
    assert abs(found.state[0].item() - 2) < 1e-3
    assert int(found.rejected) <= 6, found


def test_overflow_within_a_step_is_tried_shorter():
    """Squares beyond float32 in the error norm are no reason to give up."""
    y = torch.full((2, 3), 1e25)
    found = ode.solve(lambda t, s: (-1e3 * s[0],), (y,), 0.0, 0.01, atol=1e-20, rtol=1e-5)
    torch.testing.assert_close(found.state[0], y * math.exp(-10), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "RK99"}, r"'RK99' is unknown; known: dopri5, bosh3, rk4, heun, RK45"),
        ({"method": "rk4"}, r"does not choose its own steps; give steps="),
        ({"steps": 0}, r"at least 1"),
        ({"method": "RK45", "steps": 4}, r"expected at least 1, and one of dopri5"),
        ({"rtol": 0, "atol": 0}, "not both zero"),
        ({"rtol": -1}, "rtol, atol ≥ 0"),
        ({"args": (torch.ones(3),)}, r"one first dimension, got \[2, 3\]"),
        ({"state": torch.ones(2, 2).long()}, r"floating-point numbers, got \['torch.int64'\]"),
        ({"state": torch.eye(2), "atol": 0}, r"atol=0 allows no error .* use atol > 0"),
        ({"state": torch.eye(2), "atol": 0, "method": "RK45"}, r"atol=0 allows no error"),
        ({"t1": torch.ones(2), "method": "RK45"}, r"'RK45' takes t0 and t1 as numbers"),
    ],
)
def test_impossible_options_are_refused(options, message):
    given = {"state": torch.ones(2, 2), "t1": 1.0} | options
    with pytest.raises(ValueError, match=message):
        ode.solve(lambda t, s, *a: s, (given.pop("state"),), 0.0, given.pop("t1"), **given)


def test_derivatives_of_another_shape_are_refused():
    for wrong in (lambda t, s: (s[0][:, 0],), lambda t, s: ()):
        with pytest.raises(ValueError, match=r"for a state of \(\(2, 3\),\)"):
            ode.solve(wrong, (torch.ones(2, 3),), 0.0, 1.0)


@pytest.mark.parametrize("method", ["dopri5", "RK45"])
def test_evaluations_are_limited_with_every_solver_that_chooses_its_steps(method):
    with pytest.raises(ode.SolverError, match=r"on its way to 1, .*[Rr]aise max_nfe = 20"):
        ode.solve(lambda t, s: (-1e3 * s[0],), (torch.ones(2, 1),), 0, 1, method=method, max_nfe=20)


@pytest.mark.parametrize("method", ["dopri5", "RK45"])
def test_an_interval_of_length_zero_may_be_followed_by_a_callback(method):
    shares, y = [], torch.ones(2, 1)
    found = ode.solve(
        lambda t, s: (-s[0],), (y,), 1, 1, method=method, callback=lambda c, s, *_: shares.append(s)
    )
    assert torch.equal(found.state[0], y) and set(shares) == {1.0}


@pytest.mark.parametrize("method", ["dopri5", "RK45"])
def test_atol_may_be_zero_where_no_number_is(method):
    y = torch.tensor([[1.0, -3.0]])
    found = ode.solve(lambda t, s: (-s[0],), (y,), 0, 1, method=method, atol=0)
    torch.testing.assert_close(found.state[0], y * math.exp(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ode.METHODS)
def test_evaluations_of_scipys_solvers_are_counted_with_those_of_their_jacobians(method):
    count = []

    def fn(t, state):
        count.append(t)
        return (-50 * state[0],)

    found = ode.solve(fn, (torch.ones(2, 3, dtype=F64),), 0, 1, method=method)
    assert found.calls == len(count) and (found.nfe == len(count)).all()
