"""What a run writes down: sums that are right, names that stay, a line that a person can read."""

import json
import logging
import math
import sys
import time

import pytest
import torch
from toys_processes import tiny

import run_lib
import run_lib_journal
import run_lib_train
from run_lib_journal import LAMBDA_BINS, loss_by_lambda


def rows(workdir):
    return [json.loads(line) for line in (workdir / "history.jsonl").read_text().splitlines()]


def train(workdir, **changes):
    run_lib.train(tiny(**changes), workdir)
    return rows(workdir)


def test_losses_by_lambda_are_means_over_the_images_of_a_bin():
    torch.manual_seed(0)
    parts = [{"losses": torch.rand(9), "lambda": 4 * torch.randn(9)} for _ in range(5)]
    losses, lam = (torch.cat([p[key] for p in parts]) for key in ("losses", "lambda"))
    borders = [-math.inf, -4, -2, 0, 2, 4, math.inf]
    for name, low, high in zip(LAMBDA_BINS, borders, borders[1:]):
        inside = (lam > low) & (lam <= high)
        assert loss_by_lambda(parts)[name] == pytest.approx(losses[inside].mean().item())


def test_losses_by_lambda_leave_out_what_is_not_finite_or_has_no_lambda():
    parts = [
        {
            "losses": torch.tensor([1.0, math.nan, 3.0, 5.0]),
            "lambda": torch.tensor([1.0, 1.0, math.nan, math.inf]),
        }
    ]
    found = {k: v for k, v in loss_by_lambda(parts).items() if v is not None}
    assert found == {"0..2": 1.0, "4..inf": 5.0}


def test_history_and_tensorboard_say_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(tmp_path, training__eval_freq=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "grad_norm", "lr", "images_per_second", "memory_gib", "nonfinite"):
        there = {e.step: e.value for e in events.Scalars(name)}
        here = {row["step"]: row[name] for row in history if "loss" in row}
        assert list(here) == [2, 4, 6]
        assert there == pytest.approx(here)
    assert [e.step for e in events.Scalars("eval_loss")] == [3, 6]
    bins = [row["loss_by_lambda"] for row in history if "loss" in row]
    assert all(tuple(b) == LAMBDA_BINS for b in bins)


def test_samples_go_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, training__snapshot_sampling=True, training__num_snapshot_samples=4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Images("samples")] == [6]


def test_the_logged_loss_is_the_mean_over_the_steps_since_the_last_line(tmp_path):
    each = [row["loss"] for row in train(tmp_path / "a", training__log_freq=1) if "loss" in row]
    pairs = [row["loss"] for row in train(tmp_path / "b", training__log_freq=2) if "loss" in row]
    assert len(each) == 6
    assert pairs == pytest.approx([sum(each[i : i + 2]) / 2 for i in (0, 2, 4)], rel=1e-6)


def test_steps_that_were_not_finite_are_counted_and_left_out_of_the_loss(tmp_path, monkeypatch):
    import data_lib

    whole = data_lib.prepare

    def broken(images, *args, draws, **options):
        batch = whole(images, *args, draws=draws, **options)
        return batch * math.nan if draws.step == 2 else batch

    monkeypatch.setattr(data_lib, "prepare", broken)
    history = [row for row in train(tmp_path) if "loss" in row]
    assert [row["nonfinite"] for row in history] == [0, 1, 1]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in history)
    assert "1 steps not finite so far" in (tmp_path / "log.txt").read_text()


# --- evaluation loss ------------------------------------------------------------------------


def test_the_evaluation_loss_is_that_of_the_same_images_and_noise_at_every_batch_size(tmp_path):
    losses = []
    for size in (16, 300, 7):
        config = run_lib.complete_here(tiny(training__batch_size=size))
        state = run_lib.create_state(config)
        sets = run_lib.data_lib.get_image_sets(config)
        steps = run_lib_train.Steps(config, run_lib.sde_lib.get_sde(config), *sets)
        stop = run_lib_train.StopSignal()
        losses.append(steps.evaluate(state, 300, stop))
        assert steps.evaluate(state, 300, stop) == losses[-1]
        assert steps.evaluate(state, 100, stop) != losses[-1]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_every_image_is_evaluated_once(tmp_path, monkeypatch):
    seen = []
    config = run_lib.complete_here(tiny())
    sets = run_lib.data_lib.get_image_sets(config)
    whole = run_lib.data_lib.prepare
    monkeypatch.setattr(
        run_lib.data_lib, "prepare", lambda x, *a, **k: (seen.append(x), whole(x, *a, **k))[1]
    )
    steps = run_lib_train.Steps(config, run_lib.sde_lib.get_sde(config), *sets)
    steps.evaluate(run_lib.create_state(config), 300, run_lib_train.StopSignal())
    images = torch.cat(seen)
    assert len(images) == 300
    ordered = [sorted(map(bytes, x.flatten(1).numpy())) for x in (images, sets[1].images)]
    assert ordered[0] == ordered[1]


def test_at_snapshots_the_loss_on_the_whole_set_is_logged_too(tmp_path):
    history = train(
        tmp_path,
        training__eval_images=50,
        training__eval_freq=2,
        training__snapshot_freq=4,
    )
    some = [(r["step"], r["images"]) for r in history if "eval_loss" in r]
    all_ = [(r["step"], r["images"]) for r in history if "eval_loss_all" in r]
    assert some == [(2, 50), (4, 50), (6, 50)]
    assert all_ == [(4, 300), (6, 300)]


# --- for a person ---------------------------------------------------------------------------


def test_the_log_says_what_is_trained_and_how_it_goes(tmp_path):
    train(tmp_path, training__n_iters=12, training__eval_freq=4)
    log = (tmp_path / "log.txt").read_text()
    assert "ncsnpp, vpsde on digits/train (1,497 images of 1x8x8, 300 held out)" in log
    assert "M parameters" in log
    line = next(line for line in log.splitlines() if "step 8 of 12" in line)
    for word in ("loss ", "held out ", "lr ", " images/s", " left"):
        assert word in line


def test_on_a_terminal_the_bar_stands_for_the_lines(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with run_lib_journal.logging_to(tmp_path / "log.txt"):
        logger = logging.getLogger("score_sde")
        logger.info("a line of progress", extra={"progress": True})
        logger.info("a line of news")
    said = capsys.readouterr().err
    assert "news" in said
    assert "progress" not in said
    assert "a line of progress" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 s"), (700, "12 min"), (3900, "1 h 05 min"), (200_000, "2 d 7 h")],
)
def test_times_are_said_as_a_person_says_them(seconds, text):
    assert run_lib_journal.duration(seconds) == text


def test_the_speed_counts_training_alone_and_not_the_first_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = run_lib_journal._Clock(0)
    assert clock.rate(0) == 0
    now[0] = 100.0  # compiling
    clock.tick(1)
    now[0] = 105.0
    with clock.paused():
        now[0] = 125.0  # evaluating
    now[0] = 130.0
    assert clock.rate(21) == 20 / 10
    assert clock.left(21, 41) == "30 s"


def test_short_work_leaves_no_bar_where_there_is_no_terminal(capfd):
    with run_lib_journal.progress_bar(3, desc="short", leave=False) as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""
