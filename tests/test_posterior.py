"""Posterior scores against closed forms: Gaussian data, a linear measurement, every process."""

import itertools
import math

import pytest
import torch
from toys import UserSDE
from toys_inverse import COV2, MEAN2, Dense, random_operator, sampler_moments
from toys_solvers import paths

import controllable_generation_methods as methods
import sampling
import sde_lib
from benchmarks.inverse_beds import GaussianBed, distance, stationary
from controllable_generation_posterior import (
    MMPS,
    PiGDM,
    get_rule,
    posterior_score,
)
from operators import get_operator
from operators_base import conjugate_gradients
from parametrization import (
    OUTPUTS,
    Parametrization,
    ScoreFunction,
    as_score_function,
    convert,
    on_process,
)
from sampling_wrappers import classifier_free_guidance, static_threshold, wrap_denoiser

PROCESSES = tuple(paths())
FIRST = Dense(torch.tensor([[1.0, 0.0]]), (2,))
Y = torch.tensor([[1.2]], dtype=torch.float64)
SHAPE = (1, 4, 4)


def image_bed(sde, length=1.0):
    mean = 0.3 * torch.cos(torch.arange(16.0).double()).reshape(SHAPE)
    return GaussianBed(sde, mean, stationary(SHAPE, length, 0.5))


def points(sde, shape, n=5, seed=0):
    """States and times all over the process, float64."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.tensor([float(sde.T), sde.sampling_eps], dtype=torch.float64)
    low, high = sde_lib.half_log_snr(sde, ends).clamp(-5, 5).tolist()
    t = sde_lib.time_of_half_log_snr(sde, torch.linspace(low, high, n, dtype=torch.float64))
    alpha, sigma = sde_lib.alpha_sigma(sde, t)
    z = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    return torch.sqrt(alpha**2 + sigma**2).reshape(-1, *[1] * len(shape)) * z, t


def truth(bed, operator, y, noise):
    """The posterior as a bed of its own: its score is the exact posterior score of x_t."""
    mean, cov = bed.posterior(operator, y, noise)
    return GaussianBed(bed.sde, mean.reshape(bed.shape), cov).score_fn


def close(a, b, tol=1e-7):
    assert (a - b).abs().max() <= tol * (1 + b.abs().max()), (a - b).abs().max()


def sizes(operator):
    """Conjugate gradients to the end."""
    return {"iterations": 4 * math.prod(operator.shape_out), "tol": 0.0}


# --- exact at every x and t ----------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("noise", [0.4, 0.0])
def test_mmps_is_the_exact_posterior_score_of_correlated_gaussians(name, noise):
    sde = paths()[name]
    bed, A = image_bed(sde), random_operator(SHAPE, 6)
    y = torch.linspace(-1, 1, 6, dtype=torch.float64)[None]
    x, t = points(sde, SHAPE)
    ours = posterior_score(bed.score_fn, sde, A, y, noise, "mmps", **sizes(A))
    exact = truth(bed, A, y, noise)
    for face in ("denoise", "noise", "velocity", "__call__"):
        close(getattr(ours, face)(x, t), getattr(exact, face)(x, t), 1e-5)


@pytest.mark.parametrize("output", sorted(OUTPUTS))
def test_mmps_is_exact_in_every_parametrization(output):
    for sde in (sde_lib.VPSDE(), sde_lib.EDM(), sde_lib.RectifiedFlow()):
        bed = GaussianBed(sde, MEAN2, COV2)
        par = Parametrization(output, "t")
        model = network(bed, par)
        x, t = points(sde, (2,))
        ours = posterior_score(ScoreFunction(model, sde, par), sde, FIRST, Y, 0.3, "mmps")
        exact = truth(bed, FIRST, Y, 0.3)
        close(ours.denoise(x, t), exact.denoise(x, t), 1e-6)
        close(ours(x, t), exact(x, t), 1e-6)


def network(bed, par):
    """A network that predicts what `par` says, exactly; its time input is t."""

    def model(x, t):
        point = par.point(bed.sde, t, x)
        if par.output == "preconditioned":
            c_in = 1 / torch.sqrt(point.sigma_tilde**2 + par.sigma_data**2)
            point.x = x = x / (c_in / point.alpha)[:, None]
        return convert(bed.score(x, t), "score", par.output, point)

    return model


@pytest.mark.parametrize("name", PROCESSES)
def test_pigdm_is_exact_for_isotropic_data_and_any_operator(name):
    sde, c = paths()[name], 0.7
    bed = GaussianBed(sde, torch.ones(SHAPE), c**2 * torch.eye(16).double())
    x, t = points(sde, SHAPE)
    for noise, m in ((0.3, 5), (0.0, 5), (0.3, 20)):
        A = random_operator(SHAPE, m)
        y = torch.linspace(-1, 1, m, dtype=torch.float64)[None]
        ours = posterior_score(bed.score_fn, sde, A, y, noise, "pigdm", data_std=c)
        close(ours(x, t), truth(bed, A, y, noise)(x, t), 1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mask", {"mask": "random"}),
        ("superres", {"factor": 2}),
        ("superres_bicubic", {"factor": 2}),
        ("deblur_gaussian", {"std": 0.8, "size": 3}),
        ("compressed_sensing", {"ratio": 0.5}),
    ],
)
def test_the_library_s_operators_are_served_exactly(name, options):
    sde, A = sde_lib.EDM(), get_operator(name, SHAPE, **options)
    y = A(torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, *SHAPE))
    x, t = points(sde, SHAPE)
    correlated = image_bed(sde)
    isotropic = GaussianBed(sde, torch.zeros(SHAPE), 0.49 * torch.eye(16).double())
    for noise in (0.3, 0.0):
        ours = posterior_score(correlated.score_fn, sde, A, y, noise, "mmps", **sizes(A))
        close(ours.denoise(x, t), truth(correlated, A, y, noise).denoise(x, t), 1e-4)
        ours = posterior_score(isotropic.score_fn, sde, A, y, noise, "pigdm", data_std=0.7)
        close(ours.denoise(x, t), truth(isotropic, A, y, noise).denoise(x, t), 1e-4)


def test_tmpd_is_exact_where_the_measurements_are_uncorrelated():
    for sde in (sde_lib.VESDE(), sde_lib.VPSDE()):
        cov = torch.diag(torch.linspace(0.1, 2, 16).double())
        bed = GaussianBed(sde, torch.zeros(SHAPE), cov)
        A = Dense(torch.eye(16)[[0, 3, 9]], SHAPE)
        y = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)
        x, t = points(sde, SHAPE)
        for noise in (0.2, 0.0):
            ours = posterior_score(bed.score_fn, sde, A, y, noise, "tmpd")
            close(ours(x, t), truth(bed, A, y, noise)(x, t))


def test_each_method_is_biased_where_its_assumption_fails():
    sde = sde_lib.VPSDE()
    bed, A = image_bed(sde), random_operator(SHAPE, 6)
    y = torch.ones(1, 6, dtype=torch.float64)
    x, t = points(sde, SHAPE)
    exact = truth(bed, A, y, 0.1)(x, t)
    for method in ("dps", "pigdm", "tmpd"):
        off = posterior_score(bed.score_fn, sde, A, y, 0.1, method)(x, t) - exact
        assert off.abs().max() > 1e-2


def test_the_faces_of_a_posterior_score_agree():
    sde = sde_lib.VPSDE()
    bed, (x, t) = GaussianBed(sde, MEAN2, COV2), points(sde, (2,))
    for method in ("dps", "pigdm", "tmpd", "mmps"):
        ours = posterior_score(bed.score_fn, sde, FIRST, Y, 0.3, method)
        alpha, sigma = (c[:, None] for c in sde_lib.alpha_sigma(sde, t, x))
        close(ours.denoise(x, t), (x + sigma**2 * ours(x, t)) / alpha)
        close(ours.noise(x, t), -sigma * ours(x, t))


# --- what the measurement and its noise do -------------------------------------------------


def test_without_noise_the_denoised_image_satisfies_the_measurement():
    bed, A = image_bed(sde_lib.VPSDE()), random_operator(SHAPE, 6)
    y = torch.linspace(-1, 1, 6, dtype=torch.float64)[None]
    x, t = points(bed.sde, SHAPE)
    ours = posterior_score(bed.score_fn, bed.sde, A, y, 0.0, "mmps", **sizes(A))
    close(A(ours.denoise(x, t)), y.expand(5, 6), 1e-6)


@pytest.mark.parametrize("method", ["pigdm", "tmpd", "mmps"])
def test_a_worthless_measurement_leaves_the_prior(method):
    bed, A = image_bed(sde_lib.VPSDE()), random_operator(SHAPE, 6)
    y = torch.ones(1, 6, dtype=torch.float64)
    x, t = points(bed.sde, SHAPE)
    ours = posterior_score(bed.score_fn, bed.sde, A, y, 1e6, method)
    close(ours(x, t), bed.score_fn(x, t), 1e-9)


def test_each_sample_may_have_a_measurement_of_its_own():
    sde = sde_lib.VPSDE()
    bed, (x, t) = GaussianBed(sde, MEAN2, COV2), points(sde, (2,))
    y = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    together = posterior_score(bed.score_fn, sde, FIRST, y, 0.3, "mmps")(x, t)
    for i in range(5):
        alone = posterior_score(bed.score_fn, sde, FIRST, y[i : i + 1], 0.3, "mmps")
        close(together[i : i + 1], alone(x[i : i + 1], t[i : i + 1]), 1e-12)


def test_a_scalar_time_is_that_time_for_every_sample():
    sde = sde_lib.VPSDE()
    bed, (x, _) = GaussianBed(sde, MEAN2, COV2), points(sde, (2,))
    for method in ("dps", "pigdm", "tmpd", "mmps"):
        ours = posterior_score(bed.score_fn, sde, FIRST, Y, 0.3, method)
        t = torch.tensor(0.4, dtype=torch.float64)
        close(ours(x, t), ours(x, t.expand(5)), 1e-12)


# --- conjugate gradients -------------------------------------------------------------------


def spd(n, seed):
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, generator=g, dtype=torch.float64)
    return M @ M.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


def test_conjugate_gradients_end_after_as_many_steps_as_numbers_and_mix_no_samples():
    matrices = torch.stack([spd(8, 0), torch.eye(8).double(), spd(8, 1)])
    b = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def solve(which, iterations=8, tol=1e-12):
        A = matrices[which]
        return conjugate_gradients(
            lambda p: torch.einsum("bij,bj->bi", A, p), b[which], iterations, tol
        )[0]

    close(solve([0, 1, 2]), torch.linalg.solve(matrices, b), 1e-8)
    for iterations in (1, 3, 8):  # the middle one is done at once
        together = solve([0, 1, 2], iterations)
        for i in range(3):
            assert torch.equal(together[i : i + 1], solve([i], iterations))


def test_a_network_whose_jacobian_is_wrong_cannot_throw_the_state_out():
    sde = sde_lib.VPSDE()
    bed, A = image_bed(sde), random_operator(SHAPE, 6)
    rough = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def noise(x, t):  # 5 % off in slope: at α = 0.0066 that is 7 of ∂D/∂x, in place of 0.003
        exact = -sde_lib.alpha_sigma(sde, t)[1].reshape(-1, 1, 1, 1) * bed.score(x, t)
        return exact + 0.05 / 4 * (x.flatten(1) @ rough).reshape(x.shape)

    score_fn = ScoreFunction(noise, sde, Parametrization("noise", "t"))
    y = torch.ones(1, 6, dtype=torch.float64)
    x, t = points(sde, SHAPE)
    plain = score_fn.denoise(x, t)
    for method in ("pigdm", "tmpd", "mmps"):
        ours = posterior_score(score_fn, sde, A, y, 0.05, method)
        shift = ours.denoise(x, t) - plain
        residual = (y - A(plain)).norm(dim=1)
        assert (A(shift).norm(dim=1) <= 1.0001 * residual).all()
        assert (shift.flatten(1).square().mean(1).sqrt() <= 5.0001).all()


def test_conjugate_gradients_stop_where_the_matrix_is_not_positive():
    A = torch.diag(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))
    good = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    bad = torch.tensor([[0.0, 0.1, 1.0]], dtype=torch.float64)
    w, left = conjugate_gradients(lambda p: p @ A, torch.cat([good, bad]), 10, 1e-12)
    assert left[0] < 1e-12
    assert left[1] == 1
    close(w[0], torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert torch.equal(w[1], torch.zeros(3, dtype=torch.float64))
    zero, _ = conjugate_gradients(lambda p: p @ A, torch.zeros(1, 3).double(), 10, 1e-12)
    assert torch.equal(zero, torch.zeros(1, 3).double())


def test_more_conjugate_gradients_come_nearer_the_exact_score():
    bed, A = image_bed(sde_lib.VPSDE()), random_operator(SHAPE, 10)
    y = torch.ones(1, 10, dtype=torch.float64)
    x, t = points(bed.sde, SHAPE)
    exact = truth(bed, A, y, 0.05)(x, t)
    errors = [
        (posterior_score(bed.score_fn, bed.sde, A, y, 0.05, iterations=k)(x, t) - exact).norm()
        for k in (1, 4, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]


# --- under the samplers, without Monte Carlo -----------------------------------------------

SAMPLERS = [("heun", 4e-3), ("dpmpp_3m", 1e-3), ("dpm_solver_3", 1e-3), ("unipc", 1e-3)]


@pytest.mark.parametrize("name", ["ve", "vp", "subvp", "edm", "rectified flow"])
def test_mmps_gives_the_posterior_under_every_solver_of_the_flow(name):
    sde = paths()[name]
    bed = GaussianBed(sde, MEAN2, COV2)
    for noise, (predictor, tol) in itertools.product((0.3, 0.0), SAMPLERS):
        exact = bed.posterior(FIRST, Y, noise)
        score = posterior_score(bed.score_fn, sde, FIRST, Y, noise, "mmps")
        law = sampler_moments(bed, score, predictor, 100, draws=0)
        mean, low, high = distance(*law, *exact)
        assert max(mean, abs(low - 1), abs(high - 1)) < 0.02
        # Nearly all of that is the prior's at T, which the exact flow has too.
        flow = GaussianBed(sde, exact[0], exact[1]).flow_law(sde.sampling_eps)
        mean, low, high = distance(*law, *flow)
        assert max(mean, abs(low - 1), abs(high - 1)) < tol


@pytest.mark.parametrize(
    "predictor", ["ancestral_sampling", "reverse_diffusion", "euler_maruyama", "tau_exponential"]
)
def test_mmps_gives_the_posterior_under_the_reverse_sde_as_steps_grow(predictor):
    sde = sde_lib.VPSDE()
    bed = GaussianBed(sde, MEAN2, COV2)
    score = posterior_score(bed.score_fn, sde, FIRST, Y, 0.3, "mmps")
    errors = []
    for steps in (50, 100, 200):
        law = sampler_moments(bed, score, predictor, steps)
        mean, low, high = distance(*law, *bed.posterior(FIRST, Y, 0.3))
        errors.append(max(mean, 1 - low, abs(high - 1)))
    assert errors[-1] < 0.04
    assert errors[0] / errors[1] > 1.7 and errors[1] / errors[2] > 1.7


@pytest.mark.parametrize("noise", [0.2, 0.0])
def test_mmps_gives_the_posterior_of_images(noise):
    sde = sde_lib.EDM()
    bed = image_bed(sde)
    for A in (random_operator(SHAPE, 5), Dense(torch.eye(16)[:8], SHAPE)):
        y = torch.linspace(-1, 1, A.shape_out[0], dtype=torch.float64)[None]
        score = posterior_score(bed.score_fn, sde, A, y, noise, "mmps", **sizes(A))
        law = sampler_moments(bed, score, "dpmpp_3m", 60, draws=0)
        mean, low, high = distance(*law, *bed.posterior(A, y, noise))
        assert mean < 0.02 and abs(low - 1) < 2e-3 and abs(high - 1) < 2e-3


def test_pigdm_gives_the_posterior_of_isotropic_data():
    sde, c = sde_lib.EDM(), 0.7
    bed = GaussianBed(sde, torch.zeros(SHAPE), c**2 * torch.eye(16).double())
    A = random_operator(SHAPE, 5)
    y = torch.linspace(-1, 1, 5, dtype=torch.float64)[None]
    for noise in (0.2, 0.0):
        score = posterior_score(bed.score_fn, sde, A, y, noise, "pigdm", data_std=c)
        law = sampler_moments(bed, score, "dpmpp_3m", 60, draws=0)
        mean, low, high = distance(*law, *bed.posterior(A, y, noise))
        assert mean < 0.02 and abs(low - 1) < 2e-3 and abs(high - 1) < 2e-3


# --- DPS -----------------------------------------------------------------------------------


def dps_by_hand(bed, A, y, zeta, x, N, noises):
    """Algorithm 1 of Chung et al. 2022 on N Euler–Maruyama steps: x' − ζ ∇‖y − A D‖."""
    sde = bed.sde
    for i, t in enumerate(torch.linspace(1, sde.sampling_eps, N + 1).double()[:-1]):
        vec_t, dt = t.expand(len(x)), (sde.T - sde.sampling_eps) / N
        leaf = x.clone().requires_grad_(True)
        norm = (y - A(bed.score_fn.denoise(leaf, vec_t))).norm(dim=1)
        gradient = torch.autograd.grad(norm.sum(), leaf)[0]
        drift, g = sde.sde(x, vec_t)
        score = bed.score_fn(x, vec_t)
        x = x - (drift - g[:, None] ** 2 * score) * dt + g[:, None] * dt**0.5 * noises[i]
        x = x - zeta * gradient
    return x


def test_dps_under_euler_maruyama_is_its_algorithm():
    sde, N = sde_lib.VPSDE(), 40
    bed = GaussianBed(sde, MEAN2, COV2)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(N + 1, 6, 2, generator=g, dtype=torch.float64)
    score = posterior_score(bed.score_fn, sde, FIRST, Y, 0.3, "dps", zeta=0.05, steps=N)
    p = sampling.EulerMaruyamaPredictor(sde, score)
    noises = iter(z[1:])
    p.randn_like = lambda x: next(noises)
    times = torch.linspace(1, sde.sampling_eps, N + 1).double()
    x = z[0]
    for t, s in itertools.pairwise(times):
        x = p.step(x, t, s)[0]
    by_hand = dps_by_hand(bed, FIRST, Y, 0.05 * (1 - sde.sampling_eps), z[0], N, z[1:])
    close(x, by_hand, 1e-6)


# --- a network -----------------------------------------------------------------------------


class Small(torch.nn.Module):
    """A small convolutional network of score_sde's conventions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1),
            torch.nn.Tanh(),
            torch.nn.Conv2d(4, 1, 3, padding=1),
        )
        self.label = torch.nn.Embedding(3, 1)

    def forward(self, x, labels, y=None):
        out = self.body(x) * (1 + labels.reshape(-1, 1, 1, 1) / 999)
        return out if y is None else out + self.label(y).reshape(-1, 1, 1, 1)


def network_score(sde=None):
    from models.utils import get_score_fn

    return get_score_fn(sde or sde_lib.VPSDE(), Small(), continuous=True)


MASKED = Dense(torch.eye(16)[:8], SHAPE)
Y8 = torch.linspace(-1, 1, 8)[None]


@pytest.mark.parametrize("method", ["dps", "pigdm", "tmpd", "mmps"])
def test_weights_gather_no_gradients_and_no_mode_is_in_the_way(method):
    model = Small()
    from models.utils import get_score_fn

    score_fn = get_score_fn(sde_lib.VPSDE(), model, continuous=True)
    ours = posterior_score(score_fn, score_fn.sde, MASKED, Y8, 0.1, method)
    x, t = torch.randn(3, *SHAPE), torch.full((3,), 0.5)
    free = ours(x, t)
    assert not free.requires_grad
    with torch.no_grad():
        assert torch.equal(ours(x, t), free)
    with torch.inference_mode():
        assert torch.equal(ours(x.clone(), t.clone()), free)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.requires_grad_(False)
    assert torch.equal(ours(x, t), free)


def test_a_sample_does_not_depend_on_its_batch_through_a_network():
    score_fn = network_score()
    x, t = torch.randn(6, *SHAPE), torch.linspace(0.1, 0.9, 6)
    for method in ("dps", "pigdm", "tmpd", "mmps"):
        ours = posterior_score(score_fn, score_fn.sde, MASKED, Y8, 0.1, method)
        whole = ours(x, t)
        for i in range(6):
            close(whole[i : i + 1], ours(x[i : i + 1], t[i : i + 1]), 1e-4)


def test_evaluations_and_backward_passes_are_counted():
    score_fn = network_score()
    for method, vjps in (("dps", 1), ("pigdm", 1), ("tmpd", 2), ("mmps", 4)):
        options = {"iterations": 3, "tol": 0.0} if method == "mmps" else {}
        ours = posterior_score(score_fn, score_fn.sde, MASKED, Y8, 0.1, method, **options)
        ours(torch.randn(2, *SHAPE), torch.full((2,), 0.5))
        assert (ours.nfe, ours.vjps) == (1, vjps)


def test_labels_thresholds_and_guidance_go_inside_and_outside():
    score_fn = network_score()
    sde, x, t = score_fn.sde, torch.randn(3, *SHAPE), torch.full((3,), 0.5)
    labels = torch.tensor([0, 1, 2])

    def of(inner):
        return posterior_score(inner, sde, MASKED, Y8, 0.1, "pigdm")

    bound = score_fn.with_conditions(y=labels)
    close(of(score_fn)(x, t, y=labels), of(bound)(x, t), 1e-6)
    close(of(score_fn).with_conditions(y=labels)(x, t), of(bound)(x, t), 1e-6)
    same = wrap_denoiser(score_fn, lambda D, x, t: D)
    close(of(same)(x, t), of(score_fn)(x, t), 1e-5)
    guided = of(classifier_free_guidance(bound, score_fn, 0.0))
    close(guided(x, t), of(bound)(x, t), 1e-5)
    clipped = static_threshold(of(score_fn)).denoise(x, t)
    assert clipped.abs().max() <= 1 + 1e-6


def test_it_follows_a_network_to_another_process():
    trained, sde = sde_lib.VPSDE(), sde_lib.CosineVP()
    score_fn = network_score(trained)
    moved = on_process(score_fn, sde_lib.common_stretch(sde, trained, 1e-3))
    t = torch.tensor([0.5])
    ours = posterior_score(moved, moved.sde, MASKED, Y8, 0.1, "mmps")
    lam = sde_lib.half_log_snr(moved.sde, t)
    there = sde_lib.time_of_half_log_snr(trained, lam)
    (a, _), (b, _) = sde_lib.alpha_sigma(moved.sde, t), sde_lib.alpha_sigma(trained, there)
    x = torch.randn(1, *SHAPE)
    home = posterior_score(score_fn, trained, MASKED, Y8, 0.1, "mmps")
    close(ours.denoise(x, t), home.denoise((b / a).float() * x, there.float()), 1e-3)


def test_seeds_give_the_same_picture_at_any_batch_size():
    score_fn = network_score()
    ours = posterior_score(score_fn, score_fn.sde, MASKED, Y8, 0.1, "mmps")

    def draw(seeds):
        sampler = sampling.get_pc_sampler(
            score_fn.sde,
            (len(seeds), *SHAPE),
            sampling.get_predictor("tau_exponential"),
            None,
            lambda x: x,
            0.1,
            continuous=True,
            steps=10,
            schedule="logsnr",
            seeds=seeds,
        )
        return sampler(ours)[0]

    close(draw([3, 4, 5])[1:2], draw([4]), 1e-3)


@pytest.mark.parametrize("method", ["ode", "dpm_solver_adaptive", "gotta_go_fast"])
def test_it_goes_under_the_adaptive_samplers(method):
    import solvers_adaptive

    sde = sde_lib.VPSDE()
    bed = GaussianBed(sde, MEAN2, COV2)
    ours = posterior_score(bed.score_fn, sde, FIRST, Y, 0.3, "mmps")
    g = torch.Generator().manual_seed(0)
    shape, same = (400, 2), torch.nn.Identity()
    sampler = {
        "ode": lambda: sampling.get_ode_sampler(sde, shape, same, generator=g),
        "dpm_solver_adaptive": lambda: solvers_adaptive.get_dpm_solver_adaptive(
            sde, shape, same, generator=g
        ),
        "gotta_go_fast": lambda: solvers_adaptive.get_gotta_go_fast(sde, shape, same, generator=g),
    }[method]()
    x = sampler(ours)[0].double()
    mean, cov = bed.posterior(FIRST, Y, 0.3)
    standard_error = (cov.diagonal() / 400).sqrt()
    assert ((x.mean(0) - mean).abs() < 4 * standard_error + 0.02).all()
    assert ((x.std(0) / cov.diagonal().sqrt() - 1).abs() < 4 / math.sqrt(800) + 0.02).all()


def test_it_goes_under_a_corrector():
    sde = sde_lib.VPSDE()
    bed = GaussianBed(sde, MEAN2, COV2)
    ours = posterior_score(bed.score_fn, sde, FIRST, Y, 0.3, "mmps")
    sampler = sampling.get_pc_sampler(
        sde,
        (1000, 2),
        sampling.get_predictor("ancestral_sampling"),
        sampling.get_corrector("ald"),
        lambda x: x,
        0.1,
        continuous=True,
        steps=150,
        schedule="logsnr",
        generator=torch.Generator().manual_seed(0),
    )
    x = sampler(ours)[0].double()
    mean, cov = bed.posterior(FIRST, Y, 0.3)
    assert ((x.mean(0) - mean).abs() < 4 * (cov.diagonal() / 1000).sqrt() + 0.02).all()
    assert ((x.std(0) / cov.diagonal().sqrt() - 1).abs() < 4 / math.sqrt(2000) + 0.03).all()


# --- by name, and what is refused ----------------------------------------------------------


@pytest.mark.parametrize("method", ["dps", "pigdm", "tmpd", "mmps"])
def test_methods_have_names(method):
    score_fn = network_score()
    maker = methods.get_inverse_solver(method)
    options = {"zeta": 0.1} if method == "dps" else {}
    sampler = maker(
        score_fn.sde,
        (2, *SHAPE),
        MASKED,
        Y8,
        noise=0.1,
        steps=5,
        schedule="logsnr",
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    x, nfe = sampler(score_fn)
    assert x.shape == (2, *SHAPE) and torch.isfinite(x).all() and nfe == 5


def test_a_user_process_will_do():
    sde = UserSDE()
    bed = image_bed(sde)
    x, t = points(sde, SHAPE)
    A = random_operator(SHAPE, 4)
    y = torch.ones(1, 4, dtype=torch.float64)
    ours = posterior_score(bed.score, sde, A, y, 0.2, "mmps", **sizes(A))
    close(ours(x, t), truth(bed, A, y, 0.2)(x, t), 1e-5)


def test_a_bound_process_will_do():
    towards = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    sde = sde_lib.OUVE().bind(towards)
    bed = GaussianBed(sde, MEAN2, COV2)
    x, t = points(sde_lib.OUVE(), (2,))
    ours = posterior_score(bed.score_fn, sde, FIRST, Y, 0.3, "mmps")
    close(ours(x, t), truth(bed, FIRST, Y, 0.3)(x, t), 1e-6)


def test_wrong_arguments_are_refused():
    bed = GaussianBed(sde_lib.VPSDE(), MEAN2, COV2)

    def make(y=Y, noise=0.1, method="mmps", **options):
        return posterior_score(bed.score_fn, bed.sde, FIRST, y, noise, method, **options)

    for words, wrong in (
        ("unknown; known: dps", lambda: make(method="dsp")),
        ("has no option 'zeta'", lambda: make(zeta=1.0)),
        ("zeta > 0", lambda: make(method="dps", zeta=0)),
        ("steps ≥ 0", lambda: make(method="dps", steps=-1)),
        ("data_std > 0", lambda: make(method="pigdm", data_std=0.0)),
        ("floor > 0", lambda: make(method="tmpd", floor=0.0)),
        ("iterations ≥ 1", lambda: make(iterations=0)),
        ("≥ 0, got -1", lambda: make(noise=-1)),
        ("noise: expected a number, got nan", lambda: make(noise=math.nan)),
        (
            "measurement of shape",
            lambda: make(y=torch.zeros(3, 1))(torch.zeros(2, 2), torch.ones(2)),
        ),
        (
            "measurement of shape",
            lambda: make(y=torch.zeros(1, 2))(torch.zeros(2, 2), torch.ones(2)),
        ),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    with pytest.raises(ValueError, match="carries no gradient"):
        detached = ScoreFunction(lambda x, t: x.detach(), bed.sde, Parametrization("data", "t"))
        posterior_score(detached, bed.sde, FIRST, Y)(torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(TypeError, match="get_score_fn"):
        posterior_score(Small(), bed.sde, FIRST, Y)
    assert get_rule("mmps") == MMPS() and get_rule("pigdm") == PiGDM()


def test_the_last_step_of_dps_takes_noise_away_and_nothing_else():
    sde = sde_lib.VESDE(0.01, 20.0)
    bed, A = image_bed(sde), get_operator("mask", SHAPE)
    y = torch.full((1, *A.shape_out), 0.3, dtype=torch.float64)
    for steps, schedule in ((60, "logsnr"), (60, "uniform"), (None, "uniform")):
        kept = sampling.Trajectory()
        options = {"steps": steps, "schedule": schedule, "zeta": 0.05, "seeds": range(4)}
        solver = methods.get_inverse_solver("dps")
        x, _ = solver(sde, (4, *SHAPE), A, y, callback=kept, **options)(bed.score_fn)
        before = kept.states[-2].to(x)
        assert (x - before).square().mean().sqrt() < 0.2


def test_tmpd_without_noise_starts_where_nothing_of_the_data_is_left():
    sde = sde_lib.RectifiedFlow(N=50)

    def score(x, t):  # of N(0, 0.09): at t = 1 the denoiser rounds to 0
        alpha, sigma = (sde_lib.expand(c, x).to(x) for c in sde_lib.alpha_sigma(sde, t))
        return -x / (0.09 * alpha**2 + sigma**2)

    A = get_operator("mask", SHAPE)
    x, _ = methods.get_inverse_solver("tmpd")(
        sde, (3, *SHAPE), A, torch.full((1, *A.shape_out), 0.3), steps=40, schedule="logsnr"
    )(as_score_function(score, sde))
    close(A(x), torch.full((3, *A.shape_out), 0.3), 0.05)
