"""train(), evaluate(), statistics() and sample(): the other rooms put together, no mathematics."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import data_lib
import distributed
import sde_lib
from models.utils import prepare_for_training
from run_lib_checks import (
    check_batch,
    check_same_experiment,
    check_writable,
    lock,
    tidy,
)
from run_lib_eval import evaluate
from run_lib_journal import Journal, log, logging_to, plain, write_json
from run_lib_samples import sample
from run_lib_state import complete_here, create_state, find_checkpoints
from run_lib_stats import statistics
from run_lib_train import Run, Steps

__all__ = [
    "complete_here",
    "create_state",
    "describe",
    "evaluate",
    "find_checkpoints",
    "sample",
    "statistics",
    "train",
]


def describe(config, train_set, eval_set) -> str:
    """What is about to be trained on what, and what that takes."""
    from models.estimate import estimate  # late: it loads much of torch

    processes = distributed.world_size()
    try:
        cost = estimate(config, processes=processes).line()
    except Exception as error:  # a network of one's own may not like to be measured
        cost = f"no estimate of its cost ({type(error).__name__}: {error})"
    return (
        f"{config.model.name}, {config.training.sde} on "
        f"{train_set.name} ({len(train_set):,} {train_set.unit} of "
        f"{'x'.join(map(str, train_set.shape))}, "
        f"{len(eval_set):,} held out), batch {config.training.batch_size}, seed {config.seed}, "
        f"on {f'{processes} × ' if processes > 1 else ''}{config.device.type}: {cost}"
    )


def train(config, workdir) -> dict[str, Any]:
    """Train the configured model in `workdir`, from its last checkpoint where there is one.

    Leaves in workdir: config.json, log.txt, history.jsonl (step, loss, …), tensorboard/,
    checkpoints-meta/checkpoint.pth (for resuming; checkpoint_previous.pth is the one before it),
    checkpoints/checkpoint_<k>.pth, and samples/iter_<step>/sample.png. Everything random in a
    step depends on (config.seed, step) and, but for dropout, not on the number of processes.

    Under torchrun every process calls this; the main one writes. SIGTERM and SIGINT end the run
    after the step, with a checkpoint.

    Returns: the final training state.

    Raises: ValueError, OSError for what is wrong with configuration, data, workdir or checkpoint,
      in every process and before the training; SystemExit(128 + signal) where a signal ended it.
    """
    with distributed.process_group():
        try:
            state, signum = _train(config, Path(workdir))
        except FloatingPointError as error:  # every process decides alike, and one says so
            if not distributed.is_main():
                distributed.reported_elsewhere(error)
            raise
    if signum:
        raise SystemExit(128 + signum)
    return state


def _train(config, workdir: Path) -> tuple[dict[str, Any], int]:
    with distributed.together():
        config = complete_here(config)
        check_batch(config)
    train_set, eval_set = distributed.in_turn(lambda: data_lib.get_image_sets(config))
    with contextlib.ExitStack() as held:
        with distributed.together():
            sde = sde_lib.get_sde(config)
            if distributed.is_main():
                check_writable(workdir)
                held.enter_context(lock(workdir))
                held.enter_context(logging_to(workdir / "log.txt"))
                check_same_experiment(config, workdir, training=True)
                tidy(workdir)
        if not distributed.is_main():
            held.enter_context(logging_to(workdir / "log.txt"))
        with distributed.together():
            state = create_state(config)
            prepare_for_training(state["model"], config)
            run = Run(config, workdir, sde, state, Steps(config, sde, train_set, eval_set))
        run.restore()
        with distributed.together():
            if distributed.is_main():
                write_json(workdir / "config.json", plain(config))
        if distributed.is_main():
            log.info(describe(config, train_set, eval_set))
        with contextlib.closing(Journal(workdir, config, state)) as journal:
            signum = run.loop(journal)
        _say_goodbye(state["step"], signum)
    return state, signum


def _say_goodbye(step: int, signum: int) -> None:
    if signum:
        name = signal.Signals(signum).name
        log.info("stopped by %s at step %d, which is saved; the same command goes on", name, step)
    else:
        log.info("trained to step %d", step)
