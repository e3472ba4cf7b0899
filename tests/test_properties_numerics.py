"""Properties of the numerics, over random shapes, times and processes; and what they refuse."""

import itertools
import math

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from toys_properties import examples
from toys_sampling import Gaussian, processes

import divergence
import likelihood
import likelihood_bits
import likelihood_bounds
import losses
import ode
import operators
import parametrization
import sampling
import sde_lib
import sde_lib_base
import sde_lib_times
import solvers  # noqa: F401  registers its predictors
from parametrization import OUTPUTS, Point, convert
from randomness import Draws
from sampling_grids import SCHEDULES

PROCESSES = {**processes(), "long": toys.LongSDE()}
NAMES = sorted(PROCESSES)
NAN, INF = math.nan, math.inf
PREDICTORS = ("ancestral_sampling", "euler_maruyama", "none", "reverse_diffusion")


def inner_times(sde, n=16):
    """Times of a process where nothing is at its end."""
    T, eps = float(sde.T), max(sde.sampling_eps, 0.02 * float(sde.T))
    return torch.linspace(eps, 0.95 * T, n, dtype=torch.float64)


# --- conversions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_conversion_and_its_inverse_are_one(cases, name):
    sde = PROCESSES[name]
    t = inner_times(sde)
    x = torch.randn(len(t), 1, 2, 2, dtype=torch.float64)
    point = Point(sde, t, x)
    for source, target in itertools.product(OUTPUTS, OUTPUTS):
        output = torch.randn_like(x)
        there = convert(output, source, target, point)
        back = convert(there, target, source, point)
        scale = (back - output).abs().amax() / (1 + output.abs().amax())
        cases.hold(f"{source} -> {target}: {scale:.3g}", scale < 1e-7)
        for middle in ("data", "noise"):
            through = convert(convert(output, source, middle, point), middle, target, point)
            error = ((through - there).abs() / (1 + there.abs())).amax()
            cases.hold(f"{source} -> {middle} -> {target}: {error:.3g}", error < 1e-6)
    cases.done(3 * len(OUTPUTS) ** 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_faces_of_a_score_agree_for_every_output_of_the_network(cases, name):
    sde = PROCESSES[name]
    truth = Gaussian(sde, 0.3, 0.6).model()
    t = inner_times(sde)
    x = torch.randn(len(t), 1, 2, 2, dtype=torch.float64)
    score = truth(x, t)
    for output in OUTPUTS:
        point = Point(sde, t, x)
        answer = convert(score, "score", output, point)
        par = parametrization.as_parametrization(output, "t")
        face = parametrization.ScoreFunction(lambda x, labels, a=answer: a, sde, par)
        for kind, found in {
            "score": face(x, t),
            "data": face.denoise(x, t),
            "noise": face.noise(x, t),
            "velocity": face.velocity(x, t),
        }.items():
            expected = convert(score, "score", kind, point)
            error = ((found - expected).abs() / (1 + expected.abs())).amax()
            cases.hold(f"{output}: {kind} {error:.3g}", error < 1e-6)
    cases.done(4 * len(OUTPUTS))


# --- processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_marginals_follow_drift_and_diffusion(cases, name):
    """α' = f α and (σ²)' = 2 f σ² + g², by central differences."""
    sde = PROCESSES[name]
    for t in inner_times(sde, 40).tolist():
        h = 1e-5 * float(sde.T)
        at = torch.tensor([t - h, t, t + h], dtype=torch.float64)
        x = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
        a, s = sde_lib.alpha_sigma(sde, at, x)
        f, g = sde_lib.drift_diffusion(sde, at, x)
        slope_a, slope_v = (a[2] - a[0]) / (2 * h), (s[2] ** 2 - s[0] ** 2) / (2 * h)
        variance = 2 * f[1] * s[1] ** 2 + g[1] ** 2
        cases.hold(f"α at {t}", torch.allclose(slope_a, f[1] * a[1], rtol=1e-4, atol=1e-7))
        close = torch.allclose(slope_v, variance, rtol=1e-3, atol=1e-7)
        # As published, VE's g² integrates to σ² − σ_min².
        cases.hold(f"σ at {t}: {slope_v:.6g} for {variance:.6g}", close)
    cases.done(80)


@pytest.mark.parametrize("name", sorted(sde_lib_base._SDES))
def test_drift_and_diffusion_of_every_named_process_are_closed_forms(name):
    cls = sde_lib_base._SDES[name]
    for part in ("f", "g2", "inverse_lambda"):
        assert getattr(cls, part) is not getattr(sde_lib.AffineSDE, part)


@pytest.mark.parametrize("name", NAMES)
def test_half_log_snr_falls_and_its_inverse_is_one(cases, name):
    sde = PROCESSES[name]
    t = inner_times(sde, 60)
    lam = sde_lib.half_log_snr(sde, t)
    back = sde_lib.time_of_half_log_snr(sde, lam)
    for i in range(60):
        cases.hold(f"λ⁻¹ at {t[i]}", abs(back[i] - t[i]) < 1e-6 * float(sde.T))
        cases.hold(f"λ falls at {t[i]}", i == 0 or lam[i] < lam[i - 1])
    cases.done(120)


@examples(60)
@given(
    name=st.sampled_from([n for n in NAMES if n not in ("user", "long")]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    batch=st.integers(0, 5),
)
def test_the_priors_density_is_the_normal_one(cases, name, shape, batch):
    sde = PROCESSES[name]
    z = sde.prior_std * torch.randn(batch, *shape, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, torch.tensor(sde.prior_std, dtype=torch.float64))
    expected = normal.log_prob(z).flatten(1).sum(1) if batch else z.new_zeros(0)
    cases.hold(f"{name} {shape}", torch.allclose(sde.prior_logp(z), expected, atol=1e-8))
    cases.hold(f"{name} {shape}", sde.prior_sampling((batch, *shape)).shape == z.shape)
    cases.done(2)


# --- grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_falls_strictly_from_T_to_eps(cases, name):
    sde = PROCESSES[name]
    T = float(sde.T)
    for schedule, steps in itertools.product(SCHEDULES, (1, 2, 3, 7, 18, 250)):
        for eps in {max(sde.sampling_eps, 1e-5), 1e-3 * T, 0.1 * T, 0.9 * T}:
            times = sampling.time_grid(sde, eps, steps, schedule)
            good = times.shape == (steps,) and times[0] == T and (times.diff() < 0).all()
            cases.hold(f"{schedule} {steps} {eps}: {times}", good)
            cases.hold(f"{schedule} {steps} {eps}: end", steps == 1 or times[-1] == eps)
            cases.hold(f"{schedule} {steps} {eps}: dtype", times.dtype == torch.float64)
    cases.done(200)


def test_wrong_grids_are_refused(cases):
    sde = PROCESSES["vpsde"]
    for eps, steps, rho in itertools.product(
        (1e-3, -1.0, 0.0, 1.0, 2.0, NAN, INF, "x", None),
        (3, 0, -1, 1.5, "x", None, True),
        (7, 0, NAN),
    ):
        for schedule in (*SCHEDULES, "unknown", 3):
            cases.attempt(
                f"{eps} {steps} {rho} {schedule}",
                lambda e=eps, n=steps, r=rho, s=schedule: sampling.time_grid(sde, e, n, s, rho=r),
                lambda times: "" if times.isfinite().all() else f"gave {times}",
            )
    cases.done(900)


# --- times of training --------------------------------------------------------------------------

TIMES = {
    "uniform": (sde_lib_times.TimeSampler, {}),
    "likelihood": (sde_lib.LikelihoodTimes, {}),
    "lognormal": (sde_lib.LogNormalTimes, {}),
    "logitnormal": (sde_lib.LogitNormalTimes, {}),
}


@pytest.mark.parametrize("name", NAMES)
def test_training_times_lie_inside_and_the_quantile_rises(cases, name):
    sde = PROCESSES[name]
    eps = max(1e-5, 1e-5 * float(sde.T))
    for (kind, (cls, options)), stratified in itertools.product(TIMES.items(), (False, True)):
        times = cls(sde, eps, stratified=stratified, **options)
        u = torch.linspace(0, 1, 101, dtype=torch.float64)
        t = times.quantile(u)
        cases.hold(f"{kind}: rises", (t.diff() >= -1e-12).all())
        drawn = times(257, "cpu")
        inside = (drawn >= eps * (1 - 1e-6)).all() and (drawn <= float(sde.T) * (1 + 1e-6)).all()
        cases.hold(f"{kind}: inside", inside and drawn.shape == (257,))
        density = times.density(t[1:-1])
        cases.hold(f"{kind}: density", density.isfinite().all() and (density >= 0).all())
        cases.hold(f"{kind}: none", times(0, "cpu").shape == (0,))
        for wrong in (-1.0, NAN, INF, 2 * float(sde.T), "x", None):
            cases.refuse(f"{kind} eps={wrong}", lambda c=cls, w=wrong: c(sde, w), "eps")
    cases.done(80)


# --- random numbers ------------------------------------------------------------------------------


@examples(80)
@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**7),
    n=st.integers(1, 12),
    cut=st.integers(0, 12),
    shape=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_draws_do_not_depend_on_the_partition_of_the_batch(cases, seed, step, n, cut, shape, dtype):
    cut = min(cut, n)
    whole = Draws(seed, step, 0, n, n)
    parts = [Draws(seed, step, 0, cut, n), Draws(seed, step, cut, n - cut, n)]
    for kind in (
        lambda d: d.rand("a", shape, dtype),
        lambda d: d.randn("b", shape, dtype),
        lambda d: d.randint("c", 7),
        lambda d: d.indices(),
    ):
        together = torch.cat([kind(part) for part in parts])
        cases.hold("partition", torch.equal(kind(whole), together))
        cases.hold("rows", torch.equal(kind(whole.rows(cut, n)), kind(parts[1])))
    cases.done(8)


# --- operators -----------------------------------------------------------------------------------

SHAPES = [(3, 8, 8), (1, 8, 8), (3, 12, 8), (2, 16, 16), (3, 4, 4)]


@pytest.mark.parametrize("name", sorted(operators.catalogue()))
def test_adjoint_pseudo_inverse_and_svd_of_every_operator(cases, name):
    ran = 0
    for shape, dtype in itertools.product(SHAPES, (torch.float64, torch.float32)):
        A = cases.attempt(f"{name} {shape}", lambda s=shape: operators.get_operator(name, s))
        if A is None:
            continue
        ran += 1
        loose = 1e-9 if dtype == torch.float64 else 2e-4
        x, y = (torch.randn(2, *s, dtype=dtype) for s in (A.shape_in, A.shape_out))
        left, right = (A(x) * y).flatten(1).sum(1), (x * A.adjoint(y)).flatten(1).sum(1)
        size = A(x).flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1) + 1
        cases.hold(f"{name} {shape} adjoint", ((left - right).abs() < loose * size).all())
        again = A(A.pinv(A(x)))
        error = (again - A(x)).norm() / (1 + A(x).norm())
        cases.hold(f"{name} {shape} A A⁺ A = A: {error:.3g}", error < max(loose, 1e-5))
        cases.hold(f"{name} {shape} dtype", A(x).dtype == dtype and A(x).shape == y.shape)
        cases.hold(f"{name} {shape} empty", A(x[:0]).shape == (0, *A.shape_out))
        for wrong in (x[..., :-1], x.long(), x[0, ..., 0], "x", None, x.to(torch.complex64)):
            cases.refuse(f"{name} {shape} {type(wrong)}", lambda A=A, w=wrong: A(w), "expected")
    assert ran >= 2  # of a kernel wider than the image there is none
    cases.done(2 * len(SHAPES) + 10 * ran)


OPTION_VALUES = [
    -1,
    0,
    1,
    2,
    3,
    0.5,
    1.5,
    NAN,
    INF,
    "x",
    "",
    None,
    True,
    (),
    (1,),
    [1, 2],
    10**6,
    {},
]


@pytest.mark.parametrize("name", sorted(operators.catalogue()))
def test_every_option_of_every_operator_with_every_kind_of_value(cases, name):
    for key, value in itertools.product([*operators.catalogue()[name], "unknown"], OPTION_VALUES):
        cases.attempt(
            f"{name} {key}={value!r}",
            lambda k=key, v=value: operators.get_operator(name, (3, 8, 8), **{k: v})(
                torch.ones(1, 3, 8, 8)
            ),
            lambda y: "" if y.isfinite().all() else "not finite",
        )
    for shape in ((), (3,), (3, 8), (0, 8, 8), (3, -8, 8), "abc", None, (3, 8, 8.5), (3, 8, 8, 8)):
        cases.attempt(f"{name} {shape}", lambda s=shape: operators.get_operator(name, s))
    cases.done(27)


def test_unknown_operators_are_answered_with_the_known_ones(cases):
    for name in ("", "blurr", "Mask", None, 3, ["mask"]):
        cases.refuse(name, lambda n=name: operators.get_operator(n, (3, 8, 8)), "mask", "superres")
    cases.done(6)


# --- likelihood ----------------------------------------------------------------------------------


def estimators(sde, eps):
    return {
        "ode": likelihood.get_ode_likelihood_fn(sde, rtol=1e-1, atol=1e-1, eps=eps),
        "exact": likelihood.get_ode_likelihood_fn(sde, trace="exact", rtol=0.1, atol=0.1, eps=eps),
        "elbo": likelihood_bounds.get_elbo_fn(sde, eps=eps),
    }


@pytest.mark.parametrize("name", ["vpsde", "vesde", "edm", "rectified_flow", "user"])
def test_data_that_have_no_density_are_refused(cases, name):
    sde = PROCESSES[name]
    eps = max(sde.sampling_eps, 1e-3)
    model = Gaussian(sde, 0.0, 0.5).model()
    good = torch.rand(2, 1, 2, 2)
    wrong = [good.clone() for _ in range(3)]
    wrong[0][0, 0, 0, 0], wrong[1][1, 0, 1, 1], wrong[2][:] = NAN, INF, -INF
    wrong += [good.long(), good.bfloat16(), good.half(), good.numpy(), None, "x", [0.1], 3.0]
    for kind, fn in estimators(sde, eps).items():
        for data in wrong:
            cases.refuse(f"{kind} {str(data)[:40]}", lambda f=fn, d=data: f(model, d), "likelihood")
        shapes = [(1, 1, 1, 1), (3, 1, 2, 1), (0, 1, 2, 2)]
        for shape in shapes[: 2 if name == "user" else 3]:  # the user's own asks for one row
            cases.attempt(
                f"{kind} {shape}",
                lambda f=fn, s=shape: f(model, torch.rand(s)).logp,
                lambda logp, s=shape: (
                    "" if logp.shape == s[:1] and logp.isfinite().all() else str(logp)
                ),
            )
    cases.done(3 * 13)


@examples(60)
@given(
    dim=st.integers(1, 10**5),
    levels=st.integers(2, 65536),
    logp=st.floats(-1e7, 1e7),
    centred=st.booleans(),
)
def test_bits_per_dim_and_nats_tell_the_same(cases, dim, levels, logp, centred):
    def unscale(x):
        return (x + 1) / 2 if centred else x

    nats = torch.tensor(logp, dtype=torch.float64)
    bits = likelihood_bits.bits_per_dim(nats, dim, unscale, levels)
    width = (2 if centred else 1) / levels  # of a bin, in the network's range
    expected = -(logp + dim * math.log(width)) / (dim * math.log(2))
    cases.hold(
        f"formula: {dim} {levels} {logp}",
        math.isclose(float(bits), expected, rel_tol=1e-9, abs_tol=1e-9),
    )
    # A density of 1/L per level, all levels alike, is log₂ L bits; certainty is none.
    even = likelihood_bits.bits_per_dim(
        torch.tensor(-dim * math.log(width * levels), dtype=torch.float64), dim, unscale, levels
    )
    cases.hold("log2(levels)", math.isclose(float(even), math.log2(levels), abs_tol=1e-6))
    cases.done(2)


def test_every_wrong_argument_of_the_likelihood(cases):
    sde = PROCESSES["vpsde"]
    model, data = Gaussian(sde, 0.0, 0.5).model(), torch.rand(1, 1, 2, 2)
    wrong = {
        "eps": [-1.0, 0.0, 1.0, 2.0, NAN, INF, "x", None],
        "rtol": [-1.0, NAN, "x", None],
        "atol": [-1.0, NAN, "x", None],
        "method": ["unknown", "", None, 3, "rk4"],
        "max_nfe": [0, -1, "x", NAN, None],
        "trace": ["unknown", "", None, 3],
        "probes": [0, -1, 1.5, "x", NAN, None],
        "sde": [None, "vpsde", 3, sde_lib.VPSDE],
    }
    for key, values in wrong.items():
        for value in values:
            options = {"sde": sde, "rtol": 0.1, "atol": 0.1, "eps": 1e-3, key: value}
            cases.refuse(
                f"{key}={value!r}",
                lambda o=options: likelihood.get_ode_likelihood_fn(**o)(model, data),
            )
    for name in ("unknown", "", None, 3, ["exact"]):
        cases.refuse(f"trace {name}", lambda n=name: divergence.get_trace(n, 1), "hutch++")
        cases.refuse(f"ode {name}", lambda n=name: ode.check_options(n, 0.1, 0.1), "dopri5")
    cases.done(45)


# --- times outside of [0, T], and numbers that are none -------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_single_updates_at_wrong_times_say_so_or_keep_the_shape(cases, name):
    sde = PROCESSES[name]
    score = Gaussian(sde, 0.0, 0.5).model()
    T = float(sde.T)
    states = [torch.randn(2, 1, 2, 2), torch.full((2, 1, 2, 2), NAN), torch.randn(0, 1, 2, 2)]
    for predictor, x in itertools.product(PREDICTORS, states):
        for time in (-0.1, 0.0, 0.5 * T, T, 1.5 * T, NAN, INF):
            t = torch.full((len(x),), time)

            def update(predictor=predictor, x=x, t=t):
                p = sampling.get_predictor(predictor)(sde, score)
                return p.update_fn(x, t)[0]

            cases.attempt(
                f"{predictor} {time} {len(x)}",
                update,
                lambda y, x=x: "" if y.shape == x.shape else f"shape {y.shape}",
            )
    cases.done(80)


class Scale(torch.nn.Module):
    """A network for data of any shape."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, labels):
        return self.weight * x


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_wrong_batches(cases, name):
    sde = PROCESSES[name]
    model = Scale()
    good = torch.randn(3, 1, 2, 2)
    batches = {
        "good": good,
        "empty": good[:0],
        "one": good[:1],
        "nan": good * NAN,
        "inf": good * INF,
        "integers": good.long(),
        "bool": good > 0,
        "flat": good.flatten(1),
        "scalar": good[0, 0, 0, 0],
        "double": good.double(),
        "half": good.half(),
        "two axes": good[:, 0, 0],
        "complex": good + 0j,
        "None": None,
        "array": good.numpy(),
        "list": [[0.1]],
    }
    for label, batch in batches.items():
        for kwargs in ({}, {"likelihood_weighting": True}, {"reduce_mean": False}):
            cases.attempt(
                f"{label} {kwargs}",
                lambda b=batch, k=kwargs: losses.get_sde_loss_fn(
                    sde, True, **{"likelihood_weighting": False, **k}
                )(model, b),
                lambda loss: "" if torch.is_tensor(loss) and loss.ndim == 0 else repr(loss),
            )
    cases.done(3 * len(batches))
