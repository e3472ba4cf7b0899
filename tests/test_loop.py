"""The sampling loop: options, grids, dtypes, histories, trajectories, latent codes, speed."""

import functools
import math
import types

import ml_collections
import pytest
import torch
import toys
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys_sampling import Gaussian, processes

import sampling
import sampling_steps
import solvers
from configs.validation import complete
from models import utils
from parametrization import as_score_function
from sampling_loop import with_options

SDES = processes()
MEAN, STD = 0.2, 0.3
# Only the library's: other tests register their own.
PREDICTORS = {
    name: cls
    for name, cls in sampling_steps._PREDICTORS.items()
    if cls.__module__.startswith(("sampling", "solvers"))
}
MEMBERS = [
    *((name, cls, {}) for name, cls in PREDICTORS.items()),
    *((label, cls, options) for label, cls, options in solvers.catalogue() if options),
]
IDS = [m[0] for m in MEMBERS]


def identity(x):
    return x


def shape_for(sde, batch=4):
    return (batch, 1, 2, 3) if isinstance(sde, toys.UserSDE) else (batch, 6)


def pc(sde, predictor, corrector=None, batch=4, **options):
    options = {"continuous": True, "eps": sde.sampling_eps, **options}
    return sampling.get_pc_sampler(
        sde, shape_for(sde, batch), predictor, corrector, identity, 0.1, **options
    )


# --- options -------------------------------------------------------------------------------------


def config(**more):
    return complete(
        {
            "training": {"sde": "vpsde"},
            "sampling": {"predictor": "ddim", "corrector": "none", "steps": 8, **more},
            "device": "cpu",
        }
    )


def from_config(settings, **options):
    sde = SDES["vpsde"]
    return sampling.get_sampling_fn(settings, sde, (4, 6), identity, 1e-3, **options)


def test_options_of_the_config_reach_the_predictor():
    model = Gaussian(SDES["vpsde"], MEAN, STD).model()
    results = {}
    for eta in (0.0, 1.0):
        settings = config(solver={"eta": eta})
        results[eta] = from_config(settings, seeds=range(4))(model)[0]
        cls = functools.partial(solvers.DDIMPredictor, eta=eta)
        assert torch.equal(results[eta], pc(SDES["vpsde"], cls, steps=8, seeds=range(4))(model)[0])
    assert not torch.equal(results[0.0], results[1.0])
    assert torch.equal(results[0.0], from_config(config(), seeds=range(4))(model)[0])


def test_options_of_the_ode_are_its_tolerances_and_method():
    model = Gaussian(SDES["vpsde"], MEAN, STD).model()
    loose = from_config(config(method="ode", solver={"rtol": 1e-2, "atol": 1e-2}))(model)[1]
    tight = from_config(config(method="ode", solver={"rtol": 1e-7, "method": "RK23"}))(model)[1]
    assert loose < tight


@pytest.mark.parametrize(
    ("sampling_of", "message"),
    [
        ({"solver": {"etta": 1.0}}, r"predictor 'ddim' has no option 'etta'; its options are eta"),
        ({"predictor": "euler_maruyama", "solver": {"a": 1, "b": 2}}, r"'a', 'b'; it has none"),
        ({"predictor": "edm", "solver": {"churn": 1}}, r"options are S_churn, .*S_noise, alpha"),
        ({"method": "ode", "solver": {"order": 1}}, r"method 'ode' has no option 'order'"),
    ],
)
def test_an_unknown_option_is_refused_naming_those_there_are(sampling_of, message):
    with pytest.raises(ValueError, match=message):
        from_config(config(**sampling_of))


def test_an_unknown_option_of_a_partial_is_refused():
    with pytest.raises(ValueError, match=r"DDIMPredictor has no option 'etta'"):
        pc(SDES["vpsde"], functools.partial(solvers.DDIMPredictor, etta=1.0), steps=5)


def test_options_follow_keyword_arguments_up_the_ancestors():
    class Base:
        def __init__(self, sde, score_fn, probability_flow=False, *, a=1):
            pass

    class Child(Base):
        def __init__(self, *args, b=2, **options):
            super().__init__(*args, **options)

    with_options(Child, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match="its options are a, b"):
        with_options(Child, {"c": 2})


def test_solver_is_a_free_section_of_the_config():
    settings = complete(config(solver={"order": 3, "form": "noise"}))
    assert settings.sampling.solver.to_dict() == {"order": 3, "form": "noise"}
    with pytest.raises(ValueError, match=r"sampling\.rho: expected a number"):
        config(rho=0.0)


def test_solver_can_be_set_on_the_command_line():
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    settings = ml_collections.ConfigDict(config().to_dict())
    args = ["main.py", "--config.sampling.solver={'eta': 0.5}"]
    config_flags.DEFINE_config_dict("config", settings, flag_values=values, sys_argv=args)
    values(args)
    assert complete(values.config).sampling.solver.to_dict() == {"eta": 0.5}


# --- history and correctors ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_with_history_are_refused_with_a_corrector(name):
    cls, sde = PREDICTORS[name], SDES["vpsde"]
    if cls.multistep:
        with pytest.raises(ValueError, match=r"earlier steps.*use corrector 'none'"):
            pc(sde, cls, sampling.AnnealedLangevinDynamics, steps=6)
        pc(sde, cls, sampling.NoneCorrector, steps=6)
    else:
        pc(sde, cls, sampling.AnnealedLangevinDynamics, steps=30)


def test_there_are_predictors_with_history():
    assert {"dpmpp_2m", "unipc"} <= {name for name, cls in PREDICTORS.items() if cls.multistep}


# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("schedule", ["uniform", "quadratic", "logsnr", "karras"])
def test_every_process_has_every_grid(name, schedule):
    sde = SDES[name]
    times = sampling.time_grid(sde, sde.sampling_eps, 12, schedule)
    assert times[0] == sde.T and times[-1] == sde.sampling_eps and (times.diff() < 0).all()


def test_rho_of_the_karras_grid_is_a_parameter():
    sde = SDES["vpsde"]
    for rho in (1.0, 3.0, 7.0):
        root = torch.exp(-sde.lambda_(sampling.time_grid(sde, 1e-3, 12, "karras", rho=rho)) / rho)
        torch.testing.assert_close(root.diff(), root.diff()[:1].expand(11))
    with pytest.raises(ValueError, match="rho > 0, got 0"):
        pc(sde, solvers.DDIMPredictor, steps=5, schedule="karras", rho=0)
    seen = {}
    for rho in (3.0, 7.0):
        path = sampling.Trajectory()
        settings = config(schedule="karras", rho=rho)
        from_config(settings, callback=path)(Gaussian(sde, MEAN, STD).model())
        seen[rho] = path.times
        torch.testing.assert_close(path.times, sampling.time_grid(sde, 1e-3, 8, "karras", rho=rho))
    assert not torch.equal(seen[3.0], seen[7.0])


def test_uniform_times_of_edm_are_the_karras_grid():
    sde = SDES["edm"]
    karras = sampling.time_grid(sde, 0.0, 18, "karras", rho=sde.rho)
    torch.testing.assert_close(sampling.time_grid(sde, 0.0, 18), karras, rtol=0, atol=1e-12)
    sigma = sde.sigma(karras)
    assert float(sigma[0]) == pytest.approx(80) and float(sigma[-1]) == pytest.approx(0.002)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("steps", [5, 37])
def test_steps_are_free_of_the_training_scales(name, steps):
    sde = SDES[name]
    bed = Gaussian(sde, MEAN, STD)
    for predictor in ("ddim", "heun", "reverse_diffusion"):
        x, nfe = pc(sde, sampling.get_predictor(predictor), steps=steps, schedule="logsnr")(
            bed.model()
        )
        per_step = PREDICTORS[predictor].nfe_per_step
        assert nfe == (steps - 1) * per_step + 1 and torch.isfinite(x).all()


# --- dtypes --------------------------------------------------------------------------------------


class TinyNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(7, 32), torch.nn.SiLU(), torch.nn.Linear(32, 6)
        )
        self.seen = set()

    def forward(self, x, labels):
        self.seen.add((x.dtype, labels.dtype))
        return self.layers(torch.cat([x, labels[:, None] / 999], dim=1))


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler_maruyama"])
def test_the_network_runs_in_its_own_dtype_inside_the_states(name, state, weights):
    torch.manual_seed(1)
    net = TinyNetwork().to(weights)
    sde = SDES["vpsde"]
    sampler = pc(sde, sampling.get_predictor(name), steps=8, dtype=state, seeds=range(4))
    x, _ = sampler(net)
    assert x.dtype == state and {seen for seen, _ in net.seen} == {weights}
    torch.manual_seed(1)
    reference, _ = pc(sde, sampling.get_predictor(name), steps=8, seeds=range(4))(TinyNetwork())
    tolerance = 1e-4 if weights == torch.float32 else 0.1
    assert (x.float() - reference).abs().max() < tolerance * reference.abs().max()


def test_noise_is_the_same_at_any_dtype_of_the_state():
    sde = SDES["vpsde"]
    model = Gaussian(sde, MEAN, STD).model()
    for source in ({"seeds": range(4)}, {"generator": None}):
        drawn = []
        for dtype in (torch.float32, torch.float64):
            if "generator" in source:
                source = {"generator": torch.Generator().manual_seed(4)}
            sampler = pc(sde, solvers.TauExponentialPredictor, steps=20, dtype=dtype, **source)
            drawn.append(sampler(model)[0].double())
        torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


# --- trajectories --------------------------------------------------------------------------------


def test_a_trajectory_keeps_the_states_of_a_run():
    sde = SDES["vpsde"]
    model = Gaussian(sde, MEAN, STD).model()
    whole, some = sampling.Trajectory(), sampling.Trajectory(every=3, samples=2, mean=True)
    for path in (whole, some):
        x, _ = pc(sde, solvers.DDIMPredictor, steps=10, callback=path, seeds=range(4))(model)
    assert whole.times.shape == (10,) and whole.states.shape == (10, 4, 6)
    torch.testing.assert_close(whole.times, sampling.time_grid(sde, 1e-3, 10))
    assert some.states.shape == (4, 2, 6) and torch.equal(some.times, whole.times[::3])
    assert torch.equal(some.states[-1], x[:2])  # denoised
    with pytest.raises(ValueError, match="sample first"):
        _ = sampling.Trajectory().states
    with pytest.raises(ValueError, match="every ≥ 1"):
        sampling.Trajectory(every=0)


@pytest.mark.parametrize("method", ["pc", "ode", "dpm_solver_adaptive", "gotta_go_fast"])
def test_every_method_calls_back_with_falling_times(method):
    path = sampling.Trajectory()
    sampler = from_config(config(method=method), callback=path)
    x, _ = sampler(Gaussian(SDES["vpsde"], MEAN, STD).model())
    assert path.states.shape[1:] == x.shape
    assert path.times[-1] < 0.01
    assert method == "ode" or (path.times.diff() <= 0).all()  # RK45 tries steps and goes back


# --- latent codes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_encoding_and_decoding_are_the_exact_maps_of_gaussian_data(name):
    sde = SDES[name]
    std = torch.linspace(0.2, 1, 3 if isinstance(sde, toys.UserSDE) else 6).double()
    bed = Gaussian(sde, MEAN, std)
    x = MEAN + std * torch.randn(shape_for(sde), dtype=torch.float64)
    options = {"rtol": 1e-8, "atol": 1e-8}
    z, nfe = sampling.encode(sde, bed.model(), x, **options)
    exact = bed.flow(x, sde.sampling_eps, sde.T)
    assert nfe > 10 and (z - exact).abs().max() < 1e-5 * exact.abs().max()
    again, _ = sampling.decode(sde, bed.model(), z, **options)
    assert (again - x).abs().max() < 1e-5
    errors = sampling.round_trip_error(sde, bed.model(), x, **options)
    torch.testing.assert_close(errors, (again - x).reshape(4, -1).square().mean(1).sqrt())


def test_round_trip_error_falls_with_the_tolerance():
    sde = SDES["vpsde"]
    model = Gaussian(sde, MEAN, torch.linspace(0.2, 1, 6).double()).model()
    x = torch.randn(4, 6, dtype=torch.float64)
    errors = [
        float(sampling.round_trip_error(sde, model, x, rtol=tol, atol=tol, eps=1e-2).max())
        for tol in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    with pytest.raises(ValueError, match="floating point"):
        sampling.encode(sde, model, torch.zeros(2, 6, dtype=torch.uint8))


def test_slerp_goes_from_code_to_code_along_the_sphere():
    torch.manual_seed(0)
    a, b = torch.randn(3, 400, dtype=torch.float64), torch.randn(3, 400, dtype=torch.float64)
    path = sampling.slerp(a, b, torch.linspace(0, 1, 5))
    assert path.shape == (5, 3, 400)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    u, v = (c / c.norm(dim=1, keepdim=True) for c in (a, b))
    arc = sampling.slerp(u, v, torch.linspace(0, 1, 5))
    torch.testing.assert_close(arc.norm(dim=2), torch.ones(5, 3).double())
    angles = torch.arccos((arc[:-1] * arc[1:]).sum(2))
    torch.testing.assert_close(angles, angles[:1].expand(4, 3))  # at even speed
    torch.testing.assert_close(sampling.slerp(a, b, 0.25), path[1])
    images = sampling.slerp(a.reshape(3, 4, 10, 10).float(), b.reshape(3, 4, 10, 10).float(), 0.25)
    assert images.shape == (3, 4, 10, 10) and images.dtype == torch.float32


def test_slerp_of_parallel_codes_is_a_line():
    a = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(sampling.slerp(a, a, 0.3), a)
    torch.testing.assert_close(sampling.slerp(a, 3 * a, 0.5), 2 * a)
    nearly = a + 1e-9 * torch.randn_like(a)
    torch.testing.assert_close(sampling.slerp(a, nearly, 0.5), a)
    with pytest.raises(ValueError, match="one shape"):
        sampling.slerp(a, a[:1], 0.5)


def test_interpolated_codes_decode_to_data_in_between():
    sde = SDES["vpsde"]
    bed = Gaussian(sde, MEAN, STD)
    x = MEAN + STD * torch.randn(2, 300, dtype=torch.float64)
    z, _ = sampling.encode(sde, bed.model(), x)
    path = sampling.slerp(z[:1], z[1:], torch.linspace(0, 1, 5))[:, 0]
    decoded, _ = sampling.decode(sde, bed.model(), path)
    torch.testing.assert_close(decoded[[0, -1]], x, rtol=1e-2, atol=1e-2)
    # A straight line would pass the middle at 0.7 of the standard deviation.
    assert decoded.std(dim=1).div(STD).sub(1).abs().max() < 0.1


# --- speed ---------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes what would slow a step down on a GPU, with 'meta' in the place of the GPU: transfers
    of more than a number between host and device, and work on the batch in another dtype. What
    asks the device for a value fails by itself: a meta tensor has none."""

    def __init__(self, x):
        super().__init__()
        self.x, self.notes = x, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in tree_leaves((args, kwargs, out)) if isinstance(a, torch.Tensor)]
        copies = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if func.overloadpacket in copies and len({a.device for a in tensors}) > 1:
            self.notes.append(f"{func} between host and device")
        for a in tree_leaves(out):
            large = isinstance(a, torch.Tensor) and a.numel() >= self.x.numel()
            if large and a.is_floating_point() and a.dtype != self.x.dtype:
                self.notes.append(f"{func} in {a.dtype}")
        return out


def watched(step, x):
    with torch.no_grad(), Watch(x) as watch:
        step()
    assert watch.notes == []


@pytest.mark.parametrize(("label", "cls", "options"), MEMBERS, ids=IDS)
@pytest.mark.parametrize("name", ["vpsde", "vesde", "rectified_flow", "user"])
def test_a_step_never_waits_for_the_device(label, cls, options, name):
    sde = SDES[name]
    p = cls(sde, as_score_function(lambda x, t: -x, sde), **options)
    times = sampling.time_grid(sde, sde.sampling_eps, 8, "logsnr")
    x = torch.zeros(4, 3, 16, 16, device="meta")
    p.start(times)
    for i in range(6):
        watched(lambda i=i: p.step(x, times[i], times[i + 1]), x)
    p.finish(x, times[-1])  # tables go to the device at their first use, once
    watched(lambda: p.finish(x, times[-1]), x)


@pytest.mark.parametrize("name", ["langevin", "ald"])
@pytest.mark.parametrize("process", SDES)
def test_a_corrector_never_waits_for_the_device(name, process):
    sde = SDES[process]
    c = sampling.get_corrector(name)(sde, as_score_function(lambda x, t: -x, sde), 0.1, 2)
    x, t = torch.zeros(4, 3, 16, 16, device="meta"), torch.ones(4, device="meta")
    c.update_fn(x, t)
    watched(lambda: c.update_fn(x, t), x)


def test_the_watch_notices_what_it_is_for():
    x = torch.zeros(4, 3, device="meta")
    for slow in (
        lambda: x * torch.ones(4, 3).to("meta"),
        lambda: x.double() * 2,
        lambda: x + torch.zeros(4, 3, dtype=torch.float64, device="meta"),
    ):
        with pytest.raises(AssertionError):
            watched(slow, x)
    with pytest.raises(RuntimeError, match="meta"):
        watched(lambda: float(x.sum()), x)
    watched(lambda: x * torch.tensor(2.0, dtype=torch.float64), x)


QUICK = ("ddim", "reverse_diffusion", "dpmpp_2m")


@pytest.mark.parametrize(
    ("label", "cls"),
    [pytest.param(*m, marks=() if m[0] in QUICK else pytest.mark.slow) for m in PREDICTORS.items()],
    ids=list(PREDICTORS),
)
def test_a_step_compiles_without_breaks(label, cls):
    from torch._dynamo.testing import CompileCounter

    if cls.multistep and torch.__version__ < "2.7":
        pytest.skip("TorchDynamo of torch 2.6 breaks the graph where a time is compared")
    sde = SDES["vpsde"]
    times = sampling.time_grid(sde, sde.sampling_eps, 12, "logsnr")
    plain, other = (cls(sde, as_score_function(lambda x, t: -x, sde)) for _ in range(2))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(other.step, fullgraph=True, backend=counter)
    x = y = torch.randn(4, 3, 4, 4)
    for p in (plain, other):
        p.start(times)
    for i in range(10):
        torch.manual_seed(i)
        x = plain.step(x, times[i], times[i + 1])[0]
        torch.manual_seed(i)
        y = compiled(y, times[i], times[i + 1])[0]
    assert torch.equal(x, y)
    if label != "none":
        assert plain.score_fn.nfe == other.score_fn.nfe > 0
    # One more for the count of evaluations, which turns dynamic, and some while history fills up.
    assert counter.frame_count <= (8 if cls.multistep else 2)


def has_compiler() -> bool:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return bool(get_cpp_compiler())
    except Exception:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_the_score_of_a_network_compiles_and_agrees():
    from configs.vp import digits_ddpmpp_continuous

    settings = complete(digits_ddpmpp_continuous.get_config())
    settings.device = torch.device("cpu")
    net = utils.create_model(settings).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sde = SDES["vpsde"]
    plain = utils.get_score_fn(sde, net, continuous=True)
    compiled = torch.compile(utils.get_score_fn(sde, net, continuous=True), fullgraph=True)
    x, t = torch.randn(4, 1, 8, 8), torch.rand(4) * 0.9 + 0.05
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x, t), plain(x, t), rtol=1e-3, atol=1e-3)
    sampler = functools.partial(pc_images, sde)
    torch.testing.assert_close(sampler(torch.compile(net)), sampler(net), rtol=1e-3, atol=1e-3)


def pc_images(sde, net):
    return sampling.get_pc_sampler(
        sde,
        (4, 1, 8, 8),
        solvers.HeunPredictor,
        None,
        identity,
        0.1,
        continuous=True,
        steps=4,
        seeds=range(4),
    )(net)[0]


# --- old configs ---------------------------------------------------------------------------------


def test_a_config_without_the_new_keys_samples():
    sde = SDES["vpsde"]
    section = types.SimpleNamespace(method="pc", predictor="ddim", corrector="none")
    settings = types.SimpleNamespace(sampling=section)
    sde = type(sde)(N=7)
    sampler = sampling.get_sampling_fn(settings, sde, (2, 3), identity, 1e-3)
    x, nfe = sampler(toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD)))
    assert nfe == 7 and math.isfinite(float(x.sum()))


def test_slerp_of_no_codes_is_none():
    none = torch.zeros(0, 3, 2)
    assert sampling.slerp(none, none, torch.linspace(0, 1, 4)).shape == (4, 0, 3, 2)
