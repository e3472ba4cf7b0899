"""A process written in a few lines: its prior, its direction of time, grids it cannot be sampled
on; and settings that contradict each other."""

from __future__ import annotations

import pytest
import torch

import configs.edm.digits_ddpmpp as digits_edm
import configs.vp.digits_v as digits_v
import losses
import sampling
import sde_lib
import solvers
from configs.validation import complete
from models.utils import create_model, get_score_fn
from parametrization import as_score_function

STD = 0.5


class Quadratic(sde_lib.AffineSDE):
    """A variance-exploding process of two lines that ends at T = 2."""

    T = 2

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return 0.02 + 5 * t**2


class Backwards(Quadratic):
    """The same in the convention of noise at t = 0."""

    def sigma(self, t):
        return 0.02 + 5 * (2 - t) ** 2


def gaussian(sde):
    """The exact score for data N(0, STD²)."""

    def score(x, t):
        a, s = (sde_lib.expand(c, x) for c in sde_lib.alpha_sigma(sde, t, x))
        return -x / (a**2 * STD**2 + s**2)

    return as_score_function(score, sde)


def sample(sde, predictor, n=4, **options):
    sampler = sampling.get_pc_sampler(
        sde, (n, 2), predictor, None, lambda x: x, 0.1, eps=1e-3, seeds=range(n), **options
    )
    return sampler(gaussian(sde))[0]


def test_the_prior_of_two_lines_has_the_noise_of_the_end():
    sde = Quadratic(N=100)
    assert sde.prior_std == pytest.approx(20.02)
    assert sde.bind(torch.zeros(1, 2)).prior_std == pytest.approx(20.02)
    z = torch.randn(3, 2)
    truth = torch.distributions.Normal(0.0, 20.02).log_prob(z).sum(1)
    torch.testing.assert_close(sde.prior_logp(z), truth)


@pytest.mark.parametrize("predictor", [solvers.HeunPredictor, sampling.AncestralSamplingPredictor])
def test_a_process_of_two_lines_samples_its_data(predictor):
    x = sample(Quadratic(N=100), predictor, n=4000, steps=100, schedule="logsnr")
    assert x.std().item() == pytest.approx(STD, rel=0.08)


def test_another_prior_may_be_set_on_a_subclass_or_an_instance():
    class Wide(Quadratic):
        prior_std = 30.0

    sde = Quadratic(N=100)
    sde.prior_std = 7.0
    assert Wide(N=100).prior_std == 30.0 and sde.prior_std == 7.0
    assert sde.reverse(lambda x, t: -x).prior_std == 7.0


@pytest.mark.parametrize(
    "sde", [sde_lib.VPSDE(), sde_lib.subVPSDE(), sde_lib.CosineVP(), sde_lib.RectifiedFlow()]
)
def test_processes_that_end_in_standard_noise_keep_the_published_prior(sde):
    assert sde.prior_std == 1.0


@pytest.mark.parametrize(
    "use",
    [
        lambda sde: losses.get_sde_loss_fn(sde, train=True),
        lambda sde: sde_lib.LogNormalTimes(sde),
        lambda sde: sde.reverse(lambda x, t: x),
        lambda sde: sample(sde, solvers.DDIMPredictor),
        lambda sde: sample(sde, sampling.EulerMaruyamaPredictor),
    ],
)
def test_time_that_runs_from_noise_to_data_is_refused_with_the_remedy(use):
    with pytest.raises(ValueError, match=r"its noise falls in t; .* write T − t for t"):
        use(Backwards(N=100))


def test_a_solver_refuses_a_grid_on_which_the_noise_of_a_users_process_does_not_fall():
    class Five(sde_lib.VPSDE):  # read off marginal_prob, as a process of five methods is
        def marginal_prob(self, x, t):
            mean, std = super().marginal_prob(x, 1 - t)
            return mean, std

    with pytest.raises(ValueError, match=r"λ = log.* must rise .* falls after t"):
        solvers.DDIMPredictor(Five(), lambda x, t: -x).start(
            torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
        )


@pytest.mark.parametrize("gap", [1e-16, 1e-12, 1e-6])
@pytest.mark.parametrize(
    "predictor", [solvers.DPMpp2MPredictor, solvers.UniPCPredictor, solvers.SASolverPredictor]
)
def test_times_that_almost_coincide_are_refused_by_multistep_solvers_alone(predictor, gap):
    times = [1.0, 0.5, 0.5 - gap, 0.5 - 2 * gap, 0.1, 1e-3]
    grid = torch.tensor(times, dtype=torch.float64)
    options = {"steps": len(times), "schedule": lambda sde, eps, steps: grid}
    with pytest.raises(ValueError, match="times as long in λ as the one before"):
        sample(sde_lib.VPSDE(), predictor, **options)
    assert torch.isfinite(sample(sde_lib.VPSDE(), solvers.HeunPredictor, **options)).all()


@pytest.mark.parametrize("schedule", ["uniform", "quadratic", "logsnr", "karras"])
@pytest.mark.parametrize(
    "sde",
    [sde_lib.VPSDE(), sde_lib.VESDE(), sde_lib.EDM(), sde_lib.CosineVP(), sde_lib.RectifiedFlow()],
)
def test_no_named_schedule_is_refused_by_a_multistep_solver(sde, schedule):
    for steps in (1, 2, 3, 10, 1000):
        times = sampling.time_grid(sde, sde.sampling_eps, steps, schedule)
        solvers.DPMpp3MPredictor(sde, lambda x, t: -x).start(times)


@pytest.mark.parametrize(
    ("sampler", "key"),
    [
        ("uniform", "time_mean"),
        ("uniform", "truncate"),
        ("likelihood", "time_std"),
        ("lognormal", "truncate"),
        ("logitnormal", "truncate"),
    ],
)
def test_a_setting_that_the_time_sampler_does_not_have_is_refused(sampler, key):
    config = digits_v.get_config()
    config.training.update({"time_sampler": sampler, key: 0.5})
    config = complete(config)
    with pytest.raises(ValueError, match=f"training.{key}=0.5 says nothing to .*{sampler}"):
        sde_lib.get_time_sampler(config, sde_lib.get_sde(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding_type": "fourier"}, "takes the logarithm of the time input, and 'log_sigma/4'"),
        (
            {"embedding_type": "fourier", "time_input": "lambda"},
            "takes the logarithm of the time input, and 'lambda'",
        ),
        ({"scale_by_sigma": True}, "divides the output by the time input, and 'log_sigma/4'"),
    ],
)
def test_a_time_input_that_ncsnpp_cannot_read_is_refused_before_training(settings, message):
    config = digits_edm.get_config()
    config.model.update(settings)
    with pytest.raises(ValueError, match=message):
        create_model(complete(config))
    config.model.update(time_input="sigma", embedding_type="fourier", nf=16)
    loss = losses.get_sde_loss_fn(sde_lib.EDM(), train=True)
    assert torch.isfinite(loss(create_model(complete(config)), torch.rand(4, 1, 8, 8)))


@pytest.mark.parametrize("shape", [(5, 8), (4, 1, 8), (5, 1, 7), (8,)])
def test_an_observation_of_another_shape_than_the_data_is_refused(shape):
    sde, x = sde_lib.OUVE().bind(torch.zeros(shape)), torch.randn(5, 1, 8)
    with pytest.raises(ValueError, match="does not fit data of shape"):
        sde.marginal_prob(x, torch.full((5,), 0.5))
    with pytest.raises(ValueError, match="does not fit data of shape"):
        sde.prior_sampling(x.shape)


def test_a_score_of_another_process_is_refused_with_the_remedy():
    vp, flow = sde_lib.VPSDE(), sde_lib.RectifiedFlow()
    score = as_score_function(lambda x, t: -x, vp)
    with pytest.raises(ValueError, match="on_process"):
        get_score_fn(flow, score)
    assert get_score_fn(vp.bind(torch.ones(2)), score) is score
