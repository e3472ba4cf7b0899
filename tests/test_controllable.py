"""Inpainting, colouring and the constrained loop against Gaussian images in closed form."""

import functools

import pytest
import torch
import toys
from toys_gaussian_images import GaussianImages
from toys_sampling import processes

import controllable_generation as cg
import sampling
import sde_lib

ALD = sampling.AnnealedLangevinDynamics
STD = torch.tensor([0.3, 0.6, 0.4, 0.5, 0.8, 0.35])
MEAN = torch.tensor([0.2, -0.3, 0.5, -0.6, 0.1, 0.0]).reshape(1, 2, 3)
MASK = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]).reshape(1, 2, 3)
KNOWN = MASK.reshape(-1).bool()
A = torch.eye(6, dtype=torch.float64)[KNOWN]
SDES = {**processes(), "vesde": sde_lib.VESDE(0.01, 10.0)}


def identity(x):
    return x


def images(correlation=0.0):
    pattern = torch.eye(6) * (1 - correlation) + correlation
    return GaussianImages(MEAN, STD.diag() @ pattern @ STD.diag())


def process(name, N=60):
    sde = SDES[name]
    sde.N = N
    return sde


def inpainter(sde, predictor="reverse_diffusion", corrector=None, n_steps=1, snr=0.1, **options):
    options = {"eps": sde.sampling_eps, "continuous": True, **options}
    predictor = sampling.get_predictor(predictor)
    return cg.get_pc_inpainter(sde, predictor, corrector, identity, snr, n_steps, **options)


def unknown(x):
    return x.reshape(len(x), -1)[:, ~KNOWN].double()


# --- oracles: the exact conditional -----------------------------------------------------------

MERGED = {"dpmpp_2m": "ddim", "unipc": "ddim"}  # what they are without history
PREDICTORS = ["euler_maruyama", "reverse_diffusion", "ancestral_sampling", "ddim", "heun", *MERGED]


@pytest.mark.parametrize("corrector", [None, ALD], ids=["predictor", "pc"])
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_independent_unknown_pixels_are_drawn_as_without_a_constraint(predictor, name, corrector):
    """Mean and variance of the same steps, whatever their own error; 4 standard errors."""
    if corrector and predictor in MERGED:
        with pytest.raises(ValueError, match="corrector would leave behind"):
            inpainter(process(name), predictor, corrector)
        return
    sde, bed, n = process(name, 40), images(), 2000
    data = bed.sample(1)[0].float().expand(n, 1, 2, 3)
    steps = {} if predictor in PREDICTORS[:3] else {"steps": 12, "schedule": "logsnr"}
    torch.manual_seed(1)
    found = inpainter(sde, predictor, corrector, **steps)(bed.score_fn(sde), data, MASK)
    free = sampling.get_pc_sampler(
        sde,
        data.shape,
        sampling.get_predictor(MERGED.get(predictor, predictor)),
        corrector,
        identity,
        0.1,
        continuous=True,
        eps=sde.sampling_eps,
        **steps,
    )(bed.score_fn(sde))[0]
    assert torch.equal(found[MASK.bool().expand(data.shape)], data[MASK.bool().expand(data.shape)])
    a, b = unknown(found), unknown(free)
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * b.std(0) * (2 / n) ** 0.5).all()
    assert ((a.var(0) / b.var(0)).log().abs() < 4 * (4 / n) ** 0.5).all()


@pytest.mark.parametrize("name", ["vpsde", "vesde", "rectified_flow", "user"])
def test_half_the_pixels_known_gives_the_exact_conditional_within_two_percent(name):
    sde, bed, n = process(name, 200), images(), 20000
    data = bed.sample(1)[0].float().expand(n, 1, 2, 3)
    mean, covariance = bed.given(A, data[0].double().reshape(-1)[KNOWN])
    settings = {"steps": 100, "schedule": "logsnr", "eps": 1e-5} if name == "user" else {}
    predictor = "heun" if name == "user" else "euler_maruyama"
    torch.manual_seed(2)
    found = unknown(inpainter(sde, predictor, **settings)(bed.score_fn(sde), data, MASK))
    variance = covariance.diag()[~KNOWN]
    assert ((found.mean(0) - mean[~KNOWN]).abs() < 0.025 * variance.sqrt()).all()
    assert abs((found.mean(0) - mean[~KNOWN]).mean()) < 0.02 * variance.mean().sqrt()
    assert ((found.var(0) / variance).mean() - 1).abs() < 0.02


@pytest.mark.parametrize("name", ["vpsde", "vesde"])
def test_correlated_pixels_are_pulled_towards_their_prior_and_less_so_with_corrector_steps(name):
    """The known part at time t is drawn without regard to the unknown: between prior and posterior,
    too wide."""
    sde, bed, n = process(name, 100), images(correlation=0.5), 6000
    data = bed.sample(1, torch.Generator().manual_seed(3))[0].float().expand(n, 1, 2, 3)
    mean, covariance = bed.given(A, data[0].double().reshape(-1)[KNOWN])
    prior, shares, widths = bed.mean.reshape(-1)[~KNOWN], [], []
    for n_steps in (0, 2, 10):
        torch.manual_seed(4)
        corrector = ALD if n_steps else None
        fill = inpainter(sde, "reverse_diffusion", corrector, max(n_steps, 1), 0.16)
        found = unknown(fill(bed.score_fn(sde), data, MASK))
        way = mean[~KNOWN] - prior
        shares.append(float(((found.mean(0) - prior) * way).sum() / (way * way).sum()))
        widths.append(float((found.var(0) / covariance.diag()[~KNOWN]).mean()))
    assert 0.4 < shares[0] < shares[1] < shares[2] < 1.0
    assert 1.5 > widths[0] > widths[1] > widths[2] > 1.0


@pytest.mark.parametrize("name", ["vpsde", "vesde"])
def test_colouring_gives_the_exact_conditional_where_grey_and_colours_are_independent(name):
    basis = torch.tensor([[1.0, -2.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    basis = basis / basis.norm(dim=0)
    latent = torch.tensor([0.7, 0.5, 0.3], dtype=torch.float64)
    block = basis @ (latent**2).diag() @ basis.T
    covariance = torch.kron(block, torch.eye(4, dtype=torch.float64))
    bed = GaussianImages(torch.full((3, 2, 2), 0.1), covariance)
    sde, n = process(name, 200), 8000
    grey = torch.linspace(-0.5, 0.5, 4).reshape(1, 1, 2, 2).expand(n, 3, 2, 2)
    colour = cg.get_pc_colorizer(
        sde,
        sampling.EulerMaruyamaPredictor,
        None,
        identity,
        0.1,
        continuous=True,
        eps=sde.sampling_eps,
    )
    torch.manual_seed(5)
    found = colour(bed.score_fn(sde), grey)
    assert (found.mean(1) - grey[:, 0]).abs().max() < 1e-5
    codes = torch.einsum("bihw,ij->jbhw", found.double(), basis)[1:].reshape(2, -1)
    assert (codes.mean(1).abs() < 0.02 * latent[1:]).all()
    assert ((codes.var(1) / latent[1:] ** 2 - 1).abs() < 0.02).all()
    single = colour(bed.score_fn(sde), grey[:7, :1])  # one channel is as good
    assert (single.mean(1) - grey[:7, 0]).abs().max() < 1e-5


# --- the defects of the original ----------------------------------------------------------------


class Recorder(cg.Constraint):
    """A constraint that remembers what passes through it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.begun, self.times, self.means = inner, [], [], []

    def start(self, x):
        self.inner.noise = self.noise
        self.begun.append(self.inner.start(x))
        return self.begun[-1]

    def __call__(self, x, x_mean, t):
        self.times.append(float(t))
        assert t.dtype == torch.float64
        assert t.ndim == 0
        x, x_mean = self.inner(x, x_mean, t)
        self.means.append(x_mean)
        return x, x_mean


def record(sde, constraint, shape, bed=None, corrector=None, predictor="euler_maruyama", **options):
    seen = Recorder(constraint)
    bed = bed or GaussianImages(torch.zeros(shape[1:]), torch.eye(shape[1:].numel()))
    predictor = sampling.get_predictor(predictor)
    options = {"continuous": True, "eps": sde.sampling_eps, **options}
    sampler = cg.get_constrained_sampler(
        sde, shape, predictor, corrector, identity, 0.1, constrain=seen, **options
    )
    return seen, *sampler(bed.score_fn(sde))


@pytest.mark.parametrize("name", SDES)
def test_known_and_unknown_pixels_begin_with_the_noise_of_the_prior(name):
    sde, n = process(name, 1), 20000
    data = images().sample(1)[0].float().expand(n, 1, 2, 3)
    seen = record(sde, cg.known_pixels(sde, data, MASK), data.shape, images())[0]
    std = (
        seen.begun[0]
        - data * MASK * sde_lib.alpha_sigma(sde, torch.tensor([sde.T]), data)[0].item()
    )
    prior = sde.prior_sampling(data.shape).std()
    assert (std.reshape(n, -1).std(0) / prior - 1).abs().max() < 0.02


@pytest.mark.parametrize("name", SDES)
def test_grey_and_colours_begin_with_the_noise_of_the_prior(name):
    sde, n = process(name, 1), 20000
    grey = torch.full((n, 3, 1, 2), 0.3)
    x = record(sde, cg.known_grey(sde, grey), grey.shape)[0].begun[0]
    colours = torch.stack([x[:, 1] - x[:, 2], 2 * x[:, 0] - x[:, 1] - x[:, 2], x.sum(1)])
    std = colours.std(dim=1) / torch.tensor([2.0, 6.0, 3.0]).sqrt().unsqueeze(1).unsqueeze(1)
    assert (std / sde.prior_sampling(grey.shape).std() - 1).abs().max() < 0.02


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama", "none"])
def test_denoise_acts_on_the_unknown_part_and_known_pixels_are_returned_exactly(predictor):
    for sde in (process("vesde"), process("vpsde")):
        data, found = images().sample(50).float(), {}
        for denoise in (True, False):
            torch.manual_seed(6)
            fill = inpainter(sde, predictor, ALD, denoise=denoise)
            found[denoise] = fill(images().score_fn(sde), data, MASK)
            assert torch.equal(found[denoise][:, MASK.bool()], data[:, MASK.bool()])
        assert (unknown(found[True]) - unknown(found[False])).abs().min() > 0


def test_colouring_keeps_grey_with_and_without_denoise():
    sde, bed = process("vesde"), GaussianImages(torch.zeros(3, 2, 2), 0.1 * torch.eye(12))
    grey, found = torch.rand(20, 1, 2, 2).expand(-1, 3, -1, -1), {}
    for denoise in (True, False):
        torch.manual_seed(7)
        colour = cg.get_pc_colorizer(
            sde, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, identity, 0.16,
            denoise=denoise, continuous=True,
        )  # fmt: skip
        found[denoise] = colour(bed.score_fn(sde), grey)
        assert (found[denoise].mean(1) - grey[:, 0]).abs().max() < 1e-5
    assert (found[True] - found[False]).abs().max() > 1e-3


def test_x_mean_keeps_the_known_part_without_noise():
    sde, data = process("vpsde", 10), images().sample(8).float()
    seen = record(sde, cg.known_pixels(sde, data, MASK), data.shape, images())[0]
    for t, mean in zip(seen.times, seen.means):
        alpha = sde_lib.alpha_sigma(sde, torch.tensor([t]), data)[0].float()
        expected = (alpha * data)[:, MASK.bool()]
        torch.testing.assert_close(mean[:, MASK.bool()], expected, rtol=1e-5, atol=1e-6)


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [{}, {"steps": 7, "schedule": "karras"}])
@pytest.mark.parametrize("corrector", [None, ALD])
def test_the_constraint_is_told_the_time_of_the_state(corrector, steps):
    """t after the corrector, s after the predictor, 0 for data; the first state is at T."""
    sde, data = process("vpsde", 25), images().sample(3).float()
    seen = record(sde, cg.known_pixels(sde, data, MASK), data.shape, images(), corrector, **steps)[
        0
    ]
    n = steps.get("steps", sde.N)
    grid = sampling.time_grid(sde, sde.sampling_eps, n, steps.get("schedule", "uniform")).tolist()
    after = [*grid[1:], 0.0]
    expected = after if corrector is None else [t for pair in zip(grid, after) for t in pair]
    assert seen.times == expected


@pytest.mark.parametrize("predictor", ["dpmpp_2m", "dpmpp_3m", "exp_ab", "unipc", "sa_solver"])
def test_multistep_predictors_forget_and_step_at_order_one(predictor):
    sde, data = SDES["vpsde"], images(0.4).sample(6).float()
    options = {"steps": 9, "schedule": "logsnr", "probability_flow": True}
    first = functools.partial(inpainter, sde, **options)
    found = []
    for name in (predictor, "ddim"):
        torch.manual_seed(8)
        found.append(first(name)(images(0.4).score_fn(sde), data, MASK))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_plain_function_is_a_constraint_and_start_may_be_given():
    sde, bed = process("vpsde", 20), images()

    def upper(x, x_mean, t):
        return x.clamp(max=0.1), x_mean.clamp(max=0.1)

    sampler = cg.get_constrained_sampler(
        sde, (40, 1, 2, 3), sampling.EulerMaruyamaPredictor, None, identity, 0.1, continuous=True,
        constrain=upper, start=torch.zeros_like, seeds=range(40), eps=1e-3,
    )  # fmt: skip
    found, evaluations = sampler(bed.score_fn(sde))
    assert found.max() == 0.1
    assert evaluations == 20


def test_a_constraint_that_draws_its_own_noise_or_another_shape_is_refused():
    sde = process("vpsde", 24)
    make = functools.partial(
        cg.get_constrained_sampler, sde, (2, 1, 2, 3), sampling.EulerMaruyamaPredictor, None,
        identity, 0.1, continuous=True, eps=1e-3,
    )  # fmt: skip
    noisy = make(constrain=lambda x, m, t: (x + torch.randn_like(x), m), seeds=[1, 2])
    with pytest.raises(ValueError, match="draws its own noise"):
        noisy(images().score_fn(sde))
    noisy = make(constrain=lambda x, m, t: (x, m), start=torch.randn_like, seeds=[1, 2])
    with pytest.raises(ValueError, match="draws its own noise"):
        noisy(images().score_fn(sde))
    with pytest.raises(ValueError, match=r"returned \(1, 1, 2, 3\); expected the same"):
        make(constrain=lambda x, m, t: (x[:1], m))(images().score_fn(sde))


@pytest.mark.parametrize("predictor", ["euler_maruyama", "ancestral_sampling", "heun"])
def test_an_image_of_a_seed_is_the_same_at_any_batch_size(predictor):
    sde, data = process("vpsde", 24), images().sample(5).float()
    corrector = None if predictor == "heun" else ALD

    def fill(rows):
        seeds = [100 + i for i in rows]
        make = inpainter(sde, predictor, corrector, seeds=seeds)
        return make(images().score_fn(sde), data[list(rows)], MASK)

    whole = fill(range(5))
    torch.testing.assert_close(torch.cat([fill([i]) for i in range(5)]), whole, rtol=0, atol=0)
    assert not torch.equal(whole[:1, :, MASK[0] == 0], whole[1:2, :, MASK[0] == 0])


def test_a_generator_makes_the_samples_repeatable():
    sde, data = process("vesde", 12), images().sample(5).float()
    first, second = (
        inpainter(sde, "reverse_diffusion", ALD, generator=torch.Generator().manual_seed(9))(
            images().score_fn(sde), data, MASK
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_callback_sees_states_that_keep_to_the_known_part():
    sde, data, seen = process("vpsde", 24), images().sample(3).float(), []
    fill = inpainter(sde, callback=lambda i, t, x, x_mean: seen.append((i, t, x, x_mean)))
    found = fill(images().score_fn(sde), data, MASK)
    assert [i for i, *_ in seen] == list(range(24))
    assert torch.equal(seen[-1][3], found)
    assert torch.equal(seen[-1][2][:, MASK.bool()], data[:, MASK.bool()])


def test_the_sampler_of_a_config_takes_a_constraint():
    from configs.vp.digits_ddpmpp_continuous import get_config

    config, data = get_config(), images().sample(4).float()
    config.sampling.steps, sde = 20, SDES["vpsde"]
    seen = Recorder(cg.known_pixels(sde, data, MASK))
    sampler = sampling.get_sampling_fn(config, sde, data.shape, identity, 1e-3, constrain=seen)
    found, evaluations = sampler(images().score_fn(sde))
    assert len(seen.begun) == 1
    assert torch.equal(found[:, MASK.bool()], data[:, MASK.bool()])
    assert evaluations == 20


def test_inpainting_towards_an_observation():
    """A process whose origin an observation moves: the unknown part as without a constraint."""
    bed, n = images(), 4000
    data = bed.sample(1)[0].float().expand(n, 1, 2, 3)
    sde = SDES["ouve"].bind(torch.full((n, 1, 2, 3), 0.5))
    steps = {"steps": 60, "schedule": "karras"}
    torch.manual_seed(10)
    found = inpainter(sde, "ddim", **steps)(bed.score_fn(sde), data, MASK)
    assert torch.equal(found[:, MASK.bool()], data[:, MASK.bool()])
    ddim = sampling.get_predictor("ddim")
    settings = {"continuous": True, "eps": sde.sampling_eps, **steps}
    free = sampling.get_pc_sampler(sde, data.shape, ddim, None, identity, 0.1, **settings)
    free = unknown(free(bed.score_fn(sde))[0])
    assert ((unknown(found).mean(0) - free.mean(0)).abs() < 0.1 * free.std(0)).all()
    assert ((unknown(found).std(0) / free.std(0)).log().abs() < 0.05).all()


# --- what is handed in --------------------------------------------------------------------------


def model_that_must_not_run(x, labels):
    raise AssertionError("the network was called")


@pytest.mark.parametrize(
    ("data", "mask", "message"),
    [
        (torch.zeros(2, 1, 2, 3), torch.ones(2, 1, 3, 3), "broadcasts to it"),
        (torch.zeros(2, 1, 2, 3), torch.ones(3, 1, 2, 3), "broadcasts to it"),
        (torch.zeros(2, 1, 2, 3), torch.ones(1, 2, 1, 2, 3), "broadcasts to it"),
        (torch.zeros(2, 1, 2, 3), 255 * torch.ones(2, 1, 2, 3), "got 255; binarise"),
        (torch.zeros(2, 1, 2, 3), torch.full((2, 1, 2, 3), torch.nan), "got nan; binarise"),
        (torch.full((2, 1, 2, 3), torch.nan), MASK, "expected finite known pixels, got 6"),
        (torch.full((2, 1, 2, 3), torch.inf), MASK, "expected finite known pixels"),
        (
            torch.zeros(2, 1, 2, 3, dtype=torch.uint8),
            MASK,
            "floating-point tensor, got torch.uint8",
        ),
        (torch.zeros(0, 1, 2, 3), MASK, "expected images"),
    ],
)
def test_bad_masks_and_data_are_refused_before_any_work(data, mask, message):
    with pytest.raises(ValueError, match=message):
        inpainter(process("vpsde"))(model_that_must_not_run, data, mask)


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (2, 4, 4), (2, 4, 4, 3)])
def test_grey_images_of_wrong_channels_are_refused_before_any_work(shape):
    sde = process("vpsde")
    make = cg.get_pc_colorizer(sde, None, ALD, identity, 0.1, continuous=True, eps=1e-3)
    with pytest.raises(ValueError, match="expected grey images"):
        make(model_that_must_not_run, torch.zeros(shape))
    with pytest.raises(ValueError, match="expected finite grey images"):
        make(model_that_must_not_run, torch.full((1, 3, 2, 2), torch.nan))


def test_seeds_of_another_number_are_refused_before_any_work():
    with pytest.raises(ValueError, match="expected 2 seeds"):
        fill = inpainter(process("vpsde"), seeds=[1, 2, 3])
        fill(model_that_must_not_run, torch.zeros(2, 1, 2, 3), MASK)


def test_pairs_that_cannot_run_are_refused_when_the_function_is_made():
    with pytest.raises(ValueError, match="stochastic and has no probability flow"):
        inpainter(process("vpsde"), "ancestral_sampling", probability_flow=True)
    with pytest.raises(ValueError, match="needs 0 < eps"):
        inpainter(process("vpsde"), eps=2.0)
    with pytest.raises(TypeError, match="stepps"):
        inpainter(process("vpsde"), stepps=3)


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK[0], MASK.bool(), MASK.long(), MASK.expand(4, 1, 2, 3)],
    ids=["(1, H, W)", "(H, W)", "bool", "integers", "whole"],
)
def test_masks_broadcast_and_unknown_pixels_may_be_anything(mask):
    sde, data = process("vpsde", 24), images().sample(4).float()
    seen = torch.where(MASK.bool(), data, torch.tensor(torch.nan))
    found = inpainter(sde, seeds=range(4))(images().score_fn(sde), seen, mask)
    assert torch.equal(found, inpainter(sde, seeds=range(4))(images().score_fn(sde), data, MASK))
    assert torch.isfinite(found).all()


def test_known_pixels_keep_the_precision_of_the_data():
    sde, data = process("vpsde", 24), images().sample(4)
    found = inpainter(sde)(images().score_fn(sde), data, MASK)
    assert found.dtype == torch.float64
    assert torch.equal(found[:, MASK.bool()], data[:, MASK.bool()])
    assert inpainter(sde)(images().score_fn(sde), data.half(), MASK).dtype == torch.float32


def test_a_score_network_of_the_original_is_inpainted_and_coloured():
    """A module, called as (x, labels), with the positional arguments of the original."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, labels):
            return self.weight - x / (1 + labels.reshape(-1, 1, 1, 1) ** 2)

    sde = sde_lib.VESDE(0.01, 5.0, 10)
    arguments = (sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, identity, 0.16)
    data = torch.rand(3, 3, 4, 4)
    mask = (torch.rand(3, 1, 4, 4) > 0.5).float()
    fill = cg.get_pc_inpainter(sde, *arguments, 1, False, True, True, 1e-5)
    assert torch.equal(fill(Net(), data, mask) * mask, data * mask)
    colour = cg.get_pc_colorizer(sde, *arguments, 1, False, True, True, 1e-5)
    assert (colour(Net(), data).mean(1) - data.mean(1)).abs().max() < 1e-5


# --- a user's own loop --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vesde", "vpsde", "subvpsde", "user"])
@pytest.mark.parametrize("corrector", [None, sampling.LangevinCorrector, ALD])
def test_a_loop_of_ones_own_over_the_shared_updates_runs_unchanged(name, corrector):
    """Hundreds of forks of score_sde partially apply the shared updates and call them so."""
    sde, bed = process(name, 100), GaussianImages(torch.zeros(1, 16, 16), 0.2 * torch.eye(256))
    model = toys.AsModel(sde, bed.score_fn(sde))
    measured = bed.sample(2).float()

    settings = {"sde": sde, "continuous": True}
    predict = functools.partial(
        sampling.shared_predictor_update_fn,
        predictor=sampling.EulerMaruyamaPredictor,
        probability_flow=False,
        **settings,
    )
    correct = functools.partial(
        sampling.shared_corrector_update_fn, corrector=corrector, snr=0.05, n_steps=1, **settings
    )

    def downsampled_consistency(update):
        """The mean of the picture is known: shift the state after each update."""

        def updated(model, x, t):
            with torch.no_grad():
                vec_t = torch.ones(x.shape[0]) * t
                x, x_mean = update(x, vec_t, model=model)
                mean, std = sde.marginal_prob(measured, vec_t)
                noisy = mean + std[:, None, None, None] * torch.randn_like(x)
                dims = (1, 2, 3)
                x = x + (noisy - x).mean(dims, keepdim=True)
                return x, x_mean + (mean - x_mean).mean(dims, keepdim=True)

        return updated

    torch.manual_seed(11)
    steps = [downsampled_consistency(update) for update in (correct, predict)]
    x = sde.prior_sampling(measured.shape)
    for t in torch.linspace(sde.T, 1e-3, sde.N):
        for step in steps:
            x, x_mean = step(model, x, t)
    means = (x_mean.mean((1, 2, 3)), measured.mean((1, 2, 3)))
    torch.testing.assert_close(*means, rtol=0.02, atol=2e-3)
    assert 0.2 < x_mean.std() < 0.8


def test_images_that_are_none_are_refused_by_what_they_are():
    sde = process("vpsde")
    paint = inpainter(sde)
    colour = cg.get_pc_colorizer(sde, None, None, identity, 0.1)
    for words, wrong in (
        ("numpy.ndarray", torch.zeros(1, 3, 2, 2).numpy()),
        ("torch.uint8", torch.zeros(1, 3, 2, 2, dtype=torch.uint8)),
        (r"of shape \(0, 3, 2, 2\)", torch.zeros(0, 3, 2, 2)),
        ("NoneType", None),
    ):
        with pytest.raises(ValueError, match=words):
            paint(lambda x, t: x, wrong, torch.ones(2, 2))
        with pytest.raises(ValueError, match=words):
            colour(lambda x, t: x, wrong)
