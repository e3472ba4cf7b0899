"""Several processes: the numbers of one, its files once, and an end to all when one fails."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import toys_processes
from toys_processes import ROOT, tiny

import data_lib
import distributed
import run_lib
import run_lib_train
import sde_lib
from models.utils import register_model


def training(config):
    """A state and the steps that train it, in this process's group."""
    config = run_lib.complete_here(config)
    state = run_lib.create_state(config)
    sets = data_lib.get_image_sets(config)
    steps = run_lib_train.Steps(config, sde_lib.get_sde(config), *sets)
    find = config.training.find_unused_parameters
    return {**state, "model": distributed.parallel(state["model"], find)}, steps


def gradients(changes):
    with distributed.process_group():
        state, steps = training(tiny(**changes))
        loss = steps.train(state)
        return float(loss), {
            name.removeprefix("module."): parameter.grad.numpy().copy()
            for name, parameter in state["model"].named_parameters()
            if parameter.requires_grad
        }


def curve(changes, n):
    with distributed.process_group():
        state, steps = training(tiny(**changes))
        losses = [float(steps.train(state)) for _ in range(n)]
        # Those of other rates too: they follow the weights.
        return losses, [p.detach().numpy() for p in state["ema"].shadow_params]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("sde", ["vpsde", "vesde"])
def test_two_processes_have_every_gradient_of_one(sde, accumulate):
    changes = {"model__dropout": 0.0, "optim__grad_clip": -1.0, "training__sde": sde}
    changes |= {"model__embedding_type": "fourier", "model__init_scale": 1.0}
    one_loss, one = gradients(changes)
    changes["training__grad_accumulation"] = accumulate
    for loss, two in toys_processes.run(2, gradients, changes):
        assert loss == pytest.approx(one_loss, rel=1e-5)
        assert two.keys() == one.keys()
        largest = max(abs(g).max() for g in one.values())
        for name, gradient in one.items():
            assert abs(two[name] - gradient).max() < 2e-5 * largest, name


@pytest.mark.parametrize("classes", [0, 10])
def test_loss_curves_of_one_and_two_processes_agree_to_rounding_over_50_steps(classes):
    changes = {"model__dropout": 0.0, "model__num_classes": classes, "model__label_dropout": 0.2}
    one, average = curve(changes, 50)
    for losses, other in toys_processes.run(2, curve, changes, 50):
        assert losses == pytest.approx(one, rel=1e-3)
        assert losses[:5] == pytest.approx(one[:5], rel=1e-5)
        assert all(abs(a - b).max() < 1e-4 for a, b in zip(average, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_loss_curves_of_one_two_and_four_processes_agree(dropout):
    changes = {"model__dropout": dropout}
    one = torch.tensor(curve(changes, 50)[0])
    for n in (2, 4):
        other = torch.tensor(toys_processes.run(n, curve, changes, 50)[0][0])
        gap = other - one
        if dropout:
            assert gap.abs().max() > 0
            assert gap.mean().abs() < 3 * gap.std() / len(gap) ** 0.5
        else:
            assert gap.abs().max() < 1e-3 * one.max()


def random_numbers():
    with distributed.process_group():
        state, steps = training(tiny())
        seen = []
        state["model"].register_forward_pre_hook(lambda _, args: seen.append(args))
        steps.train(state)
        images, labels = seen[0]
        return images.numpy(), labels.numpy(), torch.rand(3).tolist()


def labels_told():
    with distributed.process_group():
        state, steps = training(tiny(model__num_classes=10, model__label_dropout=0.5))
        seen = []
        state["model"].register_forward_pre_hook(
            lambda _, args, told: seen.append(told["y"].numpy().copy()), with_kwargs=True
        )
        for _ in range(3):
            steps.train(state)
        return seen


def test_processes_get_different_images_times_noise_and_dropout():
    one = random_numbers()
    two = toys_processes.run(2, random_numbers)
    for i in (0, 1):  # what the network saw: the halves of one process's batch
        halves = torch.cat([torch.from_numpy(two[0][i]), torch.from_numpy(two[1][i])])
        assert torch.equal(halves, torch.from_numpy(one[i]))
    assert two[0][2] != two[1][2]
    assert two[0][2] == one[2]


def test_labels_are_dropped_image_by_image_whatever_the_number_of_processes():
    one = labels_told()
    halves = zip(*toys_processes.run(2, labels_told), strict=True)
    assert [[*a, *b] for a, b in halves] == [labels.tolist() for labels in one]
    dropped = sum((labels == 10).sum() for labels in one)
    assert 12 < dropped < 36  # of 48, half expected


def whole_run(workdir, changes):
    run_lib.train(tiny(**changes), workdir)


def test_one_process_writes_and_its_files_say_what_one_process_says(tmp_path):
    changes = {"model__dropout": 0.0, "training__eval_freq": 2, "training__eval_images": 50}
    changes |= {"training__snapshot_sampling": True, "training__num_snapshot_samples": 3}
    whole_run(tmp_path / "one", changes)
    toys_processes.run(2, whole_run, tmp_path / "two", changes)

    def files(name):
        names = (str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*"))
        return sorted(n for n in names if "tfevents" not in n)

    assert files("one") == files("two")
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    one, two = (
        [json.loads(line) for line in (tmp_path / n / "history.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "eval_loss", "eval_loss_all", "grad_norm", "lr"):
            assert (key in a) == (key in b)
            assert b.get(key, 0) == pytest.approx(a.get(key, 0), rel=1e-4)
    saved = torch.load(tmp_path / "two" / "checkpoints" / "checkpoint_1.pth", weights_only=True)
    run_lib.create_state(tiny())["model"].load_state_dict(saved["model"])  # bare names


def test_a_run_of_two_processes_goes_on_in_one_and_the_other_way_round(tmp_path):
    changes = {"model__dropout": 0.0}
    toys_processes.run(2, whole_run, tmp_path, {**changes, "training__n_iters": 3})
    whole_run(tmp_path, {**changes, "training__n_iters": 6})
    toys_processes.run(2, whole_run, tmp_path, {**changes, "training__n_iters": 9})
    whole_run(tmp_path / "one", {**changes, "training__n_iters": 9})
    a, b = (
        torch.load(p / "checkpoints-meta" / "checkpoint.pth", weights_only=True)["model"]
        for p in (tmp_path, tmp_path / "one")
    )
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


# --- ends -----------------------------------------------------------------------------------


def command_line(*words):
    import main

    sys.argv = ["main.py", *map(str, words)]
    main.run()


def command(workdir, **keys):
    return [
        f"--config={ROOT}/configs/vp/digits_ddpmpp_continuous.py",
        "--mode=train",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in {**toys_processes.TINY, "device": "cpu", **keys}.items()),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.batch_size": 15}, "2 processes × 1 micro-batches do not divide it"),
        ({"training.n_iters": 0}, "config.training.n_iters: expected a number >= 1"),
        ({"data.image_size": 9}, "halves the images"),
        ({"sampling.predictor": "magic"}, "'magic' is unknown"),
        ({"data.dataset": "folder", "data.levels": 256}, "expected config.data.path"),
        ({"data.datasets": "digits"}, "did you mean config.data.dataset"),
    ],
)
def test_a_wrong_configuration_is_said_once_and_ends_every_process(tmp_path, changes, message):
    begun = time.monotonic()
    children = toys_processes.start(2, command_line, *command(tmp_path / "run", **changes))
    ends = [child.end(60) for child in children]
    assert time.monotonic() - begun < 60
    assert all(code != 0 for code, _, _ in ends)
    text = "".join(text for _, _, text in ends)
    assert text.count(message) == 1, text
    assert "Traceback" not in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def one_is_missing(path):
    with distributed.process_group(), distributed.together():
        if distributed.rank() == 1:
            path.read_bytes()


def test_what_fails_in_one_process_fails_in_all_with_its_message(tmp_path):
    path = tmp_path / "nothing"
    ends = [child.end() for child in toys_processes.start(2, one_is_missing, path)]
    assert [code for code, _, _ in ends] == [1, 1]
    first, second = (result for _, result, _ in ends)
    assert "No such file" in second
    assert first.startswith("FileNotFoundError: process 1: ")


def votes(numbers):
    with distributed.process_group():
        vote = distributed.Vote()
        mine = numbers[distributed.rank()]
        return [vote(number) for number in mine] + [vote.result()]


def test_a_vote_is_known_to_all_one_call_later():
    said = [[0, 0, 15, 0], [0, 2, 0, 0]]
    assert toys_processes.run(2, votes, said) == [[0, 0, 2, 15, 0]] * 2
    assert votes([[0, 15]]) == [0, 15, 0]


def test_a_signal_to_one_process_saves_and_ends_all(tmp_path):
    workdir = tmp_path / "run"
    changes = {"training__n_iters": 100000, "training__snapshot_freq_for_preemption": 100000}
    children = toys_processes.start(2, whole_run, workdir, changes)
    wait_for(lambda: (workdir / "tensorboard").exists())
    time.sleep(0.5)
    os.kill(children[1].pid, signal.SIGTERM)
    ends = [child.end() for child in children]
    assert [code for code, _, _ in ends] == [143, 143], ends
    saved = torch.load(workdir / "checkpoints-meta" / "checkpoint.pth", weights_only=True)
    assert saved["step"] > 0
    assert f"stopped by SIGTERM at step {saved['step']}" in (workdir / "log.txt").read_text()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def run_whose_second_process_fails(workdir):
    prepare = data_lib.prepare

    def broken(*args, **options):
        if distributed.rank() == 1 and options["draws"].step == 3:
            raise OSError("disk 7 is on fire")
        return prepare(*args, **options)

    data_lib.prepare = broken
    command_line(*command(workdir))


def test_a_process_that_fails_while_training_ends_the_others(tmp_path):
    children = toys_processes.start(2, run_whose_second_process_fails, tmp_path)
    ends = [child.end(60) for child in children]
    assert all(code != 0 for code, _, _ in ends)
    assert "process 1: disk 7 is on fire" in ends[1][2]
    assert "Traceback" not in ends[0][2] + ends[1][2]


@register_model(name="idle_part")
class IdlePart(torch.nn.Module):
    """A network with a parameter that its output does not depend on."""

    def __init__(self, config):
        super().__init__()
        self.used, self.idle = torch.nn.Conv2d(1, 1, 1), torch.nn.Linear(2, 2)

    def forward(self, x, labels):
        return self.used(x)


def train_idle(workdir, find):
    whole_run(workdir, {"model__name": "idle_part", "training__find_unused_parameters": find})


def test_parameters_without_gradients_are_named_or_found(tmp_path):
    ends = [c.end() for c in toys_processes.start(2, train_idle, tmp_path / "a", False)]
    for code, result, text in ends:
        assert code == 1
        assert "['idle.weight', 'idle.bias']" in result, text
        assert "--config.training.find_unused_parameters" in result
    toys_processes.run(2, train_idle, tmp_path / "b", True)
    train_idle(tmp_path / "c", False)  # one process does not mind


# --- torchrun itself ------------------------------------------------------------------------


def torchrun(*words, timeout=180, **options):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         *words],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_trains(tmp_path):
    result = torchrun("main.py", *command(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("trained to step 6") == 1
    assert "on 2 × cpu" in result.stderr


def calling(folder, call):
    """A script that calls a function of this file."""
    path = folder / "script.py"
    here = [str(ROOT), str(ROOT / "tests")]
    path.write_text(
        f"import sys\nsys.path[:0] = {here}\nimport test_distributed\ntest_distributed.{call}\n"
    )
    return str(path)


@pytest.mark.slow
def test_torchrun_ends_when_one_process_fails(tmp_path):
    result = torchrun(calling(tmp_path, f"run_whose_second_process_fails({str(tmp_path)!r})"))
    assert result.returncode != 0
    assert "process 1: disk 7 is on fire" in result.stderr


RESTARTED = {
    "training__n_iters": 12,
    "training__snapshot_freq_for_preemption": 5,
    "model__dropout": 0.1,
}


def run_that_dies_once(workdir):
    train = run_lib_train.Steps.train

    def step(self, state):
        life = os.environ["TORCHELASTIC_RESTART_COUNT"]
        if (state["step"], distributed.rank(), life) == (7, 1, "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, state)

    run_lib_train.Steps.train = step
    whole_run(workdir, RESTARTED)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_ends_with_the_same_weights(tmp_path):
    script = calling(tmp_path, f"run_that_dies_once({str(tmp_path / 'killed')!r})")
    result = torchrun("--max-restarts=1", script)
    assert result.returncode == 0, result.stderr
    assert "going on from step 5" in result.stderr
    toys_processes.run(2, whole_run, tmp_path / "whole", RESTARTED)
    a, b = (
        torch.load(tmp_path / n / "checkpoints-meta" / "checkpoint.pth", weights_only=True)["model"]
        for n in ("killed", "whole")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_shares_cover_everything_once_and_differ_by_one_at_most():
    for n in (0, 1, 7, 300):
        for of in (1, 2, 3, 8):
            parts = [distributed.share(n, of, i) for i in range(of)]
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert max(map(len, parts)) == math.ceil(n / of)
