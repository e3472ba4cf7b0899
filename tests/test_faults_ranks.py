"""Ranks and data workers that die, two processes on one workdir, clocks that jump."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
import toys_processes
from test_data_scale import lazy_set, make_folder
from toys_faults import configuration, die
from toys_processes import ROOT, Child, tiny

import data_lib
import distributed
import run_lib
import run_lib_checks
import run_lib_journal
import run_lib_train

# --- ranks ----------------------------------------------------------------------------------

OPERATIONS = {
    "all_sum": lambda: distributed.all_sum(torch.ones(1000)),
    "gather": lambda: distributed.gather({"rank": distributed.rank()}),
    "broadcast": lambda: distributed.broadcast("word"),
    "barrier": distributed.barrier,
}


def wait_for_one_that_dies(name):
    with distributed.process_group():
        distributed.barrier()
        if distributed.rank() == 1:
            time.sleep(0.3)  # the other is in the operation by now
            die()
        while True:
            OPERATIONS[name]()


def ends_of(children):
    """(exit code, what it raised, seconds until all had ended) of each."""
    begun = time.monotonic()
    ends = [child.end(100) for child in children]
    return ends, time.monotonic() - begun


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_rank_that_is_killed_in_a_collective_ends_the_other_with_a_clear_message(name):
    ends, seconds = ends_of(toys_processes.start(2, wait_for_one_that_dies, name))
    assert seconds < 60
    assert ends[1][0] == -signal.SIGKILL
    assert ends[0][0] == 1
    assert "ConnectionError: another process was killed, without a word" in ends[0][1]
    assert "the same command goes on from the last checkpoint" in ends[0][1]


LONG = {"training__n_iters": 40, "training__snapshot_freq_for_preemption": 4}


def train_until_one_dies(workdir, step, how):
    train = run_lib_train.Steps.train

    def dying(self, state):
        if (state["step"], distributed.rank()) == (step, 1):
            if how == "killed":
                die()
            raise OSError("disk 7 is on fire")
        return train(self, state)

    run_lib_train.Steps.train = dying
    run_lib.train(tiny(**LONG), workdir)


@pytest.mark.slow
def test_a_training_whose_rank_was_killed_or_failed_resumes_to_the_same_weights(tmp_path):
    toys_processes.run(2, whole, tmp_path / "whole")
    workdir = tmp_path / "parts"
    ends, _ = ends_of(toys_processes.start(2, train_until_one_dies, workdir, 6, "killed"))
    assert "another process was killed, without a word" in ends[0][1]
    ends, _ = ends_of(toys_processes.start(2, train_until_one_dies, workdir, 14, "failed"))
    assert "disk 7 is on fire" in ends[1][1]
    assert "see its message" in ends[0][1]  # which is not said twice (main.py)
    toys_processes.run(2, whole, workdir)
    a, b = (
        torch.load(tmp_path / name / "checkpoints-meta" / "checkpoint.pth", weights_only=True)
        for name in ("whole", "parts")
    )
    assert a["step"] == b["step"] == 40
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def whole(workdir):
    run_lib.train(tiny(**LONG), workdir)


# --- data workers ---------------------------------------------------------------------------


def test_a_worker_that_dies_holds_up_nobody_who_closes(tmp_path):
    files = lazy_set(make_folder(tmp_path / "images", 8))
    for workers in (1, 2, 3):
        batches = data_lib.train_batches(files, 4, 0, workers=workers)
        next(batches)
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid, signal.SIGKILL)
        begun = time.monotonic()
        batches.close()
        assert time.monotonic() - begun < 30
        assert not multiprocessing.active_children()


def lose_workers(path, seed, count):
    """Lose workers in every way; the outcomes. A hang ends the process with all its stacks."""
    import faulthandler

    dice, outcomes = np.random.RandomState(seed), []
    files = lazy_set(path)
    for i in range(count):
        faulthandler.dump_traceback_later(500, exit=True, file=sys.__stderr__)
        how = ("one", "all", "closing")[i % 3]
        batches = data_lib.train_batches(files, 4, i, workers=int(dice.randint(1, 4)))
        next(batches)
        children = multiprocessing.active_children()
        victims = children if how == "all" else children[:1]
        time.sleep(dice.uniform(0, 0.02))
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        try:
            if how in ("one", "all"):
                for _ in range(10**6):
                    next(batches)
        except ChildProcessError as error:
            assert "one of them was killed" in str(error)
            assert "--config.data.workers=0" in str(error)
            outcomes.append(f"{how}: told")
        else:
            outcomes.append(f"{how}: closed")
        batches.close()
        assert not multiprocessing.active_children()
    faulthandler.cancel_dump_traceback_later()
    return outcomes


@pytest.mark.slow
def test_no_loss_of_a_worker_hangs(tmp_path):
    path = make_folder(tmp_path / "images", 24)
    code, outcomes, text = Child(lose_workers, path, 0, 90).end(550)
    assert code == 0, text
    counts = Counter(outcomes)
    print(counts)
    assert counts == {"one: told": 30, "all: told": 30, "closing: closed": 30}


# --- two processes on one workdir -----------------------------------------------------------


def hold(workdir, seconds):
    with run_lib_checks.lock(workdir):
        (workdir / "held").touch()
        time.sleep(seconds)


def held(workdir):
    workdir.mkdir(exist_ok=True)
    child = Child(hold, workdir, 300)
    end = time.monotonic() + 100
    while not (workdir / "held").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return child


def test_the_second_is_told_who_works_there_where_and_since_when(tmp_path):
    first = held(tmp_path / "run")
    try:
        with pytest.raises(ValueError, match="is in use") as refused:
            run_lib.train(tiny(), tmp_path / "run")
        told = str(refused.value)
        assert re.search(
            rf"process {first.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", told
        )
        with pytest.raises(ValueError, match=rf"process {first.pid}"):
            run_lib.train(tiny(), tmp_path / "run")  # also the second time
    finally:
        first.process.kill()  # leaves no lock behind
        first.process.join()
    assert run_lib.train(tiny(), tmp_path / "run")["step"] == 6


def test_workers_do_not_keep_the_lock_of_a_trainer_that_was_killed(tmp_path):
    path = make_folder(tmp_path / "images", 8)
    child = Child(hold_with_workers, tmp_path, path)
    end = time.monotonic() + 100
    while not (tmp_path / "held").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.process.join()
    with run_lib_checks.lock(tmp_path):  # at once, though workers may still be leaving
        pass


def hold_with_workers(workdir, path):
    with run_lib_checks.lock(workdir):
        batches = data_lib.train_batches(lazy_set(path), 4, 0, workers=2)
        next(batches)
        (workdir / "held").touch()
        time.sleep(300)
        batches.close()


@pytest.mark.slow
def test_the_command_refused_ends_with_1_and_the_message(tmp_path):
    first = held(tmp_path / "run")
    config = "configs/vp/digits_ddpmpp_continuous.py"
    words = ["main.py", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--mode=train"]
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    first.process.kill()
    first.process.join()
    assert result.returncode == 1
    assert f"is in use: process {first.pid} on " in result.stderr
    assert "Traceback" not in result.stderr.replace("the traceback is shown", "")


def test_evaluation_beside_training_is_allowed_and_a_second_evaluation_is_not(tmp_path):
    workdir = tmp_path / "run"
    config = configuration(workdir, eval__metrics=(), eval__enable_sampling=False)
    run_lib.train(config, workdir)
    with run_lib_checks.lock(workdir):  # as a training that goes on
        assert run_lib.evaluate(config, workdir)
    first = held(workdir / "eval")
    with pytest.raises(ValueError, match="is in use"):
        run_lib.evaluate(config, workdir)
    assert run_lib.evaluate(config, workdir, "eval2")
    first.process.kill()
    first.process.join()


# --- clocks ---------------------------------------------------------------------------------


@pytest.fixture(params=[-7200.0, 7200.0], ids=["back", "forward"])
def jumping(request, monkeypatch):
    """A clock on the wall that jumps two hours, again and again."""
    now, calls = time.time, [0]

    def jumped():
        calls[0] += 1
        return now() + request.param * (calls[0] // 7)

    monkeypatch.setattr(time, "time", jumped)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumped() * 1e9))
    return calls


def test_a_run_does_not_mind_clocks_that_jump(jumping, tmp_path):
    workdir = tmp_path / "run"
    config = configuration(workdir, eval__metrics=(), eval__wait_s=1)
    state = run_lib.train(config, workdir)
    assert state["step"] == 8
    assert run_lib.evaluate(config, workdir)
    rows = run_lib_journal._read_rows(workdir / "history.jsonl")
    rates = [row["images_per_second"] for row in rows if row.get("images_per_second")]
    assert rates and all(0 < rate < 1e6 for rate in rates)
    assert not re.search(r"\d d \d|-\d+ s left", (workdir / "log.txt").read_text())


def test_the_bar_goes_on_when_the_clock_is_set_back(monkeypatch, capsys):
    monkeypatch.setattr(run_lib_journal.distributed, "is_main", lambda: True)
    bar = run_lib_journal.progress_bar(100, delay=0.0)
    wall = time.time()
    monkeypatch.setattr(time, "time", lambda: wall - 7200)
    bar.mininterval = 0.0
    time.sleep(0.02)
    assert bar.update(50)  # it says whether it was drawn
    assert 0 < bar.format_dict["elapsed"] < 600
    bar.close()


def test_no_duration_is_measured_by_the_clock_on_the_wall():
    wrong = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "models").glob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\btime\.time\(|datetime\.(datetime\.)?now\(", line):
                wrong.append(f"{path.name}:{number}: {line.strip()}")
    assert not wrong


def test_a_line_of_fewer_steps_than_others_says_so(tmp_path):
    changes = {"training__log_freq": 5, "training__snapshot_freq_for_preemption": 1}
    for last in (8, 15):  # between two lines
        run_lib.train(tiny(**changes, training__n_iters=last), tmp_path)
    rows = run_lib_journal._read_rows(tmp_path / "history.jsonl")
    found = {row["step"]: row.get("steps_averaged") for row in rows if "loss" in row}
    assert found == {5: None, 8: 3, 10: 2, 15: None}
