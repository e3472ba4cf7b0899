"""Where the bits go: by how much each approximation in bits/dim changes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_lib
import sde_lib
from divergence import get_trace
from likelihood_dequantization import UniformDequantizer
from run_lib_likelihood import (
    Bits,
    elbo_fn,
    error_of_mean,
    importance_weighted,
    likelihood_eps,
    mean_and_error,
    ode_fn,
)
from run_lib_shards import Arrays, Shards

#: Probes of an image, at least, by the trace estimator, for their spread to be known.
_PROBES = {"exact": 1, "hutch++": 6}
#: The tightest tolerance that is compared with: float32 states round at 6e-8.
_TIGHTEST = 1e-7
#: Pairs of draws of x_T an image, for the prior; they cost no evaluation.
_PRIOR_PAIRS = 4
#: Whose random numbers the images get.
WORDS = ("gaps",)


class Gaps:
    """The gap report on the first `eval.gap_images` images of the set that `bits` scores.

    The reference is bits/dim by the ODE, a mean over K uniform dequantisations of each image. On
    the same images, noise and probes it is computed again with one thing changed at a time. A row
    holds the change, so that `reference + value = alternative`, and its standard error over images:

    - prior: −E_x KL(N(α_T x, σ_T²) ‖ π), at least the change of scoring x_T by p_T in place of π;
    - eps: a tenth of the time of the data;
    - tolerance: a hundredth of rtol and atol;
    - trace: 0; its error is that of the probes;
    - importance weighting: K dequantisations in place of one;
    - variational dequantisation in place of uniform, where there is a dequantizer;
    - elbo: the evidence lower bound in place of the ODE. For a trained network no order between
      them is a theorem: the two describe different models of the data.
    """

    def __init__(self, bits: Bits):
        self.bits, config, sde = bits, bits.config, bits.sde
        e = config.eval
        self.count = min(e.gap_images, bits.count)
        self.probes = max(e.probes, _PROBES.get(e.hutchinson_type.lower(), 2))
        self.stochastic = get_trace(e.hutchinson_type, self.probes).stochastic
        self.eps = likelihood_eps(config, sde)
        self.rtol, self.atol = (min(tol, max(tol / 100, _TIGHTEST)) for tol in (e.rtol, e.atol))
        self.fns = {
            "ode": ode_fn(config, sde, probes=self.probes),
            "tolerance": ode_fn(config, sde, probes=self.probes, rtol=self.rtol, atol=self.atol),
            "elbo": elbo_fn(config, sde),
        }
        smaller = sde_lib.alpha_sigma(sde, torch.tensor([self.eps / 10]))[1].item()
        if self.eps > 0 and smaller > 0:
            self.fns["eps"] = ode_fn(config, sde, probes=self.probes, eps=self.eps / 10)
        self.variational = e.dequantization == "variational"

    def run(self, stem: Path, weights: str) -> dict[str, Any]:
        """The rows of the report; numbers by image go to `stem`_gaps.npz."""
        config, bits = self.bits.config, self.bits
        about = {
            "images": self.count,
            "probes": self.probes,
            "rtol": self.rtol,
            "atol": self.atol,
            "samples": config.eval.iw_samples,
        }
        made_by = {**bits.made_by(weights), "how": [bits.protocol("iw"), bits.protocol("elbo")]}
        shards = Shards(Path(f"{stem}_gaps.npz"), {**made_by, "gaps": about})
        size = max(config.eval.batch_size // (config.eval.iw_samples + 3), 1)
        shards.fill(self.count, size, self._rows, "where the bits go", "image")
        rows = shards.read(self.count)
        reference = mean_and_error(rows["ode_bpd"].mean(axis=1))
        return {
            **about,
            "reference": reference,
            "terms": {name: bits.terms(_of(name, rows)) for name in ("ode", "elbo")},
            "rows": self._table(rows, reference["mean"]),
        }

    # --- the numbers by image -----------------------------------------------------------------

    def _rows(self, places: range) -> Arrays:
        """Every alternative for the images at these places, (n,); samples are (n, K)."""
        bits, count = self.bits, self.bits.config.eval.iw_samples
        uniform: Any = UniformDequantizer()

        def copies(name, count=1, dequantizer=uniform):
            rows = bits.copies(self.fns[name], places, WORDS, 1, count, dequantizer)
            return {key: v[:, 0] for key, v in rows.items() if v.ndim > 1}

        ode, index = copies("ode", count), bits.take(places, WORDS)[0]
        rows = {"index": index.numpy(), "prior": -self._prior(places)}
        rows |= {f"ode_{key}": values for key, values in ode.items()}
        for name in self.fns.keys() - {"ode"}:
            rows |= {f"{name}_{key}": values[:, 0] for key, values in copies(name).items()}
        if self.variational:
            rows["variational"] = copies("ode", count, bits.dequantizer)["bpd"]
        return rows

    def _prior(self, places: range) -> np.ndarray:
        """KL(N(α_T x, σ_T²) ‖ π) in bits/dim for each image x.

        Minus the entropy of x_T = α_T x + σ_T z, and minus log π(x_T) over pairs z, −z of norm √d:
        exact for an isotropic Gaussian π.
        """
        bits, sde = self.bits, self.bits.sde
        _, images, _, draws = bits.take(places, WORDS)
        x = data_lib.prepare(images, bits.config, draws.device, dequantize=True, draws=draws)
        x = sde_lib.double(x)
        t = torch.full((len(x),), float(sde.T), dtype=x.dtype, device=x.device)
        mean, std = sde.marginal_prob(x, t)
        total = -0.5 * math.log(2 * math.pi * math.e) * bits.dim - bits.dim * std.log()
        for pair in range(_PRIOR_PAIRS):
            z = draws.randn(f"prior {pair}", x.shape[1:]).to(x)
            z = sde_lib.expand(std * (bits.dim / sde_lib.sum_except_batch(z**2)).sqrt(), x) * z
            for noise in (z, -z):
                total = total - sde.prior_logp(mean + noise) / (2 * _PRIOR_PAIRS)
        return (total / bits.nats).cpu().numpy()

    # --- the table ----------------------------------------------------------------------------

    def _table(self, rows: Arrays, reference: float) -> list[dict[str, Any]]:
        """The rows of the report."""
        e, samples = self.bits.config.eval, rows["ode_bpd"]
        first = samples[:, 0]
        table = [_row("prior", "Prior mismatch", rows["prior"], _PRIOR)]
        if "eps" in self.fns:
            note = f"The data at t = {self.eps / 10:g} in place of {self.eps:g}."
            table.append(_row("eps", "Truncation at eps", rows["eps_bpd"] - first, note))
        note = f"rtol {self.rtol:g}, atol {self.atol:g} in place of {e.rtol:g}, {e.atol:g}."
        table += [
            _row("tolerance", "ODE tolerance", rows["tolerance_bpd"] - first, note),
            self._trace_row(rows["ode_error"].mean(axis=1)),
            *self._dequantization_rows(rows),
            _row("elbo", "ELBO in place of the ODE", rows["elbo_bpd"] - first, _ELBO),
        ]
        return [{**row, "alternative": reference + row["value"]} for row in table]

    def _trace_row(self, errors: np.ndarray) -> dict[str, Any]:
        """No change on average; the error is what the probes leave in the mean over the images."""
        name = self.bits.config.eval.hutchinson_type
        note = "The trace is exact."
        if self.stochastic:
            note = f"No bias; the error of the mean over the images by {self.probes} {name} probes."
        row = _row("trace", "Trace noise", np.zeros(1), note)
        return {**row, "standard_error": error_of_mean(errors)}

    def _dequantization_rows(self, rows: Arrays) -> list[dict[str, Any]]:
        dim, samples = self.bits.dim, rows["ode_bpd"]
        uniform, count = samples.mean(axis=1), samples.shape[1]

        def weighted(name: str, label: str, bits: np.ndarray, note: str):
            return _row(name, label, importance_weighted(bits, dim) - uniform, note)

        note = (
            f"{count} uniform dequantisations in one importance-weighted bound in place of a mean: "
            "so much of the gap to the image's own probability."
        )
        found = [weighted("importance_weighting", "Dequantisation", samples, note)]
        if self.variational:
            others = rows["variational"]
            found += [
                _row("variational", "Variational dequantisation", others.mean(axis=1) - uniform,
                     "In place of uniform."),
                weighted("variational_importance_weighting", "Variational, importance-weighted",
                         others, f"{count} of them in one importance-weighted bound."),
            ]  # fmt: skip
        return found


_PRIOR = (
    "Scoring x_T by its own distribution p_T in place of the prior: at most so much, "
    "by E KL(N(α_T x, σ_T²) ‖ π), which bounds KL(p_T ‖ π)."
)
_ELBO = (
    "The bound belongs to the reverse SDE, and to the image itself rather than at eps; the "
    "reference to the ODE. For a trained network these are two models: no theorem orders them."
)


def _of(name: str, rows: Arrays) -> Arrays:
    """The columns of one estimator, under their own names."""
    return {k.removeprefix(f"{name}_"): v for k, v in rows.items() if k.startswith(f"{name}_")}


def _row(name: str, label: str, change: np.ndarray, note: str) -> dict[str, Any]:
    found = mean_and_error(change)
    value, error = found["mean"], found["standard_error"]
    return {"name": name, "label": label, "value": value, "standard_error": error, "note": note}


def table(gaps: dict[str, Any]) -> str:
    """The report as lines of text."""
    reference = gaps["reference"]
    lines = [
        f"where the bits go, on {gaps['images']} images: {reference['mean']:.4f} ± "
        f"{_plain(reference['standard_error'], 4)} bits/dim, and what would change"
    ]
    width = max(len(row["label"]) for row in gaps["rows"])
    lines += [
        f"  {row['label']:<{width}}  {row['value']:+.6f} ± {_plain(row['standard_error'], 6)}"
        for row in gaps["rows"]
    ]
    return "\n".join(lines)


def _plain(error: float | None, digits: int) -> str:
    return "?" if error is None else f"{error:.{digits}f}"
