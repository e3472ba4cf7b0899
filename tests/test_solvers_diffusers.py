"""Solvers against diffusers' schedulers, step for step, where the definitions coincide.

Schedulers are handed our own noise levels; their step to σ = 0 is our last call.
"""

import itertools

import pytest
import torch
from toys_solvers import Mixture, start_points

import sde_lib
import solvers
from sampling import time_grid
from sampling_steps import batch_time

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

RTOL = 1e-5  # the multistep scheduler works in float32


def close(a, b):
    return torch.allclose(a.double(), b, rtol=RTOL, atol=RTOL * float(b.abs().max()))


def vp_times(steps=10):
    return time_grid(sde_lib.VPSDE(), 1e-3, steps, "logsnr")


def our_states(solver, x, times):
    """The state at each time after the first, the last x and the last x_mean."""
    solver.start(times)
    states = []
    for t, s in itertools.pairwise(times):
        x, _ = solver.step(x, t, s)
        states.append(x)
    return [*states, *solver.finish(x, times[-1])]


def primed(scheduler, times):
    """A scheduler on the VP noise levels of `times`; its time i is i."""
    scheduler.set_timesteps(len(times))
    sigmas = torch.exp(-sde_lib.half_log_snr(sde_lib.VPSDE(), times))
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    scheduler.timesteps = torch.arange(len(times))
    scheduler.set_begin_index(0)
    return scheduler


def their_states(scheduler, score, x, times):
    """The states of a scheduler of noise prediction, after each step, the last at σ = 0."""
    sde, states = sde_lib.VPSDE(), []
    for i, t in enumerate(times):
        sigma = sde_lib.alpha_sigma(sde, t, x)[1]
        noise = -sigma * score(x, batch_time(x, t))
        x = scheduler.step(noise, scheduler.timesteps[i], x).prev_sample.double()
        states.append(x)
    return states


@pytest.mark.parametrize("steps", [6, 10, 20])
@pytest.mark.parametrize(("order", "cls"), [(2, "DPMpp2MPredictor"), (3, "DPMpp3MPredictor")])
def test_dpmpp_multistep_agrees(steps, order, cls):
    sde, times = sde_lib.VPSDE(), vp_times(steps)
    score = Mixture(sde)
    x = start_points(sde, times[0])
    options = {"legacy_3m": True} if order == 3 else {}
    *ours, _, mean = our_states(getattr(solvers, cls)(sde, score, **options), x, times)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    theirs = their_states(primed(scheduler, times), score, x, times)
    assert all(close(a, b) for a, b in zip(theirs, [*ours, mean], strict=True))


def test_sde_dpmpp_2m_agrees():
    sde, times = sde_lib.VPSDE(), vp_times(10)
    score = Mixture(sde)
    x = start_points(sde, times[0])
    noise = torch.randn(10, *x.shape).double()
    solver = solvers.DPMpp2MSDEPredictor(sde, score)
    draws = iter(noise)
    solver.randn_like = lambda x: next(draws)
    *ours, _, mean = our_states(solver, x, times)
    scheduler = primed(
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), times
    )
    theirs, state = [], x
    for i, t in enumerate(times):
        sigma = sde_lib.alpha_sigma(sde, t, x)[1]
        output = -sigma * score(state, batch_time(state, t))
        state = scheduler.step(output, i, state, variance_noise=noise[i]).prev_sample.double()
        theirs.append(state)
    assert all(close(a, b) for a, b in zip(theirs, [*ours, mean], strict=True))


@pytest.mark.parametrize("steps", [6, 10])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_agrees(steps, order, variant):
    # Theirs lowers the order of the last steps on any grid, ours below 15 times.
    sde, times = sde_lib.VPSDE(), vp_times(steps)
    score = Mixture(sde)
    x = start_points(sde, times[0])
    solver = solvers.UniPCPredictor(sde, score, order=order, variant=variant)
    *ours, _, mean = our_states(solver, x, times)
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, final_sigmas_type="zero"
    )
    theirs = their_states(primed(scheduler, times), score, x, times)
    if variant == "bh1":  # theirs is 0 · ∞ at σ = 0
        theirs[-1] = mean
    assert all(close(a, b) for a, b in zip(theirs, [*ours, mean], strict=True))


@pytest.mark.parametrize(
    ("algorithm", "cls"),
    [("dpmsolver++", "DPMpp2SPredictor"), ("dpmsolver", "DPMSolver2Predictor")],
)
def test_singlestep_solvers_agree(algorithm, cls):
    # Their grid lists the inner times too: here our midpoints in λ.
    sde, times = sde_lib.VPSDE(), vp_times(6)
    score = Mixture(sde)
    x = start_points(sde, times[0])
    ours = our_states(getattr(solvers, cls)(sde, score), x, times)[:-2]
    lam = sde_lib.half_log_snr(sde, times)
    inner = sde_lib.time_of_half_log_snr(sde, (lam[:-1] + lam[1:]) / 2)
    every = torch.stack([times[:-1], inner], dim=1).flatten()
    every = torch.cat([every, times[-1:]])
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        solver_order=2, algorithm_type=algorithm, final_sigmas_type="sigma_min"
    )
    theirs = their_states(primed(scheduler, every), score, x, every)[1::2]
    assert all(close(a, b) for a, b in zip(theirs, ours, strict=True))


def test_heun_agrees():
    sde = sde_lib.EDM()
    times = time_grid(sde, 0.0, 12)
    score = Mixture(sde)
    x = start_points(sde, times[0])
    *ours, _, mean = our_states(solvers.HeunPredictor(sde, score), x, times)
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(len(times))
    sigmas = torch.cat([sde.sigma(times), torch.zeros(1, dtype=torch.float64)])
    twice = sigmas[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([sigmas[:1], twice, sigmas[-1:]])
    scheduler.timesteps = torch.arange(2 * len(times) - 1)
    scheduler.set_begin_index(0)
    theirs, state = [], x
    for i in range(2 * len(times) - 1):
        t = times[(i + 1) // 2]
        noise = -sde.sigma(t) * score(state, batch_time(state, t))
        state = scheduler.step(noise, i, state).prev_sample
        theirs.append(state)
    # Heun's corrections, and Euler's step to σ = 0.
    assert all(close(a, b) for a, b in zip([*theirs[1::2], state], [*ours, mean], strict=True))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_agrees(eta):
    sde, steps = sde_lib.VPSDE(), 10
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    # Their table at i is our process at (i + 1)/1000.
    table = torch.arange(1, 1001, dtype=torch.float64) / 1000
    scheduler.alphas_cumprod = sde.alpha(table) ** 2
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    times = (scheduler.timesteps.double() + 1) / 1000
    score = Mixture(sde)
    x = start_points(sde, times[0])
    noise = torch.randn(steps, *x.shape).double()
    solver = solvers.DDIMPredictor(sde, score, eta=eta)
    draws = iter(noise)
    solver.randn_like = lambda x: next(draws)
    *ours, _, mean = our_states(solver, x, times)
    theirs, state = [], x
    for i, t in enumerate(times):
        sigma = sde_lib.alpha_sigma(sde, t, x)[1]
        output = -sigma * score(state, batch_time(state, t))
        extra = {"eta": eta, "variance_noise": noise[i]} if i + 1 < steps else {}
        state = scheduler.step(output, int(scheduler.timesteps[i]), state, **extra).prev_sample
        theirs.append(state)
    assert all(close(a, b) for a, b in zip(theirs, [*ours, mean], strict=True))
