"""Class-conditional sampling by a noise-conditional classifier (Song et al. 2021, section 5):

∇ log p_t(x | y) = ∇ log p_t(x) + w ∇ log p_t(y | x),   w = 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

import sampling
from models.classifier import get_classifier_fn
from models.utils import get_score_fn
from parametrization import ScoreFunction
from sampling_wrappers import autoguidance, classifier_free_guidance, classifier_guidance
from sde_lib import expand


def classifier_gradient(sde, classifier, labels: torch.Tensor) -> Callable:
    """gradient(x, t) = ∇_x log p_t(y | x), (B, *), for the labels y (B,).

    It can be differentiated again, in either mode, so that a guided score has a likelihood.

    Args:
      classifier: a network (`models.classifier`), or a function logits(x, t) -> (B, classes).

    Raises: ValueError for labels that are not integers from 0 to classes − 1, one per sample.
    """
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError(
            "expected class labels from 0 as a vector (B,) of integers, got shape "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    labels = labels.long()
    logits_fn, largest = get_classifier_fn(sde, classifier), int(labels.max())

    def log_likelihood(x, t):
        logits = logits_fn(x, t)
        if logits.shape[:1] != labels.shape or logits.ndim != 2 or logits.shape[1] <= largest:
            raise ValueError(
                f"the classifier returned logits of shape {tuple(logits.shape)} for "
                f"{len(labels)} labels up to {largest}; expected ({len(labels)}, classes)"
            )
        log_p = torch.log_softmax(logits, dim=1)
        return log_p.gather(1, labels.to(x.device).unsqueeze(1)).sum()

    gradient = torch.func.grad(log_likelihood)

    def eagerly(x, t):
        with torch.compiler.set_stance("force_eager"):  # torch.func cannot see into compiled code
            if not torch.is_inference_mode_enabled():
                return gradient(x, t)
            with torch.inference_mode(False):  # inside it, torch.func of 2.6 is silently wrong
                return gradient(x.clone(), t.clone())

    return eagerly


def classifier_score(
    score_fn: ScoreFunction,
    classifier,
    labels: torch.Tensor,
    w: float = 1.0,
    *,
    interval: tuple[float, float] = (0.0, math.inf),
) -> ScoreFunction:
    """`score_fn` guided to the classes `labels` (B,) by a classifier; for any sampler.

    Args:
      classifier, labels: as `classifier_gradient`.
      w, interval: as `sampling.classifier_guidance`.
    """
    gradient = classifier_gradient(score_fn.sde, classifier, labels)
    return classifier_guidance(score_fn, gradient, w, interval=interval)


def guided_from_config(
    config, score_fn: ScoreFunction, labels: torch.Tensor | None, load: Callable
) -> ScoreFunction:
    """`score_fn`, told of the classes `labels` (B,) and guided as `config.sampling` says.

    Args:
      labels: None for samples without a class.
      load: load(where, key) -> the network that `config.<key>` = `where` names, a module or a
        ScoreFunction: the weaker network of 'autoguidance', or the classifier.

    Raises: ValueError for guidance that the network was not trained for.
    """
    s, m = config.sampling, config.model
    known = {"y": labels} if m.num_classes and labels is not None else {}
    told = score_fn.with_conditions(**known) if known else score_fn
    how = {"w": s.guidance_weight, "interval": tuple(s.guidance_interval) or (0.0, math.inf)}
    if s.guidance == "classifier_free":
        if not known or not m.label_dropout:
            raise ValueError(
                "sampling.guidance='classifier_free' needs a network trained with classes and some "
                f"of them dropped, got model.num_classes={m.num_classes} and model.label_dropout="
                f"{m.label_dropout}; train with 10 % dropped, or use 'autoguidance' or 'classifier'"
            )
        return classifier_free_guidance(told, score_fn, **how)
    if s.guidance not in ("autoguidance", "classifier"):
        return told
    other = load(s.guidance_network, "sampling.guidance_network")
    if s.guidance == "autoguidance":
        weak = get_score_fn(score_fn.sde, other, continuous=config.training.continuous)
        return autoguidance(told, weak.with_conditions(**known), **how)
    if labels is None:
        raise ValueError(
            "sampling.guidance='classifier' needs the classes of the samples, got none; give "
            "one class for each sample"
        )
    return classifier_score(told, other, labels, **how)


def get_pc_conditional_sampler(
    sde,
    classifier,
    shape,
    predictor,
    corrector,
    inverse_scaler,
    snr,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
    device=None,
    *,
    weight: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    **options,
) -> Callable:
    """pc_conditional_sampler(model, labels) -> samples of the classes `labels` (B,), or one class.

    As in the JAX version of score_sde: every score of predictor and corrector, those of few-step
    solvers too, is that of the network and the gradient of the classifier.

    Args:
      classifier: a network, or a function logits(x, t) -> (B, classes); see `get_classifier_fn`.
      shape: (B, *), the shape of the batch.
      weight: w; 0 is unconditional, larger than 1 sharpens p(y | x) (Dhariwal & Nichol 2021).
      interval: the noise levels σ/α within which the classifier is heard.
      sde ... options: as `sampling.get_pc_sampler`.
    """
    sampler = sampling.get_pc_sampler(
        sde,
        shape,
        predictor,
        corrector,
        inverse_scaler,
        snr,
        n_steps,
        probability_flow,
        continuous,
        denoise,
        eps,
        device,
        **options,
    )

    def pc_conditional_sampler(model, labels):
        labels = torch.as_tensor(labels)
        labels = labels.expand(shape[0]) if labels.ndim == 0 else labels
        if len(labels) != shape[0]:
            raise ValueError(f"expected {shape[0]} labels, one per sample, got {len(labels)}")
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        labels = labels.to(device or score_fn.device or labels.device)
        guided = classifier_score(score_fn, classifier, labels, weight, interval=interval)
        return sampler(guided)[0]

    return pc_conditional_sampler


@torch.no_grad()
def classifier_accuracy(
    sde,
    classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    times: Sequence[float],
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The share of images (B, *) that a classifier knows at each of these times, (len(times),)."""
    logits_fn, found = get_classifier_fn(sde, classifier), []
    for t in times:
        vec_t = torch.full((len(images),), float(t), device=images.device)
        mean, std = sde.marginal_prob(images, vec_t)
        z = torch.randn(images.shape, generator=generator, device=images.device)
        logits = logits_fn(mean + expand(std, images) * z, vec_t)
        found.append((logits.argmax(dim=1) == labels.to(logits.device)).double().mean())
    return torch.stack(found).cpu()
