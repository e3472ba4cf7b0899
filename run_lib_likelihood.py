"""Bits/dim of a checkpoint by the ODE, the ELBO and importance weighting: each with its errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_lib
import divergence
import likelihood
import likelihood_bounds
import likelihood_paths
import ode
import sde_lib
from likelihood_bits import log_volume_at
from likelihood_dequantization import log_weights
from models.utils import unwrap
from randomness import Draws
from run_lib_dequantization import get_dequantizer
from run_lib_journal import plain
from run_lib_memory import remedy_for_memory, remedy_in_evaluation
from run_lib_samples import code_of, conditioned, conditions
from run_lib_shards import Arrays, Shards, name_of
from run_lib_state import fixed_subset

#: Estimators by their name in `eval.likelihood`: the part of the results, and what it is called.
ESTIMATORS = {
    "ode": ("bpd", "bits/dim"),
    "elbo": ("bpd_elbo", "bits/dim, ELBO"),
    "iw": ("bpd_iw", "bits/dim, importance-weighted"),
}
#: What a reader of the report is told of each part.
NOTES = {
    "bpd": "Mean of −log₂ p(x) per dimension by the probability-flow ODE; lower is better. A "
    "uniform guess over the grey levels scores log₂(levels).",
    "bpd_elbo": "An upper bound on it for the reverse SDE, whose likelihood is not the ODE's.",
    "bpd_iw": "By the ODE, several dequantisations of an image in one tighter bound.",
}


def asked_for(config) -> list[str]:
    """The estimators that `config.eval` asks for, in the order of `ESTIMATORS`."""
    if not config.eval.enable_bpd:
        return []
    names = config.eval.likelihood.split("+")
    return [name for name in ESTIMATORS if name in names]


def likelihood_eps(config, sde) -> float:
    """The time of the data: `eval.likelihood_eps`; 0 is where sampling on the process ends."""
    return config.eval.likelihood_eps or sde.sampling_eps


def ode_fn(config, sde, **changes) -> Callable:
    """The likelihood by the probability-flow ODE as `config.eval` asks, but for `changes`."""
    e = config.eval
    options = {
        "trace": e.hutchinson_type,
        "probes": e.probes,
        "rtol": e.rtol,
        "atol": e.atol,
        "method": e.ode_method,
        "eps": likelihood_eps(config, sde),
        "continuous": config.training.continuous,
    }
    return likelihood.get_ode_likelihood_fn(sde, **{**options, **changes})


def elbo_fn(config, sde) -> Callable:
    """The evidence lower bound of the reverse SDE as `config.eval` asks."""
    return likelihood_bounds.get_elbo_fn(
        sde,
        eps=likelihood_eps(config, sde),
        points=config.eval.elbo_points,
        continuous=config.training.continuous,
    )


def importance_weighted(bits: np.ndarray, dim: int) -> np.ndarray:
    """Bits/dim of the importance-weighted bound from those of single samples, (..., K) -> (...).

    −log₂ [(1/K) Σ_k 2^(−d b_k)] / d
    """
    logw = torch.from_numpy(np.moveaxis(-bits * (dim * math.log(2)), -1, 0))
    flat = likelihood_paths.importance_weighted(logw.reshape(len(logw), -1))
    return -flat.reshape(logw.shape[1:]).numpy() / (dim * math.log(2))


def in_groups(bits: np.ndarray, size: int, dim: int) -> np.ndarray:
    """The same over groups of `size` of the K samples, averaged: (..., K) -> (...).

    Where sizes divide each other a larger one never gives more bits, image by image (Jensen).
    """
    groups = bits.reshape(*bits.shape[:-1], -1, size)
    return importance_weighted(groups, dim).mean(axis=-1)


def nested_sizes(count: int) -> list[int]:
    """Sizes of groups from 1 to `count`, each of which divides the next."""
    powers = [2**i for i in range(count.bit_length()) if count % 2**i == 0]
    return [*powers, count] if powers[-1] != count else powers


def mean_and_error(values: np.ndarray) -> dict[str, Any]:
    """Mean and standard error over images; None for the error of one."""
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}


def error_of_mean(errors: np.ndarray) -> float | None:
    """The standard error of a mean over values with these independent ones; None where unknown."""
    error = math.sqrt(float((errors**2).sum())) / errors.size
    return error if math.isfinite(error) else None


def over_repeats(bits: np.ndarray) -> float | None:
    """The standard error of the mean of (n, repeats) that comes from what differs over repeats."""
    repeats = bits.shape[1]
    if repeats == 1:
        return None
    return error_of_mean(bits.std(axis=1, ddof=1) / repeats**0.5)


class Bits:
    """Bits/dim of the images of a set under one network, by any estimator of `ESTIMATORS`.

    Every image is scored `repeats` times, each time under dequantisation noise and draws of its
    own, which belong to (config.seed, image, repeat): they do not depend on batches or processes.
    What is asked for is built, and so checked, here.
    """

    def __init__(self, config, sde, model, sets):
        e = config.eval
        self.config, self.sde, self.model = config, sde, model
        of_training = e.bpd_dataset.lower() == "train"
        self.images = sets[0 if of_training else 1]
        self.count = min(e.bpd_num_images or len(self.images), len(self.images))
        self.repeats = e.bpd_repeats or (1 if of_training else 5)
        self.dim = math.prod(self.images.shape)
        self.nats = self.dim * math.log(2)  # of one bit/dim
        self.inverse_scaler = data_lib.get_data_inverse_scaler(config)
        self.dequantizer = get_dequantizer(config, config.device)
        names = asked_for(config)
        self.fns = {name: elbo_fn(config, sde) for name in names if name == "elbo"}
        self.fns |= {name: ode_fn(config, sde) for name in names if name != "elbo"}

    # --- one batch ----------------------------------------------------------------------------

    def score(self, fn: Callable, images, labels, draws, count: int = 1, dequantizer=None):
        """Bits/dim of a batch of images under `count` dequantisations each, and their parts.

        Args:
          fn: the likelihood.
          images: integer levels (B, C, H, W), labels: (B,) or None.
          draws: a Draws of these images, for the dequantisations and the likelihood's own numbers,
            which are the same for every dequantisation.

        Returns: arrays (B, count): 'bpd', 'error' of its own numbers, 'evaluations', and
          'term_<name>', which add up to 'bpd'; 'term_levels' is of going from integer levels to
          what the network sees.
        """

        def stacked(values):
            return sde_lib.double(torch.stack(list(values)))

        told = conditioned(self.config, self.sde, self.model, conditions(self.config, labels))
        dequantizer, found, volumes = dequantizer or self.dequantizer, [], []
        levels = self.config.data.levels

        def log_density(x, draws):
            found.append(fn(told, x, draws=draws)._replace(code=None))
            volumes.append(log_volume_at(x, self.inverse_scaler, levels))
            return sde_lib.double(found[-1].logp)

        logw = log_weights(
            images.to(self.config.device),
            dequantizer,
            log_density,
            scaler=data_lib.get_data_scaler(self.config),
            inverse_scaler=self.inverse_scaler,
            levels=levels,
            count=count,
            draws=draws,
        )
        columns = {
            f"term_{name}": -stacked(each.terms[name] for each in found) / self.nats
            for name in found[0].terms
        }
        columns["term_levels"] = -stacked(volumes) / self.nats
        bits = -logw / self.nats
        if dequantizer.protocol()["dequantization"] != "uniform":
            logp = stacked(each.logp for each in found)
            columns["term_dequantization"] = (
                bits + logp / self.nats - columns["term_levels"]
            )  # log q
        columns["bpd"] = bits
        columns["error"] = stacked(each.error for each in found) / self.nats
        columns["evaluations"] = torch.stack([each.nfe for each in found])
        return {key: value.T.cpu().numpy() for key, value in columns.items()}

    def take(self, places: range, words: tuple, repeats: int = 1):
        """The images at these places, `repeats` copies of each: their indices in the set, integer
        levels, labels and random numbers."""
        chosen = fixed_subset(len(self.images), places.stop)[places.start :]
        images, labels = self.images.batch(chosen)
        images = images.repeat_interleave(repeats, dim=0)
        labels = None if labels is None else labels.repeat_interleave(repeats)
        seed, device, first = self.config.seed, self.config.device, places.start * repeats
        return chosen, images, labels, Draws(seed, words, first, len(images), device=device)

    def copies(self, fn, places: range, words: tuple, repeats=1, count=1, dequantizer=None):
        """`score` of `repeats` copies of the images at these places: arrays (n, repeats, count)."""
        chosen, images, labels, draws = self.take(places, words, repeats)
        parts = []
        for a in range(0, len(images), self.config.eval.batch_size):
            b = min(a + self.config.eval.batch_size, len(images))
            of = None if labels is None else labels[a:b]
            what, remedy = f"the likelihood of {b - a} images", remedy_in_evaluation(b - a)
            with remedy_for_memory(what, remedy):
                parts.append(self.score(fn, images[a:b], of, draws.rows(a, b), count, dequantizer))
        rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        shaped = {key: v.reshape(len(chosen), repeats, count) for key, v in rows.items()}
        return {"index": chosen.numpy(), **shaped}

    # --- all images ---------------------------------------------------------------------------

    def run(self, name: str, stem: Path, weights: str) -> dict[str, Any]:
        """The results by estimator `name`; bits/dim by image and repeat go to `stem`_<part>.npz."""
        count = self.config.eval.iw_samples if name == "iw" else 1
        about = self.protocol(name)

        def work(places: range) -> Arrays:
            words = ("bpd", self.repeats)
            rows = self.copies(self.fns[name], places, words, self.repeats, count)
            if name == "iw":
                return self.weighted(rows)
            return {key: value if key == "index" else value[..., 0] for key, value in rows.items()}

        part, label = ESTIMATORS[name]
        shards = Shards(Path(f"{stem}_{part}.npz"), {**self.made_by(weights), "how": about})
        size = max(self.config.eval.batch_size // self.repeats, 1)
        shards.fill(self.count, size, work, label, "image")
        rows = shards.read(self.count)
        return {**self._summary(name, rows), "images": self.count, **about}

    def weighted(self, rows: Arrays) -> Arrays:
        """Rows of (n, repeats, K) single dequantisations as those of their bounds, (n, repeats)."""
        samples = rows["bpd"]
        bits = importance_weighted(samples, self.dim)
        means = {k: v if k == "index" else v.mean(axis=-1) for k, v in rows.items()}
        return {
            **means,
            "samples": samples,
            "bpd": bits,
            "term_importance_weighting": bits - means["bpd"],
            "evaluations": rows["evaluations"].sum(axis=-1),
        }

    def _summary(self, name: str, rows: Arrays) -> dict[str, Any]:
        """Mean and errors over images, over repeats and over the estimator's own draws."""
        own = "points" if name == "elbo" else "probes"
        summary = {
            **mean_and_error(rows["bpd"].mean(axis=1)),
            "standard_error_repeats": over_repeats(rows["bpd"]),
            f"standard_error_{own}": error_of_mean(rows["error"]),
            "terms": self.terms(rows),
            "evaluations_mean": float(rows["evaluations"].mean()),
            "evaluations_max": int(rows["evaluations"].max()),
        }
        if name == "iw":
            each, sizes = rows["samples"], nested_sizes(rows["samples"].shape[-1])
            summary["effective_samples"] = float(self.effective_samples(each).mean())
            summary["by_samples"] = {
                str(size): mean_and_error(in_groups(each, size, self.dim).mean(axis=1))
                for size in sizes
            }
        return summary

    def effective_samples(self, samples: np.ndarray) -> np.ndarray:
        """(Σ w)²/Σ w² of the K weights that bits/dim (..., K) stand for: 1 where one has it all."""
        logw = -samples * self.nats
        w = np.exp(logw - logw.max(axis=-1, keepdims=True))
        return w.sum(axis=-1) ** 2 / (w**2).sum(axis=-1)

    def terms(self, rows: Arrays) -> dict[str, float]:
        """What the mean bits/dim of these rows is the sum of, by name."""
        names = sorted(key for key in rows if key.startswith("term_"))
        return {key.removeprefix("term_"): float(rows[key].mean()) for key in names}

    # --- how ----------------------------------------------------------------------------------

    def protocol(self, name: str) -> dict[str, Any]:
        """What a reader needs to recompute the number of this estimator."""
        e, config = self.config.eval, self.config
        about: dict[str, Any] = {
            "estimator": name,
            "repeats": self.repeats,
            "dataset": self.images.name,
            **self.dequantizer.protocol(),
            "levels": config.data.levels,
            "eps": likelihood_eps(config, self.sde),
            "prior": f"{type(self.sde).__name__}.prior_logp at T = {self.sde.T:g}",
            "seeds": "one per image and repeat",
        }
        if name == "elbo":
            return {
                **about,
                "points": e.elbo_points,
                "times": "uniform in log-SNR",
                "offset": "included: log p(x | x_eps)",
            }
        about |= {
            "trace_estimator": e.hutchinson_type,
            "probes": e.probes,
            "solver": e.ode_method,
            "rtol": e.rtol,
            "atol": e.atol,
            "offset": "not included: the density at t = eps",
        }
        if name == "iw":
            about |= {"samples": e.iw_samples}
        return about

    def made_by(self, weights: str) -> dict[str, Any]:
        """All that the numbers depend on, beside the estimator and its settings."""
        config = self.config
        return {
            "weights": weights,
            "config": {name: plain(config)[name] for name in ("model", "seed")},
            "training": [config.training.sde, config.training.continuous],
            "images": [len(self.images), self.images.shape, _fingerprint(self.images)],
            "centered": config.data.centered,
            "device": config.device.type,
            "code": code_of(
                *(self.sde, unwrap(self.model), self.dequantizer, likelihood.get_ode_likelihood_fn),
                *(likelihood_bounds.get_elbo_fn, likelihood_paths.importance_weighted),
                *(divergence.get_trace, ode.solve),
            ),
        }


def _fingerprint(image_set) -> str:
    """A hash of images spread over the set: another set of the same name has another."""
    spread = np.unique(np.linspace(0, len(image_set) - 1, 16).astype(int))
    return name_of({"pixels": image_set.take(spread).numpy().tobytes().hex()})


def count(n: int, what: str) -> str:
    """So many of them, in words."""
    return f"{n:,} {what}" + "s" * (n != 1)


def line(summary: dict[str, Any]) -> str:
    """The results of an estimator in one line."""
    error, of = summary["standard_error"], summary
    error = float("nan") if error is None else error
    return (
        f"{ESTIMATORS[of['estimator']][1]} {of['mean']:.4f} ± {error:.4f} on "
        f"{count(of['images'], 'image')} of {of['dataset']}, {count(of['repeats'], 'repeat')}, "
        f"{of['evaluations_mean']:.0f} evaluations an image (at most {of['evaluations_max']})"
    )
