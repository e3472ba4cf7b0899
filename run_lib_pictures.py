"""Figures of a network trained on points: its score, its marginals, its ways from noise."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import evaluation_points
import sampling
import sde_lib
import visualize
import visualize_plane
from data_lib_points import get_density
from models.utils import get_score_fn
from run_lib_journal import log
from run_lib_samples import Sampler
from run_lib_shards import UNREADABLE
from visualize_points import HALF_SIDE

#: Cells along a side of an exact heat map, and of a histogram; arrows along a side of a field.
CELLS, BINS, ARROWS = 100, 60, 13
#: Points whose ways are drawn, steps of a way, and λ_H of the members of the plug-in family shown.
PATHS, STEPS, FAMILY = 5, 100, (0.0, 0.5, 0.9, 1.0)
#: Points of the model's marginals, steps of its ODE towards them, and the seed of what is random.
SAMPLES, ODE_STEPS, SEED = 10_000, 30, 0
#: Noise levels σ/α of fields, of marginals beside the last one, and where ways begin: those above
#: are all alike.
LEVELS, MARGINALS, TOP = (0.1, 0.5), (3.0, 1.0, 0.3, 0.1), 20.0
#: Points, and the moments, as shares of log steps, at which a Langevin sampler is shown.
LANGEVIN_POINTS, MOMENTS = 2000, (0.0, 0.25, 0.5, 0.75, 1.0)

_UNIT = " Points are divided by √(α² + σ²), so that noise fills the square of the data."


class Picture(NamedTuple):
    """A figure: a function that draws it, and a caption of a sentence or two."""

    draw: Callable[[], Any]
    caption: str


class Pictures:
    """The figures of one network, by name; each is drawn when it is asked for.

    A network of one noise level (`training.sigma`) has its score there, and the steps of its
    sampler; others are shown at all levels, and so are their ways and marginals.
    """

    def __init__(self, config, sde, model):
        sampler = Sampler(config, sde, model)
        self.config, self.sde, self.model = config, sampler.process, sampler.told({})
        self.density = get_density(config)
        self.eps = sampler.eps
        self.continuous = config.training.continuous
        self.score_fn = get_score_fn(self.sde, self.model, train=False, continuous=self.continuous)
        self.grid = evaluation_points.grid(HALF_SIDE, CELLS)[0]
        self.log_p = self.density.log_density(self.grid)

    def pictures(self) -> dict[str, Picture]:
        """The figures that make sense for this network, by name."""
        score = Picture(
            self.fields,
            "The learned score and the exact one, times σ, over the density at that noise level; "
            "the length of an arrow is asinh of its size.",
        )
        if self.config.training.sigma:
            steps = Picture(
                self.langevin,
                "Langevin dynamics at the one noise level, from their start: after so many steps.",
            )
            return {"score": score, "steps": steps}
        marginals = Picture(
            self.marginals,
            "The marginals p_t, and histograms of the model's points on their way by the "
            "probability-flow ODE." + _UNIT,
        )
        paths = Picture(
            self.paths,
            "Ways from data to noise and back, from circles to dots; below, their first coordinate "
            "over the exact marginals, as the noise level rises or falls." + _UNIT,
        )
        family = Picture(
            self.family,
            "The plug-in reverse SDEs from λ = 0, the reverse SDE, to λ = 1, the probability-flow "
            "ODE: other ways, the same marginals (Huang et al. 2021)." + _UNIT,
        )
        return {"score": score, "marginals": marginals, "paths": paths, "family": family}

    # --- one figure each ------------------------------------------------------------------

    @torch.no_grad()
    def fields(self):
        """σ s of the network and of the truth, at one or two noise levels."""
        places = evaluation_points.grid(HALF_SIDE, ARROWS)[0]
        fields, below = {}, {}
        for level in self._levels():
            alpha, sigma, t = self._at_level(level)
            x = alpha * places
            score = self.score_fn(x.float().to(self.config.device), self._times(t, len(x)))
            exact = self.density.score(x, alpha, sigma)
            log_p = self.density.log_density(alpha * self.grid, alpha, sigma)
            for name, field in (("learned", score.double().cpu()), ("exact", exact)):
                fields[f"{name}, σ/α = {level:g}"] = sigma * field
                below[f"{name}, σ/α = {level:g}"] = log_p
        return visualize_plane.field_panels(below, places, fields, unit=0.5)

    def marginals(self):
        """p_t, and the histogram of the model's points at t, of x_t/√(α² + σ²), as noise falls."""
        end = self._level(self.eps)
        top = self._level(float(self.sde.T))
        chosen = [self._at_level(level)[2] for level in MARGINALS if 1.5 * end < level < top]
        chosen.append(self.eps)
        grid = sorted({*self._grid(ODE_STEPS), *chosen}, reverse=True)
        states, times, _ = self._way("dpmpp_2m", SAMPLES, grid)
        return visualize_plane.density_rows(
            {
                "exact": [self._marginal(t) for t in chosen],
                "model": [_smooth(states[times.index(t)], self._blur(t)) for t in chosen],
            },
            [f"σ/α = {self._level(t):.2g}" for t in chosen],
        )

    def paths(self):
        """Ways from data to noise, and back by the reverse SDE and by the probability-flow ODE."""
        return self._panels(
            {
                "forward SDE": self._forward(),
                "reverse SDE": self._member(0.0),
                "probability-flow ODE": self._member(1.0),
            }
        )

    def family(self):
        """Members of the plug-in family, all from the same points."""
        names = {0.0: "λ = 0 (SDE)", 1.0: "λ = 1 (ODE)"}
        return self._panels({names.get(m, f"λ = {m:g}"): self._member(m) for m in FAMILY})

    def langevin(self):
        """Points of the run's own sampler after 1 step, all steps, and between."""
        track = sampling.Trajectory()
        sampling.get_sampling_fn(
            self.config, self.sde, (LANGEVIN_POINTS, 2), lambda x: x, self.eps,
            generator=_seeded(), callback=track,
        )(self.model)  # fmt: skip
        states = track.states
        steps = sorted({round(len(states) ** share) for share in MOMENTS})
        shown = {f"{n} step" + "s" * (n > 1): states[n - 1] for n in steps}
        return visualize_plane.points_panels(shown, log_density=self.log_p)

    # --- times ----------------------------------------------------------------------------

    def _coefficients(self, t: float) -> tuple[float, float]:
        alpha, sigma = sde_lib.alpha_sigma(self.sde, torch.tensor(t, dtype=torch.float64))
        return float(alpha), float(sigma)

    def _level(self, t: float) -> float:
        alpha, sigma = self._coefficients(t)
        return sigma / alpha

    def _size(self, t: float) -> float:
        return math.hypot(*self._coefficients(t))

    def _times(self, t: float, n: int) -> torch.Tensor:
        return torch.full((n,), t, device=self.config.device)

    def _grid(self, steps: int) -> list[float]:
        """Falling times, even in the logarithm of the noise level, from T or TOP to eps."""
        low, high = sde_lib.lambda_range(self.sde, self.eps)
        inner = torch.linspace(max(low, -math.log(TOP)), high, steps, dtype=torch.float64)[1:-1]
        times = sde_lib.time_of_half_log_snr(self.sde, inner).tolist()
        first = float(self.sde.T) if low >= -math.log(TOP) else self._at_level(TOP)[2]
        return [first, *times, self.eps]

    def _blur(self, t: float) -> float:
        """A width much smaller than that of the noise in x_t/√(α² + σ²)."""
        return 0.35 * self._coefficients(t)[1] / self._size(t)

    def _levels(self) -> list[float]:
        """Noise levels of fields: the trained one, or LEVELS that sampling goes through."""
        if self.config.training.sigma:
            return [self.config.training.sigma]
        low, high = sorted(sde_lib.lambda_range(self.sde, self.eps))
        return [level for level in LEVELS if low <= -math.log(level) <= high]

    def _at_level(self, level: float) -> tuple[float, float, float]:
        lam = torch.tensor(-math.log(level), dtype=torch.float64)
        t = float(sde_lib.time_of_half_log_snr(self.sde, lam))
        return (*self._coefficients(t), t)

    # --- ways -----------------------------------------------------------------------------

    def _panels(self, ways: dict[str, tuple[torch.Tensor, list[float]]]):
        """Ways in the plane, and their first coordinate on its exact density over noise levels."""
        over = {}
        for name, (_, times) in ways.items():
            p = torch.stack([torch.exp(self._marginal(t, BINS)) for t in times])
            p = p.reshape(len(times), BINS, BINS).sum(dim=1)  # rows are of x_2
            over[name] = ([self._level(t) for t in times], p)
        states = {name: states for name, (states, _) in ways.items()}
        return visualize_plane.path_panels(states, log_density=self.log_p, over=over)

    @functools.cache  # noqa: B019  (an object of one evaluation)
    def _marginal(self, t: float, cells: int = 0) -> torch.Tensor:
        """log p_t of x_t/√(α² + σ²), but for a constant, on `cells`² cells, by default `grid`."""
        alpha, sigma = self._coefficients(t)
        grid = evaluation_points.grid(HALF_SIDE, cells)[0] if cells else self.grid
        return self.density.log_density(self._size(t) * grid, alpha, sigma)

    def _unit(self, states: torch.Tensor, times: list[float]) -> torch.Tensor:
        """States (T, n, 2) divided by √(α² + σ²) of their times."""
        sizes = torch.tensor([self._size(t) for t in times], dtype=torch.float64)
        return states.double() / sizes[:, None, None]

    def _forward(self) -> tuple[torch.Tensor, list[float]]:
        """Exact steps of the forward process: x_s | x_t ~ N((α_s/α_t) x, σ_s² − (α_s σ_t/α_t)²)."""
        generator = _seeded()
        times = self._grid(STEPS)[::-1]
        x, states = self.density.sample(PATHS, 2).double(), []
        before = (1.0, 0.0)
        for t in times:
            alpha, sigma = self._coefficients(t)
            ratio = alpha / before[0]
            spread = max(sigma**2 - (ratio * before[1]) ** 2, 0.0) ** 0.5
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x, before = ratio * x + spread * noise, (alpha, sigma)
            states.append(x)
        return self._unit(torch.stack(states), times), times

    @functools.cache  # noqa: B019
    def _member(self, lam: float) -> tuple[torch.Tensor, list[float]]:
        """Ways of the member λ_H of the plug-in family, its noise τ = √(1 − λ_H), and their times;
        the ODE in second order."""
        times = self._grid(STEPS)
        if lam == 1.0:
            states, times, samples = self._way("dpmpp_2m", PATHS, times)
        else:
            tau = (1 - lam) ** 0.5
            states, times, samples = self._way("tau_exponential", PATHS, times, tau=tau)
        return torch.cat([states[:-1], self._unit(samples[None], times[-1:])]), times

    def _way(self, name: str, n: int, times: list[float], **options):
        """States (T, n, 2) of a predictor at the falling `times` (T,), divided by √(α² + σ²); the
        times; and the samples (n, 2), the mean of the last call, as they are."""
        track, predictor = sampling.Trajectory(), sampling.get_predictor(name)
        first: list[torch.Tensor] = []

        def start(x):  # the prior, made smaller where the ways begin after it
            first.append(x * self._size(times[0]) / self._size(float(self.sde.T)))
            return first[0]

        sampler = sampling.get_pc_sampler(
            self.sde, (n, 2), functools.partial(predictor, **options) if options else predictor,
            None, lambda x: x, 0.0, eps=self.eps, continuous=self.continuous, steps=len(times),
            schedule=lambda *_: torch.tensor(times, dtype=torch.float64), generator=_seeded(),
            device=self.config.device, callback=track, start=start,
        )  # fmt: skip
        samples, _ = sampler(self.model)
        states = torch.cat([first[0][None].cpu(), track.states[:-1]])
        return self._unit(states, times), times, samples.cpu()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _smooth(x: torch.Tensor, width: float) -> torch.Tensor:
    """The logarithm of a histogram of points (n, 2) on the square, blurred by `width`."""
    counts = np.histogram2d(x[:, 1].numpy(), x[:, 0].numpy(), BINS, [[-HALF_SIDE, HALF_SIDE]] * 2)[
        0
    ]
    places = torch.arange(BINS, dtype=torch.float64)
    cells = max(width * BINS / (2 * HALF_SIDE), 0.4)
    bell = torch.exp(-((places[:, None] - places) ** 2) / (2 * cells**2))
    return torch.log(bell @ torch.from_numpy(counts) @ bell.T)


# --- writing ----------------------------------------------------------------------------------


def write_pictures(
    config, sde, model, stem: Path, likelihoods: Path | None = None
) -> dict[str, str]:
    """Draw the figures of a network on points, and write them as `stem`_<name>.png.

    A figure that cannot be drawn is logged with the reason and left out: numbers are not lost.

    Args:
      likelihoods: a file of `run_lib_toys.Likelihoods`, whose log-densities are drawn too.

    Returns: captions, by name, of those that were written.
    """
    pictures = Pictures(config, sde, model).pictures()
    if likelihoods is not None:
        pictures["likelihood"] = Picture(
            functools.partial(likelihood_map, likelihoods),
            "The exact log-density, the model's by the probability-flow ODE, and their difference "
            "where there are data.",
        )
    captions = {}
    for name, (draw, caption) in pictures.items():
        try:
            save_figure(draw(), Path(f"{stem}_{name}.png"))
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, *UNREADABLE):
            log.exception("the figure %r could not be drawn; the numbers are complete", name)
        else:
            captions[name] = caption
    return captions


def likelihood_map(path: Path):
    """The log-densities in a file that `run_lib_toys.Likelihoods` wrote."""
    with np.load(path) as file:
        log_p, log_q, half_side = file["log_p"], file["log_q"], float(np.abs(file["grid"]).max())
    cells = math.isqrt(len(log_p))
    return visualize_plane.log_density_panels(
        log_p, log_q, half_side=half_side * cells / (cells - 1)
    )


def save_figure(figure, path: Path, dpi: int = 130) -> None:
    """Write a matplotlib figure to `path` as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    visualize.write_atomic(path, buffer.getvalue())
