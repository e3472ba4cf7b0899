"""Inverse problems of `--mode control`: inpainting, colouring, super-resolution, and the rest."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

import operators
import sampling
from controllable_generation import get_pc_colorizer, get_pc_inpainter
from controllable_generation_methods import get_inverse_solver, load_inverse_solvers
from controllable_generation_posterior import RULES
from run_lib_control_job import Job, Outcome
from run_lib_images import read_images, read_mask
from run_lib_journal import log
from run_lib_samples import conditions
from sampling_loop import solver_options, with_options

#: Tasks that undo a measurement: its operator, and how by default.
MEASUREMENTS = {
    "inpaint": ("mask", "pc"),
    "colorize": ("grey", "pc"),
    "superres": ("superres", "ddnm"),
    "deblur": ("deblur_gaussian", "ddnm"),
}
#: Methods that are told of the data's standard deviation, and what it is taken to be, of pixels in
#: [0, 1]; EDM's σ_data = 0.5 of [−1, 1].
TOLD_OF_DATA_STD, DATA_STD = (*RULES, "smc"), 0.25
#: An error of pixels in [0, 1] that can be seen, beside that of rounding itself.
VISIBLE = 0.1
#: Measurements that are images of pixels in [0, 1], so that a file can hold one.
_PICTURES = ("mask", "grey", "superres", "superres_bicubic", "deblur_gaussian", "deblur_motion")


def invert(job: Job) -> Callable[[], Outcome]:
    """Samples given a measurement y = A x + σ z of each image."""
    c = job.config.control
    operator_name, method = MEASUREMENTS.get(c.task, (c.task, "ddnm"))
    if operator_name == "grey" and c.operator:  # the paper's is the mean of the channels
        method = "ddnm"
    A = _operator(job, operator_name)
    std = c.noise or _rounding(job, A)
    method = c.method or ("mmps" if std else method)
    job.labels(range(1))  # says now what is wrong with the class
    names, truth, y = _measure(job, A, operator_name)
    k = c.num_samples
    noise = std * job.slope
    repeated = y.repeat_interleave(k, dim=0)
    if method == "pc":
        sampler_of = _paper(job, A, operator_name, repeated)
    else:
        sampler_of = _solver(job, method, A, repeated, noise)

    def run():
        flat, evaluations = job.draw(len(repeated), sampler_of)
        samples = flat.reshape(len(y), k, *job.shape)
        error = A(job.scale(flat)) - repeated.cpu()
        numbers = {
            "task": c.task,
            "measurement": repr(A),
            "method": method,
            "evaluations": evaluations,
            "images": len(y),
            "samples_per_image": k,
            "constraint_error": float(error.square().mean().sqrt()) / job.slope,
            "noise": std,
        }
        if truth is not None:
            numbers |= quality(samples, truth)
        columns = [("measurement", _picture(job, A, operator_name, y))]
        return Outcome(names, samples, columns, numbers, truth)

    return run


def _rounding(job: Job, A: operators.Operator) -> float:
    """The standard deviation of the rounding of a measurement in a file, of pixels in [0, 1], where
    A⁺ would blow it up to what can be seen; 0 where it would not, and of measurements made here."""
    rounding = 1 / (math.sqrt(12) * (job.config.data.levels - 1))
    if not job.config.control.measured:
        return 0.0
    if A.svd is not None:
        s = A.svd.values
        if rounding * s.max() < VISIBLE * s[A.svd.nonzero(s.float())].min():
            return 0.0
    log.info("the measurement is taken to have the noise of its rounding, %.2g", rounding)
    return rounding


def quality(samples: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """PSNR in dB of samples (n, k, *) in [0, 1] against the truth (n, *), mean over images with
    its standard error; of single samples, and of each image's mean of samples."""
    found = {}
    for name, x in (("psnr", samples), ("psnr_of_mean", samples.mean(1, keepdim=True))):
        mse = (x.clamp(0, 1) - truth[:, None]).square().flatten(2).mean(2)
        each = (-10 * torch.log10(mse.clamp(min=1e-10))).mean(1)
        found[name] = float(each.mean())
        found[f"{name}_se"] = float(each.std() / len(each) ** 0.5) if len(each) > 1 else None
    found["std_over_samples"] = float(samples.std(1).mean()) if samples.shape[1] > 1 else None
    return found


def _operator(job: Job, name: str) -> operators.Operator:
    options = dict(job.config.control.operator)
    if name in ("mask", "inpaint"):
        pattern = {key: options.pop(key) for key in ("share", "seed") if key in options}
        options["mask"] = read_mask(job.config, job.shape, **pattern)
    return operators.get_operator(name, job.shape, **options)


def _measure(job: Job, A: operators.Operator, name: str):
    """Names of the images, the images in [0, 1] where they are known, and y in the network's range.

    Images of networks on dequantised data are taken at the middle of their levels.
    """
    c = job.config.control
    if not c.measured:
        names, levels = read_images(job.config)
        truth = job.unit(levels)
        y = A(job.scale(truth))
        if c.noise:
            generator = torch.Generator().manual_seed(job.config.seed)
            y = y + c.noise * job.slope * torch.randn(y.shape, generator=generator)
        return names, truth, y
    if name not in _PICTURES:
        raise ValueError(
            f"control.measured: a measurement by {name!r} is no picture; expected one of "
            f"{', '.join(_PICTURES)}. Let it be measured here (control.measured=False), or call "
            "controllable_generation_methods.get_inverse_solver(method) with y"
        )
    if name == "mask":
        names, levels = read_images(job.config)
        return names, None, A(job.scale(job.unit(levels)))
    channels, height, _ = A.shape_out
    names, levels = read_images(job.config, height, channels)
    return names, None, job.scale(job.unit(levels))


def _picture(job: Job, A: operators.Operator, name: str, y: torch.Tensor) -> torch.Tensor:
    """A measurement as images in [0, 1] of the samples' size; unknown pixels are grey."""
    if name in ("mask", "inpaint"):
        known = A.adjoint(torch.ones_like(y))
        return torch.where(known > 0, job.unscale(A.adjoint(y)), torch.full((), 0.5))
    if name in _PICTURES:
        picture = job.unscale(y).clamp(0, 1)
        size = (job.config.data.image_size,) * 2
        return torch.nn.functional.interpolate(picture, size, mode="nearest")
    return job.unscale(A.pinv(y)).clamp(0, 1)


def _paper(job: Job, A, name: str, y: torch.Tensor) -> Callable:
    """The paper's inpainting and colouring, with the configured predictor and corrector."""
    c, others = job.config.control, ", ".join(sorted(load_inverse_solvers()))
    if name not in ("mask", "inpaint", "grey"):
        raise ValueError(
            f"control.method='pc' is for 'inpaint' and 'colorize', got task {name!r}; use one of "
            f"{others}"
        )
    if c.noise or (name == "grey" and c.operator):
        what = "measurements without noise" if c.noise else "the mean of the channels"
        raise ValueError(
            f"control.method='pc' is for {what}, got control.noise={c.noise:g} and "
            f"control.operator={dict(c.operator)}; use one of {others}"
        )
    make = get_pc_colorizer if name == "grey" else get_pc_inpainter
    fn = with_options(make, dict(job.config.control.options), "control.method 'pc'")
    known = A.adjoint(torch.ones_like(y[:1])) if name != "grey" else None

    def sampler_of(places: range, callback):
        sampler = fn(*steppers(job), **settings_of(job, places, callback))
        score_fn = job.score(job.labels(places))
        part = y[places.start : places.stop].to(job.config.device)
        if known is None:
            samples = sampler(score_fn, part)
        else:
            samples = sampler(score_fn, A.adjoint(part), (known > 0).float())
        return samples, score_fn.nfe

    fn(*steppers(job), **settings_of(job, range(1), None))  # what cannot be sampled says so now
    return sampler_of


def steppers(job: Job) -> tuple[Any, ...]:
    """The arguments of the paper's samplers up to snr, from `config.sampling`."""
    s = job.config.sampling
    if s.method.lower() != "pc":
        raise ValueError(
            f"control.task={job.config.control.task!r} here goes by predictor and corrector, got "
            f"sampling.method={s.method!r}; set --config.sampling.method=pc"
        )
    name = s.predictor
    predictor = with_options(
        sampling.get_predictor(name), solver_options(job.config), f"predictor {name!r}"
    )
    corrector = sampling.get_corrector(s.corrector)
    return job.process, predictor, corrector, lambda x: x, s.snr


def settings_of(job: Job, places: range, callback) -> dict[str, Any]:
    """Keyword arguments of the paper's samplers."""
    s = job.config.sampling
    settings = {
        "n_steps": s.n_steps_each,
        "probability_flow": s.probability_flow,
        "denoise": s.noise_removal,
        "device": job.config.device,
        "callback": callback,
        "progress": True,
        **job.grid(),
    }
    return settings | noise_of(job, places)


def noise_of(job: Job, places: range) -> dict[str, Any]:
    """A seed for each sample, or a generator for the batch where Langevin steps refuse seeds."""
    numbers, corrector = torch.Size(job.shape).numel(), job.config.sampling.corrector
    if corrector.lower() == "langevin" and numbers < sampling.LangevinCorrector.MIN_NUMBERS:
        generator = torch.Generator().manual_seed(job.seeds(places)[0])
        return {"generator": generator}
    return {"seeds": job.seeds(places)}


def _solver(job: Job, method: str, A, y: torch.Tensor, noise: float) -> Callable:
    """The inverse solver `method`, with `config.control.options`."""
    solver = get_inverse_solver(method)
    takes, options = inspect.signature(solver).parameters, dict(job.config.control.options)
    if method in TOLD_OF_DATA_STD:
        options = {"data_std": DATA_STD * job.slope, **options}

    def sampler_of(places: range, callback):
        part = y[places.start : places.stop].to(job.config.device)
        told = {"seeds": job.seeds(places), "progress": True, **job.grid(), **options}
        if "callback" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            told["callback"] = callback
        shape, labels = (len(part), *job.shape), job.labels(places)
        if method == "smc":  # whose states are (B, K, *), K particles for each
            told["callback"] = callback and (lambda i, t, x, ess: callback(i, t, x[:, 0], x[:, 0]))
            told["conditions"] = {} if labels is None else conditions(job.config, labels)
            labels = None
        return solver(job.process, shape, A, part, noise=noise, **told)(job.score(labels))

    told = {**job.grid(), **options}
    solver(job.process, (1, *job.shape), A, y[:1], noise=noise, **told)  # checked now
    return sampler_of
