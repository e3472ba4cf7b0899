"""Several averages at once, and averages of any width after training (Karras et al. 2024)."""

import math
import warnings

import ml_collections
import numpy as np
import pytest
import torch
from scipy.integrate import quad

from checkpoints import restore_checkpoint, save_checkpoint
from checkpoints_convert import convert
from checkpoints_export import export_checkpoint
from configs.validation import complete
from models import ema, ema_posthoc
from models.ema import Averages, ExponentialMovingAverage, PowerFunctionAverage, posthoc_ema
from models.utils import create_model


def parameter(n=3):
    return torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))


def feed(average, p, sequence, save=None, every=0):
    for step, value in enumerate(sequence, start=1):
        with torch.no_grad():
            p.copy_(value)
        average.update([p])
        if save and step % every == 0:
            average.save_snapshot(save, step, dtype=torch.float64)


def random_walk(steps, seed=0, n=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, n, generator=g, dtype=torch.float64).cumsum(0) / steps**0.5 + 1


# --- power-function profiles ----------------------------------------------------------------


def profile(gamma, t):
    return lambda tau: (gamma + 1) * tau**gamma / t ** (gamma + 1)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_papers_widths_have_the_papers_exponents(sigma_rel, gamma):
    assert ema_posthoc.gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [0.005, 0.02, 0.05, 0.1, 0.2, 0.28])
def test_width_and_exponent_are_each_others_inverse(sigma_rel):
    gamma = ema_posthoc.gamma_of(sigma_rel)
    assert ema_posthoc.sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-11)
    p = profile(gamma, 1.0)
    mean = quad(lambda tau: tau * p(tau), 0, 1)[0]
    variance = quad(lambda tau: (tau - mean) ** 2 * p(tau), 0, 1)[0]
    assert math.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 12**-0.5, 0.3])
def test_impossible_widths_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"0 < sigma_rel < 0\.2887"):
        PowerFunctionAverage([parameter()], sigma_rel)


def test_the_recursion_is_the_integral_of_a_piecewise_constant_sequence():
    n, p = 400, parameter()
    theta = random_walk(n)
    for sigma_rel in (0.02, 0.1, 0.25):
        average = PowerFunctionAverage([p], sigma_rel)
        feed(average, p, theta)
        cdf = (torch.arange(n + 1, dtype=torch.float64) / n) ** (average.gamma + 1)
        want = (cdf.diff()[:, None] * theta).sum(0)
        torch.testing.assert_close(average.shadow_params[0], want, rtol=1e-12, atol=1e-12)


def test_the_first_update_forgets_the_initial_weights_and_float32_loses_nothing_else():
    p = torch.nn.Parameter(torch.full((2,), 1e3))
    average = PowerFunctionAverage([p], 0.05)
    constant = torch.tensor([0.1, -7.3])
    feed(average, p, [constant] * 50)
    torch.testing.assert_close(average.shadow_params[0], constant, rtol=2e-7, atol=0)
    # 1 − β at the end of a long training, where (1 − 1/t) alone has lost nine digits
    t, gamma = 10**9, 16.97
    exact = (gamma + 1) / t - (gamma + 1) * gamma / 2 / t**2
    assert ema_posthoc.step_size(gamma, t) == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("times", [(1.0, 1.0), (0.3, 1.0), (1.0, 0.7), (5.0, 90.0)])
@pytest.mark.parametrize("gammas", [(0.5, 3.0), (16.97, 6.94), (6.94, 90.0)])
def test_correlations_equal_numerical_quadrature(times, gammas):
    (t_a, t_b), (g_a, g_b) = times, gammas
    a, b = profile(g_a, t_a), profile(g_b, t_b)
    want = quad(lambda tau: a(tau) * b(tau), 0, min(times), epsabs=0, epsrel=1e-11)[0]
    got = ema_posthoc.correlation(t_a, g_a, t_b, g_b)
    assert float(got) == pytest.approx(want, rel=1e-9)
    assert float(ema_posthoc.correlation(t_b, g_b, t_a, g_a)) == pytest.approx(want, rel=1e-9)


# --- reconstruction -------------------------------------------------------------------------

GAMMAS = [ema_posthoc.gamma_of(s) for s in (0.05, 0.10)]


def grid(snapshots, t_last):
    t = np.repeat(np.arange(1, snapshots + 1) * (t_last / snapshots), 2)
    return t, np.tile(GAMMAS, snapshots)


@pytest.mark.parametrize("snapshots", [1, 2, 8, 32, 128])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.075, 0.1, 0.15, 0.25])
def test_weights_of_a_reconstruction_sum_to_one(snapshots, sigma_rel):
    x = ema_posthoc.solve_weights(*grid(snapshots, 1e6), 1e6, ema_posthoc.gamma_of(sigma_rel))
    assert x.sum() == pytest.approx(1, abs=1e-12)
    assert np.abs(x).max() < 100


def test_a_profile_that_was_kept_comes_back_as_it_is():
    t, gamma = grid(16, 4096.0)
    for wanted in (0, 9, 31):
        x = ema_posthoc.solve_weights(t, gamma, t[wanted], gamma[wanted])
        np.testing.assert_allclose(x, np.eye(32)[wanted], atol=1e-8)


def test_two_profiles_of_one_time_have_the_closed_form():
    """x minimises |x p_1 + (1 − x) p_2 − p_r|²: a quadratic in one number."""
    t, gamma, gamma_r = [7.0, 7.0], np.array(GAMMAS), ema_posthoc.gamma_of(0.07)

    def dot(a, b):  # at equal times
        return (a + 1) * (b + 1) / (a + b + 1) / 7

    a, b = GAMMAS
    along = dot(a, gamma_r) - dot(a, b) - dot(b, gamma_r) + dot(b, b)
    x = along / (dot(a, a) - 2 * dot(a, b) + dot(b, b))
    got = ema_posthoc.solve_weights(t, gamma, 7.0, gamma_r)
    np.testing.assert_allclose(got, [x, 1 - x], rtol=1e-9)


def test_more_snapshots_bring_every_width_nearer():
    for sigma_rel, least in ((0.03, 0.02), (0.075, 1e-4), (0.15, 1e-3), (0.25, 0.1)):
        gamma_r = ema_posthoc.gamma_of(sigma_rel)
        errors = []
        for snapshots in (2, 8, 32, 128):
            t, gamma = grid(snapshots, 1.0)
            x = ema_posthoc.solve_weights(t, gamma, 1.0, gamma_r)
            errors.append(ema_posthoc.residual(x, t, gamma, 1.0, gamma_r))
        norm = math.sqrt(ema_posthoc.correlation(1.0, gamma_r, 1.0, gamma_r))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < least * norm, sigma_rel


@pytest.mark.parametrize("sigma_rel", [0.07, 0.13])
def test_a_third_profile_is_reconstructed_from_two_within_the_bound(tmp_path, sigma_rel):
    """|Σ x_i θ̂_i − θ̂_r| = |∫(Σ x_i p_i − p_r) θ| ≤ ‖Σ x_i p_i − p_r‖ ‖θ‖ (Cauchy–Schwarz)."""
    n, every, p = 640, 40, parameter()
    kept, wanted = Averages([p], 0.999, profiles=(0.05, 0.10)), PowerFunctionAverage([p], sigma_rel)
    theta = random_walk(n)
    feed(kept, p, theta, save=tmp_path, every=every)
    feed(wanted, p, theta)
    (got,) = posthoc_ema(tmp_path, sigma_rel)
    error = (got.double() - wanted.shadow_params[0]).abs()
    t, gamma = grid(n // every, float(n))
    x = ema_posthoc.solve_weights(t, gamma, n, wanted.gamma)
    bound = ema_posthoc.residual(x, t, gamma, n, wanted.gamma) * theta.square().sum(0).sqrt()
    assert (error <= bound + 1e-6).all()
    spread = (theta[-1] - theta.mean(0)).abs().max()
    assert error.max() < 0.01 * spread


def test_a_step_before_the_last_uses_no_later_snapshot(tmp_path):
    n, p = 320, parameter()
    kept, wanted = Averages([p], 0.999, profiles=(0.05, 0.10)), PowerFunctionAverage([p], 0.10)
    theta = random_walk(n)
    feed(kept, p, theta, save=tmp_path, every=80)
    feed(wanted, p, theta[:160])
    (got,) = posthoc_ema(tmp_path, 0.10, step=160)
    torch.testing.assert_close(got.double(), wanted.shadow_params[0], rtol=1e-6, atol=1e-6)
    for path in tmp_path.glob("*000240.pt"):
        path.write_bytes(b"damaged")
    assert torch.equal(posthoc_ema(tmp_path, 0.10, step=160)[0], got)
    with pytest.raises(ValueError, match=r"ema_000000240\.pt is not a snapshot"):
        posthoc_ema(tmp_path, 0.10)


def test_an_average_over_no_time_is_no_snapshot(tmp_path):
    p = parameter()
    kept = Averages([p], 0.999, profiles=(0.05, 0.10))
    with pytest.raises(ValueError, match="at least one update"):
        kept.save_snapshot(tmp_path, 0)
    begun = [ema_posthoc.Snapshot(0, gamma, [p.detach()]) for gamma in GAMMAS]
    ema_posthoc.write(tmp_path, 0, begun, torch.float32)  # of an older version
    feed(kept, p, random_walk(4), save=tmp_path, every=4)
    with pytest.raises(ValueError, match="t ≥ 1"):
        posthoc_ema(tmp_path, 0.07)


def test_parameters_that_never_change_come_back_from_half_precision(tmp_path):
    p = torch.nn.Parameter(torch.tensor([0.1, -3.0]))
    kept = Averages([p], 0.999, profiles=(0.05, 0.10))
    for step in range(1, 31):
        kept.update([p])
        if step % 3 == 0:
            kept.save_snapshot(tmp_path, step, dtype=torch.float16)
    (got,) = posthoc_ema(tmp_path, 0.08)
    torch.testing.assert_close(got, p.detach(), rtol=5e-4, atol=0)
    (exact,) = posthoc_ema(tmp_path, 0.08)
    assert got.dtype == torch.float32 and torch.equal(exact, got)


def test_snapshots_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a snapshot of any step, got those of steps \[\]"
    ):
        posthoc_ema(tmp_path, 0.1)
    p = parameter()
    first = Averages([p], 0.9, profiles=(0.05, 0.10))
    feed(first, p, random_walk(6), save=tmp_path, every=3)
    with pytest.raises(ValueError, match=r"step 5, got those of steps \[3, 6\]"):
        posthoc_ema(tmp_path, 0.1, step=5)
    begun_again = Averages([p], 0.9, profiles=(0.05, 0.10))
    begun_again.update([p])
    begun_again.save_snapshot(tmp_path, 9)
    with pytest.raises(ValueError, match="snapshots of one training"):
        posthoc_ema(tmp_path, 0.1)
    assert len(posthoc_ema(tmp_path, 0.1, step=6)) == 1
    with pytest.raises(ValueError, match=r"needs model\.ema_profiles"):
        Averages([p], 0.9).save_snapshot(tmp_path, 1)


def test_snapshots_are_due_at_multiples_and_leave_no_other_file(tmp_path):
    p = parameter()
    average = Averages([p], 0.9, profiles=(0.05,), snapshot_freq=4)
    for step in range(1, 10):
        average.update([p])
        written = average.snapshot_if_due(tmp_path / "ema", step)
        assert (written is not None) == (step % 4 == 0)
    names = sorted(path.name for path in (tmp_path / "ema").iterdir())
    assert names == ["ema_000000004.pt", "ema_000000008.pt"]
    assert Averages([p], 0.9, profiles=(0.05,)).snapshot_if_due(tmp_path, 4) is None
    with pytest.raises(ValueError, match=r"posthoc_freq=4 needs model\.ema_profiles"):
        Averages([p], 0.9, snapshot_freq=4)


# --- several averages at once ---------------------------------------------------------------


def network():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    net.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    return net


def trained(averages, net, steps=20, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=g) * p.requires_grad)
        for average in averages:
            average.update(net.parameters())


def test_every_average_is_the_one_that_it_would_be_alone():
    net = network()
    several = Averages(net.parameters(), 0.9, rates=(0.5, 0.99), profiles=(0.1,))
    alone = {r: ExponentialMovingAverage(net.parameters(), r) for r in (0.9, 0.5, 0.99)}
    alone[0.1] = PowerFunctionAverage(net.parameters(), 0.1)
    trained([several, *alone.values()], net)
    weights = [p.clone() for p in net.parameters()]
    for which, average in alone.items():
        with several.average_parameters(net.parameters(), which=which):
            held = [p for p in net.parameters() if p.requires_grad]
            assert all(map(torch.equal, held, average.shadow_params))
        assert all(map(torch.equal, net.parameters(), weights))
    several.copy_to(net.parameters())
    assert all(map(torch.equal, net.parameters(), [*alone[0.9].shadow_params, net.frozen]))
    several.copy_to(net.parameters(), which=alone[0.5].shadow_params)
    assert torch.equal(net.weight, alone[0.5].shadow_params[0])


def test_an_average_that_is_not_kept_is_refused_and_the_weights_come_back():
    net = network()
    average = Averages(net.parameters(), 0.9, rates=(0.5,))
    weights = [p.clone() for p in net.parameters()]
    with (
        pytest.raises(ValueError, match=r"decay or width 0\.7; expected one of \[0\.9, 0\.5\]"),
        average.average_parameters(net.parameters(), which=0.7),
    ):
        pass
    with pytest.raises(ValueError, match="shapes or order differ"):
        average.copy_to(net.parameters(), which=[torch.ones(3)])
    assert all(map(torch.equal, net.parameters(), weights)) and not average.collected_params
    with pytest.raises(ValueError, match="each names one average"):
        Averages(net.parameters(), 0.9, rates=(0.5, 0.9))


def test_without_others_the_state_is_the_originals_to_the_key():
    net = network()
    mine, original = Averages(net.parameters(), 0.9), ExponentialMovingAverage([], 0.9)
    assert mine.state_dict().keys() == original.state_dict().keys()
    several = Averages(net.parameters(), 0.9, rates=(0.5,), profiles=(0.1,))
    assert several.state_dict().keys() - original.state_dict().keys() == {"rates", "profiles"}


def averages_equal(a, b):
    pairs = zip([a, *a.others.values()], [b, *b.others.values()], strict=True)
    return all(
        x.num_updates == y.num_updates and all(map(torch.equal, x.shadow_params, y.shadow_params))
        for x, y in pairs
    )


def test_a_saved_state_of_several_goes_on_as_if_never_stopped():
    net, other = network(), network()
    options = {"decay": 0.9, "rates": (0.5, 0.99), "profiles": (0.05, 0.1)}
    straight, resumed = (Averages(n.parameters(), **options) for n in (net, other))
    trained([straight], net)
    resumed.load_state_dict(straight.state_dict())
    assert averages_equal(straight, resumed)
    trained([straight, resumed], net, seed=2)
    assert averages_equal(straight, resumed)


def test_a_legacy_state_begins_the_others_at_its_average():
    net = network()
    legacy = ExponentialMovingAverage(net.parameters(), 0.9)
    trained([legacy], net)
    several = Averages(network().parameters(), 0.9, rates=(0.5,), profiles=(0.1,))
    with pytest.warns(UserWarning, match=r"not in the file, begun again: \[0\.1, 0\.5\]"):
        several.load_state_dict(legacy.state_dict())
    assert several.num_updates == 20
    for average in several.others.values():
        assert average.num_updates == 0
        assert all(map(torch.equal, average.shadow_params, legacy.shadow_params))
    few = Averages(net.parameters(), 0.9)
    with pytest.warns(UserWarning, match=r"in the file only, left out: \[0\.1, 0\.5\]"):
        few.load_state_dict(several.state_dict())


def test_a_state_whose_other_average_does_not_fit_changes_nothing():
    net = network()
    several = Averages(net.parameters(), 0.9, rates=(0.5,))
    trained([several], net)
    damaged = several.state_dict() | {"num_updates": 7}
    damaged["rates"] = {0.5: damaged["rates"][0.5] | {"shadow_params": [torch.ones(1)]}}
    with pytest.raises(ValueError, match="shapes or order differ"):
        several.load_state_dict(damaged)
    assert several.num_updates == 20


# --- configuration and files ----------------------------------------------------------------


def small(**model):
    model = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), **model}
    return complete(
        {"model": model, "data": {"image_size": 8}, "device": "cpu", "optim": {"warmup": 0}}
    )


def state_of(config):
    model = create_model(config)
    parameters = list(model.parameters())
    return {
        "model": model,
        "optimizer": torch.optim.Adam(parameters, lr=1e-3),
        "ema": ema.from_config(config, parameters),
        "step": 0,
    }


def test_the_configuration_chooses_the_averages():
    config = small(ema_rates=(0.99,), ema_profiles=(0.05, 0.1))
    config.training.posthoc_freq = 5
    averages = state_of(config)["ema"]
    assert averages.decay == 0.999 and averages.snapshot_freq == 5
    assert list(averages.others) == [0.99, 0.05, 0.1]
    assert not state_of(small())["ema"].others
    bare = ml_collections.ConfigDict({"model": {"ema_rate": 0.5}})  # as score_sde's own
    assert ema.from_config(bare, [parameter()]).decay == 0.5


@pytest.mark.parametrize(
    "model", [{"ema_rates": (1.0,)}, {"ema_profiles": (0.3,)}, {"ema_profiles": (0.0,)}]
)
def test_impossible_averages_are_refused_in_the_configuration(model):
    with pytest.raises(ValueError, match=next(iter(model))):
        complete({"model": model})


class OriginalAverage:
    """What score_sde_pytorch's class reads of a state."""

    def load_state_dict(self, state_dict):
        self.decay = state_dict["decay"]
        self.num_updates = state_dict["num_updates"]
        self.shadow_params = state_dict["shadow_params"]


def test_extra_averages_survive_every_way_through_files(tmp_path):
    config = small(ema_rates=(0.5,), ema_profiles=(0.1,))
    state = state_of(config)
    trained([state["ema"]], state["model"])
    save_checkpoint(tmp_path / "native.pth", state)
    fresh = state_of(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_checkpoint(tmp_path / "native.pth", fresh)
    assert averages_equal(state["ema"], fresh["ema"])

    convert(tmp_path / "native.pth", tmp_path / "theirs.pth", "score_sde", config)
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)
    original = OriginalAverage()
    original.load_state_dict(theirs["ema"])
    assert all(map(torch.equal, original.shadow_params, state["ema"].shadow_params))
    fresh = restore_checkpoint(tmp_path / "theirs.pth", state_of(config))
    assert averages_equal(state["ema"], fresh["ema"])

    export_checkpoint(tmp_path / "c.safetensors", state, "safetensors")  # the main average only
    with pytest.warns(UserWarning, match="begun again"):
        restore_checkpoint(tmp_path / "c.safetensors", state_of(config))


def test_snapshots_of_a_network_load_into_it(tmp_path):
    config = small(ema_profiles=(0.05, 0.1))
    state = state_of(config)
    model, average = state["model"], state["ema"]
    for step in (10, 20):
        trained([average], model, steps=10, seed=step)
        average.save_snapshot(tmp_path, step)
    tensors = posthoc_ema(tmp_path, 0.1)
    with average.average_parameters(model.parameters(), which=tensors):
        held = [p for p in model.parameters() if p.requires_grad]
        for got, want in zip(held, average.profiles[0.1].shadow_params, strict=True):
            torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-5)
