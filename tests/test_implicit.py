"""Explicit, implicit, sliced and denoising score matching differ by a constant: by quadrature."""

import itertools

import numpy as np
import pytest
import torch

import losses
import run_lib_objectives  # noqa: F401  (registers 'explicit' and 'elbo')
import sde_lib
from configs.validation import complete
from data_lib_densities import Gaussians
from losses_implicit import Levels, OneTime
from randomness import Draws

MEAN, STD = (0.3, -0.2), 0.6
PROCESSES = {
    "ve": lambda: sde_lib.VESDE(sigma_min=0.01, sigma_max=5.0),
    "vp": sde_lib.VPSDE,
    "subvp": sde_lib.subVPSDE,
    "cosine": lambda: sde_lib.get_sde(complete({"training": {"sde": "cosine"}})),
    "rectified_flow": lambda: sde_lib.get_sde(complete({"training": {"sde": "rectified_flow"}})),
}


class Field(torch.nn.Module):
    """A small smooth score with curl; its weights are drawn by `seed`."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ).double()
        self.parametrization = "score"

    def forward(self, x, labels):
        return 0.5 * self.layers(0.5 * x)


class Nodes:
    """Quadrature in place of random numbers: of x_0, z and signs v; each with its weight."""

    def __init__(self, order=12, signs=False):
        u, w = np.polynomial.hermite_e.hermegauss(order)
        w = w / w.sum()
        v = [-0.1, 0.9] if signs else [0.1]  # as uniform numbers: below ½ is −1
        axes = [range(order)] * 4 + [range(len(v))] * 2
        index = torch.tensor(list(itertools.product(*axes)))
        nodes = torch.from_numpy(u)[index[:, :4]]
        self.weight = torch.from_numpy(w)[index[:, :4]].prod(dim=1) / len(v) ** 2
        self.x_0 = torch.tensor(MEAN, dtype=torch.float64) + STD * nodes[:, :2]
        self.z, self.v = nodes[:, 2:], torch.tensor(v)[index[:, 4:]]
        self.total = len(nodes)

    def rand(self, stream, shape=(), dtype=None):
        return self.v[:, None] if stream == "slices" else torch.full((self.total,), 0.5)

    def randn(self, stream, shape=(), dtype=None):
        assert stream == "z"
        return self.z

    def indices(self):
        return torch.arange(self.total)

    def mean(self, loss_fn, model):
        """The objective's expectation at the loss's one time."""
        return (self.weight * loss_fn.per_image(model, self.x_0, draws=self)[0]).sum()


def exact_score():
    return Gaussians([MEAN], STD**2 * torch.eye(2)[None]).score


def objectives(sde, sigma, **options):
    at = {"times": OneTime(sde, sigma), "reduce_mean": True, **options}
    weighting = options.get("weighting", "dsm")
    return {
        "explicit": losses.get_explicit_loss_fn(sde, exact_score(), **at),
        "implicit": losses.get_implicit_loss_fn(sde, **at),
        "denoising": losses.get_sde_loss_fn(
            sde, True, True, weighting=weighting, time_sampler=OneTime(sde, sigma)
        ),
    }


def constants(sde, sigma):
    """E w d/σ² and E w ‖∇ log p_t‖² per dimension for w = σ²; the latter is σ²/v of N(m, v)."""
    t = torch.tensor([OneTime(sde, sigma).time])
    alpha, s = (float(c) for c in sde_lib.alpha_sigma(sde, t))
    return 1.0, s**2 / (alpha**2 * STD**2 + s**2)


@pytest.mark.parametrize("sigma", [0.4, 1.5])
@pytest.mark.parametrize("process", list(PROCESSES))
def test_objectives_differ_by_their_constants_for_any_score(process, sigma):
    sde, nodes = PROCESSES[process](), Nodes()
    of_noise, of_score = constants(sde, sigma)
    for seed in (0, 1):
        model = Field(seed)
        found = {k: nodes.mean(fn, model).item() for k, fn in objectives(sde, sigma).items()}
        assert found["denoising"] - found["implicit"] == pytest.approx(of_noise, abs=1e-6)
        assert found["explicit"] - found["implicit"] == pytest.approx(of_score, abs=1e-6)


def test_so_their_gradients_agree():
    sde, nodes, model = sde_lib.VPSDE(), Nodes(), Field(3)
    gradients = []
    for loss_fn in objectives(sde, 0.5).values():
        model.zero_grad()
        nodes.mean(loss_fn, model).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0.05
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert torch.allclose(gradients[0], gradients[2], atol=1e-6)


@pytest.mark.parametrize("weighting", ["likelihood", "edm", "data", "v"])
def test_a_weight_multiplies_all_of_them_alike(weighting):
    sde, nodes, model = sde_lib.VPSDE(), Nodes(8), Field(0)
    plain = {k: nodes.mean(fn, model).item() for k, fn in objectives(sde, 0.5).items()}
    heavy = objectives(sde, 0.5, weighting=weighting)
    ratios = [nodes.mean(fn, model).item() / plain[k] for k, fn in heavy.items()]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("variance_reduction", [True, False])
def test_sliced_score_matching_has_the_exact_trace_as_its_mean(variance_reduction):
    """Over all four sign vectors v of the plane, exactly."""
    sde, model = sde_lib.VPSDE(), Field(2)
    at = {"times": OneTime(sde, 0.7)}
    sliced = losses.get_implicit_loss_fn(sde, slices=1, variance_reduction=variance_reduction, **at)
    exact = Nodes(5).mean(losses.get_implicit_loss_fn(sde, **at), model)
    assert Nodes(5, signs=True).mean(sliced, model).item() == pytest.approx(exact.item(), abs=1e-12)


def test_more_slices_and_variance_reduction_lower_the_variance():
    sde, model, x = sde_lib.VPSDE(), Field(2), torch.randn(4000, 2, dtype=torch.float64)

    def spread(**options):
        fn = losses.get_implicit_loss_fn(sde, times=OneTime(sde, 0.7), **options)
        exact = losses.get_implicit_loss_fn(sde, times=OneTime(sde, 0.7))
        draws = Draws(0, 0, 0, len(x))
        return (
            fn.per_image(model, x, draws=draws)[0] - exact.per_image(model, x, draws=draws)[0]
        ).var()

    one = spread(slices=1)
    assert spread(slices=8) < 0.2 * one
    assert one < spread(slices=1, variance_reduction=False)


def test_the_exact_score_has_no_explicit_loss_and_implicit_minus_its_square():
    sde, nodes = sde_lib.VPSDE(), Nodes(8)
    found = {}
    for name, loss_fn in objectives(sde, 0.5).items():
        found[name] = nodes.mean(loss_fn, _Exact(sde)).item()
    of_noise, of_score = constants(sde, 0.5)
    assert found["explicit"] == pytest.approx(0, abs=1e-9)
    assert found["implicit"] == pytest.approx(-of_score, abs=1e-7)
    assert found["denoising"] == pytest.approx(of_noise - of_score, abs=1e-7)  # α²c²/v


class _Exact(torch.nn.Module):
    def __init__(self, sde):
        super().__init__()
        self.sde, self.parametrization = sde, "score"

    def forward(self, x, labels):
        alpha, sigma = sde_lib.alpha_sigma(self.sde, labels.double() / 999, x)
        m = alpha[:, None] * torch.tensor(MEAN, dtype=torch.float64)
        return -(x - m) / (alpha**2 * STD**2 + sigma**2)[:, None]


# --- annealed ---------------------------------------------------------------------------------


class _OfSigma(torch.nn.Module):
    """A network of integer labels, as SMLD trains."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, labels):
        return -self.w * x / (1 + labels[:, None].float())


def test_annealed_of_power_two_is_smld():
    sde, model, x = sde_lib.VESDE(0.05, 4.0, N=10), _OfSigma(), torch.randn(512, 2)
    annealed = losses.get_annealed_loss_fn(sde, continuous=False)
    smld = losses.get_smld_loss_fn(sde, True)
    a, t = annealed.per_image(model, x, draws=Draws(0, 0, 0, 512))
    assert set(torch.round(t * 9).long().tolist()) == set(range(10))
    # The same levels are drawn with equal probability, by numbers of another stream.
    torch.manual_seed(0)
    found = torch.stack([smld(model, x) for _ in range(200)])
    assert a.mean().item() == pytest.approx(found.mean().item(), abs=5 * found.std().item())


def test_at_each_level_the_power_of_sigma_is_the_weight():
    sde, model, x = sde_lib.VESDE(0.05, 4.0, N=10), _OfSigma(), torch.randn(256, 2)
    draws = Draws(0, 0, 0, 256)
    two, t = losses.get_annealed_loss_fn(sde, continuous=False).per_image(model, x, draws=draws)
    one, _ = losses.get_annealed_loss_fn(sde, continuous=False, anneal_power=1.0).per_image(
        model, x, draws=draws
    )
    sigma = sde_lib.alpha_sigma(sde, t)[1]
    assert torch.allclose(two, one * sigma.float(), rtol=1e-5)


def test_levels_of_ve_are_its_table_and_others_begin_at_eps():
    sde = sde_lib.VESDE(0.05, 4.0, N=7)
    sigma = sde_lib.alpha_sigma(sde, Levels(sde, 7).times)[1]
    assert torch.allclose(sigma, sde.discrete_sigmas.double(), rtol=1e-6)
    assert Levels(sde_lib.VPSDE(), 5, 1e-3).times[0].item() == 1e-3


# --- one level, and by configuration ----------------------------------------------------------


@pytest.mark.parametrize("process", list(PROCESSES))
def test_one_time_has_the_noise_level_asked_for(process):
    sde = PROCESSES[process]()
    t = torch.tensor([OneTime(sde, 0.3).time], dtype=torch.float64)
    alpha, sigma = sde_lib.alpha_sigma(sde, t)
    assert (sigma / alpha).item() == pytest.approx(0.3, rel=1e-9)


def test_a_level_that_the_process_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"0\.01 to 5"):
        OneTime(sde_lib.VESDE(sigma_min=0.01, sigma_max=5.0), 6.0)


def toy(dataset="mixture", **training):
    data = {"num_channels": 2, "image_size": 1, "centered": False, "random_flip": False}
    model = {"name": "mlp", "nf": 16, "num_res_blocks": 1, "dropout": 0.0, "init_scale": 1.0}
    return complete(
        {
            "data": {"dataset": dataset, **data},
            "model": {**model, "parametrization": "noise"},
            "training": {"sde": "vpsde", "eps": 1e-3, **training},
            "device": "cpu",
        }
    )


OBJECTIVES = {
    "explicit": {},
    "implicit": {"sigma": 0.2},
    "sliced": {"slices": 2, "variance_reduction": False},
    "denoising": {"sigma": 0.2},
    "annealed": {"anneal_power": 1.0},
    "elbo": {"time_sampler": "likelihood"},
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_is_trained_by_name_and_evaluated_without_a_graph(name):
    from models.utils import create_model

    config = toy(objective=name, **OBJECTIVES[name])
    sde, model = sde_lib.get_sde(config), create_model(config)
    loss_fn = losses.loss_fn_from_config(config, sde, True)
    x, draws = torch.randn(32, 2), Draws(0, 0, 0, 32)
    each, t = loss_fn.per_image(model, x, draws=draws)
    assert each.shape == t.shape == (32,) and torch.isfinite(each).all()
    loss_fn(model, x, draws=draws).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        again, _ = loss_fn.per_image(model, x, draws=draws)
    assert not again.requires_grad and torch.allclose(again, each, atol=1e-5)


@pytest.mark.parametrize(
    ("training", "match"),
    [
        ({"objective": "explict"}, "registered"),
        ({"objective": "denoising"}, "training.sigma"),
        ({"sigma": 0.1}, "training.objective"),
        ({"objective": "implicit", "sigma": 0.1, "time_sampler": "lognormal"}, "one noise level"),
        ({"objective": "implicit", "sigma": 1e4}, "a noise level of VPSDE"),
        ({"objective": "annealed", "weighting": "edm"}, "anneal_power"),
        ({"objective": "elbo", "weighting": "edm"}, "weight of its own"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(training, match):
    config = toy(**training)
    with pytest.raises(ValueError, match=match):
        losses.loss_fn_from_config(config, sde_lib.get_sde(config), True)


def test_explicit_score_matching_needs_data_whose_score_is_known():
    config = toy("digits", objective="explicit")
    with pytest.raises(ValueError, match="whose score is known"):
        losses.loss_fn_from_config(config, sde_lib.get_sde(config), True)


def test_an_objective_of_ones_own_is_chosen_by_name():
    from losses_registry import _OBJECTIVES

    @losses.register_objective(name="test_zero")
    def zero(config, sde, train):
        return losses.Objective(lambda model, x, **_: (x.sum(1) * 0, x[:, 0]))

    try:
        config = toy(objective="test_zero")
        assert losses.loss_fn_from_config(config, None, True)(None, torch.ones(3, 2)) == 0
        with pytest.raises(ValueError, match="already registered"):
            losses.register_objective(zero, name="test_zero")
    finally:
        del _OBJECTIVES["test_zero"]


def test_one_slice_costs_the_published_formula():
    """½ (vᵀs)² + vᵀ∇s v, half of what is here before the weight (Song et al. 2019, eq. 8)."""
    A = torch.tensor([[-1.0, 0.5], [0.2, -2.0]], dtype=torch.float64)
    model = torch.nn.Module()
    model.forward = lambda x, labels: x @ A.T
    model.parametrization = "score"
    sde = sde_lib.VESDE(0.01, 5.0)
    fn = losses.get_implicit_loss_fn(
        sde, slices=1, variance_reduction=False, weighting="score", reduce_mean=False,
        times=OneTime(sde, 0.5),
    )  # fmt: skip
    nodes = Nodes(2, signs=True)
    found, _ = fn.per_image(model, nodes.x_0, draws=nodes)
    x, v = nodes.x_0 + 0.5 * nodes.z, torch.where(nodes.v < 0.5, -1.0, 1.0).double()
    expected = 0.5 * (v * (x @ A.T)).sum(1) ** 2 + ((v @ A) * v).sum(1)
    assert torch.allclose(found, expected, atol=1e-6)
