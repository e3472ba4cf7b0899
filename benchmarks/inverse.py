"""Every solver of inverse problems against posteriors in closed form.

    python -m benchmarks.inverse              # minutes on one core
    python -m benchmarks.inverse --quick      # seconds: few steps, few samples

Leaves inverse.csv, inverse.md and inverse_gaussian.png in --output; --publish puts the tables into
docs/inverse_problems.md, between its markers, and the picture into assets/. --redraw makes them
from the CSV of an earlier run.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sde_lib
from benchmarks import inverse_report as report
from benchmarks.inverse_beds import (
    GaussianBed,
    MixtureBed,
    distance,
    exact_noise,
    moments,
    rows_for,
    stationary,
    total_variation,
)
from controllable_generation_methods import get_inverse_solver, load_inverse_solvers
from operators import Mask, Operator, get_operator

ROOT = Path(__file__).resolve().parent.parent
COV2 = torch.tensor([[1.0, 0.54], [0.54, 0.36]], dtype=torch.float64)
MEAN2 = torch.tensor([0.4, -0.7], dtype=torch.float64)
IMAGE = (1, 4, 4)


class Row(NamedTuple):
    case: str
    method: str
    metric: str
    value: float


# --- the cases ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Gaussian data, σ_y, and a measurement: `value` where one is given, else of a sample."""

    name: str
    bed: GaussianBed
    operator: Operator
    noise: float
    value: float | None = None

    @property
    def y(self) -> torch.Tensor:
        if self.value is not None:
            return torch.full((1, *self.operator.shape_out), self.value, dtype=torch.float64)
        g = torch.Generator().manual_seed(1)
        z = torch.randn(self.bed.d, generator=g, dtype=torch.float64)
        root = self.bed.vectors * self.bed.values.clamp(min=0).sqrt()
        x = self.bed.mean.reshape(-1) + root @ z
        y = self.operator(x.reshape(1, *self.bed.shape))
        return y + self.noise * torch.randn(y.shape, generator=g, dtype=torch.float64)

    @property
    def std(self) -> float:
        """c of ΠGDM: the data's standard deviation, as a user would measure it."""
        return self.bed.cov.diagonal().mean().sqrt().item()


def cases(sde) -> list[Case]:
    points = GaussianBed(sde, MEAN2, COV2)
    first = Mask((2,), torch.tensor([1.0, 0.0]))
    zero = torch.zeros(IMAGE)
    spread = torch.linspace(0.2, 0.8, 16, dtype=torch.float64)
    beds = {
        "isotropic": GaussianBed(sde, zero, 0.5 * torch.eye(16)),
        "independent": GaussianBed(sde, zero, torch.diag(spread)),
        "correlated": GaussianBed(sde, zero, stationary(IMAGE, 1.0, 0.5)),
    }
    known = Mask(IMAGE, torch.tensor([[1.0, 1, 0, 0]] * 4))
    sensing = get_operator("compressed_sensing", IMAGE, ratio=0.375)
    pool = get_operator("superres", IMAGE, factor=2)
    blur = get_operator("deblur_gaussian", IMAGE, std=0.8, size=3)
    return [
        Case("points, one known, σ_y = 0.3", points, first, 0.3, 1.9),
        Case("points, one known, σ_y = 0", points, first, 0.0, 1.9),
        Case("independent pixels, half known, σ_y = 0", beds["independent"], known, 0.0),
        Case("isotropic, sensing, σ_y = 0.2", beds["isotropic"], sensing, 0.2),
        Case("correlated, half known, σ_y = 0", beds["correlated"], known, 0.0),
        Case("correlated, half known, σ_y = 0.2", beds["correlated"], known, 0.2),
        Case("correlated, pooled by 2, σ_y = 0.2", beds["correlated"], pool, 0.2),
        Case("correlated, blurred, σ_y = 0.2", beds["correlated"], blur, 0.2),
        Case("correlated, sensing, σ_y = 0.2", beds["correlated"], sensing, 0.2),
    ]


# --- the methods ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a method is run.

    Args:
      options: of the method.
      steps: times of the grid.
      draws: draws of noise a step, at most, for methods whose steps are affine in state and noise,
        whose law is then exact; 0 where there is none, None for Monte Carlo.
      samples: of Monte Carlo.
    """

    options: dict = field(default_factory=dict)
    steps: int = 200
    draws: int | None = 1
    samples: int = 5_000


FLOW = {"predictor": "dpmpp_3m"}
SETTINGS: dict[str, Setting] = {
    "replacement": Setting(draws=2),
    "projection": Setting(draws=2),
    "repaint": Setting(steps=100, draws=None, samples=2000),
    "ddrm": Setting(),
    "ddnm": Setting(),
    "dps": Setting({"predictor": "euler_maruyama"}, steps=400, draws=None, samples=1500),
    "pigdm": Setting(FLOW, 100, None),
    "tmpd": Setting(FLOW, 100, None),
    "mmps": Setting(FLOW, 100, 0),
    "smc": Setting(draws=None),  # as many particles as samples
}
ZETAS = (0.01, 0.03, 0.1, 0.3)


def options_for(method: str, case: Case) -> list[dict[str, Any]]:
    """What the method is tuned over: one choice, but for DPS, whose best ζ is reported."""
    if method == "dps":
        return [{"zeta": zeta} for zeta in ZETAS]
    if method == "pigdm" or method == "smc":
        return [{"data_std": case.std}]
    if method == "mmps":
        return [{"iterations": 2 * case.bed.d, "tol": 1e-9}]
    return [{}]


def law(method: str, case: Case, tuned: dict, quick: bool):
    """Mean and covariance of what the method draws."""
    setting = SETTINGS[method]
    steps = 30 if quick else setting.steps
    d, draws = case.bed.d, setting.draws
    exact = draws is not None
    n = rows_for(d, draws * steps + 2) if exact else (500 if quick else setting.samples)
    given = {**setting.options, **tuned, "noise": case.noise, "steps": steps}
    given["dtype"] = torch.float64
    if method != "dps":
        given["schedule"] = "logsnr"
    if not exact:
        given["generator"] = torch.Generator().manual_seed(0)
    maker = get_inverse_solver(method)
    sampler = maker(case.bed.sde, (n, *case.bed.shape), case.operator, case.y, **given)
    if not exact:
        x = sampler(case.bed.score_fn)[0]
        return moments(x[torch.isfinite(x.flatten(1)).all(1)])
    with exact_noise(n):
        return moments(sampler(case.bed.score_fn)[0])


def gaussian_rows(quick: bool, tell: Callable) -> Iterator[Row]:
    for case in cases(sde_lib.VPSDE()):
        truth = case.bed.posterior(case.operator, case.y, case.noise)
        for method in methods():
            tell(f"{method}: {case.name}")
            if method == "smc" and case.noise == 0:
                continue
            results = [
                (tuned, law(method, case, tuned, quick)) for tuned in options_for(method, case)
            ]
            scored = [(distance(*found, *truth), tuned, found) for tuned, found in results]
            (off, low, high), tuned, found = min(scored, key=lambda s: _badness(s[0]))
            for metric, value in (("mean", off), ("low", low), ("high", high), *tuned.items()):
                yield Row(case.name, method, metric, float(value))
            if case.bed.d == 2:
                yield from _ellipse(case.name, method, *found)
        if case.bed.d == 2:
            yield from _ellipse(case.name, "truth", *truth)
            yield from _ellipse(case.name, "prior", case.bed.mean, case.bed.cov)
            yield Row(case.name, "y", "y", case.y.item())


def _badness(measured) -> float:
    mean, low, high = measured
    if not all(math.isfinite(v) for v in measured):
        return math.inf
    return mean + abs(math.log(max(low, 1e-9))) + abs(math.log(max(high, 1e-9)))


def _ellipse(case: str, method: str, mean, cov) -> Iterator[Row]:
    for name, value in zip(("m0", "m1"), mean, strict=True):
        yield Row(case, method, name, float(value))
    for name, value in (("c00", cov[0, 0]), ("c01", cov[0, 1]), ("c11", cov[1, 1])):
        yield Row(case, method, name, float(value))


# --- a mixture ------------------------------------------------------------------------------


def mixture_rows(quick: bool, tell: Callable) -> Iterator[Row]:
    """Total variation between samples and the posterior of a three-part mixture."""
    sde, n = sde_lib.VPSDE(), 500 if quick else 10_000
    bed = MixtureBed(
        sde,
        torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.3]]),
        torch.tensor([0.25, 0.25, 0.4]),
        torch.tensor([0.2, 0.5, 0.3]),
    )
    A = Slanted()
    y = torch.tensor([[0.3]], dtype=torch.float64)
    edges = torch.linspace(-2.5, 2.5, 26, dtype=torch.float64)
    for noise in (0.5, 0.1):
        name = f"mixture, σ_y = {noise:g}"
        truth = bed.posterior(A, y, noise)
        exact = _draw(truth, n)
        yield Row(name, "exact samples", "tv", total_variation(exact, None, truth, edges))
        for method in methods():
            tell(f"{method}: {name}")
            tuned = [{"zeta": zeta} for zeta in ZETAS] if method == "dps" else [{}]
            drawn = (_points(method, extra, bed, A, y, noise, quick) for extra in tuned)
            best = min(total_variation(x, None, truth, edges) for x in drawn)
            yield Row(name, method, "tv", best)


def _points(method: str, tuned: dict, bed, operator, y, noise: float, quick: bool):
    """Samples of the method, (n, 2)."""
    setting, n = SETTINGS[method], 500 if quick else 10_000
    given = {**setting.options, **tuned, "noise": noise}
    given["steps"] = 30 if quick else min(setting.steps, 200)
    given["generator"] = torch.Generator().manual_seed(0)
    if method != "dps":
        given["schedule"] = "logsnr"
    return get_inverse_solver(method)(bed.sde, (n, 2), operator, y, **given)(bed.score_fn)[0]


class Slanted(Operator):
    """One number of a point: 0.8 x_1 + 0.6 x_2."""

    def __init__(self):
        super().__init__((2,), (1,))

    def forward(self, x):
        return 0.8 * x[:, :1] + 0.6 * x[:, 1:]

    def transpose(self, y):
        return torch.cat([0.8 * y, 0.6 * y], 1)


def _draw(mixture, n: int) -> torch.Tensor:
    weights, means, covs = mixture
    g = torch.Generator().manual_seed(2)
    k = torch.multinomial(weights, n, replacement=True, generator=g)
    roots = torch.linalg.cholesky(covs)
    z = torch.randn(n, 2, generator=g, dtype=torch.float64)
    return means[k] + torch.einsum("nij,nj->ni", roots[k], z)


# --- the command ------------------------------------------------------------------------------


def methods() -> list[str]:
    """The solvers that are registered, in the order of SETTINGS."""
    there = load_inverse_solvers()
    return [name for name in SETTINGS if name in there]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inverse", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=ROOT / "runs/inverse")
    parser.add_argument("--quick", action="store_true", help="seconds: few steps, few samples")
    parser.add_argument("--redraw", action="store_true", help="from the CSV in --output")
    parser.add_argument("--publish", action="store_true", help="write docs/ and assets/ as well")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    table = args.output / "inverse.csv"
    if args.redraw:
        with open(table, newline="") as file:
            rows = [Row(c, m, k, float(value)) for c, m, k, value in list(csv.reader(file))[1:]]
    else:
        rows = _run(args.quick)
        with open(table, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(rows)
    report.plot(rows, args.output / "inverse_gaussian.png")
    text = report.tables(rows)
    (args.output / "inverse.md").write_text(text)
    print(text)
    print(f"{args.output / 'inverse.md'}, inverse_gaussian.png and inverse.csv")
    if args.publish:
        report.insert(ROOT / "docs/inverse_problems.md", text)
        shutil.copy(args.output / "inverse_gaussian.png", ROOT / "assets/inverse_gaussian.png")


def _run(quick: bool) -> list[Row]:
    start = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {what}", file=sys.stderr, flush=True)

    return [*gaussian_rows(quick, tell), *mixture_rows(quick, tell)]


if __name__ == "__main__":
    main()
