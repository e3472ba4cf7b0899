"""Objectives at their optimum, and a training step that a non-finite number cannot spoil."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
import toys

import losses
import sde_lib
from models.ema import ExponentialMovingAverage

NAMES = ["ve", "vp", "subvp", "user"]
MEAN, STD, SHAPE = 0.4, 0.3, (4000, 1, 2, 2)


def make(name, N=1000):
    return toys.UserSDE(N=N) if name == "user" else toys.all_sdes(N)[name]


def gaussian_data():
    return MEAN + STD * torch.randn(SHAPE, dtype=torch.float64)


def exact_model(sde):
    return toys.AsModel(sde, toys.gaussian_score(sde, MEAN, STD))


def samples_of(loss_fn, model, n=20):
    values = torch.stack([loss_fn(model, gaussian_data()) for _ in range(n)])
    return values.mean().item(), values.std().item() / n**0.5


# --- optima -------------------------------------------------------------------------------


def optimum(sde, likelihood_weighting, eps):
    """E_t of w(t)/σ² · α²c²/v, the loss per number of the exact score: numerics.md 2.1."""
    t = eps + (float(sde.T) - eps) * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    a, s = sde_lib.alpha_sigma(sde, t)
    value = (a * STD) ** 2 / ((a * STD) ** 2 + s**2)
    if likelihood_weighting:
        value = value * sde_lib.drift_diffusion(sde, t)[1] ** 2 / s**2
    return value.mean().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("likelihood_weighting", [False, True])
@pytest.mark.parametrize("reduce_mean", [False, True])
def test_loss_of_the_exact_score_is_the_closed_form(name, likelihood_weighting, reduce_mean):
    sde, eps = make(name), 1e-2 if likelihood_weighting else 1e-5
    loss_fn = losses.get_sde_loss_fn(
        sde, False, reduce_mean, likelihood_weighting=likelihood_weighting, eps=eps
    )
    mean, error = samples_of(loss_fn, exact_model(sde))
    truth = optimum(sde, likelihood_weighting, eps) * (1 if reduce_mean else 4 / 2)
    assert abs(mean - truth) < 5 * error
    assert error < 0.05 * truth


@pytest.mark.parametrize("name", ["ve", "vp"])
@pytest.mark.parametrize("reduce_mean", [False, True])
def test_discrete_loss_of_the_exact_network_is_the_closed_form(name, reduce_mean):
    sde = make(name)
    if name == "ve":
        sigmas = torch.tensor(50 * (0.01 / 50) ** np.linspace(0, 1, 1000))
        v = STD**2 + sigmas**2
        loss_fn = losses.get_smld_loss_fn(sde, False, reduce_mean)
        optimal = STD**2 / v

        def model(x, i):
            return -(x - MEAN) / v[i][:, None, None, None]
    else:
        a2 = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
        v = a2 * STD**2 + 1 - a2
        loss_fn = losses.get_ddpm_loss_fn(sde, False, reduce_mean)
        optimal = a2 * STD**2 / v

        def model(x, i):
            a, b, w = (c[i][:, None, None, None] for c in (a2.sqrt(), (1 - a2).sqrt(), v))
            return b / w * (x - a * MEAN)

    mean, error = samples_of(loss_fn, model)
    truth = optimal.mean().item() * (1 if reduce_mean else 4 / 2)
    assert abs(mean - truth) < 5 * error
    assert error < 0.05 * truth


@pytest.mark.parametrize("name", NAMES)
def test_no_score_has_a_smaller_loss_than_the_exact_one(name):
    sde = make(name)
    loss_fn = losses.get_sde_loss_fn(sde, False, likelihood_weighting=False)

    def with_error(k):
        def score(x, t):
            return k * toys.gaussian_score(sde, MEAN, STD)(x, t)

        torch.manual_seed(3)
        return loss_fn(toys.AsModel(sde, score), gaussian_data()).item()

    assert with_error(1.0) < min(with_error(0.8), with_error(1.2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("likelihood_weighting", [False, True])
def test_sum_is_half_the_dimension_times_the_mean(name, likelihood_weighting):
    values = []
    for reduce_mean in (False, True):
        torch.manual_seed(3)
        sde = make(name)
        loss_fn = losses.get_sde_loss_fn(
            sde, False, reduce_mean, likelihood_weighting=likelihood_weighting
        )
        values.append(loss_fn(exact_model(sde), torch.randn(8, 3, 2, 2)))
    torch.testing.assert_close(values[0], values[1] * 12 / 2)


@pytest.mark.parametrize("shape", [(6, 2), (6, 3, 5), (6, 1, 2, 3, 4)])
@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_losses_take_data_of_any_shape(name, shape):
    sde, batch = make(name), torch.randn(shape)
    kept = batch.clone()
    net = Net()
    for continuous in (True, False) if name != "subvp" else (True,):
        loss_fn = losses.get_loss_fn(sde, True, True, continuous, False, 1e-5)
        loss = loss_fn(net, batch)
        assert loss.shape == () and loss.dtype == torch.float32 and torch.isfinite(loss)
        assert loss.requires_grad
    assert torch.equal(batch, kept)


def test_times_lie_between_eps_and_T():
    class Long(toys.UserSDE):
        seen: list = []  # noqa: RUF012

        @property
        def T(self):
            return 5

        def marginal_prob(self, x, t):
            self.seen.append(t)
            return super().marginal_prob(x, t)

    sde = Long(theta=0.8)
    losses.get_sde_loss_fn(sde, False, eps=0.5)(lambda x, y: x, torch.zeros(5000, 1, 1, 1))
    t = max(sde.seen, key=len)
    assert 0.5 <= t.min() < 0.52 and 4.98 < t.max() <= 5.0
    assert t.mean() == pytest.approx(2.75, abs=0.1)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="SMLD training needs a VESDE, got VPSDE"):
        losses.get_smld_loss_fn(make("vp"), True)
    with pytest.raises(ValueError, match="DDPM training needs a VPSDE, got VESDE"):
        losses.get_ddpm_loss_fn(make("ve"), True)
    for name in ("subvp", "user"):
        with pytest.raises(ValueError, match="use continuous=True"):
            losses.get_step_fn(make(name), True, continuous=False)
    with pytest.raises(ValueError, match="likelihood_weighting needs continuous"):
        losses.get_step_fn(make("vp"), True, continuous=False, likelihood_weighting=True)
    for eps in (-1e-5, 1.0):
        with pytest.raises(ValueError, match="eps < 1"):
            losses.get_sde_loss_fn(make("vp"), True, eps=eps)
    with pytest.raises(ValueError, match="N ≥ 21"):
        losses.get_ddpm_loss_fn(make("vp", 20), True)


# --- a training step ----------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.1))
        self.b = torch.nn.Parameter(torch.tensor(0.2))
        self.poison = None

    def forward(self, x, labels):
        out = self.a * x + self.b
        if self.poison == "loss":
            return out + float("nan")
        if self.poison == "gradient":  # finite value, infinite derivative
            return out + torch.sqrt(torch.abs(self.a - self.a.detach()))
        return out


class Settings(dict):
    __getattr__ = dict.__getitem__


def settings(**changes):
    values = {"optimizer": "Adam", "lr": 1e-2, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    return Settings(optim=Settings(values | {"warmup": 0, "grad_clip": 1.0} | changes))


def make_state(net=None, **changes):
    net = net or Net()
    ema = ExponentialMovingAverage(net.parameters(), 0.9)
    optimizer = losses.get_optimizer(settings(**changes), net.parameters())
    return {"model": net, "optimizer": optimizer, "ema": ema, "step": 0}


def snapshot(state):
    return copy.deepcopy(
        (
            state["model"].state_dict(),
            state["optimizer"].state_dict(),
            state["ema"].state_dict(),
        )
    )


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def step_fn(optimize_fn=None, **options):
    if optimize_fn is None:
        optimize_fn = losses.optimization_manager(settings())
    return losses.get_step_fn(make("vp"), True, optimize_fn, **options)


def test_training_lowers_the_loss():
    torch.manual_seed(1)
    state, train = make_state(), step_fn(reduce_mean=True)
    values = [train(state, 0.3 * torch.randn(64, 3)).item() for _ in range(150)]
    assert sum(values[-20:]) < 0.7 * sum(values[:20])
    assert state["step"] == 150 and state["ema"].num_updates == 150


@pytest.mark.parametrize("poison", ["loss", "gradient", "data"])
def test_non_finite_numbers_never_reach_the_weights(poison):
    state, train = make_state(), step_fn(max_nonfinite=4)
    batch = torch.randn(8, 3)
    train(state, batch)
    before = snapshot(state)
    state["model"].poison = poison
    bad = torch.full_like(batch, float("nan")) if poison == "data" else batch
    for n in range(1, 4):
        loss = train(state, bad)
        assert torch.isfinite(loss) == (poison == "gradient")
        assert same(snapshot(state), before)
        assert state["nonfinite"] == state["nonfinite_in_a_row"] == n
    assert state["step"] == 4
    state["model"].poison = None
    train(state, batch)
    assert state["nonfinite"] == 3 and state["nonfinite_in_a_row"] == 0
    assert not same(snapshot(state), before)
    assert all(torch.isfinite(p).all() for p in state["model"].parameters())


def test_persisting_non_finite_steps_end_the_run():
    state, train = make_state(), step_fn(max_nonfinite=3)
    state["model"].poison = "loss"
    train(state, torch.randn(8, 3))
    train(state, torch.randn(8, 3))
    before = snapshot(state)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*at step 2"):
        train(state, torch.randn(8, 3))
    assert same(snapshot(state), before)


def test_gradient_overflow_in_its_norm_is_not_finite():
    net = Net()
    state, train = make_state(net), step_fn()
    net.a.register_hook(lambda g: torch.full_like(g, 3e38))
    net.b.register_hook(lambda g: torch.full_like(g, 3e38))
    before = snapshot(state)
    train(state, torch.randn(8, 3))
    assert same(snapshot(state), before) and state["nonfinite"] == 1


def test_users_optimize_fn_without_grad_norm_works():
    calls = []

    def optimize_fn(optimizer, params, step):
        calls.append((step, len(list(params))))
        optimizer.step()

    state = make_state()
    for fn in (optimize_fn, functools.partial(optimize_fn)):
        step_fn(fn)(state, torch.randn(8, 3))
    assert calls == [(0, 2), (1, 2)]


def test_training_without_optimize_fn_is_refused():
    train = losses.get_step_fn(make("vp"), True)
    with pytest.raises(ValueError, match="needs optimize_fn"):
        train(make_state(), torch.randn(8, 3))


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_warm_up_is_linear_from_one_and_a_python_float(kind):
    state = make_state()
    optimize = losses.optimization_manager(settings(warmup=4))
    seen = []
    for n in range(6):
        for p in state["model"].parameters():
            p.grad = torch.ones_like(p)
        optimize(state["optimizer"], state["model"].parameters(), step=kind(n))
        seen.append(state["optimizer"].param_groups[0]["lr"])
    assert all(type(lr) is float for lr in seen)
    assert seen == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("given", [True, False])
def test_gradients_are_clipped_to_the_norm(given):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for clip, wanted in ((1.0, 1.0), (10.0, 5.0), (-1.0, 5.0)):
        net.a.grad, net.b.grad = torch.tensor(3.0), torch.tensor(4.0)
        before = torch.stack([net.a, net.b]).detach()
        extra = {"grad_norm": torch.tensor(5.0)} if given else {}
        fn = losses.optimization_manager(settings(grad_clip=clip))
        fn(optimizer, net.parameters(), step=0, **extra)
        moved = before - torch.stack([net.a, net.b]).detach()
        torch.testing.assert_close(moved.norm(), torch.tensor(wanted))
        torch.testing.assert_close(moved / moved.norm(), torch.tensor([0.6, 0.8]))


def test_published_positional_arguments_of_optimize_fn_hold():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net.a.grad, net.b.grad = torch.tensor(3.0), torch.tensor(4.0)
    fn = losses.optimization_manager(settings())
    fn(optimizer, net.parameters(), 9, lr=0.5, warmup=20, grad_clip=1.0)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert net.a.item() == pytest.approx(0.1 - 0.25 * 0.6)


def test_optimizer_is_adam_of_the_config():
    net = Net()
    group = losses.get_optimizer(settings(beta1=0.8, eps=1e-6), net.parameters()).param_groups[0]
    assert group["betas"] == (0.8, 0.999) and group["eps"] == 1e-6 and group["lr"] == 1e-2
    with pytest.raises(ValueError, match="'SGD' is unknown"):
        losses.get_optimizer(settings(optimizer="SGD"), net.parameters())


# --- evaluation ---------------------------------------------------------------------------


def test_evaluation_uses_the_average_and_restores_the_weights():
    net, seen = Net(), []
    state = make_state(net)
    state["ema"].shadow_params[0].fill_(0.7)
    net.register_forward_hook(lambda m, args, out: seen.append((m.a.item(), m.training)))
    before = snapshot(state)
    evaluate = losses.get_step_fn(make("vp"), False)
    loss = evaluate(state, torch.randn(8, 3))
    assert seen == [(pytest.approx(0.7), False)]
    assert not loss.requires_grad and same(snapshot(state), before) and state["step"] == 0
    net.poison = "loss"
    assert math.isnan(evaluate(state, torch.randn(8, 3)))
    net.forward = None
    with pytest.raises(TypeError):
        evaluate(state, torch.randn(8, 3))
    assert same(snapshot(state), before)


def test_training_after_evaluation_is_in_training_mode():
    state, modes = make_state(), []
    state["model"].register_forward_hook(lambda m, *_: modes.append(m.training))
    losses.get_step_fn(make("vp"), False)(state, torch.randn(8, 3))
    step_fn()(state, torch.randn(8, 3))
    assert modes == [False, True]


def test_network_without_parameters_can_be_evaluated():
    class Fixed(torch.nn.Module):
        def forward(self, x, labels):
            return x * 0

    ema = ExponentialMovingAverage([], 0.9)
    state = {"model": Fixed(), "ema": ema, "step": 0}
    assert torch.isfinite(losses.get_step_fn(make("vp"), False)(state, torch.randn(8, 3)))


# --- what is refused, and what a sampler of times brings along -------------------------------


class FirstChannel(Net):
    """A network that returns one channel of three, which would broadcast."""

    def forward(self, x, labels):
        return super().forward(x, labels)[:, :1]


@pytest.mark.parametrize(
    "make_loss",
    [
        lambda: losses.get_ddpm_loss_fn(make("vp"), True),
        lambda: losses.get_smld_loss_fn(make("ve"), True),
        lambda: losses.get_sde_loss_fn(make("vp"), True),
        lambda: losses.get_sde_loss_fn(make("vp"), True, weighting="v"),
    ],
)
def test_an_output_of_another_shape_is_refused_by_every_objective(make_loss):
    with pytest.raises(ValueError, match=r"shape \(2, 1, 4, 4\) for an input of shape \(2, 3, 4"):
        make_loss()(FirstChannel(), torch.randn(2, 3, 4, 4))


def test_training_on_an_empty_batch_is_refused_and_changes_nothing():
    state, train = make_state(), step_fn()
    before = snapshot(state)
    with pytest.raises(ValueError, match="a batch of at least one image, got none"):
        train(state, torch.randn(0, 3))
    assert same(snapshot(state), before) and state["step"] == 0


def test_an_importance_sampler_divides_by_its_density_over_its_own_range():
    sde = make("vp")
    times = sde_lib.LikelihoodTimes(sde, 0.1)
    values = []
    for options in ({}, {"eps": 0.1}):
        torch.manual_seed(0)
        loss_fn = losses.get_sde_loss_fn(sde, True, time_sampler=times, **options)
        values.append(loss_fn(Net(), torch.ones(64, 3)).item())
    assert values[0] == values[1]


def test_a_class_in_place_of_a_process_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"expected a process such as sde_lib.VPSDE\(\)"):
        losses.get_sde_loss_fn(sde_lib.VPSDE, True)


def test_a_weight_that_rewards_errors_and_levels_that_are_none_are_refused():
    for gamma in (-5.0, 0.0, math.nan):
        with pytest.raises(ValueError, match="min_snr_gamma"):
            losses.get_sde_loss_fn(make("vp"), True, weighting="min_snr", min_snr_gamma=gamma)
    with pytest.raises(ValueError, match="N ≥ 1 noise levels, got -3"):
        losses.get_annealed_loss_fn(make("vp"), N=-3)
