"""The tasks of `--mode control` by name: inverse problems, classes, edits, interpolation.

A task reads its images and builds its samplers when it is made, so that what is wrong is said at
once, and returns the work: run() -> Outcome.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

import operators
import sampling
from controllable_generation import classifier_score
from controllable_generation_projection import get_sdedit_sampler
from models.classifier import get_classifier_fn
from run_lib_control_inverse import MEASUREMENTS, invert, noise_of, quality
from run_lib_control_job import Job, Outcome
from run_lib_guidance import load_classifier
from run_lib_images import read_images


def get_task(config) -> Callable[[Job], Callable[[], Outcome]]:
    """The task `config.control.task`.

    Raises: ValueError for a name that is none.
    """
    name = config.control.task
    others = {"edit": edit, "class": draw_classes, "interpolate": interpolate}
    known = dict.fromkeys((*MEASUREMENTS, *others, *operators.catalogue()))
    if name not in known:
        raise ValueError(f"control.task={name!r} is unknown; known: {', '.join(known)}")
    return others.get(name, invert)


def edit(job: Job) -> Callable[[], Outcome]:
    """SDEdit: each image noised to t = `control.strength` T, and denoised from there."""
    c, k = job.config.control, job.config.control.num_samples
    names, levels = read_images(job.config)
    guide = job.unit(levels)
    repeated = job.scale(guide).repeat_interleave(k, dim=0)
    grid = job.grid()
    grid["steps"] = max(round(c.strength * grid["steps"]), 2)
    told = {"t0": c.strength * job.process.T, **grid, **dict(c.options)}

    def sampler_of(places: range, callback):
        part = repeated[places.start : places.stop].to(job.config.device)
        own = {"seeds": job.seeds(places), "callback": callback, "progress": True}
        return get_sdedit_sampler(job.process, part.shape, None, part, **told, **own)(
            job.score(job.labels(places))
        )

    job.labels(range(1))
    get_sdedit_sampler(job.process, repeated[:1].shape, None, repeated[:1], **told)

    def run():
        flat, evaluations = job.draw(len(repeated), sampler_of)
        samples = flat.reshape(len(guide), k, *job.shape)
        likeness = {f"guide_{name}": v for name, v in quality(samples, guide).items()}
        numbers = {"task": "edit", "strength": c.strength, "evaluations": evaluations, **likeness}
        return Outcome(names, samples, [("guide", guide)], numbers)

    return run


def draw_classes(job: Job) -> Callable[[], Outcome]:
    """Samples of classes, by a noise-conditional classifier's gradient, or by classifier-free
    guidance of a class-conditional network."""
    config, c = job.config, job.config.control
    k, trained = c.num_samples, None
    if c.classifier:
        trained = load_classifier(config, c.classifier, "control.classifier")
        classes = trained.config.model.num_classes
    elif config.model.num_classes:
        classes = config.model.num_classes
    else:
        raise ValueError(
            "control.task='class' needs --config.control.classifier=WORKDIR of a noise-conditional "
            "classifier (configs/classifier/), or a class-conditional network (model.num_classes)"
        )
    if trained is None and c.weight and not config.model.label_dropout:
        raise ValueError(
            f"control.weight={c.weight:g} guides away from the network told of no class, which was "
            "never trained (model.label_dropout=0); set --config.control.weight=0, or give "
            "--config.control.classifier"
        )
    if c.label >= classes:
        raise ValueError(f"control.label={c.label}: expected 0 to {classes - 1}, or -1 for all")
    labels = torch.tensor([c.label]) if c.label >= 0 else torch.arange(classes)
    repeated = labels.repeat_interleave(k)
    interval = tuple(config.sampling.guidance_interval) or (0.0, math.inf)
    how: dict[str, Any] = {"w": c.weight, "interval": interval}

    def guided(part: torch.Tensor):
        part = part.to(config.device)
        if trained is not None:
            own = part if config.model.num_classes else None
            return classifier_score(job.score(own), trained.model, part, **how)
        told = job.score(part)
        if not c.weight:
            return told
        return sampling.classifier_free_guidance(told, job.score(), **how)

    def sampler_of(places: range, callback):
        shape = (len(places), *job.shape)
        score_fn = guided(repeated[places.start : places.stop])
        sampler = sampling.get_sampling_fn(
            config, job.process, shape, lambda x: x, job.eps,
            callback=callback, progress=True, **noise_of(job, places),
        )  # fmt: skip
        return sampler(score_fn)

    def run():
        flat, evaluations = job.draw(len(repeated), sampler_of)
        samples = flat.reshape(len(labels), k, *job.shape)
        numbers = {"task": "class", "weight": c.weight, "evaluations": evaluations}
        if trained is not None:
            numbers["classifier_agrees"] = _agreement(job, trained.model, flat, repeated)
        names = [f"class_{int(label)}" for label in labels]
        return Outcome(names, samples, [], numbers, headings=[f"{i + 1}" for i in range(k)])

    return run


@torch.no_grad()
def _agreement(job: Job, classifier, samples: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of samples that the classifier itself takes for the class asked for, at eps."""
    logits_fn, found = get_classifier_fn(job.process, classifier), []
    for x in job.scale(samples).split(job.config.eval.batch_size):
        x = x.to(job.config.device)
        t = torch.full((len(x),), job.eps, device=x.device)
        found.append(logits_fn(x, t).argmax(1).cpu())
    return float((torch.cat(found) == labels).float().mean())


def interpolate(job: Job) -> Callable[[], Outcome]:
    """Images on the way from each image to the next, by their latent codes."""
    c = job.config.control
    names, levels = read_images(job.config)
    if len(names) < 2:
        raise ValueError(
            "control.task='interpolate' needs two images or more, got one; give a folder"
        )
    images, between = job.unit(levels), c.num_samples
    job.labels(range(1))
    options = {"eps": job.eps, "continuous": job.config.training.continuous, **dict(c.options)}

    def carried(way: Callable, x: torch.Tensor):
        """x or its codes through `sampling.encode` or `decode`, batch by batch."""

        def batch(places: range):
            part = x[places.start : places.stop].to(job.config.device)
            return way(job.process, job.score(job.labels(places)), part, **options)

        return job.in_batches(len(x), batch)

    def run():
        x = job.scale(images)
        codes, encoded = carried(sampling.encode, x)
        again, decoded = carried(sampling.decode, codes)
        w = torch.arange(1, between + 1, device=codes.device) / (between + 1)
        path = sampling.slerp(codes[:-1], codes[1:], w).transpose(0, 1)  # (n − 1, between, *)
        flat = c.temperature * path.reshape(-1, *job.shape)
        mixed, more = carried(sampling.decode, flat)
        samples = job.unscale(mixed).float().cpu().reshape(-1, between, *job.shape)
        error = (again.cpu() - x).square().mean().sqrt()
        numbers = {
            "task": "interpolate",
            "temperature": c.temperature,
            "evaluations": encoded + decoded + more,
            "round_trip_rms": float(error) / job.slope,
            "code_norm_per_number": float(codes.square().mean().sqrt()),
        }
        stack = [images[:-1], *samples.unbind(1), images[1:]]
        frames = [(i / (len(stack) - 1), frame) for i, frame in enumerate(stack)]
        pairs = [f"{a}_to_{b}" for a, b in itertools.pairwise(names)]
        return Outcome(
            pairs,
            torch.cat([samples, images[1:, None]], dim=1),
            [("from", images[:-1])],
            numbers,
            headings=[f"{float(v):.2f}" for v in w] + ["to"],
            frames=frames,
        )

    return run
