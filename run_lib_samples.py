"""Samples of a run by number: what a network is told, how they are drawn; the mode `sample`."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_lib
import distributed
import sampling
import sde_lib
import visualize
from evaluation_features import as_bytes
from files import remove_unfinished
from losses_step import autocast, float32_precision
from models.utils import get_score_fn, unwrap
from parametrization import on_process
from randomness import seed_for
from run_lib_checks import check_same_experiment, check_writable
from run_lib_guidance import Guidance
from run_lib_journal import log, logging_to, plain, progress_bar
from run_lib_memory import remedy_for_memory, remedy_in_evaluation
from run_lib_shards import name_of
from run_lib_state import (
    complete_here,
    create_state,
    find_checkpoints,
    load_averages,
)

#: Samples whose way from noise is kept for the report's animation, images or points, and the number
#: of frames.
ANIMATED, ANIMATED_POINTS, FRAMES = 16, 1000, 40


def sampling_eps(config, sde) -> float:
    """Where sampling ends: `config.sampling.eps`, or the process's own default where it is 0."""
    return config.sampling.eps or sde.sampling_eps


def image_shape(config, n: int) -> tuple[int, ...]:
    """The shape of n images, or points."""
    return n, *data_lib.data_shape(config)


def conditions(config, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a class-conditional network is told of images with these labels; nothing for others.

    Raises: ValueError where the network wants classes and the images have none, or more.
    """
    classes = config.model.num_classes
    if not classes:
        return {}
    if labels is None or int(labels.max()) >= classes:
        found = "no labels" if labels is None else f"label {int(labels.max())}"
        raise ValueError(
            f"model.num_classes={classes} needs labels 0 to {classes - 1}, and the images have "
            f"{found}; use a data set with classes (folders), or --config.model.num_classes=0"
        )
    return {"y": labels.to(config.device)}


def conditioned(config, sde, model, known: dict[str, torch.Tensor]):
    """The network, told what is known of the images, for samplers and likelihoods."""
    if not known:
        return model
    score_fn = get_score_fn(sde, model, train=False, continuous=config.training.continuous)
    return score_fn.with_conditions(**known)


def score_on(config, sde, process, model):
    """The network's score on the process of the sampling."""
    continuous = config.training.continuous
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    if process is sde:
        return score_fn
    return on_process(score_fn, process, eps=config.training.eps)


@contextlib.contextmanager
def sampling_precision(config) -> Iterator[None]:
    """Within this context networks run in `sampling.precision`.

    One for a whole batch of samples, since autocast keeps the weights that it has cast until its
    context ends.
    """
    name, device = config.sampling.precision, config.device
    with float32_precision(name, device), autocast(name, device):
        yield


# --- samples by number ----------------------------------------------------------------------


class Sampler:
    """Samples by number: sample i is a function of the weights, `config` and i.

    With a seed per sample (`eval.seed_per_sample`) it is the same at any batch size and number of
    processes. Where the sampler refuses such seeds (Langevin steps on fewer than 768 numbers, a
    sampler without `seeds=`), or they are switched off, a batch of `eval.batch_size` has a seed,
    and `by_batch` is True: batches must begin at multiples of it.

    Args:
      label: of all samples of a network, or of a classifier that guides it, which knows classes;
        -1 = every class in turn.

    Raises: ValueError, FileNotFoundError, now, for what cannot be sampled.
    """

    def __init__(self, config, sde, model, label: int = -1):
        self.config, self.sde, self.model, self.label = config, sde, model, label
        self.process = sde_lib.sampling_process(config, sde)
        self.eps = sampling_eps(config, self.process)
        self.inverse_scaler = data_lib.get_data_inverse_scaler(config)
        self.frames: list[tuple[float, torch.Tensor]] = []
        self.guidance = Guidance(config, sde, self.process)
        classes = self.guidance.classes
        if label >= max(classes, 0) or label < -1:
            raise ValueError(
                f"expected a class label from 0 to {classes - 1}, or -1 for every class in turn, "
                f"got {label}"
                if classes
                else f"got class label {label}, and the network takes none"
            )
        self.told(self.known(range(1)))
        self.why_by_batch = self._why_by_batch()

    @property
    def by_batch(self) -> bool:
        """Whether a batch, not a sample, has a seed."""
        return bool(self.why_by_batch)

    def _why_by_batch(self) -> str:
        self._sampling_fn(1, None, None)  # what fails without seeds fails for another reason
        if not self.config.eval.seed_per_sample:
            return "eval.seed_per_sample is off"
        try:
            self._sampling_fn(1, [0], None)
        except (ValueError, TypeError) as error:
            return str(error)
        return ""

    def _sampling_fn(self, n: int, seeds: list[int] | None, callback):
        options: dict[str, Any] = {"callback": callback, "progress": distributed.is_main()}
        if seeds is not None:
            options["seeds"] = seeds
        shape = image_shape(self.config, n)
        return sampling.get_sampling_fn(
            self.config, self.process, shape, self.inverse_scaler, self.eps, **options
        )

    def __call__(self, places: range) -> tuple[torch.Tensor, int]:
        """The samples with these numbers, images uint8 (n, C, H, W) of 256 levels or points float32
        (n, 2), and the evaluations.

        The batch that begins with sample 0 leaves `frames` of its first samples.
        """
        seed, n = self.config.seed, len(places)
        callback = self._keep_frames() if places.start == 0 else None
        seeds = None if self.by_batch else [seed_for(seed, "sample", i) for i in places]
        torch.manual_seed(seed_for(seed, "sample", places.start))
        sampling_fn, remedy = self._sampling_fn(n, seeds, callback), remedy_in_evaluation(n)
        with remedy_for_memory(f"sampling {n} at a time", remedy), sampling_precision(self.config):
            samples, evaluations = sampling_fn(self.told(self.known(places)))
        if data_lib.is_points(self.config):
            return samples.float().cpu(), int(evaluations)
        levels = data_lib.quantize(samples, self.config).cpu()
        return as_bytes(levels, self.config.data.levels), int(evaluations)

    def labels(self, places: range) -> torch.Tensor | None:
        """The class labels of these samples; None where nothing knows of classes."""
        if not self.guidance.classes:
            return None
        if self.label >= 0:
            return torch.full((len(places),), self.label)
        return torch.arange(places.start, places.stop) % self.guidance.classes

    def known(self, places: range) -> dict[str, torch.Tensor]:
        """What is known of these samples: y, their labels."""
        labels = self.labels(places)
        return {} if labels is None else {"y": labels.to(self.config.device)}

    def told(self, known: dict[str, torch.Tensor]):
        """The network on the process of the sampling, told what is known of the samples, and guided
        as `config.sampling` says."""
        score_fn = score_on(self.config, self.sde, self.process, self.model)
        return self.guidance(score_fn, known.get("y"))

    def _keep_frames(self):
        """A callback that keeps about FRAMES states of the first samples, evenly over the steps."""
        s, self.frames = self.config.sampling, []
        steps = s.steps or self.process.N
        shown = ANIMATED_POINTS if data_lib.is_points(self.config) else ANIMATED
        every = max(steps // FRAMES, 1) if s.method == "pc" else 1

        def callback(i, t, x, x_mean):
            if i % every == 0 or i == steps - 1:
                state = x_mean if i == steps - 1 else x
                self.frames.append((float(t), self.inverse_scaler(state[:shown]).cpu()))
            if len(self.frames) > 4 * FRAMES:  # of a sampler that sets its own steps
                del self.frames[1::2]

        return callback

    def made_by(self, weights: str) -> dict[str, Any]:
        """All that the samples of these weights depend on, and not on how many there are."""
        config = self.config
        content: dict[str, Any] = {
            "weights": weights,
            "config": _sections(config, ("model", "sampling")),
            "training": [config.training.sde, config.training.continuous, config.training.eps],
            "data": _pixels(config),
            "seed": config.seed,
            "label": self.label,
            "eps": self.eps,
            "device": config.device.type,
            "code": code_of(self.sde, self.process, unwrap(self.model), *self._steppers()),
        }
        if guide := self.guidance.about():
            content["guidance"] = guide
        if self.by_batch:
            content["batch"] = [config.eval.batch_size, config.eval.num_samples]
        return content

    def _steppers(self) -> list[Any]:
        s = self.config.sampling
        if s.method != "pc":
            return [sampling.get_sampler(s.method)]
        return [sampling.get_predictor(s.predictor), sampling.get_corrector(s.corrector)]

    def protocol(self) -> dict[str, Any]:
        """How the samples are drawn, for a reader of the results."""
        rule = "one per sample: seed_for(config.seed, 'sample', i)"
        if self.by_batch:
            rule = f"one per batch of {self.config.eval.batch_size}: {self.why_by_batch}"
        about = {"process": type(self.process).__name__, "eps": self.eps, "seeds": rule}
        about |= self.guidance.about()
        if self.guidance.classes:
            about["labels"] = "every class in turn" if self.label < 0 else self.label
        return {**plain(self.config)["sampling"], **about}


def _sections(config, names: tuple[str, ...]) -> dict[str, Any]:
    everything = plain(config)
    return {name: everything[name] for name in names}


def _pixels(config) -> dict[str, Any]:
    names = ("image_size", "num_channels", "levels", "centered", "uniform_dequantization")
    return {name: config.data[name] for name in names}


def code_of(*things: Any) -> str:
    """A hash of the modules that define these classes, functions, or classes of objects."""
    text = {}
    for thing in things:
        thing = getattr(thing, "func", thing)
        owner = thing if inspect.isclass(thing) or inspect.isfunction(thing) else type(thing)
        module = sys.modules.get(owner.__module__)
        with contextlib.suppress(OSError, TypeError):
            text[owner.__module__] = inspect.getsource(module) if module else ""
    return name_of(text)


# --- the mode `sample` ----------------------------------------------------------------------


def sample(
    config,
    workdir,
    output: str | Path = "",
    *,
    num: int = 64,
    first: int = 0,
    checkpoint: int = -1,
    label: int = -1,
) -> Path:
    """Draw samples first to first + num − 1 from a checkpoint, with its averaged weights.

    They are the samples that an evaluation with this `config.seed` draws under these numbers.

    Args:
      output: a path that ends in .npz for one array (`samples`, uint8 (n, C, H, W), with `numbers`
        and, of class-conditional networks, `labels`); in .png or another image extension for one
        grid; else a folder for a PNG file of each sample. By default workdir/samples/ckpt_<k>.
        Points (n, 2) go to an array or a picture, by default workdir/samples/ckpt_<k>.npz.
      checkpoint: its number; -1 is the newest.
      label: of all samples, of networks or classifiers that know classes; -1 = every class in turn.

    Returns: the path that was written.
    """
    with distributed.process_group():
        with distributed.together():
            if num < 1 or first < 0:
                raise ValueError(f"expected num ≥ 1 and first ≥ 0, got {num} and {first}")
            config, workdir = complete_here(config), Path(workdir)
            config.eval.begin_ckpt = config.eval.end_ckpt = checkpoint
            number = find_checkpoints(config, workdir)[-1]
            points = data_lib.is_points(config)
            name = f"ckpt_{number}.npz" if points else f"ckpt_{number}"
            path = Path(output or workdir / "samples" / name).expanduser()
            write = _writer(path, files=not points)
            if distributed.is_main():
                folder = path if write is _write_files else path.parent
                check_writable(folder, "--output" if output else "--workdir")
                remove_unfinished(folder, "[0-9]*.png" if folder == path else path.name)
                check_same_experiment(config, workdir, training=False)
            sde, state = sde_lib.get_sde(config), create_state(config)
            draw = Sampler(config, sde, state["model"], label)
            load_averages(config, workdir, number, state)
        with logging_to(workdir / "samples" / "log.txt"):
            work = (num, number, state["step"], config.eval.batch_size)
            log.info("%d samples of checkpoint %d, step %d, in batches of %d", *work)
            if draw.by_batch:
                log.info("a seed per batch, not per sample: %s", draw.why_by_batch)
            parts = _draw(draw, range(first, first + num), path, write)
            if distributed.is_main():
                if write is not _write_files:
                    write(path, *parts, draw.labels(range(first, first + num)))
                log.info("samples in %s", path)
        distributed.barrier()
    return path


def _draw(draw: Sampler, numbers: range, path: Path, write: Callable):
    """The samples of all processes and their numbers; of files, which are written, none."""
    size = draw.config.eval.batch_size
    starts = range(numbers.start, numbers.stop, size)
    share = distributed.share(len(starts) if draw.by_batch else len(numbers))
    if draw.by_batch:  # whole batches
        mine = numbers[share.start * size : share.stop * size]
    else:
        mine = numbers[share.start : share.stop]
    dtype = torch.float32 if data_lib.is_points(draw.config) else torch.uint8
    kept = [torch.empty(image_shape(draw.config, 0), dtype=dtype)]
    with progress_bar(len(mine), desc="samples", unit="image", leave=False) as bar:
        for i in range(0, len(mine), size):
            places = mine[i : i + size]
            images, _ = draw(places)
            if write is _write_files:
                _write_files(path, images, np.asarray(places))
            else:
                kept.append(images)
            bar.update(len(places))
    return torch.cat(distributed.gather(torch.cat(kept))), np.asarray(numbers)


def _writer(path: Path, files: bool) -> Callable:
    from PIL import Image

    if path.suffix.lower() == ".npz":
        return _write_array
    if path.suffix.lower() in Image.registered_extensions():
        return _write_grid
    if path.is_file():
        raise ValueError(
            f"--output {path}: expected a folder, or a path that ends in .npz or .png, and it is "
            "a file; choose another"
        )
    if not files:
        raise ValueError(
            f"--output {path}: expected a path that ends in .npz, or in .png for a picture: points "
            "have no files of their own"
        )
    return _write_files


def _write_files(folder: Path, images: torch.Tensor, numbers: np.ndarray, labels=None) -> None:
    for image, number in zip(images, numbers):
        visualize.save_image(image, folder / f"{number:06d}.png")


def _write_grid(path: Path, images: torch.Tensor, numbers: np.ndarray, labels=None) -> None:
    visualize.save_grid(images, path)


def _write_array(path: Path, images: torch.Tensor, numbers: np.ndarray, labels=None) -> None:
    arrays = {"samples": images.numpy(), "numbers": numbers}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    visualize.write_npz(path, arrays)
