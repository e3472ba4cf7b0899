"""Thresholding and guidance: the four faces stay in keeping, under every sampler."""

import math

import pytest
import torch
import toys
from toys_sampling import Gaussian, processes

import likelihood
import sampling
import sampling_steps
import sde_lib
import solvers
import solvers_adaptive
from models.utils import get_score_fn
from parametrization import OUTPUTS, Parametrization, ScoreFunction, convert, on_process
from sampling_wrappers import (
    classifier_free_guidance,
    dynamic_threshold,
    static_threshold,
    wrap_denoiser,
)
from sde_lib import expand

SDES = processes()
MEAN, STD = 0.2, 0.3


def identity(x):
    return x


def network(sde, output, mean=MEAN):
    """The exact network of Gaussian data with the given output, float64."""
    bed = Gaussian(sde, mean, STD)

    def model_fn(x, t, shift=0.0):
        par = Parametrization("score", "t")
        point = par.point(sde, t, x)
        score = bed.score(x - shift, t) if output == "score" else bed.score(x, t)
        return convert(score, "score", output, point)

    return ScoreFunction(model_fn, sde, Parametrization(output, "t"))


def batch(sde, n=5):
    shape = (n, 1, 2, 3) if isinstance(sde, toys.UserSDE) else (n, 6)
    t = sde_lib.time_of_half_log_snr(sde, torch.linspace(1.5, -0.75, n, dtype=torch.float64))
    return torch.randn(shape, dtype=torch.float64), t


def assert_in_keeping(score_fn, x, t):
    """x = m + αD + σε̂, s = −ε̂/σ and velocity = α'D + σ'ε̂ + m' at the same point."""
    point = score_fn.parametrization.point(score_fn.sde, t, x)
    D, eps = score_fn.denoise(x, t), score_fn.noise(x, t)
    shift = 0.0 if point.shift is None else point.shift
    back = shift + expand(point.alpha, x) * D + expand(point.sigma, x) * eps
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(score_fn(x, t), -eps / expand(point.sigma, x), rtol=1e-6, atol=1e-6)
    drift, g = score_fn.sde.sde(x, t)
    velocity = drift - 0.5 * expand(g, x) ** 2 * score_fn(x, t)
    torch.testing.assert_close(score_fn.velocity(x, t), velocity, rtol=1e-5, atol=1e-5)


WRAPPERS = {
    "static": lambda s: static_threshold(s, -0.1, 0.3),
    "dynamic": lambda s: dynamic_threshold(s, 0.8, -0.2, 0.3),
    "own": lambda s: wrap_denoiser(s, lambda D, x, t: D + 0.1 * torch.sin(x)),
    "guided": lambda s: classifier_free_guidance(s, network(s.sde, "score", -0.5), 1.5),
    "guided within": lambda s: classifier_free_guidance(
        s, network(s.sde, "score", -0.5), 1.5, interval=(0.3, 2.0)
    ),
    "both": lambda s: static_threshold(
        classifier_free_guidance(s, network(s.sde, "data", -0.5), 1.0), -0.1, 0.3
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_faces_are_in_keeping(wrapper, name, output):
    sde = SDES[name]
    x, t = batch(sde)
    inner = network(sde, output)
    wrapped = WRAPPERS[wrapper](inner)
    assert_in_keeping(wrapped, x, t)
    assert (wrapped.denoise(x, t) - inner.denoise(x, t)).abs().max() > 1e-3
    assert get_score_fn(sde, wrapped) is wrapped


@pytest.mark.parametrize("wrapper", ["static", "own", "guided"])
def test_faces_are_in_keeping_on_bound_and_on_other_processes(wrapper):
    x, t = batch(SDES["vpsde"])
    bound = SDES["ouve"].bind(torch.full((1, 6), 1.5, dtype=torch.float64))
    assert_in_keeping(WRAPPERS[wrapper](network(bound, "noise")), x, t)
    other = sde_lib.common_stretch(SDES["subvpsde"], SDES["vpsde"], 1e-5)
    x, t = batch(other)
    for output in ("velocity", "noise"):
        carried = on_process(network(SDES["vpsde"], output), other)
        assert_in_keeping(WRAPPERS[wrapper](carried), x, t)


def test_a_wrapper_that_changes_nothing_is_bit_equal_on_every_face():
    """Even where D has no digits left: rectified flow at t = T in float32."""
    sde = SDES["rectified_flow"]
    for output in ("velocity", "noise"):
        inner = network(sde, output)
        wrapped = wrap_denoiser(inner, lambda D, x, t: D)
        x, t = torch.randn(4, 3), torch.full((4,), sde.T)
        for face in ("__call__", "noise", "velocity", "denoise"):
            assert torch.equal(getattr(wrapped, face)(x, t), getattr(inner, face)(x, t))


def test_static_threshold_clips_D():
    sde = SDES["vpsde"]
    x, t = batch(sde)
    D = network(sde, "noise").denoise(3 * x, t)
    clipped = static_threshold(network(sde, "noise"), 0.0, 0.25).denoise(3 * x, t)
    torch.testing.assert_close(clipped, D.clamp(0.0, 0.25))


def test_dynamic_threshold_is_imagens_at_any_range():
    sde = SDES["vpsde"]
    x, t = torch.randn(5, 1000, dtype=torch.float64), torch.full((5,), 0.5).double()
    inner = network(sde, "noise")
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (-0.1, 0.1)):
        unit = (inner.denoise(x, t) - (low + high) / 2) / ((high - low) / 2)
        s = torch.quantile(unit.abs(), 0.995, dim=1, keepdim=True).clamp(min=1)
        wanted = (unit.clamp(-s, s) / s) * (high - low) / 2 + (low + high) / 2
        found = dynamic_threshold(inner, low=low, high=high).denoise(x, t)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert found.min() >= low - 1e-6 and found.max() <= high + 1e-6
    wide = dynamic_threshold(inner, low=-100, high=100).denoise(x, t)
    torch.testing.assert_close(wide, inner.denoise(x, t))


@pytest.mark.parametrize("name", SDES)
def test_guidance_is_the_lerp_of_the_denoisers(name):
    sde = SDES[name]
    x, t = batch(sde)
    strong, weak = network(sde, "velocity"), network(sde, "noise", -0.5)
    for w in (-1.0, 0.0, 2.0):
        guided = classifier_free_guidance(strong, weak, w)
        wanted = (1 + w) * strong.denoise(x, t) - w * weak.denoise(x, t)
        torch.testing.assert_close(guided.denoise(x, t), wanted)
    low, high = 0.3, 2.0
    within = classifier_free_guidance(strong, weak, 2.0, interval=(low, high)).denoise(x, t)
    noise = strong.parametrization.point(sde, t, x).sigma_tilde
    inside = (noise >= low) & (noise <= high)
    assert inside.any() and not inside.all()
    wanted = torch.where(expand(inside, x).bool(), wanted, strong.denoise(x, t))
    torch.testing.assert_close(within, wanted)


def test_guidance_works_by_the_labels_of_a_network():
    sde = SDES["vpsde"]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.means = torch.nn.Parameter(torch.tensor([-2.0, 1.0, 0.0]))

        def forward(self, x, labels, y=None):
            y = torch.full((len(x),), 2) if y is None else y
            t = labels / 999
            sigma = sde.marginal_prob(x, t)[1][:, None]
            alpha = sde.alpha(t.double()).to(x.dtype)[:, None]
            var = (alpha * STD) ** 2 + sigma**2
            return sigma / var * (x - alpha * self.means[y][:, None])

    score_fn = get_score_fn(sde, Network(), continuous=True)
    labels = torch.tensor([0, 1] * 100)
    guided = classifier_free_guidance(score_fn.with_conditions(y=labels), score_fn, 0.5)
    sampler = sampling.get_pc_sampler(
        sde, (200, 2), solvers.DDIMPredictor, None, identity, 0.1, continuous=True, steps=20
    )
    x, nfe = sampler(guided)
    assert nfe == guided.nfe == 40
    assert x[::2].mean() < -2.3 and x[1::2].mean() > 1.2  # beyond the classes' means
    rebound = guided.with_conditions(y=labels[:4])
    rebound.denoise(x[:4], torch.full((4,), 0.5))
    assert rebound.nfe == 2 and guided.nfe == 40


def test_evaluations_of_wrappers_of_wrappers_are_the_networks():
    sde = SDES["vpsde"]
    calls = []

    def model_fn(x, t):
        calls.append(1)
        return -x

    def fresh():
        return ScoreFunction(model_fn, sde, Parametrization("noise", "t"))

    guided = classifier_free_guidance(static_threshold(fresh()), fresh(), 1.0)
    twice = classifier_free_guidance(dynamic_threshold(guided), guided, 0.5)
    x, t = torch.randn(3, 4), torch.full((3,), 0.5)
    for face in (twice, twice.denoise, twice.noise, twice.velocity):
        calls.clear()
        before = twice.nfe
        face(x, t)
        assert twice.nfe - before == len(calls) == 4


SAMPLERS = [*sampling_steps._PREDICTORS, "ode", "dpm_solver_adaptive", "gotta_go_fast"]


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_sampler_runs_with_wrappers(method):
    if method not in sampling_steps._SAMPLERS and not hasattr(
        sampling.get_predictor(method), "step"
    ):
        pytest.skip("a test's own predictor")
    sde, shape = SDES["vpsde"], (6, 3)
    low, high = 0.35, 0.4
    guided = classifier_free_guidance(network(sde, "noise"), network(sde, "v", -0.5), 0.5)
    wrapped = static_threshold(guided, low, high)
    if method == "ode":
        sampler = sampling.get_ode_sampler(sde, shape, identity, rtol=1e-3, atol=1e-3)
    elif method == "dpm_solver_adaptive":
        sampler = solvers_adaptive.get_dpm_solver_adaptive(sde, shape, identity)
    elif method == "gotta_go_fast":
        sampler = solvers_adaptive.get_gotta_go_fast(sde, shape, identity, rtol=0.1)
    else:
        predictor = sampling.get_predictor(method)
        corrector = None if predictor.multistep else sampling.AnnealedLangevinDynamics
        sampler = sampling.get_pc_sampler(
            sde, shape, predictor, corrector, identity, 0.1, steps=60, continuous=True
        )
    x, nfe = sampler(wrapped)
    assert torch.isfinite(x).all()
    assert nfe == wrapped.nfe and nfe % 2 == 0
    if method != "none":
        assert low - 0.1 < float(x.mean()) < high + 0.1


def test_likelihood_takes_a_wrapper():
    sde = SDES["vpsde"]
    data = torch.randn(4, 3) * STD + MEAN
    inner = network(sde, "noise")
    plain = likelihood.get_log_likelihood_fn(sde)(inner, data)[0]
    wrapped = likelihood.get_log_likelihood_fn(sde)(static_threshold(inner, -9, 9), data)[0]
    torch.testing.assert_close(plain, wrapped, rtol=1e-3, atol=1e-3)


def test_refusals_say_why():
    inner = network(SDES["vpsde"], "noise")
    x, t = torch.randn(3, 4), torch.full((3,), 0.5)
    with pytest.raises(ValueError, match="low < high"):
        static_threshold(inner, 1, -1)
    with pytest.raises(ValueError, match="0 < p ≤ 1"):
        dynamic_threshold(inner, 1.5)
    with pytest.raises(ValueError, match="finite w"):
        classifier_free_guidance(inner, inner, math.nan)
    with pytest.raises(ValueError, match="0 ≤ low < high"):
        classifier_free_guidance(inner, inner, 1.0, interval=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"returned \(3, 1\)"):
        wrap_denoiser(inner, lambda D, x, t: D[:, :1]).denoise(x, t)
    with pytest.raises(TypeError, match="change the process first"):
        on_process(static_threshold(inner), SDES["subvpsde"])


@pytest.mark.parametrize(
    "make",
    [
        lambda f: wrap_denoiser(f, lambda D, x, t: D),
        static_threshold,
        dynamic_threshold,
        lambda f: classifier_free_guidance(f, f, 1.0),
        lambda f: sampling.autoguidance(f, f, 1.0),
        lambda f: sampling.classifier_guidance(f, lambda x, t: x),
    ],
)
def test_a_wrapper_asks_for_a_score(make):
    for wrong in (torch.nn.Linear(2, 2), lambda x, t: -x, None):
        with pytest.raises(TypeError, match="expected a ScoreFunction, got"):
            make(wrong)


def test_scores_of_two_processes_are_not_mixed():
    a, b = network(SDES["vpsde"], "noise"), network(SDES["vesde"], "noise")
    with pytest.raises(ValueError, match=r"one process, got those of VPSDE and VESDE.*on_process"):
        sampling.autoguidance(a, b, 1.0)
    bound = SDES["vpsde"].bind(torch.zeros(1, 3))
    assert sampling.autoguidance(a, network(bound, "noise"), 1.0)
