"""The evaluation of checkpoints: loss, bits/dim, samples and their scores, the report on them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_lib
import distributed
import losses
import run_lib_pictures
import run_lib_toys
import sde_lib
import visualize
from configs import __version__
from files import remove_unfinished
from files_reading import read_json
from randomness import Draws, seed_for
from run_lib_checks import check_same_experiment, check_writable, lock
from run_lib_gaps import Gaps, table
from run_lib_journal import log, logging_to, plain, progress_bar
from run_lib_likelihood import ESTIMATORS, Bits, asked_for, line, mean_and_error
from run_lib_memory import remedy_for_memory, remedy_in_evaluation
from run_lib_metrics import (
    METRIC_IMAGES,
    METRIC_NUMBERS,
    FeatureMetrics,
    log_metrics,
    pixel_metrics,
)
from run_lib_results import Results, to_tensorboard, write_report
from run_lib_samples import Sampler, conditions
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

#: Samples in the picture of them.
SHOWN = 256


def evaluate(config, workdir, eval_folder: str = "eval") -> dict[int, dict[str, Any]]:
    """Evaluate checkpoints of a run: loss, bits/dim, samples and their scores, as `config.eval`
    asks, each on its own, and with nothing loaded that is not asked for.

    Leaves in workdir/eval_folder, for checkpoint k: ckpt_<k>.json with every number and its
    protocol, ckpt_<k>_bpd.npz (bits/dim by image and repeat; also _bpd_elbo, _bpd_iw and _gaps),
    ckpt_<k>_samples.npz (uint8), ckpt_<k>_samples.png, ckpt_<k>_sampling.webp and, where asked for,
    ckpt_<k>_frames/; of points ckpt_<k>_<figure>.png (`run_lib_pictures.py`); in
    workdir/tensorboard scalars eval/…; and workdir/report.html on the last of them. Files on data
    of another name than those of the training end in that name: ckpt_<k>_svhn.json,
    report_svhn.html.

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
                check_writable(workdir)  # for the report
                held.enter_context(lock(folder))
                remove_unfinished(folder, "*")
                remove_unfinished(workdir, "report*.html")
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
            size = config.eval.batch_size
            log.info("evaluating %s, step %d, in batches of %d", path, state["step"], size)
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
        e = config.eval
        if e.enable_loss or e.enable_bpd or e.gap_report:
            raise
        log.info("no comparison with images of the data set: %s", error)
        return None


def suffix_of(config, workdir: Path) -> str:
    """What files on data of another name than those of the training end in; '' for those."""
    path = workdir / "config.json"
    if not path.exists():
        return ""
    data = read_json(path, "the configuration of a run").get("data", {})
    known, image = data.get("dataset", "").lower(), Path(data.get("image", "")).stem
    same = known in ("", config.data.dataset.lower()) and image == Path(config.data.image).stem
    return "" if same else f"_{data_name(config)}"


class Evaluation:
    """Everything `config.eval` asks of one checkpoint; the model holds its averaged weights.

    What is asked for is built, and so checked, here, before any work begins.
    """

    def __init__(self, config, sde, state, sets, features: FeatureMetrics | None = None):
        self.config, self.sde, self.state, self.sets = config, sde, state, sets
        self.model, self.features = state["model"], features
        e = config.eval
        if e.enable_loss:
            self.loss_fn = losses.loss_fn_from_config(config, sde, train=False)
        self.points = data_lib.is_points(config)
        if self.points and (e.metrics or e.gap_report):
            raise ValueError(
                f"points have no features and no levels, got eval.metrics={e.metrics} and "
                f"gap_report={e.gap_report}; leave them () and False: their numbers come of "
                "themselves"
            )
        if self.points and e.enable_bpd:
            self.nats = run_lib_toys.Likelihoods(config, sde, self.model, sets[1])
        elif e.enable_bpd or e.gap_report:
            self.bits = Bits(config, sde, self.model, sets)
        if e.gap_report:
            self.gaps = Gaps(self.bits)
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
        if self.points and e.enable_bpd:
            self.likelihoods(keep, Path(f"{stem}_likelihood.npz"))
        for name in () if self.points else asked_for(self.config):
            summary = self.bits.run(name, stem, weights)
            part = ESTIMATORS[name][0]
            keep(part, {}, **{part: summary})
            log.info("%s", line(summary))
        if e.gap_report:
            gaps = self.gaps.run(stem, weights)
            keep("gaps", {}, gaps=gaps)
            log.info("%s", table(gaps))
        if e.enable_sampling:
            about, scores, frames = self.sampling(stem, weights)
            features = {} if self.features is None else {"features": self.features.protocol()}
            keep("sampling", features, sampling=about, metrics=scores)
            log_metrics(scores) if scores else None
        with distributed.together():
            if distributed.is_main():
                suffix = suffix_of(self.config, workdir)
                to_tensorboard(workdir, results.content, suffix)
                about = (results.content, self.sets, frames, self.pictures(stem, results.content))
                write_report(self.config, workdir, stem, suffix, *about)
        return distributed.broadcast(results.content)

    def pictures(self, stem: Path, results: dict[str, Any]) -> dict[str, str]:
        """Captions of the figures `stem`_<name>.png, which are drawn now; of points only."""
        if not (self.points and self.config.eval.figures):
            return {}
        scored = Path(f"{stem}_likelihood.npz") if "likelihood" in results else None
        return run_lib_pictures.write_pictures(self.config, self.sde, self.model, stem, scored)

    def likelihoods(self, keep, path: Path) -> None:
        """Log-likelihoods of points, in nats, and what they are compared with, at `path`."""
        with distributed.together():
            found = self.nats(path) if distributed.is_main() else {}
        keep("likelihood", {}, likelihood=found)
        if found:
            log.info("%s", run_lib_toys.line(found))

    # --- loss -------------------------------------------------------------------------------

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
                total = len(image_set)  # of the times, where they are stratified
                draws = Draws(config.seed, "eval", places.start, len(places), total, config.device)
                dequantize = config.data.uniform_dequantization
                x = data_lib.prepare(
                    images, config, config.device, dequantize=dequantize, draws=draws
                )
                known = conditions(config, labels)
                what = f"the loss of {len(places)} images at a time"
                with remedy_for_memory(what, remedy_in_evaluation(len(places))):
                    each, _ = self.loss_fn.per_image(self.model, x, draws=draws, **known)
                values.append(each.double().cpu().numpy())
                bar.update(len(places))
        mine = np.concatenate(values) if values else np.zeros(0)
        values = np.concatenate(distributed.gather(mine))
        return {**mean_and_error(values), "images": len(values)}

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
            with shards.rows("samples") as samples:
                scores = self.features(samples.take, made_by, Path(f"{stem}_features.npz"))
        about = {
            "images": count,
            "evaluations": _whole(shards.read(count, "evaluations")["evaluations"].mean()),
            **self.sampler.protocol(),
        }
        with distributed.together():
            frames = None
            if distributed.is_main():
                looked_at = count if self.points else self._looked_at(count)
                samples = torch.from_numpy(shards.read(looked_at, "samples")["samples"])
                scores = self._with_pixels(samples, scores)
                frames = _read_frames(film, made_by)
                shown = samples if self.points else samples[:SHOWN]
                visualize.save_grid(shown, f"{stem}_samples.png")
                if frames:
                    visualize.animation(frames, f"{stem}_sampling.webp")
                    if self.config.eval.keep_frames:
                        _draw_frames(frames, Path(f"{stem}_frames"))
        return about, scores, frames

    def _looked_at(self, count: int) -> int:
        """How many samples are taken into memory at once: as many as somebody looks at."""
        numbers = math.prod(data_lib.data_shape(self.config))
        return min(count, METRIC_IMAGES if numbers <= METRIC_NUMBERS else SHOWN)

    def _with_pixels(self, samples: torch.Tensor, scores: dict | None) -> dict[str, Any]:
        if self.points:
            return run_lib_toys.scores(self.config, samples)
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
            "versions": {
                "score-sde": __version__,
                **{name: importlib.metadata.version(name) for name in packages},
            },
            "config": plain(self.config),
        }


def _whole(value) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _write_frames(path: Path, frames, made_by: dict[str, Any]) -> None:
    if frames:
        times, states = zip(*frames)
        content = {"made_by": name_of(made_by), "times": times, "frames": torch.stack(states)}
        visualize.write_npz(path, {key: np.asarray(value) for key, value in content.items()})


def _draw_frames(frames, folder: Path) -> None:
    """A PNG file of each frame, folder/<number>.png, in place of those of an earlier evaluation."""
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    for i, (_, state) in enumerate(frames):
        visualize.save_grid(state, folder / f"{i:04d}.png")


def _read_frames(path: Path, made_by: dict[str, Any]):
    """The frames at `path`, if they are of these samples."""
    with contextlib.suppress(*UNREADABLE), np.load(path) as file:
        if str(file["made_by"]) == name_of(made_by):
            return [(float(t), torch.from_numpy(x)) for t, x in zip(file["times"], file["frames"])]
    return None
