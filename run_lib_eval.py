"""The evaluation of checkpoints: loss, bits/dim, samples and their scores, the report on them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_lib
import distributed
import likelihood
import losses
import sde_lib
import visualize
from models.utils import unwrap
from randomness import Draws, seed_for
from run_lib_checks import check_same_experiment, check_writable, lock
from run_lib_journal import log, logging_to, plain, progress_bar
from run_lib_metrics import FeatureMetrics, log_metrics, pixel_metrics
from run_lib_results import Results, to_tensorboard, write_report
from run_lib_samples import Sampler, code_of, conditioned, conditions
from run_lib_shards import UNREADABLE, Shards, name_of
from run_lib_state import (
    checkpoint_path,
    complete_here,
    create_state,
    data_name,
    each_checkpoint,
    find_checkpoints,
    fixed_subset,
    load_averages,
)

LIKELIHOOD_EPS = 1e-5


def evaluate(config, workdir, eval_folder: str = "eval") -> dict[int, dict[str, Any]]:
    """Evaluate checkpoints of a run: loss, bits/dim, samples and their scores, as `config.eval`
    asks, each on its own, and with nothing loaded that is not asked for.

    Leaves in workdir/eval_folder, for checkpoint k: ckpt_<k>.json with every number and its
    protocol, ckpt_<k>_bpd.npz (bits/dim by image and repeat), ckpt_<k>_samples.npz (uint8),
    ckpt_<k>_samples.png and ckpt_<k>_sampling.webp; in workdir/tensorboard scalars eval/…; and
    workdir/report.html on the last of them. Files on data of another name than those of the
    training end in that name: ckpt_<k>_svhn.json, report_svhn.html.

    The same command goes on where a killed one ended, with any batch size and number of processes;
    what belongs to other weights or another protocol is made anew. Under torchrun every process
    calls this.

    Returns: the content of the JSON files, by checkpoint number; in every process.

    Raises: ValueError, OSError for what is wrong with configuration, data, statistics, checkpoint
      or workdir, before the long work.
    """
    workdir = Path(workdir)
    folder = workdir / eval_folder
    with distributed.process_group(), contextlib.ExitStack() as held:
        with distributed.together():
            config = complete_here(config)
            if distributed.is_main():
                if not config.eval.wait_s:
                    find_checkpoints(config, workdir)
                check_same_experiment(config, workdir, training=False)
                check_writable(folder)
                held.enter_context(lock(folder))
        held.enter_context(logging_to(folder / "log.txt"))
        sets = _image_sets(config)
        metrics = FeatureMetrics(config) if _wants_features(config) else None
        with distributed.together():
            sde, state = sde_lib.get_sde(config), create_state(config)
            evaluation = Evaluation(config, sde, state, sets, metrics)
        results = {}
        for number in each_checkpoint(config, workdir):
            with distributed.together():
                weights = load_averages(config, workdir, number, state)
            path = checkpoint_path(workdir, number)
            log.info("evaluating %s, step %d", path, state["step"])
            stem = folder / f"ckpt_{number}{suffix_of(config, workdir)}"
            results[number] = evaluation.run(workdir, stem, number, weights)
    return results


def _wants_features(config) -> bool:
    return config.eval.enable_sampling and bool(config.eval.metrics)


def _image_sets(config):
    """The training and the evaluation images; None where there are none, and nothing that is asked
    for needs them."""
    try:
        return distributed.in_turn(lambda: data_lib.get_image_sets(config))
    except FileNotFoundError as error:
        if config.eval.enable_loss or config.eval.enable_bpd:
            raise
        log.info("no comparison with images of the data set: %s", error)
        return None


def suffix_of(config, workdir: Path) -> str:
    """What files on data of another name than those of the training end in; '' for those."""
    path = workdir / "config.json"
    if not path.exists():
        return ""
    known = json.loads(path.read_text()).get("data", {}).get("dataset", "")
    return "" if known.lower() in ("", config.data.dataset.lower()) else f"_{data_name(config)}"


class Evaluation:
    """Everything `config.eval` asks of one checkpoint; the model holds its averaged weights.

    What is asked for is built, and so checked, here, before any work begins.
    """

    def __init__(self, config, sde, state, sets, features: FeatureMetrics | None = None):
        self.config, self.sde, self.state, self.sets = config, sde, state, sets
        self.model, self.features = state["model"], features
        e, t = config.eval, config.training
        if e.enable_loss:
            self.loss_fn = losses.loss_fn_from_config(config, sde, train=False)
        if e.enable_bpd:
            self.likelihood_fn = likelihood.get_likelihood_fn(
                sde,
                data_lib.get_data_inverse_scaler(config),
                hutchinson_type=e.hutchinson_type,
                rtol=e.rtol,
                atol=e.atol,
                eps=LIKELIHOOD_EPS,
                continuous=t.continuous,
                levels=config.data.levels,
            )
        if e.enable_sampling:
            self.sampler = Sampler(config, sde, self.model)

    def run(self, workdir: Path, stem: Path, number: int, weights: str) -> dict[str, Any]:
        """Evaluate, and write `stem`.json, the files beside it, and the report in `workdir`."""
        e = self.config.eval
        results = Results(stem, number, self.state["step"], weights)
        frames = None

        def keep(part: str, about: dict, **values):
            with distributed.together():
                if distributed.is_main():
                    results.keep(part, {**self.protocol(), **about}, **values)

        if e.enable_loss:
            loss = self.loss()
            keep("loss", {}, loss=loss)
            log.info("loss %.5g on %d images", loss["mean"], loss["images"])
        if e.enable_bpd:
            summary = self.bpd(Path(f"{stem}_bpd.npz"), weights)
            keep("bpd", {}, bpd=summary)
            log.info("%s", _bpd_line(summary))
        if e.enable_sampling:
            about, scores, frames = self.sampling(stem, weights)
            features = {} if self.features is None else {"features": self.features.protocol()}
            keep("sampling", features, sampling=about, metrics=scores)
            log_metrics(scores) if scores else None
        with distributed.together():
            if distributed.is_main():
                suffix = suffix_of(self.config, workdir)
                to_tensorboard(workdir, results.content, suffix)
                write_report(self.config, workdir, stem, suffix, results.content, self.sets, frames)
        return distributed.broadcast(results.content)

    # --- loss and bits/dim ------------------------------------------------------------------

    @torch.no_grad()
    def loss(self) -> dict[str, Any]:
        """The loss over the whole evaluation set, every image once, each under noise of its own.

        It is the loss on all held-out images that the training logs at this checkpoint.
        """
        config, image_set = self.config, self.sets[1]
        values = []
        torch.manual_seed(seed_for(config.seed, "eval"))
        share = distributed.share(len(image_set))
        with progress_bar(len(share), desc="loss", unit="image", leave=False) as bar:
            for places, (images, labels) in self._batches(image_set, share):
                draws = Draws(config.seed, "eval", places.start, len(places), device=config.device)
                dequantize = config.data.uniform_dequantization
                x = data_lib.prepare(
                    images, config, config.device, dequantize=dequantize, draws=draws
                )
                known = conditions(config, labels)
                each, _ = self.loss_fn.per_image(self.model, x, draws=draws, **known)
                values.append(each.double().cpu().numpy())
                bar.update(len(places))
        mine = np.concatenate(values) if values else np.zeros(0)
        values = np.concatenate(distributed.gather(mine))
        return {**_mean_and_error(values), "images": len(values)}

    def bpd(self, path: Path, weights: str) -> dict[str, Any]:
        """Bits/dim of every image once per repeat, each under uniform dequantisation noise and a
        probe of its own, kept at `path`.

        The standard error is over images, of each image's mean over repeats.
        """
        config, e = self.config, self.config.eval
        of_training = e.bpd_dataset.lower() == "train"
        image_set = self.sets[0 if of_training else 1]
        count = min(e.bpd_num_images or len(image_set), len(image_set))
        repeats = e.bpd_repeats or (1 if of_training else 5)
        about = {
            "repeats": repeats,
            "dataset": image_set.name,
            "dequantization": "uniform",
            "levels": config.data.levels,
            "trace_estimator": e.hutchinson_type,
            "seeds": "one per image and repeat",
            "solver": "SciPy RK45, its steps for a batch",
            "rtol": e.rtol,
            "atol": e.atol,
            "eps": LIKELIHOOD_EPS,
        }
        made_by = {
            **about,
            "weights": weights,
            "config": {name: plain(config)[name] for name in ("model", "seed")},
            "training": [config.training.sde, config.training.continuous],
            "images": [len(image_set), image_set.shape, _fingerprint(image_set)],
            "centered": config.data.centered,
            "device": config.device.type,
            "code": code_of(self.sde, unwrap(self.model), likelihood.get_likelihood_fn),
        }

        def work(places: range) -> dict[str, np.ndarray]:
            return self._bits(image_set, places, repeats)

        shards = Shards(path, made_by)
        shards.fill(count, max(e.batch_size // repeats, 1), work, "bits/dim", "image")
        rows = shards.read(count)
        per_image = rows["bpd"].mean(axis=1)
        evaluations = float(rows["evaluations"].mean())
        return {
            **_mean_and_error(per_image),
            "images": count,
            **about,
            "evaluations_per_batch": evaluations,
        }

    def _bits(self, image_set, places: range, repeats: int) -> dict[str, np.ndarray]:
        """Bits/dim of the images at these places, `repeats` times each; their indices."""
        config = self.config
        chosen = fixed_subset(len(image_set), places.stop)[places.start :]
        images, labels = image_set.batch(chosen)
        images = images.repeat_interleave(repeats, dim=0)
        labels = None if labels is None else labels.repeat_interleave(repeats)
        first = places.start * repeats
        draws = Draws(config.seed, ("bpd", repeats), first, len(images), device=config.device)
        x = data_lib.prepare(images, config, config.device, dequantize=True, draws=draws)
        told = conditioned(config, self.sde, self.model, conditions(config, labels))
        values, _, nfe = self.likelihood_fn(told, x, draws=draws)
        return {
            "bpd": values.double().cpu().numpy().reshape(-1, repeats),
            "index": chosen.numpy(),
            "evaluations": np.full(len(places), float(nfe)),
        }

    def _batches(self, image_set, share: range) -> Iterator[tuple[range, data_lib.Batch]]:
        """This process's part of the set in its fixed order: places, and what is there."""
        size = self.config.eval.batch_size
        order = fixed_subset(len(image_set), len(image_set)).tolist()
        batches = data_lib.eval_batches(image_set, size, part=order[share.start : share.stop])
        for start, batch in zip(range(share.start, share.stop, size), batches):
            yield range(start, start + len(batch.images)), batch

    # --- samples ----------------------------------------------------------------------------

    def sampling(self, stem: Path, weights: str):
        """How `eval.num_samples` samples were drawn, which are kept; their scores, and frames of
        the sampling of the first, both in the main process only."""
        count = self.config.eval.num_samples
        made_by = self.sampler.made_by(weights)
        path, film = Path(f"{stem}_samples.npz"), Path(f"{stem}_frames.npz")
        shards = Shards(path, made_by, whole_parts=self.sampler.by_batch)
        if self.sampler.by_batch:
            log.info("a seed per batch, not per sample: %s", self.sampler.why_by_batch)

        def work(places: range) -> dict[str, np.ndarray]:
            samples, evaluations = self.sampler(places)
            if places.start == 0:  # before the samples, so that these never come without
                _write_frames(film, self.sampler.frames, made_by)
            return {
                "samples": samples.numpy(),
                "evaluations": np.full(len(places), float(evaluations)),
            }

        shards.fill(count, self.config.eval.batch_size, work, "samples", "image")
        scores = None
        if self.features is not None:
            features = Path(f"{stem}_features.npz")
            scores = self.features(lambda: shards.read(count)["samples"], made_by, features)
        rows = shards.read(count)
        about = {
            "images": count,
            "evaluations": _whole(rows["evaluations"].mean()),
            **self.sampler.protocol(),
        }
        with distributed.together():
            frames = None
            if distributed.is_main():
                samples = torch.from_numpy(rows["samples"])
                scores = self._with_pixels(samples, scores)
                frames = _read_frames(film, made_by)
                visualize.save_grid(samples[:256], f"{stem}_samples.png")
                if frames:
                    visualize.animation(frames, f"{stem}_sampling.webp")
        return about, scores, frames

    def _with_pixels(self, samples: torch.Tensor, scores: dict | None) -> dict[str, Any]:
        if self.sets is None:
            return scores or {"notes": ["no images of the data set to compare with"]}
        on_pixels = pixel_metrics(samples, *self.sets)
        if scores is None:
            return on_pixels
        notes = [*scores["notes"], *on_pixels["notes"]]
        return {**scores, **on_pixels, "notes": notes}

    def protocol(self) -> dict[str, Any]:
        """What a reader needs to recompute the numbers."""
        packages = ("torch", "numpy", "scipy")
        return {
            "weights": self.state["average"],
            "seed": self.config.seed,
            "processes": distributed.world_size(),
            "device": str(self.config.device.type),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "config": plain(self.config),
        }


def _mean_and_error(values: np.ndarray) -> dict[str, Any]:
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}


def _whole(value) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _fingerprint(image_set) -> str:
    """A hash of images spread over the set: another set of the same name has another."""
    spread = np.unique(np.linspace(0, len(image_set) - 1, 16).astype(int))
    return name_of({"pixels": image_set.take(spread).numpy().tobytes().hex()})


def _write_frames(path: Path, frames, made_by: dict[str, Any]) -> None:
    if frames:
        times, states = zip(*frames)
        content = {"made_by": name_of(made_by), "times": times, "frames": torch.stack(states)}
        visualize.write_npz(path, {key: np.asarray(value) for key, value in content.items()})


def _read_frames(path: Path, made_by: dict[str, Any]):
    """The frames at `path`, if they are of these samples."""
    with contextlib.suppress(*UNREADABLE), np.load(path) as file:
        if str(file["made_by"]) == name_of(made_by):
            return [(float(t), torch.from_numpy(x)) for t, x in zip(file["times"], file["frames"])]
    return None


def _bpd_line(bpd: dict[str, Any]) -> str:
    return (
        f"bits/dim {bpd['mean']:.4f} ± {bpd['standard_error'] or float('nan'):.4f} on "
        f"{bpd['images']} images of {bpd['dataset']}, {bpd['repeats']} repeats, "
        f"{bpd['evaluations_per_batch']:.0f} evaluations"
    )
