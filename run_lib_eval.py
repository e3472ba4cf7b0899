"""The evaluation of one checkpoint: loss, bits/dim, samples, and the report on them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_lib
import evaluation
import likelihood
import losses
import sampling
import visualize
import visualize_report
from models.utils import get_score_fn
from randomness import seed_for
from run_lib_journal import log, plain, progress_bar, read_history, write_json

#: Samples whose way from noise is kept for the report's animation, and the number of frames.
ANIMATED, FRAMES = 16, 40
LIKELIHOOD_EPS = 1e-5
#: Limits of what is computed on raw pixels: numbers an image, samples, training images.
METRIC_NUMBERS, METRIC_IMAGES, TRAIN_IMAGES = 1024, 5000, 20000
NEIGHBOR_NUMBERS = 3 * 64 * 64


def sampling_eps(config, sde) -> float:
    """Where sampling ends: `config.sampling.eps`, or the process's own default where it is 0."""
    return config.sampling.eps or sde.sampling_eps


def image_shape(config, n: int) -> tuple[int, int, int, int]:
    """The shape of n images."""
    size = config.data.image_size
    return n, config.data.num_channels, size, size


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


def every_class(config, n: int) -> torch.Tensor | None:
    """Labels 0, 1, … in turn for n samples of a class-conditional network."""
    return torch.arange(n) % config.model.num_classes if config.model.num_classes else None


def conditioned(config, sde, model, known: dict[str, torch.Tensor]):
    """The network, told what is known of the images, for samplers and likelihoods."""
    if not known:
        return model
    score_fn = get_score_fn(sde, model, train=False, continuous=config.training.continuous)
    return score_fn.with_conditions(**known)


class Evaluation:
    """Everything `config.eval` asks of one checkpoint; the model holds its averaged weights.

    What is asked for is built, and so checked, here, before any work begins.
    """

    def __init__(self, config, sde, state, train_set, eval_set):
        self.config, self.sde, self.state = config, sde, state
        self.model = state["model"]
        self.train_set, self.eval_set = train_set, eval_set
        self.inverse_scaler = data_lib.get_data_inverse_scaler(config)
        self.frames: list[tuple[float, torch.Tensor]] = []
        e, t = config.eval, config.training
        if e.enable_loss:
            self.loss_fn = losses.get_loss_fn(
                sde, False, t.reduce_mean, t.continuous, t.likelihood_weighting, t.eps
            )
        if e.enable_bpd:
            self.likelihood_fn = likelihood.get_likelihood_fn(
                sde,
                self.inverse_scaler,
                hutchinson_type=e.hutchinson_type,
                rtol=e.rtol,
                atol=e.atol,
                eps=LIKELIHOOD_EPS,
                continuous=t.continuous,
                levels=config.data.levels,
            )
        if e.enable_sampling:
            self._sampler(1)

    def run(self, workdir: Path, folder: Path, number: int) -> dict[str, Any]:
        """Evaluate, write ckpt_<number>.* into `folder` and report.html into `workdir`.

        Each part is written when it is done. Parts of the same checkpoint that an earlier call
        left, and this one does not ask for, stay.
        """
        folder.mkdir(parents=True, exist_ok=True)
        e, stem = self.config.eval, folder / f"ckpt_{number}"
        self.frames = []
        results = _earlier(Path(f"{stem}.json"), number, self.state["step"])

        def keep(part: str, **values):
            results.update(values)
            results["protocol"][part] = self.protocol()
            write_json(Path(f"{stem}.json"), results)

        if e.enable_loss:
            keep("loss", loss=self.loss())
            log.info("loss %.5g on %d images", results["loss"]["mean"], results["loss"]["images"])
        if e.enable_bpd:
            summary, values = self.bpd()
            np.savez_compressed(f"{stem}_bpd.npz", bpd=values)
            keep("bpd", bpd=summary)
            log.info("%s", _bpd_line(summary))
        if e.enable_sampling:
            about, pixels = self.sample()
            np.savez_compressed(f"{stem}_samples.npz", samples=pixels.numpy())
            visualize.save_grid(_unit(pixels[:256]), f"{stem}_samples.png")
            visualize.animation(self.frames, f"{stem}_sampling.webp")
            keep("sampling", sampling=about, metrics=self.metrics(_unit(pixels[:METRIC_IMAGES])))
            for name in {"frechet_distance_pixels", "one_nn_accuracy"} & results["metrics"].keys():
                log.info("%s %.4f", name, results["metrics"][name])
        self.report(workdir, stem, results)
        log.info("results in %s.json, report in %s", stem, workdir / "report.html")
        return results

    @torch.no_grad()
    def loss(self) -> dict[str, float]:
        """The loss over the whole evaluation set, every image once, under fixed noise."""
        torch.manual_seed(seed_for(self.config.seed, "eval loss"))
        total = 0.0
        for images, known in self._batches(self.eval_set, len(self.eval_set), "loss"):
            x = self._prepare(images, self.config.data.uniform_dequantization)
            total += self.loss_fn(self.model, x, **known).item() * len(x)
        return {"mean": total / len(self.eval_set), "images": len(self.eval_set)}

    def bpd(self) -> tuple[dict[str, Any], np.ndarray]:
        """Bits/dim of every image once per repeat, under fresh uniform dequantisation.

        The standard error is over images, of each image's mean over repeats.
        """
        config, e = self.config, self.config.eval
        image_set = self.train_set if e.bpd_dataset.lower() == "train" else self.eval_set
        count = min(e.bpd_num_images or len(image_set), len(image_set))
        repeats = e.bpd_repeats or (1 if image_set is self.train_set else 5)
        values, evaluations = np.zeros((repeats, count)), []
        for repeat in range(repeats):
            done = 0
            label = f"bits/dim {repeat + 1}/{repeats}"
            for images, known in self._batches(image_set, count, label):
                torch.manual_seed(seed_for(config.seed, "bpd", repeat, done))
                x = self._prepare(images, dequantize=True)
                result, _, nfe = self.likelihood_fn(self._told(known), x)
                values[repeat, done : done + len(images)] = result.cpu().numpy()
                done += len(images)
                evaluations.append(nfe)
        per_image = values.mean(axis=0)
        summary = {
            "mean": float(per_image.mean()),
            "standard_error": float(per_image.std(ddof=1) / count**0.5) if count > 1 else None,
            "images": count,
            "repeats": repeats,
            "dataset": image_set.name,
            "evaluations_per_batch": float(np.mean(evaluations)),
            "dequantization": "uniform",
            "levels": config.data.levels,
            "trace_estimator": e.hutchinson_type,
            "rtol": e.rtol,
            "atol": e.atol,
            "eps": LIKELIHOOD_EPS,
        }
        return summary, values

    def sample(self) -> tuple[dict[str, Any], torch.Tensor]:
        """How `eval.num_samples` samples were drawn, and the samples: uint8 (n, C, H, W)."""
        config, done, evaluations = self.config, 0, 0
        parts, total = [], config.eval.num_samples
        while done < total:
            n = min(config.eval.batch_size, total - done)
            torch.manual_seed(seed_for(config.seed, "sample", done))
            known = conditions(config, every_class(config, n))
            callback = None if self.frames else self._keep_frames()
            samples, evaluations = self._sampler(n, callback)(self._told(known))
            levels = data_lib.quantize(samples, config).cpu()
            parts.append(visualize.to_uint8(_unit(levels, config.data.levels)))
            done += n
        about = {"images": total, "evaluations": evaluations, **config.sampling.to_dict()}
        return about, torch.cat(parts)

    def _sampler(self, n: int, callback=None):
        return sampling.get_sampling_fn(
            self.config,
            self.sde,
            image_shape(self.config, n),
            self.inverse_scaler,
            sampling_eps(self.config, self.sde),
            callback=callback,
            progress=True,
        )

    def _keep_frames(self):
        """A callback that keeps about FRAMES states of the first samples, evenly over the steps."""
        steps = self.config.sampling.steps or self.sde.N
        every = max(steps // FRAMES, 1) if self.config.sampling.method == "pc" else 1

        def callback(i, t, x, x_mean):
            if i % every == 0 or i == steps - 1:
                state = x_mean if i == steps - 1 else x
                self.frames.append((t, self.inverse_scaler(state[:ANIMATED]).cpu()))
            if len(self.frames) > 4 * FRAMES:  # of a sampler that sets its own steps
                del self.frames[1::2]

        return callback

    def metrics(self, samples: torch.Tensor) -> dict[str, Any]:
        """Distances of the samples to held-out and to training images, where pixels are few."""
        numbers = samples[0].numel()
        if numbers > METRIC_NUMBERS or min(len(samples), len(self.eval_set)) < 2:
            note = (
                f"no distances on pixels: {numbers} numbers an image (at most {METRIC_NUMBERS}), "
                f"{len(samples)} samples, {len(self.eval_set)} held-out images (at least 2 each)"
            )
            log.info(note)
            return {"notes": [note]}
        reference = self._real(self.eval_set, max(len(samples), 300))
        train = self._real(self.train_set, TRAIN_IMAGES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same sentences are in the notes
            metrics = evaluation.low_dimensional_metrics(samples, reference, train)
        for note in metrics["notes"]:
            log.info("%s", note)
        return metrics

    def _told(self, known):
        return conditioned(self.config, self.sde, self.model, known)

    def _real(self, image_set, count: int) -> torch.Tensor:
        chosen = fixed_subset(len(image_set), count)
        return _unit(image_set.take(chosen), self.config.data.levels)

    def _prepare(self, images: torch.Tensor, dequantize: bool) -> torch.Tensor:
        return data_lib.prepare(images, self.config, self.config.device, dequantize=dequantize)

    def _batches(self, image_set, count: int, label: str):
        with progress_bar(count, desc=label, unit="image", leave=False) as bar:
            for chosen in fixed_subset(len(image_set), count).split(self.config.eval.batch_size):
                images, labels = image_set.batch(chosen)
                yield images, conditions(self.config, labels)
                bar.update(len(images))

    def protocol(self) -> dict[str, Any]:
        """What a reader needs to recompute the numbers."""
        packages = ("torch", "numpy", "scipy")
        return {
            "weights": "exponential moving average",
            "seed": self.config.seed,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "config": plain(self.config),
        }

    def report(self, workdir: Path, stem: Path, results) -> None:
        """Write workdir/report.html on all that is known of the checkpoint."""
        samples = neighbors = real = bpd = None
        if "bpd" in results:
            bpd = np.load(f"{stem}_bpd.npz")["bpd"].mean(axis=0)
        if "sampling" in results:
            samples = _unit(torch.from_numpy(np.load(f"{stem}_samples.npz")["samples"][:300]))
            real = self._real(self.eval_set, 64)
            if samples[0].numel() <= NEIGHBOR_NUMBERS:
                train = self._real(self.train_set, TRAIN_IMAGES)
                distances, indices = evaluation.nearest_neighbors(samples, train)
                neighbors = (train[indices.flatten()], distances.flatten())
        visualize_report.write_report(
            workdir / "report.html",
            title=f"{self.config.training.sde} on {self.eval_set.name.split('/')[0]}",
            subtitle=f"{workdir.name}, checkpoint {results['checkpoint']}, "
            f"step {results['step']:,}",
            config_text=json.dumps(plain(self.config), indent=2),
            samples=samples,
            real=real,
            train_neighbors=neighbors,
            loss_history=read_history(workdir),
            frames=self.frames or None,
            bpd=bpd,
            metrics=results.get("metrics"),
            max_pairs=300 if self.config.data.image_size <= 16 else 48,
        )


def fixed_subset(n: int, count: int) -> torch.Tensor:
    """The indices of `count` of n images, the same ones always and spread over all classes."""
    if count >= n:
        return torch.arange(n)
    return torch.from_numpy(np.random.RandomState(0).permutation(n)[:count])


def _unit(levels: torch.Tensor, count: int = 256) -> torch.Tensor:
    return levels.float() / (count - 1)


def _earlier(path: Path, number: int, step: int) -> dict[str, Any]:
    """What an earlier evaluation of the same checkpoint wrote, or an empty result."""
    if path.exists():
        with contextlib.suppress(ValueError, AttributeError):
            known = json.loads(path.read_text())
            if known.get("step") == step:
                return known
    return {"checkpoint": number, "step": step, "protocol": {}}


def _bpd_line(bpd: dict[str, Any]) -> str:
    return (
        f"bits/dim {bpd['mean']:.4f} ± {bpd['standard_error'] or math.nan:.4f} "
        f"on {bpd['images']} images of "
        f"{bpd['dataset']}, {bpd['repeats']} repeats, "
        f"{bpd['evaluations_per_batch']:.0f} evaluations"
    )
