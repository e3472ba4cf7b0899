"""Every sampler on every process and grid: finite samples, or one clear error and no other."""

# ruff: noqa: B023  (closures here are called at once)

import itertools
import math

import pytest
import torch
import toys
from toys_sampling import Gaussian, processes

import sampling
import sampling_ode
import sampling_steps
import sde_lib
import solvers  # noqa: F401  registers its predictors
import solvers_adaptive
from configs.validation import complete
from parametrization import as_score_function
from sampling_loop import _option_names, with_options

PREDICTORS = sorted(sampling_steps._PREDICTORS)
CORRECTORS = sorted(sampling_steps._CORRECTORS)
SAMPLERS = sorted(sampling_steps._SAMPLERS)
SHAPE = (2, 1, 2, 2)


class NotAffine(toys.UserSDE):
    """A user's process with a drift that is not affine in x."""

    def sde(self, x, t):
        return -self.theta * torch.sin(x), torch.ones_like(t) * (2 * self.theta) ** 0.5


PROCESSES = {**processes(), "long": toys.LongSDE(), "not affine": NotAffine()}


def at(name, N):
    """The process under that name, with N scales."""
    sde = PROCESSES[name]
    low = isinstance(sde, (sde_lib.VPSDE, sde_lib.subVPSDE))
    made = type(sde)(N=N) if not low else type(sde)(0.1, min(20.0, 0.9 * N), N)
    return made


def model(sde):
    return Gaussian(sde, 0.2, 0.5).model()


def identity(x):
    return x


def finite(shape, dtype=torch.float32):
    def check(result):
        x, nfe = result
        if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
            return f"shape {tuple(x.shape)}, dtype {x.dtype}"
        if x.device.type != "meta" and not x.isfinite().all():
            return "not finite"
        return "" if isinstance(nfe, int) and nfe >= 0 else f"nfe {nfe!r}"

    return check


def pc(sde, predictor, corrector, shape=SHAPE, *, snr=0.1, score=None, **options):
    sampler = sampling.get_pc_sampler(
        sde,
        shape,
        sampling.get_predictor(predictor),
        sampling.get_corrector(corrector),
        identity,
        snr,
        eps=options.pop("eps", sde.sampling_eps),
        **options,
    )
    return sampler(score or model(sde))


#: (N, steps, schedule)
GRIDS = [
    (1, None, "uniform"),
    (2, None, "uniform"),
    (3, 1, "uniform"),
    (1, 2, "uniform"),
    (4, 3, "quadratic"),
    (7, 3, "logsnr"),
    (5, 4, "karras"),
]


def test_every_predictor_and_corrector_on_every_process_and_grid(cases):
    for name, (N, steps, schedule) in itertools.product(PROCESSES, GRIDS):
        sde = at(name, N)
        for predictor, corrector in itertools.product(PREDICTORS, CORRECTORS):
            cases.attempt(
                f"{name} {predictor} {corrector} N={N} steps={steps} {schedule}",
                lambda p=predictor, c=corrector: pc(sde, p, c, steps=steps, schedule=schedule),
                finite(SHAPE),
            )
    assert cases.ran > 1000, cases.ran
    cases.done(4000)


NAN, INF = math.nan, math.inf
WRONG = {
    "eps": [-1.0, -1e-9, 1.0, 1.5, 1e9, NAN, INF, -INF, "x", None, [1e-3], True, 1j],
    "steps": [0, -1, 1.5, NAN, "x", True, [3], INF],
    "snr": [-1.0, NAN, INF, "x", None, [0.1], 1j],
    "n_steps": [0, -1, 1.5, NAN, "x", None, [2], True],
    "shape": [
        (),
        (2,),
        (0, 1, 2, 2),
        (2, 0),
        (-1, 2, 2),
        (2, 2.5),
        "ab",
        None,
        3,
        (2, "x"),
        (NAN, 2),
    ],
    "schedule": [
        "unknown",
        "",
        3,
        None,
        lambda *a: None,
        lambda *a: [NAN] * 3,
        lambda *a: [0.5, 0.1],
        lambda *a: [0.1, 0.5, 0.9],
        lambda *a: "abc",
        lambda *a: [2.0, 1.0, 0.5],
    ],
    "rho": [0, -1, NAN, "x", None, INF],
    "dtype": [torch.int32, torch.complex64, torch.bool, "float32", 3],
    "seeds": [[1], [1, 2, 3], "ab", [1.5, 2.5], [2**70, 1], 3, [None, 1], [NAN, 1]],
    "generator": [3, "x"],
    "device": ["quda", "cuda:99", object(), 3.5],
    "predictor": [int, "ddim", 3, object(), sampling.LangevinCorrector, torch.nn.Linear],
    "corrector": [int, "ald", 3, object(), sampling.EulerMaruyamaPredictor],
    "probability_flow": ["x", NAN],
    "callback": [3, "x"],
    "inverse_scaler": [3, None, "x"],
    "constrain": [3],
    "start": [3],
    "sde": [None, "vpsde", sde_lib.VPSDE, 3],
}
WRONG_FOR = {"rho": {"schedule": "karras"}, "snr": {}, "n_steps": {}}


def valid(sde):
    return {
        "sde": sde,
        "shape": SHAPE,
        "predictor": sampling.ReverseDiffusionPredictor,
        "corrector": sampling.AnnealedLangevinDynamics,
        "inverse_scaler": identity,
        "snr": 0.1,
        "eps": 0.3,
        "steps": 3,
        "schedule": "uniform",
    }


def test_every_wrong_argument_of_the_pc_sampler(cases):
    for name in ("vpsde", "edm", "user"):
        sde = at(name, 3)
        score = model(sde)
        for key, values in WRONG.items():
            for value in values:
                kwargs = valid(sde) | WRONG_FOR.get(key, {}) | {key: value}
                cases.attempt(
                    f"{name} {key}={value!r}",
                    lambda kw=kwargs: sampling.get_pc_sampler(**kw)(score),
                    finite(SHAPE),
                )
    cases.done(200)


ODE_WRONG = {
    **{
        k: WRONG[k]
        for k in (
            "eps",
            "shape",
            "seeds",
            "generator",
            "device",
            "sde",
            "inverse_scaler",
            "callback",
        )
    },
    "rtol": [-1.0, NAN, "x", None, INF],
    "atol": [-1.0, NAN, "x", None, INF],
    "method": ["unknown", "", 3, None, "rk4", "heun"],
    "steps": [0, -1, 1.5, "x", NAN],
    "max_nfe": [0, -1, "x", NAN, None],
}


def test_every_wrong_argument_of_the_ode_sampler(cases):
    for name in ("vpsde", "edm", "user"):
        sde = at(name, 3)
        score = model(sde)
        for key, values in ODE_WRONG.items():
            for value in values:
                kwargs = dict(
                    sde=sde, shape=SHAPE, inverse_scaler=identity, eps=0.3, rtol=1e-2, atol=1e-2
                )
                kwargs |= {"method": "rk4"} if key == "steps" else {}
                kwargs |= {key: value}
                cases.attempt(
                    f"ode {name} {key}={value!r}",
                    lambda kw=kwargs: sampling.get_ode_sampler(**kw)(score),
                    finite(SHAPE),
                )
    cases.done(100)


ADAPTIVE_WRONG = {
    **{
        k: WRONG[k]
        for k in (
            "eps",
            "shape",
            "seeds",
            "generator",
            "device",
            "sde",
            "inverse_scaler",
            "callback",
            "dtype",
        )
    },
    **{
        k: [0, -1, NAN, "x", None, INF]
        for k in ("rtol", "atol", "h0", "theta", "max_growth", "max_nfe")
    },
}


@pytest.mark.parametrize(
    "maker", [solvers_adaptive.get_dpm_solver_adaptive, solvers_adaptive.get_gotta_go_fast]
)
def test_every_wrong_argument_of_the_adaptive_samplers(cases, maker):
    wrong = dict(ADAPTIVE_WRONG)
    wrong |= (
        {"order": [0, 1, 4, 2.5, "x", None]}
        if "dpm" in maker.__name__
        else {"exponent": [0, -1, NAN, "x"]}
    )
    for name in ("vpsde", "edm", "user"):
        sde = at(name, 3)
        score = model(sde)
        for key, values in wrong.items():
            for value in values:
                kwargs = dict(
                    sde=sde,
                    shape=SHAPE,
                    inverse_scaler=identity,
                    eps=0.3,
                    rtol=0.1,
                    atol=0.1,
                    max_nfe=300,
                )
                kwargs |= {key: value}
                cases.attempt(
                    f"{maker.__name__} {name} {key}={value!r}",
                    lambda kw=kwargs: maker(**kw)(score),
                    finite(SHAPE),
                )
    cases.done(100)


LANGEVIN_WRONG = {
    **{
        k: WRONG[k]
        for k in (
            "shape",
            "seeds",
            "generator",
            "device",
            "sde",
            "inverse_scaler",
            "callback",
            "corrector",
            "n_steps",
            "snr",
        )
    },
    "steps": [0, -1, 1.5, "x", NAN, None],
    "sigma": [0, -1, NAN, "x", None, INF],
    "half_side": [0, -1, NAN, "x", None, INF],
    "start": ["x", 3, None],
}


def test_every_wrong_argument_of_the_langevin_sampler(cases):
    for name in ("vpsde", "edm", "user"):
        sde = at(name, 3)
        score = model(sde)
        for key, values in LANGEVIN_WRONG.items():
            for value in values:
                kwargs = dict(
                    sde=sde,
                    shape=SHAPE,
                    inverse_scaler=identity,
                    steps=3,
                    sigma=1.0,
                    corrector=sampling.AnnealedLangevinDynamics,
                    snr=0.1,
                )
                kwargs |= {key: value}
                cases.attempt(
                    f"langevin {name} {key}={value!r}",
                    lambda kw=kwargs: sampling.get_langevin_sampler(**kw)(score),
                    finite(SHAPE),
                )
    cases.done(100)


@pytest.mark.parametrize("direction", [sampling_ode.encode, sampling_ode.decode])
def test_codes_are_tensors_of_floating_point_numbers(cases, direction):
    sde = at("vpsde", 30)
    x = torch.randn(SHAPE)
    for wrong in ((x, 30), [x], x.long(), x > 0, x.to(torch.complex64), x.numpy(), None, 3, "x"):
        cases.refuse(
            f"{direction.__name__} {type(wrong)}",
            lambda w=wrong: direction(sde, model(sde), w),
            f"{direction.__name__} needs a tensor",
            "takes the first",
        )
    for shape in ((3,), (), (0, 1, 2, 2)):
        cases.refuse(shape, lambda s=shape: direction(sde, model(sde), torch.zeros(s)), "(B, *)")
    cases.done(12)


# --- registered samplers, by a configuration ------------------------------------------------


def configured(method, predictor="euler_maruyama", corrector="none", **keys):
    config = complete(
        {"sampling": {"method": method, "predictor": predictor, "corrector": corrector}}
    )
    config.device = torch.device("cpu")
    config.sampling.update(keys)
    return config


def slow_but(fast, values):
    """Parameters of which all but those in `fast` are slow."""
    return [v if v in fast else pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.mark.parametrize("name", slow_but(("vpsde", "rectified_flow", "user"), PROCESSES))
def test_every_sampler_by_its_name_on_every_process(cases, name):
    for method, steps, seeds in itertools.product(SAMPLERS, (0, 1, 2), (False, True)):
        sde = at(name, 3)
        config = configured(
            method, corrector="ald" if method == "langevin" else "none", steps=steps
        )
        config.training.sigma = 1.0
        if method in ("ode", "dpm_solver_adaptive", "gotta_go_fast"):
            config.sampling.solver = {"rtol": 0.1, "atol": 0.1}
        shape = (3, 1, 2, 1)

        def run(config=config, sde=sde, shape=shape, seeds=seeds):
            eps = sde.sampling_eps
            sampler = sampling.get_sampling_fn(
                config, sde, shape, identity, eps, seeds=[1, 2, 3] if seeds else None
            )
            return sampler(model(sde))

        cases.attempt(f"{name} {method} {steps} {seeds}", run, finite(shape))
    cases.done(30)


UNKNOWN = ["", "Langevn", "ddim ", "pcc", "euler-maruyama", "no", "ode45", "ÜNI"]


def test_unknown_names_of_samplers_are_answered_with_the_known_ones(cases):
    sde = at("vpsde", 30)
    for name in UNKNOWN:
        cases.refuse(name, lambda n=name: sampling.get_predictor(n), "ddim", "euler_maruyama")
        cases.refuse(name, lambda n=name: sampling.get_corrector(n), "langevin", "ald")
        cases.refuse(
            name, lambda n=name: sampling_steps.get_sampler(n), "pc", "ode", "gotta_go_fast"
        )
        cases.refuse(name, lambda n=name: sampling.time_grid(sde, 0.1, 3, n), "karras", "logsnr")
        for key in ("method", "predictor", "corrector"):
            config = configured("pc")
            config.sampling[key] = name
            cases.refuse(
                f"{key}={name}",
                lambda c=config: sampling.get_sampling_fn(c, sde, SHAPE, identity, 1e-3),
                "nknown",
            )
    for name in (None, 3, ["ddim"], {"a": 1}):
        for get in (sampling.get_predictor, sampling.get_corrector, sampling_steps.get_sampler):
            cases.refuse(name, lambda n=name, g=get: g(n), "nknown")
    cases.done(60)


# --- options of predictors --------------------------------------------------------------------

VALUES = [
    -1,
    0,
    0.5,
    1,
    2,
    3,
    5,
    1.5,
    NAN,
    INF,
    "x",
    None,
    True,
    (0.1, 0.9),
    [1, 2],
    10**9,
    -0.0,
    1j,
]


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_option_of_every_predictor_with_every_kind_of_value(cases, predictor):
    cls = sampling.get_predictor(predictor)
    options = sorted(_option_names(cls))
    for key, value in itertools.product([*options, "unknown_option"], VALUES):
        for name in ("vpsde", "edm"):
            sde = at(name, 4)
            cases.attempt(
                f"{predictor} {key}={value!r} {name}",
                lambda sde=sde, key=key, value=value: sampling.get_pc_sampler(
                    sde, SHAPE, with_options(cls, {key: value}, predictor), None, identity, 0.1,
                    eps=0.1, steps=4, schedule="logsnr",
                )(model(sde)),
                finite(SHAPE),
            )  # fmt: skip
    cases.done(2 * len(VALUES))


# --- processes and their arguments --------------------------------------------------------------

NUMBERS = [-1, 0, 0.5, 1, 1000, NAN, INF, -INF, "x", None, [1], True, 1j, 1e30, 1e-30]
ARGUMENTS = {
    sde_lib.VPSDE: ("beta_min", "beta_max", "N"),
    sde_lib.subVPSDE: ("beta_min", "beta_max", "N"),
    sde_lib.VESDE: ("sigma_min", "sigma_max", "N"),
    sde_lib.CosineVP: ("N",),
    sde_lib.RectifiedFlow: ("N", "sigma_min"),
    sde_lib.EDM: ("sigma_min", "sigma_max", "rho", "N"),
    sde_lib.LinearVE: ("sigma_min", "sigma_max", "N"),
    sde_lib.OUVE: ("theta", "sigma_min", "sigma_max", "N"),
}


def test_every_argument_of_every_process(cases):
    def sample(cls, key, value):
        sde = cls(**{key: value})
        return pc(sde, "euler_maruyama", "none", steps=2, eps=max(sde.sampling_eps, 0.3))

    for cls, keys in ARGUMENTS.items():
        for key, value in itertools.product(keys, NUMBERS):
            cases.attempt(
                f"{cls.__name__} {key}={value!r}",
                lambda c=cls, k=key, v=value: sample(c, k, v),
                finite(SHAPE),
            )
    cases.done(300)


# --- shapes, dtypes, devices ---------------------------------------------------------------------

SHAPES = [
    (1, 1),
    (3, 2),
    (2, 7),
    (1, 3, 5),
    (2, 1, 3, 5),
    (1, 3, 1, 1),
    (2, 1, 2, 2, 3),
    (5, 1, 1, 1),
]
SMALL = {"vesde": 50, "vpsde": 30, "rectified_flow": 5, "edm": 5, "cosine": 5, "subvpsde": 30}


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", slow_but((torch.float16,), DTYPES))
def test_every_shape_and_dtype(cases, dtype):
    for (name, N), shape in itertools.product(SMALL.items(), SHAPES):
        sde = at(name, N)
        for predictor in PREDICTORS:
            cases.attempt(
                f"{name} {predictor} {shape} {dtype}",
                lambda sde=sde, p=predictor, shape=shape: pc(
                    sde, p, "none", shape, steps=3, dtype=dtype, eps=0.1, schedule="quadratic"
                ),
                finite(shape, dtype),
            )
    cases.done(600)


def test_the_meta_device_tells_shapes_without_numbers(cases):
    def zero(x, t):
        return torch.zeros_like(x)

    for name, predictor in itertools.product(SMALL, PREDICTORS):
        sde = at(name, SMALL[name])
        cases.attempt(
            f"meta {name} {predictor}",
            lambda sde=sde, p=predictor: pc(
                sde, p, "none", device="meta", steps=3, eps=0.1,
                score=as_score_function(zero, sde),
            ),
            finite(SHAPE),
        )  # fmt: skip
    cases.done(100)


# --- networks that misbehave ---------------------------------------------------------------------

NETWORKS = {
    "nan": lambda x, t: x * NAN,
    "inf": lambda x, t: x * INF,
    "late nan": lambda x, t: torch.where(t.reshape(-1, 1, 1, 1) < 0.5, x * NAN, -x),
    "one row of nan": lambda x, t: torch.cat([x[:1] * NAN, -x[1:]]),
    "too many channels": lambda x, t: torch.cat([x, x], dim=1),
    "one row": lambda x, t: x[:1],
    "flat": lambda x, t: x.flatten(1),
    "None": lambda x, t: None,
    "a tuple": lambda x, t: (x, x),
    "a number": lambda x, t: 0.0,
    "a string": lambda x, t: "x",
    "an array": lambda x, t: x.numpy(),
    "integers": lambda x, t: x.long(),
    "complex": lambda x, t: x.to(torch.complex64),
    "float64": lambda x, t: -x.double(),
    "bfloat16": lambda x, t: -x.bfloat16(),
    "huge": lambda x, t: x * 1e38,
}


def behave(cases, names):
    for (label, network), name in itertools.product(NETWORKS.items(), names):
        sde = at(name, 30)
        loose = {"rtol": 0.2, "atol": 0.2, "max_nfe": 40}
        runs = {
            "pc": lambda s: pc(sde, "reverse_diffusion", "ald", score=s, steps=3),
            "dpmpp_2m": lambda s: pc(sde, "dpmpp_2m", "none", score=s, steps=3),
            "ode": lambda s: sampling.get_ode_sampler(sde, SHAPE, identity, eps=0.1, **loose)(s),
            "scipy": lambda s: sampling.get_ode_sampler(
                sde, SHAPE, identity, eps=0.5, method="RK23", rtol=0.5, atol=0.5
            )(s),
            "fast": lambda s: solvers_adaptive.get_gotta_go_fast(sde, SHAPE, identity, **loose)(s),
            "dpm": lambda s: solvers_adaptive.get_dpm_solver_adaptive(
                sde, SHAPE, identity, **loose
            )(s),
        }
        for method, run in runs.items():
            for kind, score in (("score", as_score_function(network, sde)), ("net", network)):
                cases.attempt(f"{label} {kind} {name} {method}", lambda: run(score), finite(SHAPE))


def test_networks_that_give_something_else_are_told_so(cases):
    behave(cases, ["edm"])
    cases.done(200)


@pytest.mark.slow
def test_networks_that_give_something_else_are_told_so_on_other_processes(cases):
    behave(cases, ["vpsde", "user"])
    cases.done(400)
