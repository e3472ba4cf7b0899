"""The numbers that score_sde_pytorch gives on the CPU, from ../shared/parity (see its README)."""

from pathlib import Path

import numpy as np
import pytest
import torch

import likelihood
import losses
import sampling
import sde_lib

DATA = np.load(Path(__file__).parent / "data" / "parity_numerics.npz")
SHAPE, N, SEED = (2, 3, 4, 4), 24, 100
SDES = {
    "ve": lambda: sde_lib.VESDE(0.01, 20, N),
    "vp": lambda: sde_lib.VPSDE(0.1, 20, N),
    "subvp": lambda: sde_lib.subVPSDE(0.1, 20, N),
}
EPS = {"ve": 1e-5, "vp": 1e-3, "subvp": 1e-3}


class Toy(torch.nn.Module):
    """The three-parameter network of the parity README."""

    def __init__(self, name: str, continuous: bool):
        super().__init__()
        self.name, self.continuous = name, continuous
        self.params = torch.nn.ParameterList(
            torch.nn.Parameter(torch.tensor(v)) for v in (0.3, 0.1, 0.01 if continuous else 0.3)
        )

    def forward(self, x, labels):
        a, b, c = self.params
        labels = labels[:, None, None, None]
        y = a * x + b * torch.cos(c * labels)
        if self.name != "ve":
            return y
        if self.continuous:
            return -y / labels.clamp(min=0.01) ** 2
        return -y / (20 * (0.01 / 20) ** (labels / (N - 1))) ** 2


def agrees(value, key, tolerance=1e-4):
    truth = DATA[key]
    value = torch.as_tensor(value).detach().numpy()
    assert value.shape == truth.shape
    np.testing.assert_allclose(value, truth, atol=tolerance * np.abs(truth).max(), rtol=0)


def keys(prefix):
    return [k for k in DATA.files if k.startswith(prefix)]


def inverse_scaler(x):
    return (x + 1.0) / 2.0


@pytest.mark.parametrize("key", keys("pc/"))
def test_pc_samples_equal_the_originals(key):
    _, name, kind, predictor, corrector, pf, denoise, n_steps = key.split("/")
    sampler = sampling.get_pc_sampler(
        SDES[name](),
        SHAPE,
        sampling.get_predictor(predictor),
        sampling.get_corrector(corrector),
        inverse_scaler,
        0.16,
        n_steps=int(n_steps[1:]),
        probability_flow=pf == "pf1",
        continuous=kind == "cont",
        denoise=denoise == "dn1",
        eps=EPS[name],
        device="cpu",
    )
    torch.manual_seed(SEED)
    samples, nfe = sampler(Toy(name, kind == "cont"))
    agrees(samples, key, 5e-3 if key.startswith("pc/vp/disc") else 1e-4)
    assert nfe == N * ((predictor != "none") + int(n_steps[1:]) * (corrector != "none"))


@pytest.mark.parametrize("key", keys("ode/"))
def test_ode_samples_equal_the_originals(key):
    _, name, denoise = key.split("/")
    sampler = sampling.get_ode_sampler(
        SDES[name](), SHAPE, inverse_scaler, denoise=denoise == "dn1", eps=EPS[name], device="cpu"
    )
    torch.manual_seed(SEED + 1)
    agrees(sampler(Toy(name, True))[0], key)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("probe", ["Rademacher", "Gaussian"])
def test_bits_per_dim_equal_the_originals(name, probe):
    options = {"hutchinson_type": probe, "method": "RK45"}
    fn = likelihood.get_likelihood_fn(SDES[name](), inverse_scaler, **options)
    data = torch.from_numpy(DATA[f"bpd/{name}/{probe}/data"])
    torch.manual_seed(SEED + 3)
    bpd, z, _ = fn(Toy(name, True), data)
    agrees(bpd, f"bpd/{name}/{probe}/bpd")
    agrees(z, f"bpd/{name}/{probe}/z")


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("probe", ["Rademacher", "Gaussian"])
def test_bits_per_dim_by_our_solver_are_within_the_tolerance_of_the_originals(name, probe):
    """Both err by about 1e-5 of the prior's spread, which is 1 or more."""
    fn = likelihood.get_likelihood_fn(SDES[name](), inverse_scaler, hutchinson_type=probe)
    torch.manual_seed(SEED + 3)
    bpd, z, _ = fn(Toy(name, True), torch.from_numpy(DATA[f"bpd/{name}/{probe}/data"]))
    agrees(bpd, f"bpd/{name}/{probe}/bpd")
    assert abs(z.numpy() - DATA[f"bpd/{name}/{probe}/z"]).max() < 1e-4 * SDES[name]().prior_std


@pytest.mark.parametrize("key", [k for k in keys("loss/") if not k.endswith("grad")])
def test_losses_and_gradients_equal_the_originals(key):
    _, name, kind, mean, lw = key.split("/")
    args = dict(train=True, reduce_mean=mean == "mean1")
    if kind == "cont":
        loss_fn = losses.get_sde_loss_fn(SDES[name](), likelihood_weighting=lw == "lw1", **args)
    elif name == "ve":
        loss_fn = losses.get_smld_loss_fn(SDES[name](), **args)
    else:
        loss_fn = losses.get_ddpm_loss_fn(SDES[name](), **args)
    torch.manual_seed(SEED + 4)
    batch = torch.rand(SHAPE)
    torch.manual_seed(SEED + 5)
    model = Toy(name, kind == "cont")
    loss = loss_fn(model, batch)
    agrees(loss, key)
    agrees(torch.stack(torch.autograd.grad(loss, list(model.params))), key + "/grad")


@pytest.mark.parametrize("name", SDES)
def test_sde_functions_equal_the_originals(name):
    sde = SDES[name]()
    x = torch.linspace(-2, 2, int(np.prod(SHAPE))).reshape(SHAPE)
    t = torch.linspace(0.003, 0.997, SHAPE[0])
    drift, diffusion = sde.sde(x, t)
    mean, std = sde.marginal_prob(x, t)
    f, G = sde.discretize(x, t)
    values = dict(drift=drift, diffusion=diffusion, mean=mean, std=std, f=f, G=G)
    for what, value in values.items():
        agrees(value, f"sde/{name}/{what}")
    agrees(sde.prior_logp(x), f"sde/{name}/prior_logp")
    for pf in (False, True):
        rsde = sde.reverse(lambda x, t: -0.3 * x, pf)
        agrees(rsde.sde(x, t)[0], f"rsde/{name}/pf{int(pf)}/drift")
        f, G = rsde.discretize(x, t)
        agrees(f, f"rsde/{name}/pf{int(pf)}/f")
        agrees(G, f"rsde/{name}/pf{int(pf)}/G")
