"""Classifier guidance, classifier-free guidance and autoguidance, against a mixture of Gaussians
whose classes have closed forms."""

import functools
import math

import pytest
import torch
import toys
from test_wrappers import assert_in_keeping
from toys_sampling import processes

import controllable_generation as cg
import divergence
import likelihood
import sampling
import sde_lib
from models.utils import create_model, get_score_fn
from parametrization import OUTPUTS, Parametrization, ScoreFunction, convert, on_process
from sde_lib import expand

SDES = {**processes(), "vesde": sde_lib.VESDE(0.01, 10.0)}
CENTRES = torch.tensor([[-1.0, 0.2], [0.3, 0.9], [0.8, -0.7]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STD = 0.3


class Mixture:
    """Σ_k w_k N(m_k, STD²) in the plane, as images (1, 1, 2): exact score and classifier."""

    def __init__(self, sde):
        self.sde = sde

    def _moments(self, x, t):
        alpha, sigma = (expand(c, x) for c in sde_lib.alpha_sigma(self.sde, t, x))
        y = sde_lib.origin(self.sde, x)
        shift = torch.zeros_like(x) if y is None else (1 - alpha) * y
        return alpha, shift, alpha**2 * STD**2 + sigma**2

    def log_joint(self, x, t):
        """log p_t(x, y) for each y, but for a constant: (B, 3)."""
        alpha, shift, variance = self._moments(x, t)
        means = shift.unsqueeze(1) + alpha.unsqueeze(1) * CENTRES.reshape(3, 1, 1, 2)
        square = (x.unsqueeze(1) - means).double() ** 2 / (2 * variance.unsqueeze(1))
        return WEIGHTS.log() - square.flatten(2).sum(2)

    def class_score(self, x, t, y):
        """∇ log p_t(x | y)."""
        alpha, shift, variance = self._moments(x, t)
        mean = shift + alpha * CENTRES[y].reshape(-1, 1, 1, 2)
        return (-(x - mean) / variance).to(x.dtype)

    def score(self, x, t, y=None):
        if y is not None:
            return self.class_score(x, t, y)
        p = torch.softmax(self.log_joint(x, t), dim=1).reshape(-1, 3, 1, 1, 1)
        scores = [self.class_score(x, t, torch.full((len(x),), k)) for k in range(3)]
        return (p * torch.stack(scores, dim=1)).sum(1).to(x.dtype)

    def score_fn(self, output="score"):
        """The exact network with this output; told of y it knows the class."""

        def model_fn(x, t, y=None):
            point = Parametrization("score", "t").point(self.sde, t, x)
            return convert(self.score(x, t, y), "score", output, point)

        return ScoreFunction(model_fn, self.sde, Parametrization(output, "t"))


def batch(sde, n=6):
    t = sde_lib.time_of_half_log_snr(sde, torch.linspace(1.5, -0.75, n, dtype=torch.float64))
    return torch.randn(n, 1, 1, 2, dtype=torch.float64), t, torch.arange(n) % 3


def guided(bed, labels, w=1.0, output="score", **options):
    return cg.classifier_score(bed.score_fn(output), bed.log_joint, labels, w, **options)


FACES = ("__call__", "denoise", "noise", "velocity")


# --- classifier guidance ------------------------------------------------------------------------


@pytest.mark.parametrize("output", [o for o in OUTPUTS if o != "preconditioned"])
@pytest.mark.parametrize("name", SDES)
def test_an_exact_classifier_gives_the_exact_score_of_the_class(name, output):
    """∇ log p(x) + ∇ log p(y | x) = ∇ log p(x | y), on every face."""
    bed = Mixture(SDES[name])
    x, t, y = batch(bed.sde)
    found, exact = guided(bed, y, output=output), bed.score_fn(output).with_conditions(y=y)
    for face in FACES:
        a, b = getattr(found, face)(x, t), getattr(exact, face)(x, t)
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert (found(x, t) - bed.score_fn()(x, t)).abs().max() > 1e-2


@pytest.mark.parametrize("w", [0.4, 3.0])
@pytest.mark.parametrize("name", SDES)
def test_faces_are_in_keeping_at_any_weight(name, w):
    bed = Mixture(SDES[name])
    x, t, y = batch(bed.sde)
    found = guided(bed, y, w)
    assert_in_keeping(found, x, t)
    way = bed.class_score(x, t, y) - bed.score(x, t)
    torch.testing.assert_close(found(x, t), bed.score(x, t) + w * way, rtol=1e-8, atol=1e-8)


def test_on_bound_and_on_other_processes():
    sde = SDES["ouve"].bind(torch.full((6, 1, 1, 2), 1.5, dtype=torch.float64))
    x, t, y = batch(sde)
    found = guided(Mixture(sde), y)
    assert_in_keeping(found, x, t)
    torch.testing.assert_close(found(x, t), Mixture(sde).class_score(x, t, y))
    vp, other = SDES["vpsde"], sde_lib.common_stretch(SDES["subvpsde"], SDES["vpsde"], 1e-5)
    x, t, y = batch(other)
    carried = on_process(Mixture(vp).score_fn("noise"), other)
    found = cg.classifier_score(carried, Mixture(other).log_joint, y)
    assert_in_keeping(found, x, t)
    torch.testing.assert_close(found(x, t), Mixture(other).class_score(x, t, y))


@pytest.mark.parametrize(
    ("predictor", "corrector", "steps"),
    [
        ("euler_maruyama", None, {}),
        ("reverse_diffusion", sampling.AnnealedLangevinDynamics, {}),
        ("ancestral_sampling", None, {}),
        ("ddim", sampling.AnnealedLangevinDynamics, {"steps": 60, "schedule": "logsnr"}),
        ("heun", None, {"steps": 25, "schedule": "logsnr"}),
        ("dpmpp_2m", None, {"steps": 40, "schedule": "logsnr"}),
        ("unipc", None, {"steps": 30, "schedule": "logsnr"}),
    ],
)
@pytest.mark.parametrize("name", ["vpsde", "vesde", "subvpsde", "edm"])
def test_samples_of_a_class_have_its_mean_and_spread(name, predictor, corrector, steps):
    sde, n = SDES[name], 3000
    sde.N = 120
    bed, labels = Mixture(sde), torch.arange(n) % 3
    sampler = cg.get_pc_conditional_sampler(
        sde, bed.log_joint, (n, 1, 1, 2), sampling.get_predictor(predictor), corrector,
        lambda x: x, 0.1, continuous=True, eps=sde.sampling_eps, **steps,
    )  # fmt: skip
    torch.manual_seed(0)
    x = sampler(bed.score_fn(), labels).double().reshape(n, 2)
    for k in range(3):
        part = x[labels == k]
        assert (part.mean(0) - CENTRES[k]).abs().max() < 0.17 * STD
        assert (part.std(0) / STD).log().abs().max() < 0.15


def test_without_weight_the_sampler_draws_the_whole_mixture():
    sde, n = SDES["vpsde"], 4000
    bed = Mixture(sde)
    sampler = cg.get_pc_conditional_sampler(
        sde, bed.log_joint, (n, 1, 1, 2), sampling.get_predictor("heun"), None, lambda x: x, 0.1,
        continuous=True, eps=1e-3, weight=0.0, steps=20, schedule="logsnr",
    )  # fmt: skip
    torch.manual_seed(1)
    x = sampler(bed.score_fn(), 0)
    found = bed.log_joint(x, torch.full((n,), 1e-3)).argmax(1).bincount(minlength=3) / n
    torch.testing.assert_close(found.double(), WEIGHTS, rtol=0, atol=0.04)


def test_the_gradient_can_be_differentiated_in_both_modes():
    """So that a guided score has a likelihood: that of the class, exactly."""
    sde = SDES["vpsde"]
    bed, (x, t, y) = Mixture(sde), batch(sde)
    gradient = cg.classifier_gradient(sde, bed.log_joint, y)

    def log_p(x):
        return torch.log_softmax(bed.log_joint(x, t), 1).gather(1, y[:, None]).sum()

    z = x.clone().requires_grad_()
    expected = torch.autograd.grad(log_p(z), z)[0]
    with torch.no_grad():
        torch.testing.assert_close(gradient(x, t), expected)
    guide, exact = guided(bed, y), bed.score_fn().with_conditions(y=y)
    for mode in ("reverse", "forward"):
        trace = divergence.get_trace("exact", mode=mode)
        probe = trace.draw(x)
        found = trace(lambda z: guide.velocity(z, t), x, probe)
        truth = trace(lambda z: exact.velocity(z, t), x, probe)
        for a, b in zip(found, truth):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


def test_the_likelihood_of_a_guided_score_is_that_of_the_class():
    sde = SDES["vpsde"]
    bed, (x, _, y) = Mixture(sde), batch(sde)
    bits = likelihood.get_likelihood_fn(sde, lambda x: x, eps=1e-4, continuous=True)
    torch.manual_seed(2)
    found = bits(guided(bed, y), x.float())[0]
    torch.manual_seed(2)
    exact = bits(bed.score_fn().with_conditions(y=y), x.float())[0]
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


def test_labels_that_no_classifier_knows_are_refused():
    bed, (x, t, _) = Mixture(SDES["vpsde"]), batch(SDES["vpsde"])
    for labels in (torch.zeros(6), torch.zeros(2, 3).long(), torch.full((6,), -1)):
        with pytest.raises(ValueError, match="integers"):
            cg.classifier_gradient(bed.sde, bed.log_joint, labels)
    for labels in (torch.full((6,), 3), torch.zeros(5).long()):
        with pytest.raises(ValueError, match="the classifier returned logits of shape"):
            cg.classifier_gradient(bed.sde, bed.log_joint, labels)(x, t)
    make = functools.partial(
        cg.get_pc_conditional_sampler, bed.sde, bed.log_joint, (6, 1, 1, 2),
        sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.1, continuous=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected 6 labels"):
        make()(bed.score_fn(), torch.zeros(5).long())


# --- guidance by another score ------------------------------------------------------------------


@pytest.mark.parametrize("guide", [sampling.classifier_free_guidance, sampling.autoguidance])
def test_no_weight_and_equal_networks_change_nothing(guide):
    for sde in SDES.values():
        bed, (x, t, y) = Mixture(sde), batch(sde)
        told, free = bed.score_fn().with_conditions(y=y), bed.score_fn()
        for face in FACES:
            plain = getattr(told, face)(x, t)
            assert torch.equal(getattr(guide(told, free, 0.0), face)(x, t), plain)
            assert torch.equal(getattr(guide(told, told, 2.0), face)(x, t), plain)
            minus = getattr(guide(told, free, -1.0), face)(x, t)
            torch.testing.assert_close(minus, getattr(free, face)(x, t), rtol=1e-9, atol=1e-9)


def test_classifier_free_and_classifier_guidance_are_one_where_both_are_exact():
    """s_c + w (s_c − s) = s + (1 + w) ∇ log p(y | x)."""
    for sde in SDES.values():
        bed, (x, t, y) = Mixture(sde), batch(sde)
        told = bed.score_fn().with_conditions(y=y)
        free = sampling.classifier_free_guidance(told, bed.score_fn(), 1.5)
        torch.testing.assert_close(free(x, t), guided(bed, y, 2.5)(x, t), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            free.denoise(x, t), guided(bed, y, 2.5).denoise(x, t), rtol=1e-7, atol=1e-7
        )


@pytest.mark.parametrize("kind", ["classifier", "autoguidance", "classifier_free"])
def test_guidance_acts_within_its_interval_alone(kind):
    sde = SDES["vpsde"]
    bed, (x, t, y) = Mixture(sde), batch(sde)
    told = bed.score_fn().with_conditions(y=y)
    inside = (0.3, 1.0)
    if kind == "classifier":
        base, found, whole = bed.score_fn(), guided(bed, y, interval=inside), guided(bed, y)
    else:
        guide = getattr(sampling, kind if kind == "autoguidance" else "classifier_free_guidance")
        base, whole = told, guide(told, bed.score_fn(), 1.0)
        found = guide(told, bed.score_fn(), 1.0, interval=inside)
    noise = torch.exp(-sde_lib.half_log_snr(sde, t))
    within = (noise >= 0.3) & (noise <= 1.0)
    assert within.any()
    assert not within.all()
    for face in FACES:
        a, b, c = (getattr(f, face)(x, t) for f in (found, whole, base))
        assert torch.equal(a[within], b[within])
        assert torch.equal(a[~within], c[~within])


@pytest.mark.parametrize(
    ("w", "interval", "message"),
    [
        (math.nan, (0.0, 1.0), "finite w"),
        (1.0, (1.0, 1.0), "0 ≤ low < high"),
        (1.0, (-1.0, 1.0), "0 ≤ low < high"),
    ],
)
def test_bad_weights_and_intervals_are_refused(w, interval, message):
    score_fn = Mixture(SDES["vpsde"]).score_fn()
    for make in (
        lambda: sampling.classifier_guidance(score_fn, lambda x, t: x, w, interval=interval),
        lambda: sampling.autoguidance(score_fn, score_fn, w, interval=interval),
        lambda: sampling.classifier_free_guidance(score_fn, score_fn, w, interval=interval),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_evaluations_of_the_network_are_counted():
    sde = SDES["vpsde"]
    bed, (x, t, y) = Mixture(sde), batch(sde)
    one = guided(bed, y)
    two = sampling.autoguidance(one, bed.score_fn(), 1.0)
    for score_fn, evaluations in ((one, 1), (two, 2)):
        score_fn.denoise(x, t)
        assert score_fn.nfe == evaluations


# --- networks of this library -------------------------------------------------------------------


def conditional_network():
    from configs.vp.digits_ddpmpp_continuous import get_config

    config = get_config()
    config.device = torch.device("cpu")
    config.model.update(nf=16, num_classes=10, label_dropout=0.1, num_res_blocks=1)
    torch.manual_seed(3)
    model = create_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.label_embedding.table.weight[-1] = 0  # the absent label's, which training leaves so
    return config, model


def test_a_dropped_label_is_no_label():
    """The unconditional score of classifier-free guidance is the network's own without y."""
    model = conditional_network()[1]
    sde = SDES["vpsde"]
    score_fn = get_score_fn(sde, model, continuous=True)
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.4)
    dropped = score_fn.with_conditions(y=torch.full((4,), 10))
    with torch.no_grad():
        torch.testing.assert_close(dropped(x, t), score_fn(x, t))
        told = score_fn.with_conditions(y=torch.arange(4))
        assert (told(x, t) - score_fn(x, t)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["", "classifier_free", "autoguidance", "classifier"])
def test_guidance_of_a_config(kind):
    config, model = conditional_network()
    other = conditional_network()[1]
    config.sampling.update(guidance=kind, guidance_weight=1.5, guidance_interval=(0.2, 3.0))
    config.sampling.guidance_network = "there"
    sde, labels = SDES["vpsde"], torch.arange(4)
    score_fn, asked = get_score_fn(sde, model, continuous=True), []

    def logits(x, t):
        return x.flatten(1)[:, :10] * (1 + t[:, None])

    def load(where, key):
        asked.append((where, key))
        return logits if kind == "classifier" else other

    found = cg.guided_from_config(config, score_fn, labels, load)
    told, interval = score_fn.with_conditions(y=labels), {"interval": (0.2, 3.0)}
    weak = get_score_fn(sde, other, continuous=True).with_conditions(y=labels)
    expected = {
        "": told,
        "classifier_free": sampling.classifier_free_guidance(told, score_fn, 1.5, **interval),
        "autoguidance": sampling.autoguidance(told, weak, 1.5, **interval),
        "classifier": cg.classifier_score(told, logits, labels, 1.5, **interval),
    }[kind]
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0.05, 0.3, 0.5, 0.9])
    with torch.no_grad():
        torch.testing.assert_close(found(x, t), expected(x, t))
    named = kind in ("autoguidance", "classifier")
    assert asked == ([("there", "sampling.guidance_network")] if named else [])


def test_guidance_that_the_network_was_not_trained_for_is_refused():
    config, model = conditional_network()
    score_fn = get_score_fn(SDES["vpsde"], model, continuous=True)
    config.sampling.guidance = "classifier_free"
    config.model.label_dropout = 0.0
    with pytest.raises(ValueError, match="train with 10 % dropped"):
        cg.guided_from_config(config, score_fn, torch.arange(4), None)
    config.sampling.guidance = "classifier"
    with pytest.raises(ValueError, match="needs the classes of the samples"):
        cg.guided_from_config(config, score_fn, None, lambda where, key: None)


@pytest.mark.parametrize(
    ("key", "value"),
    [("guidance", "more"), ("guidance_interval", (3.0, 1.0)), ("guidance_interval", (1.0,))],
)
def test_bad_guidance_in_a_config_is_refused(key, value):
    from configs.validation import complete

    config = conditional_network()[0]
    config.sampling[key] = value
    with pytest.raises(ValueError, match=f"sampling.{key}"):
        complete(config)


def test_a_users_process_of_five_methods_is_guided():
    bed, n = Mixture(toys.UserSDE(theta=8.0)), 1500
    labels = torch.arange(n) % 3
    sampler = cg.get_pc_conditional_sampler(
        bed.sde, bed.log_joint, (n, 1, 1, 2), sampling.get_predictor("heun"), None, lambda x: x,
        0.1, continuous=True, eps=1e-4, steps=30, schedule="logsnr",
    )  # fmt: skip
    torch.manual_seed(4)
    x = sampler(bed.score_fn(), labels).reshape(n, 2).double()
    means = torch.stack([x[labels == k].mean(0) for k in range(3)])
    torch.testing.assert_close(means, CENTRES, rtol=0, atol=0.05)


def test_labels_are_integers_of_any_width():
    def logits(x, t):
        return x.flatten(1)[:, :4]

    x, t = torch.randn(2, 1, 2, 2), torch.full((2,), 0.5)
    wanted = cg.classifier_gradient(SDES["vpsde"], logits, torch.tensor([1, 3]))(x, t)
    for labels in (torch.tensor([1, 3], dtype=torch.int32), [1, 3], torch.tensor([1, 3]).byte()):
        assert torch.equal(cg.classifier_gradient(SDES["vpsde"], logits, labels)(x, t), wanted)
