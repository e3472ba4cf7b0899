"""The training loop: steps, evaluation losses, checkpoints, samples, and leaving when asked to."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import data_lib
import distributed
import losses
import run_lib_dequantization  # noqa: F401  (registers the objective 'dequantization')
import run_lib_objectives  # noqa: F401  (registers 'explicit' and 'elbo')
import sampling
import visualize
from checkpoints import restore_newest, save_checkpoint
from models.layers import LabelEmbedding
from models.utils import unwrap
from randomness import Draws, seed_for
from run_lib_checks import NO_SCORE
from run_lib_journal import Journal, log
from run_lib_memory import remedy_for_memory, remedy_in_training
from run_lib_samples import Sampler, conditions, image_shape, sampling_precision
from run_lib_state import fixed_subset


class StoppedError(Exception):
    """Long work that was given up because the run was asked to stop."""


class StopSignal:
    """SIGTERM and SIGINT, remembered in `number` until the step is done; 0 if there was none.

    A second SIGINT, more than a second later, interrupts at once: a terminal and torchrun may both
    send the first. Elsewhere than in the main thread signals are left alone.
    """

    def __init__(self):
        self.number, self._since, self._before = 0, 0.0, {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def heed(self, *_) -> None:
        """Raise StoppedError once a signal has come; a callback of long work."""
        if self.number:
            raise StoppedError

    def _handle(self, number, frame) -> None:
        now = time.monotonic()
        if self.number and number == signal.SIGINT and now - self._since > 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._since = number, now
            if distributed.is_main():  # written past Python's streams, which may be in use
                os.write(2, b"\nstopping after this step; a second Ctrl-C leaves without saving\n")


class Steps:
    """Training steps and evaluation losses on the configured data, repeatable one by one.

    What is random in a step depends on the seed, the step and each image's place in the global
    batch; dropout, which is drawn by torch's own generator, also on the process.
    """

    def __init__(self, config, sde, train_set, eval_set):
        self.config, self.train_set, self.eval_set = config, train_set, eval_set
        self.share = distributed.share(config.training.batch_size)
        self.batches, self.label_dropout = None, 0.0
        self.train_step = losses.step_fn_from_config(config, sde, True)
        self.eval_step = losses.step_fn_from_config(config, sde, False)

    def train(self, state) -> torch.Tensor:
        """One training step; the loss of the global batch."""
        config, step, share = self.config, state["step"], self.share
        size, seed = config.training.batch_size, config.seed
        if self.batches is None:
            self.batches = data_lib.train_batches(self.train_set, size, seed, step, part=share)
            self.label_dropout = _take_over_label_dropout(state["model"])
        images, labels = next(self.batches)
        torch.manual_seed(seed_for(seed, "train", step, distributed.rank()))
        draws = Draws(seed, step, share.start, len(share), size, config.device)
        batch = data_lib.prepare(
            images,
            config,
            config.device,
            flip=config.data.random_flip,
            dequantize=config.data.uniform_dequantization,
            draws=draws,
        )
        return self.train_step(state, batch, draws=draws, **self._told(labels, draws))

    def _told(self, labels, draws: Draws) -> dict[str, torch.Tensor]:
        known = conditions(self.config, labels)
        if self.label_dropout:
            dropped = draws.rand("label dropout") < self.label_dropout
            known["y"] = torch.where(dropped, self.config.model.num_classes, known["y"])
        return known

    def evaluate(self, state, count: int, stop: StopSignal) -> float:
        """The averaged weights' loss on `count` images of the evaluation set, spread over the
        processes; the same images under the same noise always.

        Raises: StoppedError where the run is asked to stop; in every process.
        """
        config, device = self.config, self.config.device
        torch.manual_seed(seed_for(config.seed, "eval"))
        order = fixed_subset(len(self.eval_set), len(self.eval_set)).tolist()
        mine, size = distributed.share(count), self._eval_batch()
        held_out = data_lib.eval_batches(
            self.eval_set, size, part=order[mine.start : mine.stop], workers=0
        )
        total = torch.zeros(2, dtype=torch.float64)
        for first, (images, labels) in zip(range(mine.start, mine.stop, size), held_out):
            if stop.number:
                break
            draws = Draws(config.seed, "eval", first, len(images), count, device)
            dequantize = config.data.uniform_dequantization
            batch = data_lib.prepare(images, config, device, dequantize=dequantize, draws=draws)
            self.eval_step(state, batch, draws=draws, **conditions(config, labels))
            each = self.eval_step.info["losses"].double().cpu()
            total += torch.stack([each.sum(), torch.tensor(len(each))])
        loss, done = distributed.all_sum(total).tolist()
        if done < count:
            raise StoppedError
        return loss / count

    def _eval_batch(self) -> int:
        t = self.config.training
        return max(len(self.share) // t.grad_accumulation, 1)


def _take_over_label_dropout(network) -> float:
    """The share of labels that the network drops in training. From now on it drops none: its own
    random numbers would depend on the process."""
    tables = [part for part in network.modules() if isinstance(part, LabelEmbedding)]
    share = max((table.dropout for table in tables), default=0.0)
    for table in tables:
        table.dropout = 0.0
    return share


class Run:
    """A training in `workdir`: goes on from its last checkpoint, keeps what it finds there."""

    def __init__(self, config, workdir: Path, sde, state, steps: Steps):
        self.config, self.workdir, self.sde = config, workdir, sde
        self.state, self.steps = state, steps
        self.resume_path = workdir / "checkpoints-meta" / "checkpoint.pth"
        self.saved_at = -1
        self.sample: Any = _sampler(config, sde, state["model"])

    def restore(self) -> None:
        """Load the last good checkpoint, if there is one.

        Raises: ValueError where no file can be used, or the processes see different ones.
        """
        with warnings.catch_warnings(record=True) as caught, distributed.together():
            warnings.simplefilter("always")
            path = restore_newest(self.resume_path, self.state, "cpu")
        for warning in caught:
            log.warning("%s", warning.message) if distributed.is_main() else None
        steps = distributed.gather(self.state["step"])
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes go on from different steps, {steps}; the --workdir must be in a "
                "folder that all machines share"
            )
        if path is not None:
            self.saved_at = self.state["step"]
            log.info("going on from step %d of %s", self.state["step"], path)

    def loop(self, journal: Journal) -> int:
        """Train to the last step; the number of the signal that ended it earlier, or 0."""
        config, state = self.config, self.state
        network, first = state["model"], state["step"]
        state["model"] = distributed.parallel(network, config.training.find_unused_parameters)
        vote, number = distributed.Vote(), 0
        step = f"a step of training.batch_size={config.training.batch_size} images"
        try:
            with StopSignal() as stop, remedy_for_memory(step, remedy_in_training(config)):
                if first > 0:
                    self._keep(network, journal, stop, again=True)
                while state["step"] < config.training.n_iters and not number:
                    loss = self.steps.train(state)
                    if state["step"] == first + 1 and state["model"] is not network:
                        _check_gradients(config, network)
                    journal.after_step(state, loss, self.steps.train_step.info)
                    self._keep(network, journal, stop)
                    number = vote(stop.number)
                number = number or vote.result()
                if number:
                    self._save_resume(journal)
        finally:
            state["model"] = network
        return number

    def _keep(self, network, journal: Journal, stop: StopSignal, again: bool = False) -> None:
        """What is due after this step: checkpoints, then the slow things, losses and samples.

        A run that was killed, or asked to stop, among them comes back `again` for those that are
        not there.
        """
        step, t = self.state["step"], self.config.training
        last = step == t.n_iters
        snapshot = step % t.snapshot_freq == 0 or last
        folder = self.workdir / "samples" / f"iter_{step}"
        state = {**self.state, "model": network}
        with contextlib.suppress(StoppedError), journal.aside():
            if snapshot:
                self._save_numbered(math.ceil(step / t.snapshot_freq), again)
            if t.posthoc_freq and (snapshot or step % t.posthoc_freq == 0):
                self._main_does(state["ema"].save_snapshot, self.workdir / "ema", step)
            if snapshot or step % t.snapshot_freq_for_preemption == 0:
                self._save_resume(journal)
            for name, count in self._eval_losses(step, snapshot, last):
                if not journal.has(step, name):
                    loss = self.steps.evaluate(state, count, stop)
                    journal.eval_loss(step, name, loss, count)
            if snapshot and t.snapshot_sampling and not (again and _there(folder / "sample.png")):
                self._draw_samples(state, journal, folder, stop)

    def _eval_losses(self, step: int, snapshot: bool, last: bool) -> list[tuple[str, int]]:
        """The evaluation losses due: names, and numbers of images."""
        total, t = len(self.steps.eval_set), self.config.training
        count = min(t.eval_images or total, total)
        part = [("eval_loss", count)] if step % t.eval_freq == 0 or last else []
        return part + ([("eval_loss_all", total)] if snapshot and count < total else [])

    def _save_numbered(self, number: int, again: bool) -> None:
        path = self.workdir / "checkpoints" / f"checkpoint_{number}.pth"
        if not (again and _there(path)):
            self._main_does(save_checkpoint, path, self.state)
            log.info("step %d: saved checkpoint_%d", self.state["step"], number)

    def _save_resume(self, journal: Journal) -> None:
        if self.saved_at == self.state["step"]:
            return
        journal.flush()  # first, so that history never lacks a step of the checkpoint
        self._main_does(save_checkpoint, self.resume_path, self.state, keep_previous=True)
        self.saved_at = self.state["step"]

    def _main_does(self, work, *args, **options) -> None:
        with distributed.together():
            if distributed.is_main():
                work(*args, **options)

    def _draw_samples(self, state, journal: Journal, folder: Path, stop: StopSignal) -> None:
        step, path = state["step"], folder / "sample.png"
        with state["ema"].average_parameters(state["model"].parameters()):
            found = distributed.gather(self.sample(stop))
        refused = [reason for _, _, reason in found if reason]
        if refused:
            log.warning("no samples at step %d: %s", step, refused[0])
            return
        samples = torch.cat([part for part, _, _ in found])
        self._main_does(visualize.save_grid, samples, path)
        journal.samples(step, samples)
        log.info("step %d: samples in %s (%d evaluations)", step, path, found[0][1])


def _there(path: Path) -> bool:
    """Whether the main process has this file."""
    return distributed.broadcast(path.exists())


def _sampler(config, sde, model):
    """sample(stop) -> this process's part of the snapshot's samples, the evaluations, and why there
    are none; None where the network is no score.

    Raises: ValueError, now, for what cannot be sampled.
    """
    t = config.training
    if t.objective in NO_SCORE:
        if t.snapshot_sampling:
            raise ValueError(
                f"training.objective={t.objective!r} trains no network that draws samples; use "
                "--config.training.snapshot_sampling=False"
            )
        return None
    count = t.num_snapshot_samples or min(t.batch_size, 64)
    share = distributed.share(count)
    draw = Sampler(config, sde, model)

    def sample(stop: StopSignal) -> tuple[Any, int, str]:
        if not share:
            return torch.empty(image_shape(config, 0)), 0, ""
        torch.manual_seed(seed_for(config.seed, "snapshot", distributed.rank()))
        if distributed.is_main():
            log.info("sampling %d images for the snapshot (training.snapshot_sampling)", count)
        sampling_fn = sampling.get_sampling_fn(
            config,
            draw.process,
            image_shape(config, len(share)),
            draw.inverse_scaler,
            draw.eps,
            progress=distributed.is_main(),
            callback=stop.heed,
        )
        remedy = f"use --config.training.num_snapshot_samples={max(len(share) // 2, 1)} or fewer"
        what = f"sampling {len(share)} at a snapshot"
        try:
            with remedy_for_memory(what, remedy), sampling_precision(config):
                samples, nfe = sampling_fn(draw.told(draw.known(share)))
        except FloatingPointError as error:
            return None, 0, str(error)
        except StoppedError:
            return None, 0, "the run was asked to stop"
        return samples.cpu(), int(nfe), ""

    return sample


def _check_gradients(config, network) -> None:
    """DistributedDataParallel waits for the gradient of every parameter.

    Raises: ValueError that names the parameters that had none.
    """
    if config.training.find_unused_parameters:
        return
    idle = [n for n, p in unwrap(network).named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise ValueError(
            f"the loss does not depend on the parameters {idle}, whose gradients the other "
            "processes wait for; take them out of the network (or requires_grad_(False)), or use "
            "--config.training.find_unused_parameters"
        )
