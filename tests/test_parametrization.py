"""What networks' outputs mean: conversions against closed forms, labels, faces, wrappers."""

import pytest
import torch
import toys
from toys_paths import by_hand as closed_coefficients
from toys_paths import every_sde

import parametrization as par
import sampling
import sde_lib
from models.utils import get_score_fn, unwrap
from parametrization import Parametrization, Point, ScoreFunction, as_score_function, convert
from sde_lib import expand

NAMES = ["ve", "vp", "subvp", "user"]
MEAN, STD = 0.4, 0.3
T = torch.tensor([0.01, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)


def make(name, N=1000):
    return every_sde(N)[name]


def gaussian_truth(name, x, t, sigma_data=par.SIGMA_DATA):
    """Every output for data N(MEAN, STD²): numerics.md 2.1."""
    a, s, da, ds, g = (expand(c, x) for c in closed_coefficients(name, t))
    v, c2, centred = a**2 * STD**2 + s**2, STD**2, x - a * MEAN
    score = -centred / v
    data, noise = MEAN + a * c2 / v * centred, s / v * centred
    tilde, sd = s / a, sigma_data
    root = torch.sqrt(tilde**2 + sd**2)
    c_skip, c_out = sd**2 / root**2, tilde * sd / root
    return {
        "data": data,
        "noise": noise,
        "score": score,
        "drift": g * score,
        "v": a * noise - s * data,
        "velocity": da * MEAN + (a * da * c2 + s * ds) / v * centred,
        "preconditioned": (data - c_skip * x / a) / c_out,
    }


@pytest.mark.parametrize("name", every_sde())
@pytest.mark.parametrize("source", par.OUTPUTS)
@pytest.mark.parametrize("target", par.OUTPUTS)
def test_conversions_agree_with_the_closed_forms(name, source, target):
    sde = make(name)
    x, t = torch.randn(len(T), 3, 4, 4, dtype=torch.float64), T * float(sde.T)
    truth = gaussian_truth(name, x, t)
    converted = convert(truth[source], source, target, Point(sde, t, x))
    assert converted.dtype == torch.float64
    torch.testing.assert_close(converted, truth[target], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", every_sde())
@pytest.mark.parametrize("source", par.OUTPUTS)
@pytest.mark.parametrize("target", par.OUTPUTS)
def test_conversions_there_and_back_change_nothing(name, source, target):
    sde = make(name)
    t = T[:-1] * float(sde.T)
    x, output = (torch.randn(len(t), 1, 2, 2, dtype=torch.float64) for _ in range(2))
    point = Point(sde, t, x, sigma_data=0.7)
    there = convert(output, source, target, point)
    back = convert(there, target, source, point)
    torch.testing.assert_close(back, output, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("target", par.OUTPUTS)
def test_preconditioning_follows_the_datas_standard_deviation(target):
    """At σ_data = STD the network that returns zero is the denoiser of N(0, STD²)."""
    sde = make("edm")
    x = torch.randn(len(T), 2, dtype=torch.float64)
    point = Parametrization("preconditioned", sigma_data=0.3).point(sde, T, x)
    truth = gaussian_truth("edm", x, T, sigma_data=0.3)
    converted = convert(truth["preconditioned"], "preconditioned", target, point)
    torch.testing.assert_close(converted, truth[target])
    zero = ScoreFunction(
        lambda x, labels: torch.zeros_like(x),
        sde,
        par.as_parametrization("preconditioned", "", STD),
    )
    variance = expand(STD**2 / (STD**2 + closed_coefficients("edm", T)[1] ** 2), x)
    torch.testing.assert_close(zero.denoise(x, T), variance * x)


@pytest.mark.parametrize("output", par.OUTPUTS)
@pytest.mark.parametrize("time", [*par.TIME_INPUTS, ""])
def test_parametrization_is_output_time_input_and_sigma_data(output, time):
    declared = par.as_parametrization(output, time, 0.25)
    default = "log_sigma/4" if output == "preconditioned" else "t*999"
    assert (declared.output, declared.time, declared.sigma_data) == (output, time or default, 0.25)
    with pytest.raises(ValueError, match="sigma_data > 0"):
        par.as_parametrization(output, time, 0.0)


class Network(torch.nn.Module):
    """The exact network of one output; records its labels and counts its calls."""

    def __init__(self, name, output, declared=None):
        super().__init__()
        self.name, self.output = name, output
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.labels, self.times = [], None
        if declared is not None:
            self.parametrization = declared

    def forward(self, x, labels):
        self.labels.append(labels)
        return self.scale * gaussian_truth(self.name, x, self.times)[self.output]


FACES = {"__call__": "score", "denoise": "data", "noise": "noise", "velocity": "velocity"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output", [o for o in par.OUTPUTS if o != "preconditioned"])
def test_each_face_is_one_call_of_the_network(name, output):
    net = Network(name, output, output)
    net.times = T
    score = get_score_fn(make(name), net)
    x = torch.randn(len(T), 1, 2, 2, dtype=torch.float64)
    truth = gaussian_truth(name, x, T)
    for n, (face, wanted) in enumerate(FACES.items(), start=1):
        value = getattr(score, face)(x, T)
        torch.testing.assert_close(value, truth[wanted], rtol=1e-7, atol=1e-7)
        assert score.nfe == len(net.labels) == n


@pytest.mark.parametrize("name", NAMES)
def test_preconditioned_network_gets_scaled_input_and_log_sigma(name):
    sde, x = make(name), torch.randn(len(T), 1, 2, 2, dtype=torch.float64)
    a, s, *_ = closed_coefficients(name, T)
    tilde = s / a
    seen = {}

    def F(scaled, labels):
        seen["x"], seen["labels"] = scaled, labels
        # The exact F of N(MEAN, STD²) from its own inputs.
        root = expand(torch.sqrt(tilde**2 + par.SIGMA_DATA**2), x)
        return gaussian_truth(name, scaled * root * expand(a, x), T)["preconditioned"]

    score = ScoreFunction(F, sde, par.as_parametrization("preconditioned"))
    torch.testing.assert_close(score(x, T), gaussian_truth(name, x, T)["score"])
    torch.testing.assert_close(seen["labels"], 0.25 * torch.log(tilde))
    root = expand(torch.sqrt(tilde**2 + par.SIGMA_DATA**2), x)
    torch.testing.assert_close(seen["x"], x / expand(a, x) / root)


@pytest.mark.parametrize("name", NAMES)
def test_faces_of_a_plain_function_follow_tweedie(name):
    sde = make(name)
    score = as_score_function(toys.gaussian_score(sde, MEAN, STD), sde)
    x = torch.randn(len(T), 1, 2, 2, dtype=torch.float64)
    for face, wanted in FACES.items():
        torch.testing.assert_close(
            getattr(score, face)(x, T), gaussian_truth(name, x, T)[wanted], rtol=1e-7, atol=1e-7
        )
    assert as_score_function(score, sde) is score


def test_float32_faces_stay_float32_at_the_ends_of_time():
    for name in NAMES:
        sde = make(name)
        x, t = torch.randn(2, 1, 2, 2), torch.tensor([1e-4, 1.0])
        truth = gaussian_truth(name, x.double(), t.double())
        for output in ("noise", "score", "velocity", "v"):
            net = ScoreFunction(
                lambda x, _, o=output, n=name, t=t: gaussian_truth(n, x.double(), t.double())[
                    o
                ].float(),
                sde,
                Parametrization(output),
            )
            value = net(x, t)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), truth["score"], rtol=2e-3, atol=2e-3)


# --- score_sde's rules for labels ---------------------------------------------------------


def recording(labels, config_scales=None):
    class Recorder(torch.nn.Module):
        def forward(self, x, y):
            labels.append(y.clone())
            return torch.zeros_like(x)

    model = Recorder()
    if config_scales is not None:
        model.config = type("C", (), {"model": type("M", (), {"num_scales": config_scales})})
    return model


def run_sampler(sde, model, continuous, **options):
    sampler = sampling.get_pc_sampler(
        sde,
        (2, 3),
        sampling.EulerMaruyamaPredictor,
        None,
        lambda x: x,
        0.16,
        continuous=continuous,
        eps=sde.sampling_eps,
        **options,
    )
    return sampler(model)


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("N", [24, 100, 1000])
def test_discrete_networks_see_every_integer_once(name, N):
    labels = []
    run_sampler(make(name, N), recording(labels), continuous=False)
    assert not labels[0].is_floating_point()
    assert all(torch.equal(y, y[:1].expand(2)) for y in labels)
    order = range(N) if name == "ve" else range(N - 1, -1, -1)
    assert [int(y[0]) for y in labels] == list(order)


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_labels_do_not_follow_N(name):
    sde, labels = make(name, 1000), []
    score = get_score_fn(sde, recording(labels), continuous=False)
    sde.N = 50
    run_sampler(sde, score, continuous=False)
    seen = [int(y[0]) for y in labels]
    assert len(seen) == 50 and min(seen) == 0 and max(seen) == 999
    bound = make(name, 50)
    labels.clear()
    run_sampler(bound, recording(labels, config_scales=1000), continuous=False)
    assert [int(y[0]) for y in labels] == seen


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_fewer_steps_still_cover_the_labels(name):
    labels = []
    run_sampler(make(name, 1000), recording(labels), continuous=False, steps=10)
    seen = [int(y[0]) for y in labels]
    assert len(set(seen)) == 10 and {min(seen), max(seen)} == {0, 999}


def test_continuous_networks_see_sigma_or_999_t():
    x, t = torch.zeros(3, 2), torch.tensor([0.01, 0.4, 1.0])
    for name in ("ve", "vp", "subvp"):
        for continuous in (True, False) if name == "subvp" else (True,):
            labels = []
            get_score_fn(make(name), recording(labels), continuous=continuous)(x, t)
            wanted = 0.01 * 5000**t if name == "ve" else 999 * t
            torch.testing.assert_close(labels[0], wanted)
            assert labels[0].dtype == torch.float32


def test_labels_of_a_process_that_ends_elsewhere_are_999_t_over_T():
    class Long(toys.UserSDE):
        @property
        def T(self):
            return 5

    labels = []
    t = torch.tensor([0.5, 5.0])
    get_score_fn(Long(theta=0.8), recording(labels), continuous=True)(torch.zeros(2, 1, 1, 1), t)
    torch.testing.assert_close(labels[0], torch.tensor([99.9, 999.0]))


def test_time_without_axes_gives_one_label_per_sample():
    for name in ("ve", "vp", "subvp"):
        for continuous in (True, False):
            labels = []
            score = get_score_fn(make(name), recording(labels), continuous=continuous)
            x = torch.ones(3, 2)
            one = score(x, torch.tensor(0.4))
            rows = score(x, torch.full((3,), 0.4))
            assert labels[0].shape == (3,) and torch.equal(labels[0], labels[1])
            torch.testing.assert_close(one, rows)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_legacy_outputs_mean_score_for_ve_and_noise_elsewhere(name):
    sde, x, t = make(name), torch.randn(3, 2), torch.tensor([0.05, 0.4, 1.0])
    score = get_score_fn(sde, lambda x, y: torch.ones_like(x), continuous=True)(x, t)
    std = sde.marginal_prob(x, t)[1]
    wanted = torch.ones_like(x) if name == "ve" else -torch.ones_like(x) / std[:, None]
    torch.testing.assert_close(score, wanted)


def test_discrete_vp_divides_by_its_own_table():
    sde, x = make("vp", 100), torch.randn(2, 3)
    t = torch.tensor([0.503, 1.0])
    score = get_score_fn(sde, lambda x, y: torch.ones_like(x), continuous=False)
    sigma = sde.sqrt_1m_alphas_cumprod[[49, 99]]
    torch.testing.assert_close(score(x, t), -torch.ones_like(x) / sigma[:, None])
    alpha = sde.sqrt_alphas_cumprod[[49, 99]]
    torch.testing.assert_close(score.denoise(x, t), (x - sigma[:, None]) / alpha[:, None])


# --- wrappers, modes, gradients -----------------------------------------------------------


class DataNet(torch.nn.Module):
    parametrization = "data"

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, labels):
        return self.w * x


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        torch.nn.DataParallel,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: torch.nn.DataParallel(torch.compile(net, backend="eager")),
        lambda net: torch.compile(torch.nn.DataParallel(net), backend="eager"),
    ],
    ids=["bare", "DataParallel", "compiled", "DataParallel(compiled)", "compiled(DataParallel)"],
)
def test_declared_parametrization_is_found_through_wrappers(wrap):
    net = DataNet()
    wrapped = wrap(net)
    assert unwrap(wrapped) is net
    x, t = torch.randn(2, 3), torch.tensor([0.3, 0.6])
    torch.testing.assert_close(get_score_fn(make("vp"), wrapped).denoise(x, t), 0.5 * x)


def test_network_is_only_called_through_the_object_handed_in():
    class Wrapper(torch.nn.DataParallel):
        calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return super().forward(*args, **kwargs)

    wrapped = Wrapper(DataNet())
    score = get_score_fn(make("vp"), wrapped)
    score(torch.ones(2, 3), torch.tensor([0.3, 0.6]))
    assert wrapped.calls == 1


def test_score_is_differentiable_in_x_and_in_the_weights():
    for name in ("ve", "vp", "subvp"):
        for continuous in (True, False):
            net = torch.nn.Module()
            net.w = torch.nn.Parameter(torch.tensor(0.5))
            net.forward = lambda x, y, net=net: net.w * torch.tanh(x)
            score = get_score_fn(make(name), net, train=True, continuous=continuous)
            x = torch.randn(2, 3, requires_grad=True)
            t = torch.tensor([0.3, 0.6], requires_grad=True)
            for face in FACES:
                grads = torch.autograd.grad(getattr(score, face)(x, t).sum(), (x, net.w))
                assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


def test_training_mode_is_the_one_asked_for():
    net, x, t = DataNet(), torch.ones(1, 2), torch.tensor([0.5])
    get_score_fn(make("vp"), net, train=True)(x, t)
    assert net.training
    get_score_fn(make("vp"), net, train=False)(x, t)
    assert not net.training
    compiled = torch.compile(DataNet(), backend="eager")
    get_score_fn(make("vp"), compiled, train=False)(x, t)
    assert not unwrap(compiled).training


def test_network_keeps_its_dtype_and_the_state_its_own():
    net = DataNet().to(torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        score = get_score_fn(make("vp"), net)(torch.ones(1, 2, dtype=dtype), torch.tensor([0.5]))
        assert score.dtype == dtype


def test_conditions_reach_the_network():
    seen = {}

    def model(x, labels, **conditions):
        seen.update(conditions)
        return x

    get_score_fn(make("vp"), model)(torch.ones(1, 2), torch.tensor([0.5]), y=torch.tensor([3]))
    assert seen["y"] == 3


def test_wrong_output_shape_is_refused():
    score = get_score_fn(make("vp"), lambda x, y: x[:, :1])
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\).*\(2, 3\)"):
        score(torch.ones(2, 3), torch.tensor([0.3, 0.6]))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'epsilon' is unknown; known"):
        par.as_parametrization("epsilon")
    with pytest.raises(ValueError, match="time_input"):
        Parametrization("noise", "steps")


def test_score_function_is_returned_as_it_is():
    sde = make("vp")
    score = as_score_function(toys.gaussian_score(sde, 0.0, 1.0), sde)
    assert get_score_fn(sde, score) is score


def test_time_inputs_are_what_they_are_called():
    sde, x = make("vp"), torch.zeros(len(T), 1, dtype=torch.float64)
    p = Point(sde, T, x)
    a, s, *_ = closed_coefficients("vp", T)
    wanted = {
        "t*999": 999 * T,
        "t": T,
        "sigma": s,
        "lambda": torch.log(a / s),
        "log_sigma/4": torch.log(s / a) / 4,
    }
    assert wanted.keys() == par.TIME_INPUTS.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(Parametrization("noise", name).labels(p), value)
    assert torch.equal(sde_lib.half_log_snr(sde, T), sde.lambda_(T))


def test_a_users_network_wins_over_a_built_in_one_of_its_name(monkeypatch):
    from models import utils

    monkeypatch.setattr(utils, "_MODELS", dict(utils._MODELS))
    built_in = utils.get_model("ncsnpp")
    mine = utils.register_model(type("Mine", (torch.nn.Module,), {}), name="ncsnpp")
    assert utils.get_model("ncsnpp") is mine
    assert utils.register_model(built_in, name="ncsnpp") is built_in
    assert utils.get_model("ncsnpp") is mine
    with pytest.raises(ValueError, match="already registered"):
        utils.register_model(type("Other", (torch.nn.Module,), {}), name="ncsnpp")


def test_times_that_fit_no_sample_are_refused_by_every_face():
    score, x = as_score_function(lambda x, t: -x, toys.all_sdes()["vp"]), torch.randn(3, 2)
    for face in (score, score.denoise, score.noise, score.velocity):
        for t, message in [
            (torch.rand(2), r"one time for each of 3 samples, .* shape \(2,\); use t.reshape"),
            (torch.rand(3, 1), r"one time for each of 3 samples, .* shape \(3, 1\)"),
            (0.5, "its time as a tensor, got float; use torch.full"),
        ]:
            with pytest.raises(ValueError, match=message):
                face(x, t)
        for t in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((3,), 0.5)):
            torch.testing.assert_close(face(x, t), face(x, torch.full((3,), 0.5)))
