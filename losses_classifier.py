"""The objective of a noise-conditional classifier: cross-entropy on perturbed images."""

from __future__ import annotations

import torch.nn.functional as F

import sde_lib
from losses_registry import register_objective
from losses_step import Objective
from models.classifier import get_classifier_fn
from randomness import normal
from sde_lib import expand


def get_classifier_loss_fn(sde, train: bool, eps: float = 1e-5, *, time_sampler=None) -> Objective:
    """loss_fn(model, batch, *, y, draws=None): E_t −log p(y | x_t), in nats; guessing among K
    classes costs log K (Song et al. 2021, App. I.1; Dhariwal & Nichol 2021, section 4).

    Args:
      sde: the forward process.
      train: whether the network runs in training mode.
      eps: the smallest time.
      time_sampler: of t; uniform on (eps, T) by default. An importance sampler's density is not
        divided out: no time's loss is worth more than another's.
    """
    times = time_sampler or sde_lib.TimeSampler(sde, eps)

    def per_image(model, batch, *, draws=None, y=None):
        if y is None:
            raise ValueError(
                "a classifier is trained on labels y (B,), got none; set model.num_classes and use "
                "a data set with classes"
            )
        t = times(batch.shape[0], batch.device, draws)
        mean, std = sde.marginal_prob(batch, t)
        x = mean + expand(std, batch) * normal(batch, draws, "z")
        logits = get_classifier_fn(sde, model, train)(x, t)
        return F.cross_entropy(logits, y, reduction="none"), t

    return Objective(per_image)


@register_objective(name="classifier")
def _from_config(config, sde, train: bool) -> Objective:
    t, m = config.training, config.model
    if m.num_classes < 2 or m.label_dropout:
        raise ValueError(
            "training.objective='classifier' needs model.num_classes ≥ 2 and no label_dropout, got "
            f"{m.num_classes} and {m.label_dropout}"
        )
    sampler = sde_lib.get_time_sampler(config, sde)
    return get_classifier_loss_fn(sde, train, t.eps, time_sampler=sampler)
