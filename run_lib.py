"""train() and evaluate(): the other rooms put together. No mathematics lives here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

import data_lib
import losses
import sampling
import sde_lib
import visualize
from checkpoints import restore_checkpoint, save_checkpoint
from configs.validation import complete, flatten
from models.ema import ExponentialMovingAverage
from models.utils import create_model
from randomness import seed_for
from run_lib_eval import (
    Evaluation,
    conditioned,
    conditions,
    every_class,
    fixed_subset,
    image_shape,
    sampling_eps,
)
from run_lib_journal import Journal, log, logging_to, plain, write_json

# --- what training and evaluation share -----------------------------------------------------


def complete_here(config):
    """`config` completed, on a device that is there.

    Raises: ValueError for a configuration that is wrong, or a device that cannot be used.
    """
    config = complete(config)
    try:
        torch.zeros((), device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"config.device={str(config.device)!r} cannot be used: {reason}; "
            "use --config.device=cpu"
        ) from error
    return config


def create_state(config) -> dict[str, Any]:
    """A fresh training state: model, optimizer, ema, step."""
    torch.manual_seed(seed_for(config.seed, "weights"))
    model = create_model(config)
    return {
        "model": model,
        "optimizer": losses.get_optimizer(config, model.parameters()),
        "ema": ExponentialMovingAverage(model.parameters(), decay=config.model.ema_rate),
        "step": 0,
    }


def describe(config, state, train_set, eval_set) -> str:
    """One paragraph on what is about to be trained."""
    count = sum(p.numel() for p in state["model"].parameters())
    return (
        f"{config.model.name}, {count / 1e6:.2f} M parameters, {config.training.sde} on "
        f"{train_set.name} ({len(train_set):,} images of {'x'.join(map(str, train_set.shape))}, "
        f"{len(eval_set):,} held out), batch {config.training.batch_size}, seed {config.seed}, "
        f"on {config.device}"
    )


# --- training -------------------------------------------------------------------------------


def train(config, workdir) -> dict[str, Any]:
    """Train the configured model in `workdir`, from its last checkpoint where there is one.

    Leaves in workdir: config.json, log.txt, history.jsonl (step, loss, …), tensorboard/,
    checkpoints-meta/checkpoint.pth (for resuming), checkpoints/checkpoint_<k>.pth, and
    samples/iter_<step>/sample.png. Everything random in a step depends on (config.seed, step).

    Returns: the final training state.
    """
    config = complete_here(config)
    workdir = Path(workdir)
    train_set, eval_set = data_lib.get_image_sets(config)
    sde = sde_lib.get_sde(config)
    sampling_fn = _snapshot_sampler(config, sde)
    check_same_experiment(config, workdir)
    with logging_to(workdir / "log.txt"):
        state = create_state(config)
        write_json(workdir / "config.json", plain(config))
        resume = workdir / "checkpoints-meta" / "checkpoint.pth"
        if resume.exists():
            restore_checkpoint(resume, state, config.device)
            log.info("resuming from step %d", state["step"])
        log.info(describe(config, state, train_set, eval_set))
        steps = _Steps(config, sde, train_set, eval_set)
        journal = Journal(workdir, config, state)
        try:
            while state["step"] < config.training.n_iters:
                loss = steps.train(state)
                journal.after_step(state, loss)
                step, t = state["step"], config.training
                last = step == t.n_iters
                if step % t.eval_freq == 0 or last:
                    journal.eval_loss(state, steps.evaluate(state))
                if step % t.snapshot_freq == 0 or last:
                    number = math.ceil(step / t.snapshot_freq)
                    save_checkpoint(workdir / "checkpoints" / f"checkpoint_{number}.pth", state)
                    log.info("step %d: saved checkpoint_%d", step, number)
                    if t.snapshot_sampling:
                        _snapshot(config, workdir, state, sampling_fn)
                # Last, so that a run killed among these does the unfinished ones again.
                if step % t.snapshot_freq_for_preemption == 0 or last:
                    journal.flush()
                    save_checkpoint(resume, state)
        finally:
            journal.close()
        log.info("trained to step %d", state["step"])
    return state


def check_same_experiment(config, workdir: Path) -> None:
    """Refuse to go on in a workdir whose weights belong to another experiment.

    Raises: ValueError that lists the keys of model, process and data that differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    known, asked = (dict(flatten(c)) for c in (json.loads(path.read_text()), plain(config)))

    def fixed(key: str) -> bool:
        return (key.startswith("model.") and key not in _FREE) or key in _EXPERIMENT

    differ = [
        f"{key}: {known[key]!r} there, {asked[key]!r} now"
        for key in asked
        if key in known and fixed(key) and known[key] != asked[key]
    ]
    if differ:
        raise ValueError(
            f"{workdir} belongs to another experiment ({'; '.join(differ)}); "
            "use its settings, or another --workdir"
        )


#: Beside the keys of `model`: what weights already trained depend on.
_EXPERIMENT = (
    "training.sde",
    "training.continuous",
    "data.dataset",
    "data.image_size",
    "data.num_channels",
    "data.centered",
    "data.levels",
)
_FREE = ("model.dropout", "model.ema_rate", "model.label_dropout")


class _Steps:
    """Training and evaluation steps on the configured data, repeatable one by one."""

    def __init__(self, config, sde, train_set, eval_set):
        self.config = config
        self.train_set, self.batches = train_set, None
        t = config.training
        options = dict(
            reduce_mean=t.reduce_mean,
            continuous=t.continuous,
            likelihood_weighting=t.likelihood_weighting,
            eps=t.eps,
        )
        optimize_fn = losses.optimization_manager(config)
        self.train_step = losses.get_step_fn(
            sde, True, optimize_fn, max_nonfinite=max(t.max_nonfinite, 1), **options
        )
        self.eval_step = losses.get_step_fn(sde, False, **options)
        count = min(t.batch_size, len(eval_set))
        held_out = eval_set.batch(fixed_subset(len(eval_set), count))
        self.eval_images, self.known = held_out.images, conditions(config, held_out.labels)

    def train(self, state) -> torch.Tensor:
        config, step = self.config, state["step"]
        if self.batches is None:
            self.batches = data_lib.train_batches(
                self.train_set, config.training.batch_size, config.seed, step
            )
        images, labels = next(self.batches)
        torch.manual_seed(seed_for(config.seed, "train", step))
        batch = data_lib.prepare(
            images,
            config,
            config.device,
            flip=config.data.random_flip,
            dequantize=config.data.uniform_dequantization,
        )
        return self.train_step(state, batch, **conditions(config, labels))

    def evaluate(self, state) -> float:
        """The loss of a fixed batch under fixed noise, with the averaged weights."""
        torch.manual_seed(seed_for(self.config.seed, "eval"))
        batch = data_lib.prepare(
            self.eval_images,
            self.config,
            self.config.device,
            dequantize=self.config.data.uniform_dequantization,
        )
        return self.eval_step(state, batch, **self.known).item()


def _snapshot_sampler(config, sde):
    count = config.training.num_snapshot_samples or min(config.training.batch_size, 64)
    sampling_fn = sampling.get_sampling_fn(
        config,
        sde,
        image_shape(config, count),
        data_lib.get_data_inverse_scaler(config),
        sampling_eps(config, sde),
        progress=True,
    )
    known = conditions(config, every_class(config, count))
    return lambda model: sampling_fn(conditioned(config, sde, model, known))


def _snapshot(config, workdir: Path, state, sampling_fn) -> None:
    torch.manual_seed(seed_for(config.seed, "snapshot"))
    with state["ema"].average_parameters(state["model"].parameters()):
        try:
            samples, nfe = sampling_fn(state["model"])
        except FloatingPointError as error:
            log.warning("no samples at step %d: %s", state["step"], error)
            return
    folder = workdir / "samples" / f"iter_{state['step']}"
    folder.mkdir(parents=True, exist_ok=True)
    visualize.save_grid(samples, folder / "sample.png")
    log.info("step %d: samples in %s (%d evaluations)", state["step"], folder / "sample.png", nfe)


# --- evaluation -----------------------------------------------------------------------------


def evaluate(config, workdir, eval_folder: str = "eval") -> dict[int, dict[str, Any]]:
    """Evaluate checkpoints of a run: loss, bits/dim and samples, as `config.eval` asks.

    Leaves in workdir/eval_folder, for checkpoint k: ckpt_<k>.json with every number and its
    protocol, ckpt_<k>_bpd.npz (bits/dim by repeat and image), ckpt_<k>_samples.npz (uint8),
    ckpt_<k>_samples.png and ckpt_<k>_sampling.webp; and workdir/report.html on the last of them.

    Returns: the content of the JSON files, by checkpoint number.
    """
    config = complete_here(config)
    workdir = Path(workdir)
    numbers = find_checkpoints(config, workdir)
    train_set, eval_set = data_lib.get_image_sets(config)
    sde = sde_lib.get_sde(config)
    check_same_experiment(config, workdir)
    state = create_state(config)
    evaluation = Evaluation(config, sde, state, train_set, eval_set)
    results = {}
    with logging_to(workdir / eval_folder / "log.txt"):
        for number in numbers:
            path = workdir / "checkpoints" / f"checkpoint_{number}.pth"
            restore_checkpoint(path, state, config.device)
            state["ema"].copy_to(state["model"].parameters())
            log.info("evaluating %s, step %d", path, state["step"])
            results[number] = evaluation.run(workdir, workdir / eval_folder, number)
    return results


def find_checkpoints(config, workdir: Path) -> list[int]:
    """The numbers of the run's checkpoints from eval.begin_ckpt to eval.end_ckpt; -1 is the newest.

    Raises: FileNotFoundError where there is none of them, naming what there is.
    """
    found = sorted(
        int(path.stem.removeprefix("checkpoint_"))
        for path in (workdir / "checkpoints").glob("checkpoint_*.pth")
        if path.stem.removeprefix("checkpoint_").isdigit()
    )
    begin, end = config.eval.begin_ckpt, config.eval.end_ckpt
    if -1 in (begin, end) and found:
        begin, end = found[-1] if begin == -1 else begin, found[-1]
    chosen = [number for number in found if begin <= number <= end]
    if not chosen:
        there = ", ".join(map(str, found)) or "none (train first; see training.snapshot_freq)"
        raise FileNotFoundError(
            f"expected checkpoints {begin} to {end} in {workdir / 'checkpoints'}, found {there}; "
            "--config.eval.begin_ckpt=-1 takes the newest"
        )
    return chosen
