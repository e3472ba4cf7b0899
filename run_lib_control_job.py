"""What the tasks of `--mode control` are given, a checkpoint's score, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import data_lib
import sde_lib
from randomness import seed_for
from run_lib_memory import remedy_for_memory, remedy_in_evaluation
from run_lib_samples import FRAMES, conditions, sampling_eps, sampling_precision, score_on

#: Samples that the animation shows.
ANIMATED = 16


@dataclass
class Outcome:
    """What a task leaves: samples and pictures of n images, all in [0, 1], and numbers.

    samples: (n, k, C, H, W), k for each image.
    columns: pictures by heading, (n, C, H, W) each, that the comparison shows before the samples.
    truth: (n, C, H, W), where it is known.
    headings: of the samples' columns; by default numbers.
    """

    names: list[str]
    samples: torch.Tensor
    columns: list[tuple[str, torch.Tensor]]
    numbers: dict[str, Any]
    truth: torch.Tensor | None = None
    headings: list[str] = field(default_factory=list)
    frames: list[tuple[float, torch.Tensor]] = field(default_factory=list)


class Job:
    """A checkpoint's score and what its tasks share: ranges, seeds, batches, frames."""

    def __init__(self, config, sde, model):
        self.config, self.sde, self.model = config, sde, model
        self.process = sde_lib.sampling_process(config, sde)
        self.eps = sampling_eps(config, self.process)
        self.scale = data_lib.get_data_scaler(config)
        self.unscale = data_lib.get_data_inverse_scaler(config)
        self.frames: list[tuple[float, torch.Tensor]] = []
        self._end: list[tuple[float, torch.Tensor]] = []

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        data = self.config.data
        return data.num_channels, data.image_size, data.image_size

    @property
    def slope(self) -> float:
        """How much longer the network's range is than [0, 1]."""
        return abs(float(self.scale(torch.ones(())) - self.scale(torch.zeros(()))))

    def unit(self, levels: torch.Tensor) -> torch.Tensor:
        """Integer levels as pixels in [0, 1]: x = (i + ½)/L of networks that saw dequantised
        data, else i/(L − 1)."""
        data = self.config.data
        if data.uniform_dequantization:
            return (levels.float() + 0.5) / data.levels
        return levels.float() / (data.levels - 1)

    def labels(self, places: range) -> torch.Tensor | None:
        """The class `control.label` for each of these samples, where the network is told of one.

        Raises: ValueError for a class that is none, and where a network that was never trained
          without one is given none.
        """
        m, label = self.config.model, self.config.control.label
        if label >= max(m.num_classes, 0) and label >= 0:
            raise ValueError(
                f"control.label={label}: expected "
                + (f"0 to {m.num_classes - 1}" if m.num_classes else "-1: the network takes none")
            )
        if label >= 0:
            return torch.full((len(places),), label)
        if m.num_classes and not m.label_dropout:
            raise ValueError(
                f"a network of model.num_classes={m.num_classes}, trained without label_dropout, "
                "draws nothing without a class; set --config.control.label"
            )
        return None

    def score(self, labels: torch.Tensor | None = None):
        """The network's score on the process of the sampling, told the labels."""
        score_fn = score_on(self.config, self.sde, self.process, self.model)
        known = conditions(self.config, labels) if labels is not None else {}
        return score_fn.with_conditions(**known) if known else score_fn

    def grid(self) -> dict[str, Any]:
        """What samplers are told of the times, the process and the network."""
        s = self.config.sampling
        return {
            "steps": s.steps or self.process.N,
            "schedule": s.schedule,
            "rho": s.rho,
            "eps": self.eps,
            "continuous": self.config.training.continuous,
        }

    def seeds(self, places: range) -> list[int]:
        """A seed for each sample, by its number over all images."""
        return [seed_for(self.config.seed, "control", i) for i in places]

    def draw(self, count: int, sampler_of: Callable) -> tuple[torch.Tensor, int]:
        """`count` samples in [0, 1] in batches of `eval.batch_size`, and evaluations a batch.

        `sampler_of(places, callback)` makes the samples of these numbers, in the network's range.
        """

        def batch(places: range):
            callback = self._keep_frames() if places.start == 0 else None
            with sampling_precision(self.config):
                samples, evaluations = sampler_of(places, callback)
            if places.start == 0 and self._end:
                self.frames.append(self._frame(*self._end.pop()))
            return self.unscale(samples).float().cpu(), evaluations

        return self.in_batches(count, batch)

    def in_batches(self, count: int, batch: Callable) -> tuple[torch.Tensor, int]:
        """batch(places) -> (x, evaluations) of `eval.batch_size` samples at a time, `count` in all:
        x of all, and the most evaluations."""
        parts, most, size = [], 0, self.config.eval.batch_size
        for start in range(0, count, size):
            places = range(start, min(start + size, count))
            n = len(places)
            with remedy_for_memory(f"sampling {n} at a time", remedy_in_evaluation(n)):
                x, evaluations = batch(places)
            parts.append(x)
            most = max(most, int(evaluations))
        return torch.cat(parts), most

    def _keep_frames(self):
        """A callback that keeps FRAMES to 2 FRAMES states, however often it is called, and the last
        one's mean."""
        calls, every, self.frames = 0, 1, []

        def callback(i, t, x, x_mean):
            nonlocal calls, every
            if calls % every == 0:
                self.frames.append(self._frame(t, x[:ANIMATED]))
            if len(self.frames) > 2 * FRAMES:
                del self.frames[1::2]
                every *= 2
            calls += 1
            self._end = [(t, x_mean[:ANIMATED])]

        return callback

    def _frame(self, t: float, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        return float(t), self.unscale(x).float().cpu()
