"""Code written for score_sde_pytorch, outside this repository, runs without a change here."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

#: What a user of score_sde has in one file: a process, a predictor, a corrector, a network.
USER_FILE = """
import functools

import ml_collections
import numpy as np
import torch

import likelihood
import losses
import sampling
import sde_lib
from models import utils as mutils
from models.ema import ExponentialMovingAverage
from sampling import Corrector, Predictor, register_corrector, register_predictor


class MySDE(sde_lib.SDE):
    def __init__(self, rate=6.0, N=60):
        super().__init__(N)
        self.rate = rate
        self.N = N
        self.discrete_levels = torch.linspace(0.0, 1.0, N)

    @property
    def T(self):
        return 1

    def sde(self, x, t):
        beta_t = 2 * self.rate * t
        drift = -0.5 * beta_t[:, None, None, None] * x
        return drift, torch.sqrt(beta_t)

    def marginal_prob(self, x, t):
        log_mean_coeff = -0.5 * self.rate * t ** 2
        mean = torch.exp(log_mean_coeff[:, None, None, None]) * x
        return mean, torch.sqrt(1.0 - torch.exp(2.0 * log_mean_coeff))

    def prior_sampling(self, shape):
        return torch.randn(*shape)

    def prior_logp(self, z):
        N = np.prod(z.shape[1:])
        return -N / 2.0 * np.log(2 * np.pi) - torch.sum(z ** 2, dim=(1, 2, 3)) / 2.0


@register_predictor(name="my_predictor")
class MyPredictor(Predictor):
    def __init__(self, sde, score_fn, probability_flow=False):
        super().__init__(sde, score_fn, probability_flow)

    def update_fn(self, x, t):
        dt = -1.0 / self.rsde.N
        z = torch.randn_like(x)
        drift, diffusion = self.rsde.sde(x, t)
        x_mean = x + drift * dt
        x = x_mean + diffusion[:, None, None, None] * np.sqrt(-dt) * z
        return x, x_mean


@register_corrector(name="my_corrector")
class MyCorrector(Corrector):
    def update_fn(self, x, t):
        for i in range(self.n_steps):
            grad = self.score_fn(x, t)
            noise = torch.randn_like(x)
            std = self.sde.marginal_prob(x, t)[1]
            step_size = (self.snr * std) ** 2 * 2
            x_mean = x + step_size[:, None, None, None] * grad
            x = x_mean + noise * torch.sqrt(step_size * 2)[:, None, None, None]
        return x, x_mean


@mutils.register_model(name="my_model")
class MyModel(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = config.data.num_channels
        self.conv = torch.nn.Conv2d(channels, channels, 1)
        self.embed = torch.nn.Linear(2, channels)

    def forward(self, x, labels):
        t = labels.float() / 999
        y = self.embed(torch.stack([t, t ** 2], dim=1))
        return self.conv(x) * (1 + y[:, :, None, None])


config = ml_collections.ConfigDict()
config.device = torch.device("cpu")
config.training = ml_collections.ConfigDict({"continuous": True, "sde": "mysde"})
config.model = ml_collections.ConfigDict({"name": "my_model", "num_scales": 60})
config.data = ml_collections.ConfigDict({"num_channels": 3, "image_size": 4, "centered": True})
config.optim = ml_collections.ConfigDict(dict(
    optimizer="Adam", lr=2e-3, beta1=0.9, eps=1e-8, weight_decay=0, warmup=10, grad_clip=1.0))
config.sampling = ml_collections.ConfigDict(dict(
    method="pc", predictor="my_predictor", corrector="my_corrector", snr=0.1, n_steps_each=1,
    probability_flow=False, noise_removal=True))

torch.manual_seed(0)
SHAPE = (6, 3, 4, 4)
EPS = 1e-3
sde = MySDE()
data = lambda: 0.3 * torch.randn(32, 3, 4, 4)
inverse_scaler = lambda x: (x + 1.0) / 2.0
score_model = mutils.create_model(config)


def trained(steps=30):
    ema = ExponentialMovingAverage(score_model.parameters(), decay=0.9)
    optimizer = losses.get_optimizer(config, score_model.parameters())
    state = dict(optimizer=optimizer, model=score_model, ema=ema, step=0)
    optimize_fn = losses.optimization_manager(config)
    step_fn = losses.get_step_fn(sde, train=True, optimize_fn=optimize_fn, reduce_mean=True,
                                 continuous=True, likelihood_weighting=False)
    eval_fn = losses.get_step_fn(sde, train=False, optimize_fn=optimize_fn, reduce_mean=True,
                                 continuous=True, likelihood_weighting=False)
    values = [step_fn(state, data()).item() for _ in range(steps)]
    assert state["step"] == steps and np.isfinite(values).all()
    assert np.isfinite(eval_fn(state, data()).item())
    return state
"""

SCENARIOS = {
    "training": """
        before = [p.clone() for p in score_model.parameters()]
        state = trained()
        assert all(not torch.equal(a, b) for a, b in zip(before, score_model.parameters()))
    """,
    "likelihood weighting": """
        fn = losses.get_sde_loss_fn(sde, True, True, True, True)
        fn(score_model, data()).backward()
        assert all(torch.isfinite(p.grad).all() for p in score_model.parameters())
    """,
    "PC sampling from the config": """
        trained()
        fn = sampling.get_sampling_fn(config, sde, SHAPE, inverse_scaler, EPS)
        x, n = fn(score_model)
        assert x.shape == SHAPE and torch.isfinite(x).all() and n == 2 * sde.N
    """,
    "PC sampling with every built-in pair": """
        for p in ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none"):
            for c in ("langevin", "ald", "none"):
                fn = sampling.get_pc_sampler(
                    sde, SHAPE, sampling.get_predictor(p), sampling.get_corrector(c),
                    inverse_scaler, 0.1, n_steps=1, probability_flow=False, continuous=True,
                    denoise=True, eps=EPS, device="cpu")
                assert torch.isfinite(fn(score_model)[0]).all()
    """,
    "ODE sampling": """
        config.sampling.method = "ode"
        x, n = sampling.get_sampling_fn(config, sde, SHAPE, inverse_scaler, EPS)(score_model)
        assert x.shape == SHAPE and torch.isfinite(x).all() and n > 10
        fn = sampling.get_ode_sampler(sde, SHAPE, inverse_scaler, denoise=True, rtol=1e-4,
                                      atol=1e-4, method="RK45", eps=EPS, device="cpu")
        x, n = fn(score_model, torch.randn(*SHAPE))
        assert torch.isfinite(x).all()
    """,
    "likelihood": """
        trained()
        fn = likelihood.get_likelihood_fn(sde, inverse_scaler, eps=1e-3)
        bpd, z, nfe = fn(score_model, data())
        assert bpd.shape == (32,) and z.shape == (32, 3, 4, 4) and torch.isfinite(bpd).all()
    """,
    "a hand-written loop": """
        predict = functools.partial(
            sampling.shared_predictor_update_fn, sde=sde, predictor=MyPredictor,
            probability_flow=False, continuous=True)
        correct = functools.partial(
            sampling.shared_corrector_update_fn, sde=sde, corrector=sampling.LangevinCorrector,
            continuous=True, snr=0.1, n_steps=1)
        with torch.no_grad():
            x = sde.prior_sampling(SHAPE)
            timesteps = torch.linspace(sde.T, EPS, sde.N)
            for i in range(sde.N):
                t = timesteps[i]
                vec_t = torch.ones(SHAPE[0], device=t.device) * t
                x, x_mean = correct(x, vec_t, model=score_model)
                x, x_mean = predict(x, vec_t, model=score_model)
        assert torch.isfinite(inverse_scaler(x_mean)).all()
    """,
    "a loop over the reverse process": """
        score_fn = mutils.get_score_fn(sde, score_model, train=False, continuous=True)
        rsde = sde.reverse(score_fn, probability_flow=False)
        assert isinstance(rsde, MySDE) and rsde.N == sde.N and rsde.rate == sde.rate
        x = sde.prior_sampling(SHAPE)
        t = torch.full((SHAPE[0],), 0.7)
        f, G = rsde.discretize(x, t)
        x = x - f + G[:, None, None, None] * torch.randn_like(x)
        drift, diffusion = rsde.sde(x, t)
        assert torch.isfinite(drift).all() and diffusion.shape == (SHAPE[0],)
    """,
    "classifier guidance in the notebooks' way": """
        score_fn = mutils.get_score_fn(sde, torch.nn.DataParallel(score_model), train=False,
                                       continuous=True)
        def guided(x, t):
            with torch.enable_grad():
                x_in = x.detach().requires_grad_(True)
                grad = torch.autograd.grad(-x_in.square().sum(), x_in)[0]
            return score_fn(x, t) + 0.01 * grad
        p = MyPredictor(sde, guided)
        x, mean = p.update_fn(torch.randn(*SHAPE), torch.full((SHAPE[0],), 0.7))
        assert torch.isfinite(x).all()
    """,
    "fewer steps are refused for an update of the old style": """
        try:
            sampling.get_pc_sampler(sde, SHAPE, MyPredictor, None, inverse_scaler, 0.1, steps=10)
        except ValueError as error:
            assert "MyPredictor" in str(error) and "define step" in str(error)
        else:
            raise AssertionError("accepted")
        sde.N = 20
        fn = sampling.get_pc_sampler(sde, SHAPE, MyPredictor, None, inverse_scaler, 0.1,
                                     continuous=True)
        assert fn(score_model)[1] == 20
    """,
    "a subclass of VPSDE with its own tables, discretely trained": """
        class Cosine(sde_lib.VPSDE):
            def __init__(self, N=60):
                super().__init__(0.1, 20, N)
                bar = torch.cos(torch.linspace(0, 1, N + 1) * 1.5) ** 2
                self.discrete_betas = 1 - bar[1:] / bar[:-1]
                self.alphas = 1.0 - self.discrete_betas
                self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
                self.sqrt_alphas_cumprod = torch.sqrt(self.alphas_cumprod)
                self.sqrt_1m_alphas_cumprod = torch.sqrt(1.0 - self.alphas_cumprod)
        vp = Cosine()
        assert vp.reverse(None).alphas is vp.alphas
        losses.get_ddpm_loss_fn(vp, train=True)(score_model, data()).backward()
        fn = sampling.get_pc_sampler(
            vp, SHAPE, sampling.AncestralSamplingPredictor, sampling.AnnealedLangevinDynamics,
            inverse_scaler, 0.1, continuous=False, eps=EPS)
        x, n = fn(score_model)
        assert torch.isfinite(x).all() and n == 120
    """,
    "checkpoints through utils": """
        from utils import restore_checkpoint, save_checkpoint
        state = trained(3)
        save_checkpoint("checkpoints-meta/checkpoint.pth", state)
        fresh = dict(state, step=0)
        fresh = restore_checkpoint("checkpoints-meta/checkpoint.pth", fresh, config.device)
        assert fresh["step"] == 3
    """,
    "flattening": """
        x = torch.randn(2, 3)
        flat = mutils.to_flattened_numpy(x)
        assert flat.shape == (6,) and torch.equal(mutils.from_flattened_numpy(flat, (2, 3)), x)
        sigmas = mutils.get_sigmas(ml_collections.ConfigDict(
            {"model": {"sigma_min": 0.01, "sigma_max": 50, "num_scales": 10}}))
        assert sigmas[0] > sigmas[-1] and len(sigmas) == 10
    """,
}


@pytest.mark.parametrize("what", SCENARIOS)
def test_users_file_runs_unchanged(tmp_path, what):
    run_user_code(tmp_path, textwrap.dedent(SCENARIOS[what]))


def run_user_code(tmp_path, code):
    (tmp_path / "my_project.py").write_text(USER_FILE + code)
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "my_project.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr, run.stderr
