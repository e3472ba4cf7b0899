"""Guidance of a run's samples as `config.sampling` describes it, and the network that it needs."""

from __future__ import annotations

from typing import Any

import torch

import sde_lib
from controllable_generation import guided_from_config
from models.utils import get_score_fn
from parametrization import ScoreFunction, on_process
from run_lib_checks import NO_SCORE
from run_lib_state import weights_hash
from run_lib_trained import Trained, check_agreement, load_trained

_KEY = "sampling.guidance_network"
#: What a network and the one that guides it must agree on.
_IMAGES = ("data.image_size", "data.num_channels", "data.centered", "data.logit_alpha")


class Guidance:
    """`config.sampling.guidance` for samples on `process`: guidance(score_fn, labels) -> score.

    The other network of 'autoguidance' and 'classifier' is that of the workdir
    `sampling.guidance_network`; a worse network may have been trained on another process.

    Args:
      sde: the process of the training.
      process: that of the sampling.

    Raises: ValueError, FileNotFoundError for a network that is not there, or does not fit.
    """

    def __init__(self, config, sde, process):
        self.config, self.sde, self.process = config, sde, process
        self.kind, self.classes = config.sampling.guidance, config.model.num_classes
        self.trained: Trained | None = None
        device = str(config.device)
        if self.kind == "autoguidance":
            self.trained = load_trained(config.sampling.guidance_network, _KEY, device)
            check_agreement(config, self.trained, _KEY, (*_IMAGES, "model.num_classes"))
            kind = self.trained.config.training.objective
            _check_kind(self.trained, _KEY, kind not in NO_SCORE, "a score model")
        elif self.kind == "classifier":
            self.trained = load_classifier(config, config.sampling.guidance_network, _KEY)
            self.classes = self.trained.config.model.num_classes

    def __call__(self, score_fn: ScoreFunction, labels: torch.Tensor | None) -> ScoreFunction:
        """`score_fn`, on the process of the sampling, told of labels (B,) and guided."""
        return guided_from_config(self.config, score_fn, labels, lambda *_: self._other())

    def _other(self):
        trained = self.trained
        assert trained is not None  # guided_from_config asks for what the constructor loaded
        if self.kind == "classifier":
            return trained.model
        there = trained.config
        sde = sde_lib.get_sde(there)
        if _same(sde, self.sde):  # without an inversion of λ, whose rounding moves labels
            sde = self.sde
        score_fn = get_score_fn(sde, trained.model, continuous=there.training.continuous)
        if sde is self.process:
            return score_fn
        return on_process(score_fn, self.process, eps=there.training.eps)

    def about(self) -> dict[str, Any]:
        """What the samples owe to the other network; nothing where there is none."""
        if self.trained is None:
            return {}
        weights = weights_hash(self.trained.model)
        return {"guidance_weights": weights, "guidance_step": self.trained.step}


def load_classifier(config, where: str, key: str) -> Trained:
    """The noise-conditional classifier that `config.<key>` = `where` names, for these images.

    Raises: ValueError, FileNotFoundError for one that is not there, or is none, or of others.
    """
    trained = load_trained(where, key, str(config.device))
    kind, wanted = trained.config.training.objective, "a classifier (configs/classifier/)"
    _check_kind(trained, key, kind == "classifier", wanted)
    check_agreement(config, trained, key, _IMAGES)
    classes = trained.config.model.num_classes
    if config.model.num_classes not in (0, classes):
        raise ValueError(
            f"config.{key}: {trained.path} knows {classes} classes, and the network was told of "
            f"{config.model.num_classes}; use a classifier of the same classes"
        )
    return trained


def _check_kind(trained: Trained, key: str, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(
            f"config.{key}: expected {wanted}, got a {trained.config.model.name!r}, {trained.path}"
        )


def _same(a: sde_lib.SDE, b: sde_lib.SDE) -> bool:
    """Whether two processes have, to the last bit, the same α and σ."""
    if type(a) is not type(b) or a.T != b.T:
        return False
    t = torch.linspace(b.sampling_eps, float(b.T), 9, dtype=torch.float64)
    pairs = zip(sde_lib.alpha_sigma(a, t), sde_lib.alpha_sigma(b, t))
    return all(torch.equal(p, q) for p, q in pairs)
