"""Solvers of inverse problems by projection, against the closed-form posterior of Gaussian data."""

import inspect

import pytest
import torch
from toys import AsModel, UserSDE, gaussian_score

import sde_lib
from controllable_generation import get_pc_inpainter
from controllable_generation_methods import METHODS, get_inverse_solver
from controllable_generation_projection import KnownMeasurement, _RePaint, ddnm_score
from operators import Operator, get_operator
from parametrization import as_score_function
from sampling import get_pc_sampler, get_predictor
from sde_lib import alpha_sigma, expand

NAMES = ("replacement", "projection", "repaint", "ddrm", "ddnm", "sdedit")
SDES = {
    "ve": sde_lib.VESDE(0.01, 20, 1000),
    "vp": sde_lib.VPSDE(0.1, 20, 1000),
    "subvp": sde_lib.subVPSDE(0.1, 20, 1000),
    "edm": sde_lib.EDM(),
    "rectified_flow": sde_lib.RectifiedFlow(),
}
F64 = torch.float64


class Gaussian:
    """Data N(m, C), their exact score and the posterior given A x + σ_y z."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = torch.tensor(mean, dtype=F64), covariance
        self.values, self.basis = torch.linalg.eigh(covariance)

    def score(self, sde):
        def fn(x, t):
            a, s = (expand(v.to(x.dtype), x) for v in alpha_sigma(sde, t, x))
            m, Q = self.mean.to(x), self.basis.to(x)
            r = (x - a * m) @ Q / (a**2 * self.values.to(x) + s**2)
            return -r @ Q.T

        return as_score_function(fn, sde)

    def posterior(self, operator, y, noise):
        A, C = operator.dense(), self.covariance
        gain = C @ A.T @ torch.linalg.inv(A @ C @ A.T + noise**2 * torch.eye(len(A)))
        return self.mean + gain @ (y - A @ self.mean), C - gain @ A @ C


ROOT = torch.tensor([[1, 0.6, 0.2, 0.1], [0, 0.8, 0.5, 0.2], [0, 0, 0.6, 0.3], [0, 0, 0, 0.7]])
MEAN = [0.3, -0.2, 0.5, 0.1]
INDEPENDENT = Gaussian(MEAN, torch.tensor([0.25, 1.0, 0.09, 0.5], dtype=F64).diag())
CORRELATED = Gaussian(MEAN, ROOT.double() @ ROOT.double().T)
A = get_operator("mask", (4,), mask=torch.tensor([1, 0, 1, 0]))
Y = torch.tensor([[1.0, -0.3]], dtype=F64)
KNOWN, UNKNOWN = [0, 2], [1, 3]


def drawn(name, data, sde="vp", n=8000, noise=0.0, operator=A, y=Y, seed=0, **options):
    """Mean and covariance of samples of a solver."""
    options = {"steps": 40, "schedule": "logsnr", "dtype": F64} | options
    generator = torch.Generator().manual_seed(seed)
    shape = (n, *operator.shape_in)
    sampler = get_inverse_solver(name)(
        SDES[sde], shape, operator, y, noise=noise, generator=generator, **options
    )
    samples = sampler(data.score(SDES[sde]))[0]
    return samples.mean(0), torch.cov(samples.T)


def agree(found, expected, n=8000, slack=0.0):
    """Within 5 standard errors of n samples."""
    (mean, cov), (m, C) = found, expected
    var = C.diagonal()
    assert ((mean - m).abs() <= 5 * (var / n).sqrt() + slack + 1e-6).all(), mean - m
    scale = (var.unsqueeze(1) * var + C**2).sqrt()
    assert ((cov - C).abs() <= 5 * scale / n**0.5 + slack + 1e-6).all(), cov - C


# --- exact where known and unknown are independent ----------------------------------------------


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("name", ["replacement", "ddnm"])
def test_without_noise_independent_directions_are_exact(name, sde):
    found = drawn(name, INDEPENDENT, sde, predictor="heun")
    agree(found, INDEPENDENT.posterior(A, Y[0], 0.0), slack=0.01)


def test_ddnm_goes_under_a_multistep_solver():
    found = drawn("ddnm", INDEPENDENT, predictor="dpmpp_2m")
    agree(found, INDEPENDENT.posterior(A, Y[0], 0.0), slack=0.01)


def test_ddrm_without_fresh_noise_is_exact_as_steps_grow():
    m, C = INDEPENDENT.posterior(A, Y[0], 0.0)
    gaps = []
    for steps in (25, 50, 100):
        mean, cov = drawn("ddrm", INDEPENDENT, eta=0.0, steps=steps)
        assert (mean - m).abs().max() < 0.06
        gaps.append((C - cov)[1, 1].item())
    assert gaps[0] > 1.5 * gaps[1] > 2.25 * gaps[2] > 0


def test_mixed_directions_are_exact_where_they_are_independent():
    # Isotropic data stay independent in the singular basis of any operator.
    data = Gaussian([0.0] * 4, 0.5 * torch.eye(4, dtype=F64))
    sensing = get_operator("compressed_sensing", (4,), ratio=0.5, seed=3)
    y = torch.tensor([[0.8, -0.6]], dtype=F64)
    for name in ("replacement", "ddnm"):
        found = drawn(name, data, operator=sensing, y=y, predictor="heun")
        agree(found, data.posterior(sensing, y[0], 0.0), slack=0.01)


@pytest.mark.parametrize("sde", ["vp", "ve"])
def test_replacement_respects_noise_exactly_where_independent(sde):
    # First order in the step: what is left at 250 steps is a few hundredths of the variance.
    found = drawn("replacement", INDEPENDENT, sde, noise=0.4, n=4000, steps=250)
    agree(found, INDEPENDENT.posterior(A, Y[0], 0.4), n=4000, slack=0.03)


# --- biased where they are not, and how ---------------------------------------------------------


def test_correlated_unknowns_are_biased_towards_their_prior():
    m, _ = CORRELATED.posterior(A, Y[0], 0.0)
    towards = (CORRELATED.mean - m)[UNKNOWN]
    share = {}
    for name in ("replacement", "ddnm", "ddrm"):
        mean, _ = drawn(name, CORRELATED, steps=80)
        assert (mean[KNOWN] - Y[0]).abs().max() < 1e-9
        share[name] = (mean - m)[UNKNOWN] / towards
    # Of the way from the posterior's mean back to the prior's.
    assert (share["replacement"] > 0.55).all() and (share["replacement"] < 0.85).all()
    assert (share["ddnm"] > 0.55).all() and (share["ddnm"] < 0.85).all()
    assert (share["ddrm"] < share["ddnm"]).all()


def test_repaint_reduces_the_bias_the_more_it_resamples():
    m, _ = CORRELATED.posterior(A, Y[0], 0.0)
    bias = []
    for resamplings in (1, 4, 12):
        options = {"steps": 30, "jump": 5, "resamplings": resamplings, "n": 4000}
        mean, _ = drawn("repaint", CORRELATED, **options)
        bias.append((mean - m)[UNKNOWN].mean().item())
    assert bias[0] > 1.3 * bias[1] > 1.69 * bias[2] > 0


def test_repaint_of_one_round_is_replacement():
    one = drawn("repaint", CORRELATED, resamplings=1, jump=7, n=4000)
    agree(one, drawn("replacement", CORRELATED, n=4000, seed=1), n=2000)


def test_ddrm_loses_variance_of_the_unknown_with_its_fresh_noise():
    _, C = INDEPENDENT.posterior(A, Y[0], 0.0)
    _, cov = drawn("ddrm", INDEPENDENT, steps=200, n=4000)
    assert 0.65 < (cov[1, 1] / C[1, 1]).item() < 0.85


@pytest.mark.parametrize("name", ["ddrm", "ddnm"])
def test_noise_keeps_the_mean_between_prior_and_measurement(name):
    mean, cov = drawn(name, INDEPENDENT, noise=0.4, steps=10)
    m, C = INDEPENDENT.posterior(A, Y[0], 0.4)
    prior = INDEPENDENT.mean[KNOWN]
    for k, y, p in zip(KNOWN, Y[0], prior):
        assert min(y, p) < mean[k] < max(y, p)
        assert (mean[k] - m[k]).abs() < 0.5 * (y - m[k]).abs()
    assert (cov.diagonal() < C.diagonal()).all()  # too sure of themselves


def test_many_steps_of_ddnm_plus_end_where_the_probability_flow_takes_the_measurement():
    # The noise of y is all that is left in the state once σ/α = σ_y, so that the end is a point.
    mean, cov = drawn("ddnm", INDEPENDENT, noise=0.4, steps=200, n=4000)
    var, m = INDEPENDENT.covariance.diagonal()[KNOWN], INDEPENDENT.mean[KNOWN]
    flow = m + (var / (var + 0.4**2)).sqrt() * (Y[0] - m)
    assert (mean[KNOWN] - flow).abs().max() < 0.05
    assert cov.diagonal()[KNOWN].max() < 0.01


def test_ddnm_plus_does_not_pile_up_noise_where_singular_values_are_small():
    data = Gaussian([0.0] * 49, 0.25 * torch.eye(49, dtype=F64))
    blur = get_operator("deblur_gaussian", (1, 7, 7), std=2.0)
    assert blur.svd.values.min() < 1e-3
    generator = torch.Generator().manual_seed(0)
    truth = 0.5 * torch.randn(1, 1, 7, 7, generator=generator, dtype=F64)
    y = blur(truth) + 0.1 * torch.randn(1, 1, 7, 7, generator=generator, dtype=F64)
    sde = SDES["vp"]
    flat = data.score(sde)
    images = as_score_function(lambda x, t: flat(x.reshape(-1, 49), t).reshape(x.shape), sde)
    for name in ("replacement", "ddrm", "ddnm"):
        sampler = get_inverse_solver(name)(
            sde, (50, 1, 7, 7), blur, y, noise=0.1, steps=50, schedule="logsnr", dtype=F64
        )
        assert 0.2 < sampler(images)[0].std() < 0.8, name


def test_a_weight_below_one_lets_the_measurement_go():
    full, _ = drawn("projection", INDEPENDENT, weight=1.0)
    mean, cov = drawn("projection", INDEPENDENT, weight=0.3)
    assert (full[KNOWN] - Y[0]).abs().max() < 1e-9
    assert 1e-5 < cov.diagonal()[KNOWN].max() < 0.01
    assert ((mean - Y[0][[0, 0, 1, 1]]).abs()[KNOWN] > 1e-3).any()


@pytest.mark.parametrize("t0", [0.3, 0.6])
def test_sdedit_is_the_data_given_a_noised_guide(t0):
    sde, guide = SDES["vp"], torch.tensor([[1.0, 0.5, -0.3, 0.2]], dtype=F64)
    eye = get_operator("mask", (4,), mask=torch.ones(4))
    found = drawn("sdedit", INDEPENDENT, y=guide, operator=eye, t0=t0, predictor="heun")
    a, s = alpha_sigma(sde, torch.tensor(t0, dtype=F64))
    var = INDEPENDENT.covariance.diagonal()
    # Of the probability flow: a linear map of N(α guide, σ²).
    shrink = (var / (a**2 * var + s**2)).sqrt()
    mean = INDEPENDENT.mean + shrink * a * (guide[0] - INDEPENDENT.mean)
    agree(found, (mean, (shrink**2 * s**2).diag()), slack=0.01)


def test_sdedit_goes_from_the_guide_to_the_prior():
    guide = torch.tensor([[1.0, 0.5, -0.3, 0.2]], dtype=F64)
    options = {"y": guide, "predictor": "heun", "n": 2000}
    eye = get_operator("mask", (4,), mask=torch.ones(4))
    near, _ = drawn("sdedit", INDEPENDENT, operator=eye, t0=0.02, **options)
    far = drawn("sdedit", INDEPENDENT, operator=eye, t0=1.0, **options)
    assert (near - guide[0]).abs().max() < 0.05
    agree(far, (INDEPENDENT.mean, INDEPENDENT.covariance), n=2000, slack=0.02)


# --- what holds for every model -----------------------------------------------------------------


IMAGE = (1, 8, 8)
TASKS = {
    "mask": {},
    "superres": {"factor": 2},
    "superres_bicubic": {"factor": 2},
    "deblur_gaussian": {"std": 0.6},
    "compressed_sensing": {},
    "mri": {},
    "ct": {"angles": 4},
}


def wavy(sde):
    """No Gaussian's score, of images of any shape: D = tanh."""

    def score(x, t):
        a, s = (expand(v.to(x.dtype), x) for v in alpha_sigma(sde, t, x))
        D = torch.tanh(x / (a**2 + s**2).sqrt())
        return (a * D - x) / s**2

    return as_score_function(score, sde)


def solver(name, sde, task="mask", n=3, noise=0.0, **options):
    operator = get_operator(task, IMAGE, **TASKS[task])
    truth = torch.rand(1, *IMAGE, generator=torch.Generator().manual_seed(5), dtype=F64) - 0.5
    y = operator(truth)
    if name == "repaint":
        options = {"jump": 3, "resamplings": 2} | options
    make = get_inverse_solver(name)
    options = {"steps": 10, "schedule": "logsnr", "dtype": F64, "eps": 1e-3} | options
    return make(sde, (n, *IMAGE), operator, y, noise=noise, **options), operator, y


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["replacement", "repaint", "ddrm", "ddnm"])
def test_without_noise_the_measurement_holds_at_the_end(name, task):
    for sde in SDES.values():
        sampler, operator, y = solver(name, sde, task)
        samples, _ = sampler(wavy(sde))
        assert (operator(samples) - y).abs().max() < 1e-5
        assert samples.std() > 0.01


def test_in_single_precision_the_measurement_holds_too():
    for name in ("replacement", "repaint", "ddrm", "ddnm"):
        sampler, operator, y = solver(name, SDES["ve"], "superres_bicubic", dtype=None)
        samples, _ = sampler(wavy(SDES["ve"]))
        assert samples.dtype == torch.float32
        assert (operator(samples) - y).abs().max() < 1e-5


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_sample_at_any_batch_size(name, noise):
    sde = SDES["vp"]
    whole = solver(name, sde, n=3, noise=noise, seeds=[7, 8, 9])[0](wavy(sde))[0]
    parts = [solver(name, sde, n=1, noise=noise, seeds=[s])[0](wavy(sde))[0] for s in (7, 8, 9)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("name", NAMES)
def test_evaluations_are_counted(name, noise):
    sde, calls = SDES["vp"], []

    def counted(x, t):
        calls.append(1)
        return -x

    _, nfe = solver(name, sde, noise=noise)[0](as_score_function(counted, sde))
    assert nfe == len(calls) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_takes_a_corrector_and_a_process_towards_an_observation(name):
    bound = SDES["vp"].bind(torch.full((1, *IMAGE), 0.3, dtype=F64))
    options = {"corrector": "ald", "snr": 0.1} if name != "sdedit" else {}
    sampler, operator, y = solver(name, bound, **options)
    samples, _ = sampler(as_score_function(lambda x, t: -(x - 0.3), bound))
    assert torch.isfinite(samples).all()
    if name not in ("projection", "sdedit"):
        assert (operator(samples) - y).abs().max() < 1e-9


def test_replacement_by_a_mask_is_the_inpainter_of_score_sde():
    sde, operator = SDES["vp"], get_operator("mask", IMAGE)
    data = torch.rand(2, *IMAGE, generator=torch.Generator().manual_seed(1), dtype=F64)
    options = {"steps": 12, "dtype": F64, "seeds": [1, 2]}
    sampler = get_inverse_solver("replacement")(
        sde, (2, *IMAGE), operator, operator(data), predictor="ddim", eps=1e-3, **options
    )
    inpainter = get_pc_inpainter(
        sde, get_predictor("ddim"), None, lambda x: x, 0.1, eps=1e-3, **options
    )
    same = inpainter(wavy(sde), data, operator.mask.double()[None])
    same = same[0] if isinstance(same, tuple) else same
    assert (sampler(wavy(sde))[0] - same).abs().max() < 1e-9


def test_the_ddnm_score_goes_under_any_sampler():
    sde, operator = SDES["ve"], get_operator("grey", (3, 4, 4))
    y = torch.full((1, 1, 4, 4), 0.25)
    sampler = get_pc_sampler(
        sde, (2, 3, 4, 4), get_predictor("unipc"), None, lambda x: x, 0.1, eps=1e-5, steps=10
    )
    samples, nfe = sampler(ddnm_score(wavy(sde), operator, y))
    assert nfe == 10
    assert (operator(samples) - y).abs().max() < 1e-5


def test_repaint_noises_again_by_the_exact_transition():
    sde = SDES["subvp"]
    times = torch.tensor([0.7, 0.4, 0.2], dtype=F64)
    known = KnownMeasurement(sde, A, Y)
    stretch = _RePaint(
        sde, None, inner=get_predictor("none"), constrain=known, times=times, resamplings=2
    )
    (a_s, s_s), (a_t, s_t) = (alpha_sigma(sde, t) for t in (times[2], times[0]))
    torch.manual_seed(0)
    x = a_s * 0.7 + s_s * torch.randn(40000, 1, dtype=F64)
    moved = stretch._noised_again(x, times[2], times[0])
    assert moved.mean().item() == pytest.approx(0.7 * a_t.item(), abs=0.02)
    assert moved.std().item() == pytest.approx(s_t.item(), rel=0.02)


def test_repaint_visits_its_stretches_as_often_as_asked():
    sde = SDES["vp"]
    for steps, jump, rounds in ((10, 3, 4), (10, 9, 2), (7, 1, 3), (5, 20, 2)):
        sampler = solver("repaint", sde, steps=steps, jump=jump, resamplings=rounds)[0]
        assert sampler(wavy(sde))[1] == rounds * (steps - 1) + 1


def test_the_start_has_the_noise_of_the_prior():
    for name in ("replacement", "ddrm"):
        sde = SDES["ve"]
        sampler = solver(name, sde, n=500)[0]
        first = {}

        def watch(x, t, first=first):
            first.setdefault("x", x)
            return -x / 400

        sampler(as_score_function(watch, sde))
        operator = get_operator("mask", IMAGE)
        assert operator(first["x"]).std().item() == pytest.approx(20, rel=0.02)
        assert first["x"].std().item() == pytest.approx(20, rel=0.02)


# --- names and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_has_the_same_signature(name):
    parameters = inspect.signature(get_inverse_solver(name)).parameters
    assert list(parameters)[:5] == ["sde", "shape", "operator", "y", "noise"]
    assert parameters["noise"].kind is inspect.Parameter.KEYWORD_ONLY
    assert name in METHODS


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("replacement", {"noise": -1.0}, "standard deviation of the noise"),
        ("projection", {"weight": 0.0}, "0 < w ≤ 1"),
        ("repaint", {"jump": 0}, "jump and resamplings ≥ 1"),
        ("ddrm", {"eta": 2.0}, "eta and eta_b of 0 to 1"),
        ("ddnm", {"eta": -0.1}, "eta of 0 to 1"),
        ("ddnm", {"noise": 0.1, "predictor": "heun"}, "leave predictor out"),
        ("sdedit", {"t0": 0.0}, "eps < t0 ≤ T"),
        ("sdedit", {"t0": 1.5}, "eps < t0 ≤ T"),
        ("sdedit", {"schedule": "cubic"}, "sdedit knows uniform"),
        ("replacement", {"steps": 0}, "steps ≥ 1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_sampling(name, options, message):
    with pytest.raises(ValueError, match=message):
        solver(name, SDES["vp"], **options)


def test_shapes_that_do_not_fit_are_refused():
    make, sde = get_inverse_solver("ddnm"), SDES["vp"]
    with pytest.raises(ValueError, match="do not fit"):
        make(sde, (2, 5), A, Y)
    with pytest.raises(ValueError, match=r"measurement of shape \(1 or 2, \*\(2,\)\)"):
        make(sde, (2, 4), A, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="expected a guide"):
        get_inverse_solver("sdedit")(sde, (2, 4), None, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"unknown; registered: .*ddrm"):
        get_inverse_solver("drm")


def test_an_operator_without_singular_values_is_refused_where_they_are_needed():
    large = get_operator("ct", (1, 66, 66), angles=3)
    y = large(torch.zeros(1, 1, 66, 66))
    for name, noise in (("ddrm", 0.0), ("ddnm", 0.1), ("replacement", 0.1)):
        with pytest.raises(ValueError, match="needs singular values"):
            get_inverse_solver(name)(SDES["vp"], (1, 1, 66, 66), large, y, noise=noise)


def test_ddnm_plus_refuses_a_corrector_which_would_move_what_it_keeps_account_of():
    with pytest.raises(ValueError, match="corrector"):
        solver("ddnm", SDES["vp"], noise=0.1, corrector="ald")


@pytest.mark.parametrize("name", NAMES)
def test_a_users_process_of_five_methods_and_a_network_go(name):
    sde = UserSDE(N=50)
    network = AsModel(sde, gaussian_score(sde, 0.1, 0.5))  # told t·999/T, answers with the noise
    sampler, operator, y = solver(name, sde, dtype=None, eps=1e-2, n=2)
    samples, _ = sampler(network)
    assert torch.isfinite(samples).all()
    if name not in ("projection", "sdedit"):
        assert (operator(samples) - y).abs().max() < 1e-5


def test_repaint_goes_by_the_directions_that_the_state_s_precision_can_tell():
    """Of a singular value of 1e-9 float32 knows nothing, and it must not end the resampling."""

    class Diagonal(Operator):
        def forward(self, x):
            return x * torch.tensor([1.0, 1.0, 1e-9], dtype=x.dtype)

        transpose = forward

    A = Diagonal((3,), (3,))
    known = KnownMeasurement(SDES["vp"], A, torch.zeros(1, 3), noise=0.01)
    t = torch.tensor(0.5, dtype=F64)
    assert known.holds(torch.zeros(2, 3), t)
    assert not known.holds(torch.zeros(2, 3, dtype=F64), t)


def test_the_options_of_repaints_predictor_go_to_it():
    A, y = get_operator("mask", (4,), mask=torch.tensor([1, 0, 0, 1])), torch.zeros(1, 2)
    make = get_inverse_solver("repaint")
    options = {"steps": 6, "jump": 2, "resamplings": 2, "seeds": [1, 2], "eps": 1e-2}
    samples = [
        make(SDES["vp"], (2, 4), A, y, predictor="ddim", solver={"eta": eta}, **options)(
            as_score_function(lambda x, t: -x, SDES["vp"])
        )[0]
        for eta in (0.0, 1.0)
    ]
    assert not torch.equal(*samples)
    with pytest.raises(ValueError, match="DDIMPredictor has no option 'tau'; its options are eta"):
        make(SDES["vp"], (2, 4), A, y, predictor="ddim", solver={"tau": 1.0})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_options_that_a_method_does_not_have_are_refused_by_name(name):
    A, y = get_operator("mask", (4,), mask=torch.tensor([1, 0, 0, 1])), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="has no option 'itterations'"):
        get_inverse_solver(name)(SDES["vp"], (2, 4), A, y, noise=0.1, itterations=3)


@pytest.mark.parametrize(
    ("name", "taken"),
    [("ddrm", "predictor"), ("ddrm", "solver"), ("replacement", "start"), ("sdedit", "start"),
     ("repaint", "constrain")],
)  # fmt: skip
def test_what_a_method_sets_itself_is_refused_by_name(name, taken):
    A, y = get_operator("mask", (4,), mask=torch.tensor([1, 0, 0, 1])), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"{name if name != 'replacement' else 'projection'} has "
                                         f"no option '{taken}'"):  # fmt: skip
        get_inverse_solver(name)(SDES["vp"], (2, 4), A, y, **{taken: None})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_measurements_that_are_none_are_refused_before_the_sampling(name):
    A, shape = get_operator("mask", (4,), mask=torch.tensor([1, 0, 0, 1])), (2, 4)
    make, good = get_inverse_solver(name), torch.zeros(1, 2)
    for words, y, noise in (
        ("expected finite measurements, got 2", good * torch.nan, 0.1),
        ("floating point, got ndarray", good.numpy(), 0.1),
        ("floating point, got torch.int64", good.long(), 0.1),
        ("noise: expected a number", good, "a"),
        ("≥ 0, got -1", good, -1),
    ):
        with pytest.raises(ValueError, match=words):
            make(SDES["vp"], shape, A, y, noise=noise)
    if name == "smc":
        with pytest.raises(ValueError, match="noise > 0"):
            make(SDES["vp"], shape, A, good)


def test_a_grid_of_no_steps_and_a_start_that_is_no_number_are_refused():
    make, y = get_inverse_solver("sdedit"), torch.zeros(1, 4)
    for words, options in (("steps ≥ 1", {"steps": 0}), ("t0: expected a number", {"t0": "a"})):
        with pytest.raises(ValueError, match=words):
            make(SDES["vp"], (2, 4), None, y, **options)
    with pytest.raises(ValueError, match="jump: expected an integer"):
        get_inverse_solver("repaint")(
            SDES["vp"], (2, 4), get_operator("mask", (4,), mask=torch.ones(4)), y, jump=2.5
        )
