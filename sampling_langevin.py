"""Langevin dynamics at one noise level: what a score of one level can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

import arguments
import sde_lib
from sampling_grids import check_shape
from sampling_loop import (
    FiniteWatch,
    check_common,
    check_kind,
    check_seeds,
    class_of,
    is_continuous,
    score_and_device,
    solver_options,
    step_bar,
    with_options,
)
from sampling_noise import NoiseSource, own_noise_refused
from sampling_steps import NoneCorrector, batch_time, get_corrector, register_sampler

STARTS = ("prior", "uniform")


def get_langevin_sampler(
    sde,
    shape,
    corrector,
    inverse_scaler,
    snr: float,
    steps: int = 1000,
    denoise: bool = True,
    device=None,
    *,
    sigma: float,
    start: str = "uniform",
    half_side: float = 2.0,
    n_steps: int = 1,
    continuous: bool = True,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    callback: Callable | None = None,
    progress: bool = False,
) -> Callable:
    """langevin_sampler(model) -> (samples, evaluations): `steps` × `n_steps` corrector steps,

        x ← x + ε s(x, t) + √(2ε) z   at the one time t where σ_t/α_t is `sigma`.

    It ends in the data blurred by that noise, slowly where they are in parts that lie further apart
    than σ: annealed Langevin dynamics, which go through many levels (predictor 'none', corrector
    'ald'), are the remedy (Song & Ermon 2019).

    Args:
      sde, shape, inverse_scaler, device, continuous, generator, seeds, callback, progress: as
        `sampling.get_pc_sampler`.
      corrector, snr: a Corrector class, which chooses ε, and its signal-to-noise ratio.
      steps, n_steps: callbacks are called, and the bar moves, `steps` times.
      denoise: return the mean of the last step, without its noise.
      start: 'uniform' on the square, or cube, of half the side `half_side`, or 'prior', the
        process's.
    """
    shape = check_shape(shape)
    sde_lib.check_process(sde)
    arguments.whole(steps=steps, n_steps=n_steps)
    arguments.real(sigma=sigma, half_side=half_side)
    check_common(inverse_scaler, callback=callback)
    if start not in STARTS:
        raise ValueError(f"start {start!r} is unknown; known: {', '.join(STARTS)}")
    if steps < 1 or n_steps < 1 or not half_side > 0:
        raise ValueError(
            f"expected steps and n_steps ≥ 1 and half_side > 0, got {steps}, {n_steps}, {half_side}"
        )
    if not sigma > 0:
        raise ValueError(
            f"Langevin dynamics are at one noise level, got sigma={sigma}; set training.sigma, "
            "which the network was trained at, or sampling.solver.sigma"
        )
    check_seeds(seeds, shape, corrector)
    level = torch.tensor(-math.log(sigma), dtype=torch.float64)
    t = sde_lib.time_of_half_log_snr(sde, level)
    if not -1e-9 <= t / sde.T <= 1 + 1e-9:
        ends = torch.tensor([0.0, float(sde.T)], dtype=torch.float64)
        low, high = torch.exp(-sde_lib.half_log_snr(sde, ends)).tolist()
        raise ValueError(
            f"{type(sde).__name__} has noise levels σ/α from {low:.4g} to {high:.4g}, got sigma="
            f"{sigma}"
        )
    t = t.clamp(0, float(sde.T))
    check_kind(corrector, "corrector")
    if class_of(corrector) is NoneCorrector:
        raise ValueError(
            "Langevin dynamics are the steps of a corrector, and 'none' takes none; use 'langevin' "
            "or 'ald'"
        )
    corrector(sde, lambda x, t: x, snr, n_steps)  # refuses what it cannot do, now

    @torch.no_grad()
    def langevin_sampler(model):
        score_fn, target = score_and_device(sde, model, continuous, device)
        before = score_fn.nfe
        source = NoiseSource(generator, seeds)
        c = corrector(sde, score_fn, snr, n_steps)
        c.noise = source
        if start == "prior":
            x = source.prior(sde, shape).to(target, torch.float32)
        else:
            z = source.randn_like(torch.zeros(shape, device=target))
            x = half_side * (2 * torch.special.ndtr(z) - 1)
        x_mean, vec_t, watch = x, batch_time(x, t), FiniteWatch(t.expand(steps))
        for i in step_bar(range(steps), progress):
            with own_noise_refused(seeds, target, i):
                x, x_mean = c.update_fn(x, vec_t)
            watch(i, x)
            if callback is not None:
                callback(i, float(t), x, x_mean)
        result = x_mean if denoise else x
        watch.last(result)
        return inverse_scaler(result), score_fn.nfe - before

    return langevin_sampler


@register_sampler(name="langevin")
def _langevin_from_config(config, sde, shape, inverse_scaler, eps, **options):
    s = config.sampling
    given = {"sigma": getattr(config.training, "sigma", 0.0), **solver_options(config)}
    sampler = with_options(get_langevin_sampler, given, "sampling.method 'langevin'")
    return sampler(
        sde,
        shape,
        get_corrector(s.corrector),
        inverse_scaler,
        s.snr,
        s.steps or sde.N,
        s.noise_removal,
        getattr(config, "device", None),
        n_steps=s.n_steps_each,
        continuous=is_continuous(config),
        **options,
    )
