"""The evaluation of one checkpoint: loss, bits/dim, samples, and the report on them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
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
from models.utils import get_score_fn
from run_lib_journal import log, plain, progress_bar, read_history, write_json

#: Samples whose way from noise is kept for the report's animation, and the number of frames.
ANIMATED, FRAMES = 16, 40
LIKELIHOOD_EPS = 1e-5


def seed_for(*words) -> int:
    """A seed that depends on these words alone, so that any step can be repeated by itself."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:7], "big")


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
    """Everything `config.eval` asks of one checkpoint; the model holds its averaged weights."""

    def __init__(self, config, sde, state, train_set, eval_set):
        self.config, self.sde, self.state = config, sde, state
        self.model = state["model"]
        self.train_set, self.eval_set = train_set, eval_set
        self.inverse_scaler = data_lib.get_data_inverse_scaler(config)
        self.frames: list[tuple[float, torch.Tensor]] = []

    def run(self, workdir: Path, folder: Path, number: int) -> dict[str, Any]:
        """Evaluate, write ckpt_<number>.* into `folder` and report.html into `workdir`."""
        folder.mkdir(parents=True, exist_ok=True)
        e, stem = self.config.eval, folder / f"ckpt_{number}"
        results: dict[str, Any] = {"checkpoint": number, "step": self.state["step"]}
        bpd = samples = None
        if e.enable_loss:
            results["loss"] = self.loss()
            log.info("loss %.5g on %d images", results["loss"]["mean"], results["loss"]["images"])
        if e.enable_bpd:
            results["bpd"], bpd = self.bpd()
            np.savez_compressed(f"{stem}_bpd.npz", bpd=bpd)
            log.info("%s", _bpd_line(results["bpd"]))
        if e.enable_sampling:
            results["sampling"], samples = self.sample()
            pixels = visualize.to_uint8(samples).cpu().numpy()
            np.savez_compressed(f"{stem}_samples.npz", samples=pixels)
            visualize.save_grid(samples[:256], f"{stem}_samples.png")
            visualize.animation(self.frames, f"{stem}_sampling.webp")
            results["metrics"] = self.metrics(samples)
            for name, value in results["metrics"].items():
                if name in ("frechet_distance_pixels", "one_nn_accuracy"):
                    log.info("%s %.4f", name, value)
        results["protocol"] = self.protocol()
        write_json(Path(f"{stem}.json"), results)
        self.report(workdir, number, results, bpd, samples)
        log.info("results in %s.json, report in %s", stem, workdir / "report.html")
        return results

    # -- loss

    @torch.no_grad()
    def loss(self) -> dict[str, float]:
        """The loss over the whole evaluation set, every image once, under fixed noise."""
        config, t = self.config, self.config.training
        loss_fn = losses.get_loss_fn(
            self.sde, False, t.reduce_mean, t.continuous, t.likelihood_weighting, t.eps
        )
        torch.manual_seed(seed_for(config.seed, "eval loss"))
        total = 0.0
        for images, known in self._batches(self.eval_set, len(self.eval_set), "loss"):
            x = self._prepare(images, config.data.uniform_dequantization)
            total += loss_fn(self.model, x, **known).item() * len(x)
        return {"mean": total / len(self.eval_set), "images": len(self.eval_set)}

    # -- bits/dim

    def bpd(self) -> tuple[dict[str, Any], np.ndarray]:
        """Bits/dim of every image once per repeat, under fresh uniform dequantisation.

        The standard error is over images, of each image's mean over repeats.
        """
        config, e = self.config, self.config.eval
        image_set = self.train_set if e.bpd_dataset.lower() == "train" else self.eval_set
        count = min(e.bpd_num_images or len(image_set), len(image_set))
        repeats = e.bpd_repeats or (1 if image_set is self.train_set else 5)
        fn = likelihood.get_likelihood_fn(
            self.sde,
            self.inverse_scaler,
            hutchinson_type=e.hutchinson_type,
            rtol=e.rtol,
            atol=e.atol,
            eps=LIKELIHOOD_EPS,
            continuous=config.training.continuous,
            levels=config.data.levels,
        )
        values, evaluations = np.zeros((repeats, count)), []
        for repeat in range(repeats):
            done = 0
            label = f"bits/dim {repeat + 1}/{repeats}"
            for images, known in self._batches(image_set, count, label):
                torch.manual_seed(seed_for(config.seed, "bpd", repeat, done))
                result, _, nfe = fn(self._told(known), self._prepare(images, dequantize=True))
                values[repeat, done : done + len(images)] = result.cpu().numpy()
                done += len(images)
                evaluations.append(nfe)
        per_image = values.mean(axis=0)
        error = float(per_image.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
        summary = {
            "mean": float(per_image.mean()),
            "standard_error": error,
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

    # -- samples

    def sample(self) -> tuple[dict[str, Any], torch.Tensor]:
        """`eval.num_samples` samples on the data's levels in [0, 1], and how they were drawn."""
        config, done, evaluations = self.config, 0, 0
        parts, total = [], config.eval.num_samples
        while done < total:
            n = min(config.eval.batch_size, total - done)
            torch.manual_seed(seed_for(config.seed, "sample", done))
            sampling_fn = sampling.get_sampling_fn(
                config,
                self.sde,
                image_shape(config, n),
                self.inverse_scaler,
                sampling_eps(config, self.sde),
                callback=None if self.frames else self._keep_frames(),
                progress=True,
            )
            known = conditions(config, every_class(config, n))
            samples, evaluations = sampling_fn(self._told(known))
            parts.append(self._unit(data_lib.quantize(samples, config)).cpu())
            done += n
        about = {"images": total, "evaluations": evaluations, **config.sampling.to_dict()}
        return about, torch.cat(parts)

    def _keep_frames(self):
        """A callback that keeps about FRAMES states of the first samples, evenly over the steps."""
        steps = self.config.sampling.steps or self.sde.N
        every = max(steps // FRAMES, 1) if self.config.sampling.method == "pc" else 2

        def callback(i, t, x, x_mean):
            if i % every == 0 or i == steps - 1:
                state = x_mean if i == steps - 1 else x
                self.frames.append((t, self.inverse_scaler(state[:ANIMATED]).cpu()))

        return callback

    def metrics(self, samples: torch.Tensor) -> dict[str, Any]:
        """Distances of the samples to held-out and to training images."""
        reference = self._real(self.eval_set, min(len(self.eval_set), max(len(samples), 300)))
        train = self._real(self.train_set, min(len(self.train_set), 20000))
        return evaluation.low_dimensional_metrics(samples, reference, train)

    # -- pieces

    def _told(self, known):
        return conditioned(self.config, self.sde, self.model, known)

    def _real(self, image_set, count: int) -> torch.Tensor:
        return self._unit(image_set.take(torch.arange(count)))

    def _unit(self, levels: torch.Tensor) -> torch.Tensor:
        return levels.float() / (self.config.data.levels - 1)

    def _prepare(self, images: torch.Tensor, dequantize: bool) -> torch.Tensor:
        return data_lib.prepare(images, self.config, self.config.device, dequantize=dequantize)

    def _batches(self, image_set, count: int, label: str):
        done = 0
        with progress_bar(count, desc=label, unit="image", leave=False) as bar:
            for batch in data_lib.eval_batches(image_set, self.config.eval.batch_size):
                images = batch.images[: count - done]
                labels = None if batch.labels is None else batch.labels[: len(images)]
                yield images, conditions(self.config, labels)
                done += len(images)
                bar.update(len(images))
                if done == count:
                    return

    def protocol(self) -> dict[str, Any]:
        """What a reader needs to recompute the numbers."""
        packages = ("torch", "numpy", "scipy")
        return {
            "weights": "exponential moving average",
            "seed": self.config.seed,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "config": plain(self.config),
        }

    def report(self, workdir: Path, number: int, results, bpd, samples) -> None:
        """Write workdir/report.html."""
        neighbors = None
        if samples is not None:
            train = self._real(self.train_set, min(len(self.train_set), 20000))
            distances, indices = evaluation.nearest_neighbors(samples, train)
            neighbors = (train[indices.flatten()], distances.flatten())
        visualize.write_report(
            workdir / "report.html",
            title=f"{self.config.training.sde} on {self.eval_set.name.split('/')[0]}",
            subtitle=f"{workdir.name}, checkpoint {number}, step {results['step']:,}",
            config_text=json.dumps(plain(self.config), indent=2),
            samples=samples,
            real=None
            if samples is None
            else self._real(self.eval_set, min(len(self.eval_set), 64)),
            train_neighbors=neighbors,
            loss_history=read_history(workdir),
            frames=self.frames or None,
            bpd=None if bpd is None else bpd.mean(axis=0),
            metrics=results.get("metrics"),
            max_pairs=300 if self.config.data.image_size <= 16 else 48,
        )


def _bpd_line(bpd: dict[str, Any]) -> str:
    return (
        f"bits/dim {bpd['mean']:.4f} ± {bpd['standard_error']:.4f} on {bpd['images']} images of "
        f"{bpd['dataset']}, {bpd['repeats']} repeats, "
        f"{bpd['evaluations_per_batch']:.0f} evaluations"
    )
