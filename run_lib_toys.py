"""Numbers of a network that was trained on points: distances to the truth, and likelihoods in nats.

What is a number of the truth here is exact: the density of every set of points is known.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import evaluation_points
import likelihood
import likelihood_bounds
import visualize
from data_lib_points import CANVAS, get_density
from randomness import Draws
from run_lib_likelihood import mean_and_error

#: Held-out points whose likelihood is computed where `eval.bpd_num_images` says nothing, and the
#: grid on which the density of the model is: half its side, and cells along it.
SCORED, GRID_HALF_SIDE, GRID_SIZE = 1000, 1.25 * CANVAS, 64
#: Relative and absolute tolerance of the ODE on the grid, for a picture and a sum.
GRID_TOLERANCE = 1e-3


def scores(config, samples: torch.Tensor) -> dict[str, Any]:
    """Distances of samples (n, 2) to the truth, beside those of the truth to itself
    (`evaluation_points.compare`)."""
    if len(samples) < evaluation_points.POINTS:
        note = f"{len(samples)} samples: distances to the truth need {evaluation_points.POINTS}"
        return {"notes": [note]}
    found = evaluation_points.compare(samples, get_density(config).sample)
    return {**found, "notes": [f"Distances to true points: {found['protocol']}."]}


class Likelihoods:
    """Log-likelihoods of held-out points under one network, in nats per point, and the divergence
    from the truth.

    The ODE's is exact but for its tolerance: its trace is. `eval.bpd_num_images` points are taken
    (0 = SCORED), `eval.elbo_points` times each for the bound, and `eval.rtol`, `atol`,
    `ode_method`, `likelihood_eps` are read; bits of levels do not exist for points.

    Raises: ValueError for a network of one noise level.
    """

    def __init__(self, config, sde, model, points):
        e = config.eval
        if config.training.sigma:
            raise ValueError(
                f"a network of one noise level, training.sigma={config.training.sigma}, has no "
                "likelihood: it takes all levels from noise to data; use "
                "--config.eval.enable_bpd=False"
            )
        self.config, self.sde, self.model = config, sde, model
        self.points, self.density = points, get_density(config)
        self.count = min(e.bpd_num_images or SCORED, len(points))
        self.eps = e.likelihood_eps if e.likelihood_eps else sde.sampling_eps
        continuous = config.training.continuous
        options = {"trace": "exact", "method": e.ode_method, "eps": self.eps}
        options["continuous"] = continuous
        self.ode = likelihood.get_ode_likelihood_fn(sde, rtol=e.rtol, atol=e.atol, **options)
        coarse = {name: max(GRID_TOLERANCE, e[name]) for name in ("rtol", "atol")}
        self.ode_on_grid = likelihood.get_ode_likelihood_fn(sde, **coarse, **options)
        self.elbo = likelihood_bounds.get_elbo_fn(
            sde, eps=self.eps, points=e.elbo_points, continuous=continuous
        )

    def __call__(self, path: Path) -> dict[str, Any]:
        """The numbers, with standard errors over points; values by point, and log-densities on the
        grid (`grid`, `log_q` of the model, `log_p` of the truth), go to the .npz at `path`."""
        x = self.points.take(range(self.count)).to(self.config.device)
        draws = Draws(self.config.seed, "elbo", 0, self.count, device=self.config.device)
        ode, elbo = self.ode(self.model, x), self.elbo(self.model, x, draws=draws)
        rows = {
            "log_likelihood": ode.logp,
            "elbo": elbo.logp,
            "truth": self.density.log_density(x),
        }
        rows = {name: value.double().cpu().numpy() for name, value in rows.items()}
        places, cell = evaluation_points.grid(GRID_HALF_SIDE, GRID_SIZE)
        log_p, log_q = self.density.log_density(places), self._on_grid(places.float())
        visualize.write_npz(
            path,
            {**rows, "grid": places.numpy(), "log_p": log_p.numpy(), "log_q": log_q.numpy()},
        )
        on_grid = evaluation_points.kl_on_grid(log_p, log_q, cell)
        return {
            "unit": "nats per point",
            "points": self.count,
            "dimensions": x.shape[1],
            "log_likelihood": mean_and_error(rows["log_likelihood"]),
            "elbo": mean_and_error(rows["elbo"]),
            "truth": mean_and_error(rows["truth"]),
            "kl": mean_and_error(rows["truth"] - rows["log_likelihood"]),
            "kl_elbo": mean_and_error(rows["truth"] - rows["elbo"]),
            "elbo_gap": mean_and_error(rows["log_likelihood"] - rows["elbo"]),
            "kl_on_grid": {**on_grid, "half_side": GRID_HALF_SIDE, "cells": GRID_SIZE},
            "bits_per_dim": -float(np.mean(rows["log_likelihood"])) / (x.shape[1] * math.log(2)),
            "trace_estimator": "exact",
            "eps": self.eps,
            "rtol": self.config.eval.rtol,
            "atol": self.config.eval.atol,
            "elbo_points": self.config.eval.elbo_points,
            "evaluations_mean": float(ode.nfe.double().mean()),
        }

    def _on_grid(self, places: torch.Tensor) -> torch.Tensor:
        parts = places.to(self.config.device).split(self.config.eval.batch_size)
        return torch.cat([self.ode_on_grid(self.model, part).logp for part in parts]).double().cpu()


def line(found: dict[str, Any]) -> str:
    """The likelihoods in one line."""

    def number(name: str) -> str:
        value = found[name]
        error = value["standard_error"]  # 0 of the truth where it is uniform
        return f"{value['mean']:.4f} ± {math.nan if error is None else error:.4f}"

    return (
        f"nats per point: {number('log_likelihood')} by the ODE, at least {number('elbo')} by the "
        f"reverse SDE (ELBO), {number('truth')} of the truth; KL {number('kl')}, on a grid "
        f"{found['kl_on_grid']['kl']:.4f}"
    )
