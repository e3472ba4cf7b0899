"""Quality against evaluations: 2-D mixtures with exact scores, and a trained network of digits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import checkpoints
import data_lib
import run_lib
import sampling
import sde_lib
import solvers_adaptive
from benchmarks.solver_beds import Member, Mixture, members, processes, sliced_wasserstein
from configs.validation import complete
from evaluation import frechet_distance_from_samples
from models.utils import get_score_fn
from randomness import seed_for

#: The solvers compared; the order table has them all.
CHOSEN = (
    *("euler_maruyama", "ancestral_sampling", "ddim", "heun", "dpm_solver_2", "dpm_solver_3"),
    *("dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "exp_ab data 3", "exp_ab noise 3", "unipc 2", "unipc 3"),
    *("edm churn 10", "dpmpp_2m_sde", "sa_solver"),
)
#: By solver: tolerances in the place of numbers of steps.
ADAPTIVE: dict[str, tuple[Callable, tuple[float, ...], bool]] = {
    "dpm_solver_adaptive": (
        solvers_adaptive.get_dpm_solver_adaptive,
        (1.0, 0.5, 0.2, 0.1, 0.05, 0.01),
        False,
    ),
    "gotta_go_fast": (solvers_adaptive.get_gotta_go_fast, (0.5, 0.2, 0.1, 0.05), True),
}
MIXTURES = ("VP", "sub-VP", "VE", "cosine", "EDM", "rectified flow")


class Row(NamedTuple):
    """One line of the CSV: of bed 'orders', 'agreement', 'mixture' or 'digits', or 'about'."""

    bed: str
    process: str
    solver: str
    stochastic: bool
    schedule: str
    nfe: int
    seed: int
    metric: str
    value: float


def chosen() -> list[Member]:
    """The fixed-step solvers compared."""
    known = {m.label: m for m in members()}
    return [known[label] for label in CHOSEN]


def steps_for(nfe: int, per_step: int) -> int:
    """Times of a grid of at most `nfe` evaluations, the last of which is at eps."""
    return max((nfe - 1) // per_step, 1) + 1


def schedule_of(process: str, member: Member) -> str:
    """As published: uniform times for score_sde's predictors and on EDM's process, whose time is
    made for it; Karras's times for their methods; else equal steps in λ."""
    if member.label in ("euler_maruyama", "ancestral_sampling") or process == "EDM":
        return "uniform"
    return "karras" if member.label in ("heun", "edm churn 10") else "logsnr"


# --- 2-D mixtures ---------------------------------------------------------------------------


def mixture_rows(nfes, points: int, tell: Callable) -> Iterator[Row]:
    """Every process and chosen solver on eight narrow Gaussians, scores exact."""
    every = processes()
    for process in MIXTURES:
        sde = every[process]
        bed = Mixture.ring(sde)
        generator = torch.Generator().manual_seed(0)
        x_T = sampling.NoiseSource(generator).prior(sde, (points, 2)).double()
        eps = torch.tensor(sde.sampling_eps, dtype=torch.float64)
        exact = bed.flow(x_T, torch.tensor(float(sde.T)).double(), eps)
        data, other = bed.sample(points, seed=1), bed.sample(points, seed=2)
        floor = sliced_wasserstein(data, other)
        yield Row("mixture", process, "data", True, "", 0, 0, "sliced_wasserstein", floor)
        for member in chosen():
            for nfe in nfes:
                tell(f"mixture, {process}, {member.label}, {nfe} evaluations")
                yield from _mixture_run(bed, process, member, nfe, exact, data)


def _mixture_run(bed: Mixture, process: str, member: Member, nfe: int, exact, data):
    sde, probe = bed.sde, member.probe(bed.sde)
    schedule = schedule_of(process, member)
    states = sampling.Trajectory(every=1)
    sampler = sampling.get_pc_sampler(
        sde,
        exact.shape,
        member.make,
        None,
        lambda x: x,
        0.0,
        eps=sde.sampling_eps,
        steps=steps_for(nfe, probe.nfe_per_step),
        schedule=schedule,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
        callback=states,
    )
    x, used = sampler(bed.score_fn())
    row = functools.partial(
        Row, "mixture", process, member.label, probe.stochastic, schedule, used, 0
    )
    yield row("sliced_wasserstein", sliced_wasserstein(x, data))
    if not probe.stochastic:  # the state at eps, before its last denoising
        error = (states.states[-1] - exact).square().sum(1).mean().sqrt()
        yield row("error", float(error))


# --- digits ---------------------------------------------------------------------------------


class Digits:
    """A trained network of scikit-learn's digits, and the Fréchet distance of its samples.

    Args:
      workdir: of a run of configs/vp/digits_ddpmpp_continuous.py.
      samples: a seed, and seeds.
    """

    def __init__(self, workdir: Path, samples: int, seeds: int):
        self.config = complete(digits_config())
        state = run_lib.create_state(self.config)
        path = newest_checkpoint(workdir)
        checkpoints.restore_checkpoint(path, state, self.config.device)
        state["ema"].copy_to(state["model"].parameters())
        self.step = int(state["step"])
        self.sde: Any = sde_lib.get_sde(self.config)
        self.model = state["model"].eval()
        self.inverse_scaler = data_lib.get_data_inverse_scaler(self.config)
        self.count, self.seeds = samples, seeds
        sets = data_lib.get_image_sets(self.config)
        images = [s.take(range(len(s))) for s in sets]
        self.real = torch.cat(images).double().reshape(-1, 64) / (self.config.data.levels - 1)

    @property
    def shape(self):
        return (self.count * self.seeds, 1, 8, 8)

    def noise(self) -> list[int]:
        """Seeds of all samples; those of one seed of the benchmark follow one another."""
        return [seed_for(k, "digits", i) for k in range(self.seeds) for i in range(self.count)]

    def distances(self, sampler: Callable) -> tuple[list[float], list[float], int]:
        """By seed: Fréchet and sliced Wasserstein distance to the real digits; evaluations."""
        score_fn = get_score_fn(self.sde, self.model, continuous=True)
        samples, nfe = sampler(score_fn)
        levels = data_lib.quantize(self.inverse_scaler(samples), self.config)
        unit = levels.double().reshape(self.seeds, self.count, 64) / (self.config.data.levels - 1)
        chosen = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        some = self.real[chosen[: self.count]]
        frechet = [frechet_distance_from_samples(part, self.real) for part in unit]
        return frechet, [sliced_wasserstein(part, some) for part in unit], nfe

    def reference(self, steps: int) -> Callable:
        """The PC sampler of the run's configuration, at `steps` steps."""
        s = self.config.sampling
        return sampling.get_pc_sampler(
            self.sde,
            self.shape,
            sampling.get_predictor(s.predictor),
            sampling.get_corrector(s.corrector),
            lambda x: x,
            s.snr,
            n_steps=s.n_steps_each,
            steps=steps,
            seeds=self.noise(),
            eps=self.sde.sampling_eps,
        )

    def fixed(self, member: Member, nfe: int) -> Callable:
        """A solver at about `nfe` evaluations."""
        return sampling.get_pc_sampler(
            self.sde,
            self.shape,
            member.make,
            None,
            lambda x: x,
            0.0,
            steps=steps_for(nfe, member.probe(self.sde).nfe_per_step),
            schedule=schedule_of("VP", member),
            seeds=self.noise(),
            eps=self.sde.sampling_eps,
        )

    def adaptive(self, make: Callable, rtol: float) -> Callable:
        """An adaptive sampler at a relative tolerance."""
        return make(self.sde, self.shape, lambda x: x, rtol=rtol, seeds=self.noise())


def digit_rows(bed: Digits, nfes, reference_steps: int, tell: Callable) -> Iterator[Row]:
    """The PC sampler of the configuration at many steps, and every solver at few."""
    s = bed.config.sampling
    pair = f"{s.predictor} + {s.corrector}, {reference_steps} steps"
    tell(f"digits, {pair}")
    yield from _digit_rows(
        bed, "reference: " + pair, True, "uniform", bed.reference(reference_steps)
    )
    for member in chosen():
        probe = member.probe(bed.sde)
        for nfe in nfes:
            tell(f"digits, {member.label}, {nfe} evaluations")
            # The ODE's solvers have converged by then.
            if steps_for(nfe, probe.nfe_per_step) < 3 or (nfe > 50 and not probe.stochastic):
                continue
            yield from _digit_rows(
                bed,
                member.label,
                probe.stochastic,
                schedule_of("VP", member),
                bed.fixed(member, nfe),
            )
    for label, (make, tolerances, stochastic) in ADAPTIVE.items():
        for rtol in tolerances:
            tell(f"digits, {label}, rtol {rtol:g}")
            sampler = bed.adaptive(make, rtol)
            yield from _digit_rows(bed, label, stochastic, f"rtol {rtol:g}", sampler)


def _digit_rows(bed: Digits, label: str, stochastic: bool, schedule: str, sampler: Callable):
    frechet, wasserstein, nfe = bed.distances(sampler)
    for name, values in (("frechet", frechet), ("sliced_wasserstein", wasserstein)):
        for seed, value in enumerate(values):
            yield Row("digits", "VP", label, stochastic, schedule, nfe, seed, name, value)


def digits_config():
    """The configuration of the demo."""
    from configs.vp import digits_ddpmpp_continuous

    return digits_ddpmpp_continuous.get_config()


def newest_checkpoint(workdir: Path) -> Path:
    """The run's last checkpoint; it is trained first where there is none."""
    folder = workdir / "checkpoints"
    config = complete(digits_config())
    if not list(folder.glob("checkpoint_*.pth")):
        print(f"no checkpoint in {folder}: training the digits model there first, for minutes")
        run_lib.train(config, workdir)
    return folder / f"checkpoint_{run_lib.find_checkpoints(config, workdir)[-1]}.pth"


# --- what the numbers say -------------------------------------------------------------------


class Summary(NamedTuple):
    """Mean over seeds and its standard error."""

    nfe: int
    mean: float
    error: float


def summarise(rows, bed: str, metric: str) -> dict[str, list[Summary]]:
    """By solver: mean and standard error at each number of evaluations, rising."""
    values: dict[str, dict[tuple, list[float]]] = {}
    for r in rows:
        if r.bed == bed and r.metric == metric:
            values.setdefault(r.solver, {}).setdefault((r.nfe, r.schedule), []).append(r.value)
    return {
        solver: [
            Summary(nfe, *_mean_and_error(torch.tensor(found, dtype=torch.float64)))
            for (nfe, _), found in sorted(by_nfe.items())
        ]
        for solver, by_nfe in values.items()
    }


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    spread = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), spread


def reaches(point: Summary, reference: Summary) -> bool:
    """Whether the mean is at most two standard errors (of the difference) above the reference's."""
    return point.mean <= reference.mean + 2 * math.hypot(point.error, reference.error)


def first_to_reach(points: list[Summary], reference: Summary) -> Summary | None:
    """The fewest evaluations from which on every point reaches the reference."""
    found = None
    for point in reversed(points):
        if not reaches(point, reference):
            break
        found = point
    return found
