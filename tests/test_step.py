"""One training step: optimizer and schedules, precision, micro-batches, several processes."""

import contextlib
import copy
import math
import os

import pytest
import torch
import toys

import losses
import losses_step
from models.ema import ExponentialMovingAverage
from randomness import Draws


class Settings(dict):
    __getattr__ = dict.__getitem__


def settings(n_iters=100, **changes):
    values = {"optimizer": "Adam", "lr": 1e-2, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    optim = Settings(values | {"warmup": 0, "grad_clip": 1.0} | changes)
    return Settings(optim=optim, training=Settings(n_iters=n_iters))


class Net(torch.nn.Module):
    """Two convolutions and a class embedding; remembers what it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 1, 3, padding=1)
        self.classes = torch.nn.Embedding(3, 8)
        self.seen = []

    def forward(self, x, labels, y=None):
        h = self.first(x)
        self.seen.append((len(x), h.dtype, None if y is None else y.clone()))
        h = h + torch.cos(labels)[:, None, None, None]
        if y is not None:
            h = h + self.classes(y)[:, :, None, None]
        return self.last(torch.tanh(h))


def make_state(net=None, **changes):
    net = net or Net()
    return {
        "model": net,
        "optimizer": losses.get_optimizer(settings(**changes), net.parameters()),
        "ema": ExponentialMovingAverage(net.parameters(), 0.9),
        "step": 0,
    }


def trainer(**options):
    optimize = losses.optimization_manager(settings())
    return losses.get_step_fn(toys.all_sdes()["vp"], True, optimize, True, **options)


def gradients(state):
    return torch.cat(
        [p.grad.reshape(-1) for p in state["model"].parameters() if p.grad is not None]
    )


BATCH = torch.randn(7, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def draws(step=0):
    return Draws(3, step, 0, len(BATCH))


# --- optimizer and learning rate ------------------------------------------------------------


def test_adamw_and_beta2_are_the_configs():
    params = Net().parameters()
    made = losses.get_optimizer(settings(optimizer="AdamW", beta2=0.95, weight_decay=0.1), params)
    assert type(made) is torch.optim.AdamW and made.param_groups[0]["betas"] == (0.9, 0.95)
    assert made.param_groups[0]["fused"] and made.param_groups[0]["weight_decay"] == 0.1


def test_adamw_decays_weights_and_adam_adds_a_penalty():
    for name, expected in (("AdamW", 1 - 0.01 * 0.1), ("Adam", 1 - 0.01)):
        p = torch.nn.Parameter(torch.ones(1))
        p.grad = torch.zeros(1)
        losses.get_optimizer(settings(optimizer=name, weight_decay=0.1), [p]).step()
        assert p.item() == pytest.approx(expected, rel=1e-6)


def test_groups_of_parameters_are_taken():
    net = Net()
    groups = [{"params": net.first.parameters()}, {"params": net.last.parameters()}]
    assert len(losses.get_optimizer(settings(), groups).param_groups) == 2


RATES = {
    "constant": lambda k: 1.0,
    "cosine": lambda k: 0.5 * (1 + math.cos(math.pi * max(k - 10, 0) / 90)),
    "inverse_sqrt": lambda k: math.sqrt(10 / max(k + 1, 10)),
}


def rate_at(optimize, step):
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([p], lr=123.0)
    optimize(optimizer, [p], step=step)
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("schedule", RATES)
def test_learning_rate_is_a_function_of_the_step_alone(schedule):
    optimize = losses.optimization_manager(settings(schedule=schedule, warmup=10))
    for step in (99, 0, 9, 10, 50, 4):
        expected = 1e-2 * min((step + 1) / 10, 1) * RATES[schedule](step)
        assert rate_at(optimize, step) == pytest.approx(expected)
        assert type(rate_at(optimize, step)) is float


def test_cosine_decay_ends_near_zero_stays_there_and_needs_no_warm_up():
    optimize = losses.optimization_manager(settings(schedule="cosine"))
    assert rate_at(optimize, 0) == 1e-2
    assert 0 < rate_at(optimize, 99) < 1e-5
    assert rate_at(optimize, 100) == rate_at(optimize, 500) == 0


def test_without_schedule_and_warm_up_the_rate_is_the_optimizers_own():
    assert rate_at(losses.optimization_manager(settings()), 3) == 123.0


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="'step' is unknown; known: constant, cosine"):
        losses.optimization_manager(settings(schedule="step"))
    with pytest.raises(ValueError, match="needs optim"):
        losses.optimization_manager(settings(schedule="inverse_sqrt"))


# --- micro-batches --------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 3, 7, 100])
def test_micro_batches_give_the_gradient_of_the_whole_batch(accumulate):
    y = torch.arange(7) % 3
    whole, cut = make_state(), make_state()
    steps = trainer(), trainer(accumulate=accumulate)
    for n in range(3):
        found = [
            step(state, BATCH, draws=draws(n), y=y)
            for step, state in zip(steps, (whole, cut), strict=True)
        ]
        torch.testing.assert_close(*found, rtol=1e-6, atol=0)
        scale = gradients(whole).norm()
        assert (gradients(whole) - gradients(cut)).norm() < 1e-6 * scale
        for state in (whole, cut):  # the same weights again, so that only one step is compared
            state["model"].load_state_dict(Net().state_dict())
        torch.testing.assert_close(steps[0].info["losses"], steps[1].info["losses"])
        assert torch.equal(steps[0].info["t"], steps[1].info["t"])
    assert [seen[0] for seen in whole["model"].seen] == [7, 7, 7]
    sizes = [seen[0] for seen in cut["model"].seen][: min(accumulate, 7)]
    assert sum(sizes) == 7 and max(sizes) - min(sizes) <= 1
    labels = torch.cat([seen[2] for seen in cut["model"].seen[: len(sizes)]])
    assert torch.equal(labels, y)


def test_gradients_are_reduced_once_for_all_micro_batches():
    class Parallel(Net):
        @contextlib.contextmanager
        def no_sync(self):
            self.log.append("apart")
            yield

        def forward(self, *args, **kwargs):
            self.log.append("forward")
            return super().forward(*args, **kwargs)

    net = Parallel()
    net.log = []
    trainer(accumulate=3)(make_state(net), BATCH)
    assert net.log == ["apart", "forward", "apart", "forward", "forward"]


def test_impossible_numbers_of_micro_batches_are_refused():
    with pytest.raises(ValueError, match="accumulate ≥ 1"):
        trainer(accumulate=0)


# --- precision ------------------------------------------------------------------------------


def test_bf16_changes_the_networks_products_and_nothing_else():
    exact, rough = make_state(), make_state()
    step = trainer(precision="bf16")
    expected, found = trainer()(exact, BATCH, draws=draws()), step(rough, BATCH, draws=draws())
    assert rough["model"].seen[0][1] == torch.bfloat16
    assert exact["model"].seen[0][1] == torch.float32
    # bfloat16 keeps 8 bits; two layers of it.
    assert 0 < abs(found - expected) < 2 * 2**-8 * expected
    scale = gradients(exact).norm()
    assert 0 < (gradients(rough) - gradients(exact)).norm() < 4 * 2**-8 * scale
    assert found.dtype == step.info["losses"].dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in rough["model"].last.parameters())
    kept = rough["optimizer"].state.values()
    assert all(s["exp_avg"].dtype == torch.float32 for s in kept)
    assert torch.equal(step.info["t"], draws().rand("time") * (1 - 1e-5) + 1e-5)


def test_objective_under_autocast_is_bit_equal_where_no_product_is():
    class Pointwise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x, labels):
            return self.a * x

    for options in ({}, {"weighting": "edm"}, {"likelihood_weighting": True}):
        found = []
        for precision in ("fp32", "bf16"):
            sde = toys.all_sdes()["vp"]
            objective = losses.get_sde_loss_fn(
                sde, True, **{"likelihood_weighting": False} | options
            )
            step = trainer(precision=precision, loss_fn=objective)
            state = make_state(Pointwise())
            found.append((step(state, BATCH, draws=draws()), state["model"].a.grad))
        assert found[0] == found[1]


@pytest.mark.parametrize(("name", "allowed"), [("fp32", False), ("tf32", True)])
def test_float32_products_on_a_gpu_are_what_is_asked_for_and_the_flags_come_back(name, allowed):
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    with pytest.raises(KeyError), losses_step.float32_precision(name, torch.device("cuda")):
        assert [place.allow_tf32 for place in places] == [allowed, allowed]
        raise KeyError
    assert [place.allow_tf32 for place in places] == before
    for other in ("", "bf16"):
        with losses_step.float32_precision(other, torch.device("cuda")):
            assert [place.allow_tf32 for place in places] == before


def test_precision_does_not_fight_with_torchs_newer_setting(monkeypatch):
    class Mixed:
        @property
        def allow_tf32(self):
            raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Mixed())
    with (
        pytest.raises(ValueError, match="use precision '' to keep"),
        losses_step.float32_precision("fp32", torch.device("cuda")),
    ):
        pass


def test_unknown_precision_is_refused():
    for train in (True, False):
        with pytest.raises(ValueError, match="'fp16' is unknown; use 'fp32', 'tf32' or 'bf16'"):
            losses.get_step_fn(toys.all_sdes()["vp"], train, precision="fp16")


# --- what a step tells ----------------------------------------------------------------------


def test_info_holds_losses_and_half_log_snr_of_each_image():
    step, state = trainer(), make_state()
    assert step.info == {}
    loss = step(state, BATCH, draws=draws())
    info = step.info
    t = draws().rand("time").double() * (1 - 1e-5) + 1e-5
    B = 0.1 * t + 9.95 * t**2
    torch.testing.assert_close(info["lambda"], -0.5 * torch.log(torch.expm1(B)), rtol=1e-5, atol=0)
    torch.testing.assert_close(info["losses"].mean(), loss)
    assert not info["losses"].requires_grad and info["lr"] == 1e-2
    assert info["grad_norm"] > 0 and isinstance(info["grad_norm"], float)


def test_evaluation_with_draws_repeats_itself_and_leaves_torchs_numbers_alone():
    state = make_state()
    evaluate = losses.get_step_fn(toys.all_sdes()["vp"], False, reduce_mean=True)
    before = torch.get_rng_state()
    first, second = (evaluate(state, BATCH, draws=draws()) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)
    assert set(evaluate.info) == {"losses", "t", "lambda"}
    assert evaluate.info["losses"].shape == (7,)


def test_a_stopped_run_goes_on_exactly():
    def run(stop):
        optim = dict(schedule="cosine", warmup=3, optimizer="AdamW")
        state = make_state(**optim)
        for n in range(8):
            if n == stop:
                kept = copy.deepcopy(
                    {k: state[k].state_dict() for k in ("model", "optimizer", "ema")}
                )
                state = make_state(**optim) | {"step": n}
                for key, value in kept.items():
                    state[key].load_state_dict(value)
            optimize = losses.optimization_manager(settings(n_iters=8, **optim))
            step = losses.get_step_fn(toys.all_sdes()["vp"], True, optimize)
            step(state, BATCH, draws=draws(n))
        return state

    whole, resumed = run(None), run(4)
    for a, b in zip(whole["model"].parameters(), resumed["model"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole["optimizer"].param_groups[0]["lr"] == resumed["optimizer"].param_groups[0]["lr"]


# --- several processes ----------------------------------------------------------------------


def in_process(rank, world, folder):
    import torch.distributed as dist

    import distributed

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    batch = torch.cat([BATCH, BATCH[:1]])
    mine = distributed.share(8)
    net = Net()
    state = make_state(net)
    del net.classes  # unused here
    state["ema"] = ExponentialMovingAverage(net.parameters(), 0.9)
    state["model"] = torch.nn.parallel.DistributedDataParallel(net)
    step = trainer(accumulate=2)
    rows = Draws(3, 0, mine.start, len(mine), 8)
    loss = step(state, batch[mine.start : mine.stop], draws=rows)
    after = gradients(state), [p.detach().clone() for p in net.parameters()]
    poisoned = batch[mine.start : mine.stop] * (math.nan if rank == 1 else 1)
    step(state, poisoned, draws=rows)
    kept = all(torch.equal(p, q) for p, q in zip(after[1], net.parameters(), strict=True))
    torch.save(
        {"loss": loss, "gradients": after[0], "kept": kept, "nonfinite": state["nonfinite"]},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one_and_skip_a_bad_step_together(tmp_path):
    torch.multiprocessing.spawn(in_process, (2, str(tmp_path)), nprocs=2)
    state = make_state()
    loss = trainer()(state, torch.cat([BATCH, BATCH[:1]]), draws=Draws(3, 0, 0, 8))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["loss"], loss, rtol=1e-6, atol=0)
        scale = gradients(state).norm()
        assert (found["gradients"] - gradients(state)).norm() < 1e-6 * scale
        assert found["kept"] and found["nonfinite"] == 1
