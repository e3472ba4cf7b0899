"""The PC loop and the ODE sampler: every pair, grids, seeds, failures, evaluations counted."""

import functools
import itertools
import math
import time
import types

import pytest
import torch
import toys

import likelihood
import ode
import sampling
import sde_lib
from parametrization import as_score_function
from sampling import get_ode_sampler, get_pc_sampler, time_grid

NAMES = ["ve", "vp", "subvp", "user"]
PREDICTORS = ["euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none", None]
CORRECTORS = ["langevin", "ald", "none", None]
MEAN, STD = 0.2, 0.3


class TanhSDE(toys.UserSDE):
    """A process whose drift is not affine."""

    def sde(self, x, t):
        return -torch.tanh(x), torch.ones_like(t)


class Counting:
    """A network of score_sde's conventions with the exact Gaussian score; counts its calls."""

    def __init__(self, sde):
        self.model = toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD))
        self.calls = 0

    def __call__(self, x, labels):
        self.calls += 1
        return self.model(x, labels)


def make(name, N=1000):
    others = {"user": toys.UserSDE, "tanh": TanhSDE, "long": toys.LongSDE}
    return others[name](N=N) if name in others else toys.all_sdes(N)[name]


def identity(x):
    return x


def pc(sde, predictor="euler_maruyama", corrector=None, shape=(4, 1, 2, 2), **options):
    if isinstance(predictor, str):
        predictor = sampling.get_predictor(predictor)
    if isinstance(corrector, str):
        corrector = sampling.get_corrector(corrector)
    options = {"snr": 0.16, "continuous": True, "eps": sde.sampling_eps, **options}
    return get_pc_sampler(sde, shape, predictor, corrector, identity, **options)


# --- every pair ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "long", "tanh"])
@pytest.mark.parametrize("N", [5, 20, 100])
@pytest.mark.parametrize("steps", [None, 7])
def test_every_pair_is_finite_or_refused_at_construction(name, N, steps):
    ran = 0
    for predictor, corrector, flow in itertools.product(PREDICTORS, CORRECTORS, (False, True)):
        sde = make(name, N)
        try:
            sampler = pc(sde, predictor, corrector, probability_flow=flow, steps=steps)
        except ValueError:
            continue
        model = Counting(sde)
        x, nfe = sampler(model)
        ran += 1
        assert x.shape == (4, 1, 2, 2) and x.dtype == torch.float32
        assert torch.isfinite(x).all()
        per_step = (predictor not in (None, "none")) + (corrector not in (None, "none"))
        assert nfe == model.calls == (steps or N) * per_step
    assert ran >= 8


def refusal(name, N, *args, **options):
    with pytest.raises(ValueError) as error:
        pc(make(name, N), *args, **options)
    return str(error.value)


def test_refusals_say_why_and_what_to_do():
    for predictor in ("reverse_diffusion", "ancestral_sampling"):
        assert "N ≥ 21" in refusal("vp", 20, predictor)
    for name in ("vp", "subvp"):
        assert "set steps" in refusal(name, 20, "euler_maruyama", "langevin")
    assert "no probability flow" in refusal("ve", 100, "ancestral_sampling", probability_flow=True)
    assert "not affine in x; use euler_maruyama" in refusal("tanh", 100, "ancestral_sampling")
    assert "not affine in x" in refusal("tanh", 100, "euler_maruyama", "langevin")
    assert "not affine in x" in refusal("tanh", 100, schedule="logsnr", steps=10)
    assert "n_steps ≥ 1" in refusal("vp", 100, corrector="ald", n_steps=0)
    assert "snr" in refusal("vp", 100, corrector="ald", snr=-0.1)
    assert "eps < 1" in refusal("vp", 100, eps=1.0)
    assert "use 0.001" in refusal("vp", 100, eps=0.0)
    assert "eps" in refusal("vp", 100, eps=-1e-3)
    assert "steps ≥ 1" in refusal("vp", 100, steps=0)
    assert "schedule 'cosine' is unknown" in refusal("vp", 100, schedule="cosine")
    for shape in ((4,), (0, 2), (), (2, -1)):
        assert "shape" in refusal("vp", 100, shape=shape)
    assert "falling times" in refusal("vp", 100, schedule=lambda *_: torch.zeros(5), steps=5)
    assert "falling times" in refusal("vp", 100, schedule=lambda *_: [0.5, 0.1], steps=5)
    assert "falling times" in refusal("vp", 100, schedule=lambda *_: [1.5, 0.1], steps=2)
    with pytest.raises(ValueError, match=r"unknown; registered: .*reverse_diffusion"):
        sampling.get_predictor("nonsense")
    with pytest.raises(ValueError, match="already registered"):
        sampling.register_predictor(sampling.Predictor, name="none")


def test_network_of_wrong_output_shape_is_refused_at_its_first_call():
    with pytest.raises(ValueError, match="the network returned shape"):
        pc(make("vp", 100))(lambda x, y: x[:, :, :1])


def test_process_that_is_not_affine_runs_under_euler_maruyama():
    sde = make("tanh", 50)
    x, nfe = pc(sde, steps=20)(lambda x, y: torch.zeros_like(x))
    assert torch.isfinite(x).all() and nfe == 20


@pytest.mark.parametrize("name", NAMES)
def test_discrete_sampling_of_ode_uses_discrete_labels(name):
    seen = []

    def model(x, labels):
        seen.append(labels)
        return torch.zeros_like(x)

    sde = make(name, 100)
    get_ode_sampler(sde, (2, 1, 2, 2), identity, continuous=False)(model)
    integers = name in ("ve", "vp")
    assert all(y.is_floating_point() != integers for y in seen)
    assert not integers or all(0 <= int(y.min()) <= int(y.max()) <= 99 for y in seen)


def test_ode_of_discrete_networks_is_not_that_of_continuous_ones():
    """VE's labels mean σ or an index: the wrong one would decode to noise."""
    sde = make("ve", 1000)
    sigmas = torch.flip(sde.discrete_sigmas, (0,))

    def discrete(x, labels):
        return -(x - MEAN) / (STD**2 + sigmas[labels][:, None] ** 2)

    z = 50 * torch.randn(64, 2)
    options = {"eps": 1e-3, "rtol": 1e-4, "atol": 1e-4}
    exact, _ = get_ode_sampler(sde, (64, 2), identity, **options)(Counting(sde), z)
    table, _ = get_ode_sampler(sde, (64, 2), identity, continuous=False, **options)(discrete, z)
    assert (exact - table).abs().max() < 2e-2


# --- grids --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "long"])
@pytest.mark.parametrize("schedule", ["uniform", "quadratic", "logsnr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_grids_fall_from_T_to_eps(name, schedule, steps):
    sde = make(name)
    times = time_grid(sde, 1e-3, steps, schedule)
    assert times.dtype == torch.float64 and times.shape == (steps,)
    assert times[0] == sde.T and (steps == 1 or times[-1] == 1e-3)
    assert (times.diff() < 0).all()


def test_grids_of_other_end_times_are_free_of_rounding():
    for T in (0.7, 2, 3, 10.0):
        sde = types.SimpleNamespace(T=T)
        for schedule in ("uniform", "quadratic"):
            times = time_grid(sde, 1e-3, 10, schedule)
            assert times[0] == T and times[-1] == 1e-3


def test_grids_are_uniform_in_what_they_name():
    sde = make("vp")
    lam = sde.lambda_(time_grid(sde, 1e-3, 12, "logsnr"))
    torch.testing.assert_close(lam.diff(), lam.diff()[:1].expand(11))
    root = torch.exp(-sde.lambda_(time_grid(sde, 1e-3, 12, "karras")) / 7)
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(11))
    root = time_grid(sde, 1e-3, 12, "quadratic").sqrt()
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(11))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["uniform", "quadratic", "logsnr", "karras", "own"])
def test_any_schedule_samples_the_data(name, schedule):
    if schedule == "own":

        def schedule(sde, eps, steps):
            return torch.linspace(1, eps**0.5, steps, dtype=torch.float64) ** 2

    sde = make(name)
    options = {"steps": 200, "schedule": schedule, "eps": 1e-2, "denoise": False}
    x, nfe = pc(sde, "reverse_diffusion", shape=(500, 1, 2, 2), **options)(Counting(sde))
    a, s = (float(c) for c in sde_lib.alpha_sigma(sde, torch.tensor(1e-2)))
    assert nfe == 200
    assert x.mean() == pytest.approx(a * MEAN, abs=0.05)
    assert x.std() == pytest.approx(math.hypot(a * STD, s), rel=0.1)


def test_steps_equal_to_N_are_the_legacy_grid():
    sde, results = make("vp", 50), []
    for options in ({}, {"steps": 50}):
        torch.manual_seed(3)
        results.append(pc(sde, "ancestral_sampling", "ald", **options)(Counting(sde))[0])
    assert torch.equal(*results)


def test_number_of_steps_follows_N_assigned_after_construction():
    sde = make("vp", 100)
    sampler = pc(sde, "reverse_diffusion")
    sde.N = 40
    torch.manual_seed(3)
    x, nfe = sampler(Counting(sde))
    torch.manual_seed(3)
    again, _ = pc(make("vp", 40), "reverse_diffusion")(Counting(sde))
    assert nfe == 40 and torch.equal(x, again)
    sde.N = 10
    with pytest.raises(ValueError, match="N ≥ 21"):
        sampler(Counting(sde))


# --- users' predictors --------------------------------------------------------------------


class UpdateOnly(sampling.Predictor):
    def update_fn(self, x, t):
        return x * 0.5, x


class StepOnly(sampling.Predictor):
    def step(self, x, t, s):
        self.seen = [*getattr(self, "seen", []), (float(t), float(s))]
        return x + self.score_fn(x, sampling.batch_time(x, t)) * 0, x


class NewUpdate(sampling.ReverseDiffusionPredictor):
    def update_fn(self, x, t):
        return torch.full_like(x, 7.0), torch.full_like(x, 7.0)


class NewStep(sampling.ReverseDiffusionPredictor):
    def step(self, x, t, s):
        return torch.full_like(x, 7.0), torch.full_like(x, 7.0)

    def finish(self, x, t):
        return x, x


def test_class_with_update_fn_only_is_refused_off_the_legacy_grid():
    sde = make("vp", 30)
    assert pc(sde, UpdateOnly)(Counting(sde))[1] == 0
    for options in ({"steps": 10}, {"schedule": "karras"}, {"steps": 31}):
        with pytest.raises(ValueError, match=r"UpdateOnly .*leave out steps=.* or define step"):
            pc(sde, UpdateOnly, **options)
    p = UpdateOnly(sde, toys.gaussian_score(sde, 0, 1))
    with pytest.raises(NotImplementedError, match="define step"):
        p.step(torch.zeros(1, 1), torch.tensor(0.5), torch.tensor(0.4))


def test_class_with_step_only_works_on_the_legacy_grid():
    sde = make("vp", 30)
    x, nfe = pc(sde, StepOnly)(Counting(sde))
    assert torch.isfinite(x).all()
    assert nfe == 30  # 29 intervals and the denoiser at eps


def test_users_newer_update_is_never_replaced_by_an_inherited_step():
    sde = make("vp", 30)
    assert (pc(sde, NewUpdate)(Counting(sde))[0] == 7).all()
    with pytest.raises(ValueError, match="NewUpdate has an update_fn"):
        pc(sde, NewUpdate, steps=10)


def test_users_newer_step_is_never_replaced_by_an_inherited_update():
    sde = make("vp", 30)
    for options in ({}, {"steps": 10}):
        assert (pc(sde, NewStep, **options)(Counting(sde))[0] == 7).all()


def test_class_with_neither_is_refused():
    class Nothing(sampling.Predictor):
        pass

    with pytest.raises(TypeError, match="neither update_fn"):
        pc(make("vp", 30), Nothing)


def test_class_that_is_no_predictor_runs_by_its_update_fn():
    class Foreign:
        def __init__(self, sde, score_fn, probability_flow=False):
            self.score_fn = score_fn

        def update_fn(self, x, t):
            return x + 0 * self.score_fn(x, t), x

    sde = make("vp", 30)
    assert pc(sde, Foreign)(Counting(sde))[1] == 30
    with pytest.raises(ValueError, match="define step"):
        pc(sde, Foreign, steps=10)


def test_start_is_called_with_the_grid():
    seen = []

    class Starting(sampling.EulerMaruyamaPredictor):
        def start(self, times):
            seen.append(times)

    sde = make("vp", 30)
    sampler = pc(sde, Starting, steps=12, schedule="karras")
    sampler(Counting(sde))
    sampler(Counting(sde))
    assert len(seen) == 2 and torch.equal(seen[0], time_grid(sde, 1e-3, 12, "karras"))


# --- results, denoising, callbacks --------------------------------------------------------


def test_denoise_returns_x_mean_and_else_x():
    sde, last = make("vp", 30), {}

    def keep(i, t, x, x_mean):
        last.update(i=i, t=t, x=x, x_mean=x_mean)

    for denoise in (True, False):
        x, _ = pc(sde, "ancestral_sampling", "ald", denoise=denoise, callback=keep)(Counting(sde))
        assert torch.equal(x, last["x_mean" if denoise else "x"])
        assert not torch.equal(last["x"], last["x_mean"])
        assert last["i"] == 29 and last["t"] == pytest.approx(1e-3)


def test_corrector_alone_denoises_by_its_own_mean():
    sde, last = make("vp", 30), {}
    x, _ = pc(sde, None, "ald", callback=lambda i, t, x, m: last.update(x=x, m=m))(Counting(sde))
    assert torch.equal(x, last["m"]) and not torch.equal(x, last["x"])


def test_callback_is_called_after_every_step_with_falling_times():
    sde, times = make("ve", 30), []
    pc(sde, callback=lambda i, t, x, m: times.append((i, t)), steps=12)(Counting(sde))
    assert [i for i, _ in times] == list(range(12))
    assert all(a[1] > b[1] for a, b in itertools.pairwise(times))


def test_inverse_scaler_is_applied_once():
    sde = make("vp", 30)
    sampler = get_pc_sampler(
        sde, (2, 3), None, None, lambda x: 100 + x, 0.1, generator=torch.Generator().manual_seed(1)
    )
    x, nfe = sampler(Counting(sde))
    assert nfe == 0 and (x - 100).abs().max() < 6


def test_n_steps_of_the_corrector_are_counted():
    sde, model = make("vp", 30), Counting(make("vp", 30))
    _, nfe = pc(sde, "euler_maruyama", "ald", n_steps=3)(model)
    assert nfe == model.calls == 30 * 4


def test_dtype_of_the_state_can_be_chosen():
    sde = make("vp", 30)
    for predictor in PREDICTORS:
        x, _ = pc(sde, predictor, "ald", dtype=torch.float64, steps=5)(Counting(sde))
        assert x.dtype == torch.float64


# --- randomness ---------------------------------------------------------------------------

SEEDS = [7, 0, 123456789, 2**40 + 1, 17, 3, 99]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("predictor", PREDICTORS[:4])
@pytest.mark.parametrize("corrector", ["ald", "none", "langevin"])
def test_seeded_samples_are_bit_equal_at_any_batch_size(name, predictor, corrector):
    shape = (3, 16, 16) if corrector == "langevin" else (1, 3, 2)
    sde = make(name, 30)

    def sample(seeds, **options):
        sampler = pc(sde, predictor, corrector, (len(seeds), *shape), seeds=seeds, **options)
        return sampler(Counting(sde))[0]

    for options in ({}, {"steps": 6}):
        whole = sample(SEEDS, **options)
        parts = torch.cat([sample(s, **options) for s in (SEEDS[:1], SEEDS[1:4], SEEDS[4:])])
        assert torch.equal(whole, parts)
        assert torch.equal(whole.flip(0), sample(SEEDS[::-1], **options))
        assert torch.unique(whole.flatten(1), dim=0).shape[0] == len(SEEDS)


def test_seeded_ode_samples_start_from_the_same_codes():
    sde = make("vp", 30)

    def sample(seeds):
        options = {"seeds": seeds, "rtol": 1e-6, "atol": 1e-6}
        return get_ode_sampler(sde, (len(seeds), 2), identity, **options)(Counting(sde))[0]

    torch.testing.assert_close(sample(SEEDS)[2:4], sample(SEEDS[2:4]), rtol=0, atol=1e-4)


def test_langevin_under_seeds_is_refused_below_768_numbers():
    sde = make("ve", 30)
    with pytest.raises(ValueError, match="use corrector 'ald'"):
        pc(sde, corrector="langevin", shape=(2, 3, 15, 17), seeds=[1, 2])
    pc(sde, corrector="langevin", shape=(2, 3, 16, 16), seeds=[1, 2])
    with pytest.raises(ValueError, match="one per sample, got 3"):
        pc(sde, shape=(2, 3), seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="got both"):
        pc(sde, shape=(1, 3), seeds=[1], generator=torch.Generator())(Counting(sde))


class OwnNoisePredictor(sampling.Predictor):
    def update_fn(self, x, t):
        return x + 0.01 * torch.randn_like(x), x


class OwnNoiseCorrector(sampling.Corrector):
    def update_fn(self, x, t):
        return x + 0.01 * torch.randn_like(x), x


def test_class_that_draws_its_own_noise_is_refused_under_seeds():
    sde = make("vp", 30)
    for options in ({"predictor": OwnNoisePredictor}, {"corrector": OwnNoiseCorrector}):
        pc(sde, shape=(2, 3), **options)(Counting(sde))
        with pytest.raises(ValueError, match=r"draw by self.randn_like\(x\)"):
            pc(sde, shape=(2, 3), seeds=[1, 2], **options)(Counting(sde))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["generator", "seeds"])
def test_a_given_source_of_noise_is_reproducible_and_leaves_the_global_state(name, source):
    sde, results = make(name, 30), []
    for _ in range(2):
        torch.rand(len(results) + 3)
        before = torch.get_rng_state()
        given = (
            {"generator": torch.Generator().manual_seed(5)}
            if source == "generator"
            else {"seeds": [1, 2, 3, 4]}
        )
        x, _ = pc(sde, "reverse_diffusion", "ald", **given)(Counting(sde))
        z, _ = get_ode_sampler(sde, (4, 1, 2, 2), identity, **given)(Counting(sde))
        assert torch.equal(torch.get_rng_state(), before)
        results.append((x, z))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_generator_gives_new_samples_at_every_call():
    sde = make("vp", 30)
    sampler = pc(sde, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(sampler(Counting(sde))[0], sampler(Counting(sde))[0])


def test_seeded_noise_is_standard_normal_and_independent_of_the_prior():
    source = sampling.NoiseSource(seeds=range(400))
    x = source.prior(make("vp"), (400, 5))
    z = source.randn_like(x)
    w = source.randn_like(x)
    for a, b in itertools.combinations((x, z, w), 2):
        assert (a * b).mean().abs() < 5 / 2000**0.5
    for a in (x, z, w):
        assert a.mean().abs() < 5 / 2000**0.5
        assert abs(a.var() - 1) < 5 * (2 / 2000) ** 0.5


# --- failures -----------------------------------------------------------------------------


class NaNBelow:
    """NaN at times below `threshold`, for VP's labels 999·t."""

    def __init__(self, threshold):
        self.threshold = threshold

    def __call__(self, x, labels):
        bad = labels[:, None, None, None] <= 999 * self.threshold
        return torch.where(bad, torch.full_like(x, float("nan")), x)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_nan_of_the_network_is_an_error_that_names_t_within_seconds(threshold):
    sde, start = make("vp", 100), time.monotonic()
    named = r"t = 1\b" if threshold == 1 else r"t = 0\.[45]"
    with pytest.raises(FloatingPointError, match=named):
        pc(sde)(NaNBelow(threshold))
    for method in ode.METHODS:
        with pytest.raises(FloatingPointError, match=r"t = "):
            get_ode_sampler(sde, (2, 1, 2, 2), identity, method=method)(NaNBelow(threshold))
    data = torch.zeros(2, 1, 2, 2)
    with pytest.raises(FloatingPointError, match=r"t = 1e-05"):
        likelihood.get_likelihood_fn(sde, identity)(NaNBelow(threshold), data)
    assert time.monotonic() - start < 10


def test_nan_at_the_last_step_is_noticed():
    sde = make("vp", 100)
    with pytest.raises(FloatingPointError, match=r"step 99 of 100, at t = 0\.001"):
        pc(sde)(NaNBelow(0.002))


def test_overflow_of_the_state_is_an_error():
    sde = make("vp", 100)
    with pytest.raises(FloatingPointError, match="t = "):
        pc(sde)(lambda x, y: -1e30 * x)


def test_unknown_ode_method_is_refused():
    sde = make("vp", 30)
    with pytest.raises(ValueError, match=r"'RK99' is unknown; known: dopri5"):
        get_ode_sampler(sde, (2, 3), identity, method="RK99")(Counting(sde))


# --- the ODE ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_encoding_inverts_decoding(name):
    sde, model = make(name), None
    model = Counting(sde)
    z = torch.randn(8, 1, 2, 2, dtype=torch.float64) * (50 if name == "ve" else 1)
    options = {"rtol": 1e-8, "atol": 1e-8, "eps": 1e-3}
    x, nfe = get_ode_sampler(sde, z.shape, identity, **options)(model, z)
    assert nfe == model.calls
    encode = likelihood.get_log_likelihood_fn(sde, **options)
    back = encode(model, x)[1]
    assert (back - z).abs().max() < 1e-5 * z.abs().max()


def test_ode_denoise_is_one_reverse_diffusion_mean_and_is_counted():
    sde, model = make("vp"), Counting(make("vp"))
    z = torch.randn(4, 1, 2, 2)
    x, nfe = get_ode_sampler(sde, z.shape, identity)(model, z)
    calls = model.calls
    mean, more = get_ode_sampler(sde, z.shape, identity, denoise=True)(model, z)
    assert nfe == calls and more == nfe + 1 == model.calls - calls
    score = as_score_function(toys.gaussian_score(sde, MEAN, STD), sde)
    p = sampling.ReverseDiffusionPredictor(sde, score)
    torch.testing.assert_close(mean, p.update_fn(x, torch.full((4,), 1e-3))[1])


def test_ode_sampler_calls_back_and_leaves_the_code_unchanged():
    sde, seen = make("vp"), []
    z = torch.randn(4, 1, 2, 2)
    kept = z.clone()
    sampler = get_ode_sampler(
        sde, z.shape, identity, callback=lambda n, t, x, m: seen.append((n, t, x.shape))
    )
    _, nfe = sampler(Counting(sde), z)
    counts, times, shapes = zip(*seen, strict=True)
    assert counts[0] == 0 and counts[-1] == nfe and counts[1] == 8 and len(seen) == 1 + nfe // 6
    assert times[0] == 1.0 and times[-1] == 1e-3 and list(times) == sorted(times, reverse=True)
    assert set(shapes) == {z.shape}
    assert torch.equal(z, kept)


@pytest.mark.parametrize("method", ode.METHODS)
def test_every_solver_solves_to_its_tolerance(method):
    y, nfe = ode.solve_scipy(
        lambda t, y: (-t * y[0], 2 * t * y[1] ** 0),
        (torch.ones(2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)),
        0.0,
        2.0,
        rtol=1e-6,
        atol=1e-8,
        method=method,
    )
    assert nfe > 0 and y[0].shape == (2,) and y[1].shape == (1, 1)
    assert y[0][0].item() == pytest.approx(2.718281828**-2, abs=3e-5)
    assert y[1].item() == pytest.approx(4.0, abs=3e-5)


# --- hand-written loops and configs -------------------------------------------------------


def test_shared_update_functions_are_one_update_each():
    sde = make("vp", 100)
    model = Counting(sde)
    x, t = torch.randn(4, 1, 2, 2), torch.full((4,), 0.5)
    predict = functools.partial(
        sampling.shared_predictor_update_fn,
        sde=sde,
        predictor=sampling.ReverseDiffusionPredictor,
        probability_flow=False,
        continuous=True,
    )
    correct = functools.partial(
        sampling.shared_corrector_update_fn,
        sde=sde,
        corrector=sampling.LangevinCorrector,
        continuous=True,
        snr=0.16,
        n_steps=2,
    )
    torch.manual_seed(1)
    y, mean = predict(x, t, model=model)
    score = toys.gaussian_score(sde, MEAN, STD)
    torch.manual_seed(1)
    p = sampling.ReverseDiffusionPredictor(sde, score)
    for a, b in zip((y, mean), p.update_fn(x, t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert model.calls == 1
    correct(x, t, model=model)
    assert model.calls == 3
    for shared, none in (
        (sampling.shared_predictor_update_fn, {"predictor": None, "probability_flow": False}),
        (sampling.shared_corrector_update_fn, {"corrector": None, "snr": 0.1, "n_steps": 1}),
    ):
        assert torch.equal(shared(x, t, sde=sde, model=model, continuous=True, **none)[0], x)


class Config(dict):
    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


def config(method, **more):
    pair = {"predictor": "Euler_Maruyama", "corrector": "none", "snr": 0.1, "n_steps_each": 1}
    rest = {"method": method, "probability_flow": False, "noise_removal": True, **more}
    return Config(sampling=Config(pair | rest), training=Config(continuous=True), device="cpu")


def test_sampler_is_made_from_the_config():
    sde = make("vp", 40)
    for settings, count in ((config("pc"), 40), (config("PC", steps=9, schedule="karras"), 9)):
        sampler = sampling.get_sampling_fn(settings, sde, (2, 3), identity, 1e-3)
        assert sampler(Counting(sde))[1] == count
    sampler = sampling.get_sampling_fn(config("ode"), sde, (2, 3), identity, 1e-3)
    assert sampler(Counting(sde))[0].shape == (2, 3)
    with pytest.raises(ValueError, match=r"sampling\.method 'magic' is unknown"):
        sampling.get_sampling_fn(config("magic"), sde, (2, 3), identity, 1e-3)


def test_no_gradient_is_kept_while_sampling():
    net = torch.nn.Linear(2, 2)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, labels):
            return self.net(x)

    sde = make("vp", 30)
    for sampler in (pc(sde, shape=(2, 2)), get_ode_sampler(sde, (2, 2), identity)):
        x, _ = sampler(Net())
        assert not x.requires_grad and net.weight.grad is None


def test_process_of_sampling_leaves_the_forward_process_alone():
    sde = make("vp", 30)
    before = dict(vars(sde))
    pc(sde, "reverse_diffusion", "langevin")(Counting(sde))
    assert vars(sde) == before and sde_lib.is_affine(sde)


def test_names_are_found_in_any_case_and_as_they_were_registered(monkeypatch):
    import sampling_steps

    monkeypatch.setattr(sampling_steps, "_PREDICTORS", dict(sampling_steps._PREDICTORS))

    @sampling.register_predictor
    class OfItsOwnName(sampling.Predictor):
        pass

    for name in ("OfItsOwnName", "ofitsownname"):
        assert sampling.get_predictor(name) is OfItsOwnName
    assert sampling.get_predictor("DDIM") is sampling.get_predictor("ddim")
    assert sampling.get_corrector("ALD") is sampling.AnnealedLangevinDynamics
    for wrong in (None, 3, ["ddim"], "ddi"):
        with pytest.raises(ValueError, match="is unknown"):
            sampling.get_predictor(wrong)


@pytest.mark.parametrize("seeds", [torch.arange(4), range(4), (0, 1, 2, 3)])
def test_seeds_may_be_numbers_of_any_kind(seeds):
    sde = make("vp", 5)
    sampler = get_pc_sampler(
        sde, (4, 1, 2, 3), sampling.get_predictor("ddim"), None, lambda x: x, 0.16,
        seeds=seeds, continuous=True,
    )  # fmt: skip
    model = toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD))
    assert sampler(model)[0].isfinite().all()


def test_a_state_of_half_precision_is_refused():
    """In bfloat16 999 steps of DDIM on VE leave a standard deviation of 0.25 for 0.30."""
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"float32 or torch\.float64, got"):
            get_pc_sampler(make("ve"), (4, 2), None, None, lambda x: x, 0.16, dtype=dtype)


@pytest.mark.parametrize("method", ode.METHODS)
def test_solvers_of_scipy_are_held_to_max_nfe(method):
    sde, calls = make("vp"), []
    model = toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD))

    def counting(x, labels):
        calls.append(1)
        return model(x, labels)

    sampler = get_ode_sampler(sde, (3, 1, 2, 3), lambda x: x, method=method, max_nfe=7)
    with pytest.raises(ode.SolverError, match=r"is at t = [01].*max_nfe = 7"):
        sampler(counting)
    assert len(calls) == 7
    with pytest.raises(ode.SolverError, match="max_nfe = 7"):
        sampling.encode(sde, counting, torch.zeros(3, 1, 2, 3), method=method, max_nfe=7)


def test_what_is_no_latent_code_is_refused():
    sde = make("vp")
    model = toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD))
    for wrong in (torch.zeros(3, 2).numpy(), torch.zeros(3, 2).long(), (torch.zeros(3, 2), 5)):
        with pytest.raises(ValueError, match="floating point"):
            get_ode_sampler(sde, (3, 2), lambda x: x)(model, wrong)


def test_a_generator_draws_on_its_own_device(monkeypatch):
    """So that one of the CPU goes with samples on a GPU; 'meta' stands for it."""
    asked, kept = [], torch.randn

    def spy(*shape, device=None, **options):
        asked.append(torch.device(device))
        return kept(*shape, device=device, **options)

    monkeypatch.setattr(torch, "randn", spy)
    source = sampling.NoiseSource(torch.Generator().manual_seed(0))
    z = source.randn_like(torch.zeros(2, 3, device="meta", dtype=torch.float64))
    assert asked == [torch.device("cpu")]
    assert (z.device.type, z.dtype, z.shape) == ("meta", torch.float64, (2, 3))
    sampling.NoiseSource().randn_like(torch.zeros(2, 3, device="meta"))
    assert asked[1].type == "meta"


def test_a_seeds_prior_is_drawn_on_the_cpu_whatever_torchs_default_device():
    source = sampling.NoiseSource(seeds=[1, 2])
    expected = source.prior(make("vp"), (2, 3))
    torch.set_default_device("meta")
    try:
        found = source.prior(make("vp"), (2, 3))
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_a_clock_set_back_does_not_silence_the_bar(monkeypatch, capsys):
    from sampling_loop import FractionBar, step_bar

    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = step_bar(range(100), True)
    assert bar._time is time.monotonic
    for i in bar:
        if i == 50:
            monkeypatch.setattr(time, "time", lambda: 1e9 - 3600)
            time.sleep(0.25)
    share = FractionBar(True, "ODE")
    share(0.25)
    time.sleep(0.25)
    share(0.5)
    share.close()
    shown = capsys.readouterr().err
    assert " 51%" in shown or " 52%" in shown
    assert "ODE:  50%" in shown
