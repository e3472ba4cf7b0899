"""Scores of a checkpoint's samples: distances on pixels, and metrics of features."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distributed
import evaluation
import evaluation_metrics
import evaluation_stats
from evaluation_features import get_extractor
from run_lib_journal import log
from run_lib_memory import remedy_for_memory, remedy_in_evaluation
from run_lib_samples import code_of
from run_lib_shards import Shards
from run_lib_state import data_name, fixed_subset
from run_lib_stats import statistics_path

#: Limits of what is computed on raw pixels: numbers an image, samples, training images.
METRIC_NUMBERS, METRIC_IMAGES, TRAIN_IMAGES = 1024, 5000, 20000


def unit(levels: torch.Tensor, count: int = 256) -> torch.Tensor:
    """Images of integer levels 0 … count − 1 in [0, 1]."""
    return levels.float() / (count - 1)


def real_images(image_set, count: int) -> torch.Tensor:
    """`count` images of a set in [0, 1], the same ones always."""
    return unit(image_set.take(fixed_subset(len(image_set), count)), image_set.levels)


def pixel_metrics(samples: torch.Tensor, train_set, eval_set) -> dict[str, Any]:
    """Distances of uint8 samples to held-out and to training images, where pixels are few."""
    samples, numbers = samples[:METRIC_IMAGES], samples[0].numel()
    if numbers > METRIC_NUMBERS or min(len(samples), len(eval_set)) < 2:
        note = (
            f"no distances on pixels: {numbers} numbers an image (at most {METRIC_NUMBERS}), "
            f"{len(eval_set)} held-out images (at least 2, and as many samples)"
        )
        return {"notes": [note]}
    samples, reference = unit(samples), real_images(eval_set, max(len(samples), 300))
    train = real_images(train_set, TRAIN_IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same sentences are in the notes
        return evaluation.low_dimensional_metrics(samples, reference, train)


class FeatureMetrics:
    """`eval.metrics` of samples against the reference statistics; both are loaded, and checked to
    fit, when this is made, before any sampling. Every process makes it.

    Raises: ValueError, FileNotFoundError with the remedy.
    """

    def __init__(self, config):
        self.config, e, d = config, config.eval, config.data
        with distributed.together():
            self.reference = evaluation_stats.read_statistics(statistics_path(config))
            kept = self.reference.features is not None
            # Cheap things first: the weights may take long to load.
            evaluation_metrics.check_metrics(
                e.metrics, e.num_samples, has_logits=True, has_features=kept
            )
        self.extractor = get_extractor(
            e.extractor, e.inception_path, config.device, e.download_inception
        )
        with distributed.together():
            size = (d.num_channels, d.image_size, d.image_size)
            seen = self.extractor(torch.zeros(1, *size, dtype=torch.uint8))
            self.extractor.dim = seen.pool.shape[1]
            evaluation_metrics.check_metrics(
                e.metrics, e.num_samples, has_logits=seen.logits is not None, has_features=kept
            )
            self.notes = evaluation_stats.check_compatible(
                self.reference,
                self.extractor,
                resolution=d.image_size,
                channels=d.num_channels,
                dataset=data_name(config),
            )

    def __call__(
        self, samples: Callable[[range], np.ndarray], made_by: dict, path: Path
    ) -> dict | None:
        """The metrics of the samples, uint8 (n, C, H, W), whose features are kept at `path`; None
        in processes other than the main one.

        Args:
          samples: gives those of some places, where features are yet to be computed.
          made_by: what they depend on.
        """
        about = {
            key: value for key, value in self.extractor.protocol().items() if key != "versions"
        }
        code = code_of(self.extractor.network)
        shards = Shards(path, {"samples": made_by, "code": code, **about})
        count = self.config.eval.num_samples

        def work(places: range) -> dict[str, np.ndarray]:
            what = f"features of {len(places)} images at a time"
            with remedy_for_memory(what, remedy_in_evaluation(len(places))):
                pool, logits = self.extractor(torch.from_numpy(samples(places)))
            rows = {"pool": pool.cpu().numpy()}
            return rows if logits is None else {**rows, "logits": logits.cpu().numpy()}

        size = self.config.eval.batch_size
        shards.fill(count, size, work, f"features by {self.extractor.name!r}", "image")
        if not distributed.is_main():
            return None
        rows = shards.read(count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same sentences are in the notes
            result = evaluation_metrics.feature_metrics(
                rows["pool"], rows.get("logits"), self.reference, self.config.eval.metrics
            )
        return {**result, "notes": [*result["notes"], *self.notes]}

    def protocol(self) -> dict[str, Any]:
        """What another person needs to recompute the numbers."""
        r = self.reference
        return {
            "metrics": list(self.config.eval.metrics),
            "extractor": self.extractor.protocol(),
            "reference": {
                "file": r.source,
                "sha256": r.hash,
                "n": int(r.n),
                "protocol": r.protocol,
            },
        }


def log_metrics(metrics: dict[str, Any]) -> None:
    """The scores, with their standard errors, and the notes on them, in the log."""
    named = ("fid", "kid", "is", "precision", "recall", "density", "coverage")
    for name in (*named, "frechet_distance_pixels", "one_nn_accuracy"):
        if name in metrics:
            error = metrics.get(f"{name}_se")
            log.info("%s %.5g%s", name, metrics[name], f" ± {error:.2g}" if error else "")
    for note in metrics.get("notes", ()):
        log.info("%s", note)
