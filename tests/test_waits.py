"""Whole loops of samplers and likelihoods keep the device busy: nothing is asked of it, and nothing
is sent to it, while they go on.

The device 'meta' stands for a GPU. Its tensors have no values, so that what asks for one fails;
what is sent there goes through a dispatch mode that notes it.
"""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import arguments
import likelihood
import likelihood_bounds
import ode
import ode_adaptive
import sampling
import sampling_loop
import sde_lib
from divergence import get_trace
from ode_tableaus import TABLEAUS
from parametrization import as_score_function
from randomness import Draws

SHAPE = (4, 3, 8, 8)
SDES = {
    "vpsde": sde_lib.VPSDE(N=25),
    "vesde": sde_lib.VESDE(N=25),
    "rectified_flow": sde_lib.RectifiedFlow(N=25),
}


class Transfers(TorchDispatchMode):
    """Notes tensors of more than one number that go between host and device, with the step."""

    def __init__(self):
        super().__init__()
        self.step, self.found = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in tree_leaves((args, kwargs, out)) if isinstance(a, torch.Tensor)]
        copies = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if func.overloadpacket in copies and len({a.device.type for a in tensors}) > 1:
            self.found.append((self.step, str(func)))
        return out

    def after_start(self):
        return [note for note in self.found if note[0] > 0]


@pytest.fixture(autouse=True)
def meta_is_a_device(monkeypatch):
    monkeypatch.setattr(arguments, "usable_device", lambda device, *args, **kwargs: device)


@pytest.fixture
def unchecked(monkeypatch):
    """Likelihoods look at their data once before they begin."""
    for room in (likelihood, likelihood_bounds):
        monkeypatch.setattr(room, "check_data", lambda data: None)


def on_device(sde):
    return as_score_function(lambda x, t: -x, sde)


@pytest.fixture
def looks(monkeypatch):
    """How often the loop's own watch has looked at the device."""
    count = []
    monkeypatch.setattr(sampling_loop.FiniteWatch, "check", lambda self: count.append(1))
    return count


def loop(sde, looks, **options):
    """Transfers of a whole predictor–corrector run on 'meta', and live tensors at two steps."""
    alive = {}
    with Transfers() as transfers:

        def callback(i, t, x, x_mean):
            transfers.step = i + 1
            if i in (4, 8):
                gc.collect()
                alive[i] = sum(
                    type(o) is torch.Tensor and o.device.type == "meta" for o in gc.get_objects()
                )

        sampler = sampling.get_pc_sampler(
            sde,
            SHAPE,
            inverse_scaler=lambda x: x,
            snr=0.1,
            continuous=True,
            eps=1e-2,
            device="meta",
            callback=callback,
            **options,
        )
        x, _ = sampler(on_device(sde))
    assert x.device.type == "meta" and x.shape == SHAPE
    assert len(looks) == 1  # at the end
    assert alive[8] <= alive[4]
    return transfers


@pytest.mark.parametrize("corrector", ["langevin", "ald", "none"])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama", "none"])
@pytest.mark.parametrize("name", SDES)
def test_the_predictor_corrector_loop_asks_and_sends_nothing(name, predictor, corrector, looks):
    sde = SDES[name]
    transfers = loop(
        sde,
        looks,
        predictor=sampling.get_predictor(predictor),
        corrector=sampling.get_corrector(corrector),
        n_steps=2,
    )
    assert transfers.after_start() == []
    # The prior, the times, and tables of the process at their first use.
    assert len(transfers.found) <= 5


FEW_STEPS = (
    *("ddim", "heun", "edm", "dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m"),
    *("dpmpp_2m_sde", "exp_ab", "unipc", "sa_solver", "tau_euler", "tau_exponential"),
)


@pytest.mark.parametrize("predictor", FEW_STEPS)
def test_few_step_samplers_ask_and_send_nothing(predictor, looks):
    transfers = loop(
        SDES["vpsde"],
        looks,
        predictor=sampling.get_predictor(predictor),
        corrector=None,
        steps=12,
        schedule="logsnr",
    )
    assert transfers.after_start() == []


# --- the ODE on the device -----------------------------------------------------------------------


@pytest.fixture
def blind(monkeypatch):
    """`ode.solve` with what a step looks at taken out: four steps of dopri5 on 'meta'."""
    transfers = Transfers()

    def solve(fn, state, t0, t1, *, args=(), **_):
        y = tuple(state)
        run = ode_adaptive.Adaptive(TABLEAUS["dopri5"], fn, 1e-5, 1e-5, 10**6, True, None)
        rows = run._start(run._rows(*ode._times(t0, t1, y), y, tuple(args)))
        for step in range(1, 5):
            transfers.step = step
            rows, stuck = run._judge(rows, *run._try(rows))
            torch.stack([rows.under_way, stuck]).sum(dim=1)  # what the step would look at
        transfers.step = 0
        return ode.Solution(rows.y, rows.nfe, rows.rejected, 0)

    monkeypatch.setattr(ode_adaptive, "refuse_nonfinite", lambda *args: None)  # twice, at the start
    monkeypatch.setattr(ode, "solve", solve)
    with transfers:
        yield transfers


def test_a_step_of_the_ode_sampler_asks_and_sends_nothing_beside_its_one_look(blind, monkeypatch):
    sde = SDES["vpsde"]
    sampler = sampling.get_ode_sampler(sde, SHAPE, lambda x: x, device="meta")
    monkeypatch.setattr(sampling_loop.FiniteWatch, "check", lambda self: None)
    assert sampler(on_device(sde))[0].device.type == "meta"
    assert blind.after_start() == []


@pytest.mark.parametrize("trace", ["rademacher", "gaussian", "hutch++"])
@pytest.mark.usefixtures("unchecked")
def test_a_step_of_the_likelihood_asks_and_sends_nothing_beside_its_one_look(blind, trace):
    sde = SDES["vpsde"]
    fn = likelihood.get_ode_likelihood_fn(sde, trace=get_trace(trace, 3))
    x = torch.zeros(SHAPE, device="meta")
    draws = Draws(0, 0, 0, SHAPE[0], device="meta")
    assert fn(on_device(sde), x, draws=draws).logp.device.type == "meta"
    assert blind.after_start() == []


@pytest.mark.parametrize("form", ["score", "implicit"])
@pytest.mark.usefixtures("unchecked")
def test_the_elbo_asks_and_sends_nothing_until_it_is_whole(form, monkeypatch):
    looked = []
    monkeypatch.setattr(likelihood_bounds, "refuse_nan", lambda x: looked.append(1) or x)
    sde, x = SDES["vpsde"], torch.zeros(SHAPE, device="meta")
    fn = likelihood_bounds.get_elbo_fn(sde, points=4, form=form)
    counts = []
    for points in (4, 8):
        fn = likelihood_bounds.get_elbo_fn(sde, points=points, form=form, offset=False)
        with Transfers() as transfers:
            fn(on_device(sde), x, draws=Draws(0, 0, 0, SHAPE[0], device="meta"))
        counts.append(len(transfers.found))
    assert counts == [0, 0]
    assert looked == [1, 1]


class Looks(TorchDispatchMode):
    """Counts the operations that need a tensor's value, or the places of one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asking = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        self.count += func.overloadpacket in asking
        return func(*args, **(kwargs or {}))


def test_the_adaptive_solver_looks_once_a_step(monkeypatch):
    counts, found = [], []
    known = ode_adaptive._counts
    monkeypatch.setattr(ode_adaptive, "_counts", lambda *m: counts.append(1) or known(*m))
    for rtol in (1e-2, 1e-9):
        counts.clear()
        with Looks() as looks:
            solution = ode.solve(
                lambda t, y: (-y[0],), (torch.ones(5, 3).double(),), 0, 4, rtol=rtol, atol=rtol
            )
        assert solution.calls == 2 + 6 * len(counts)
        found.append((len(counts), looks.count))
    (few, at_start), (many, others) = found
    assert many > 3 * few
    assert others == at_start  # at the start, and nowhere under way


def test_the_watch_notices_what_it_is_for():
    with Transfers() as transfers:
        transfers.step = 1
        torch.ones(3).to("meta")
        torch.zeros(3, device="meta") * torch.tensor(2.0, dtype=torch.float64)  # a number: a launch
    assert len(transfers.after_start()) == 1
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.zeros((), device="meta"))
    with Looks() as looks:
        bool(torch.ones(()))
    assert looks.count == 1
