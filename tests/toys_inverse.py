"""Test beds of inverse problems: Gaussians with any covariance and a dense linear operator."""

from __future__ import annotations

import math

import torch

import sampling
from benchmarks.inverse_beds import GaussianBed, exact_noise, moments, rows_for

#: Two coordinates that correlate, with different spreads.
MEAN2 = torch.tensor([0.4, -0.7], dtype=torch.float64)
COV2 = torch.tensor([[1.0, 0.54], [0.54, 0.36]], dtype=torch.float64)


class Dense:
    """A matrix as an operator, with what posterior samplers ask of one."""

    svd = None

    def __init__(self, matrix, shape_in, shape_out=None):
        self.matrix, self.shape_in = matrix.double(), tuple(shape_in)
        self.shape_out = tuple(shape_out or (len(matrix),))

    def __call__(self, x):
        flat = x.reshape(len(x), -1) @ self.matrix.T.to(x.dtype)
        return flat.reshape(len(x), *self.shape_out)

    def adjoint(self, y):
        return (y.reshape(len(y), -1) @ self.matrix.to(y.dtype)).reshape(len(y), *self.shape_in)

    def pinv(self, y):
        back = torch.linalg.pinv(self.matrix).to(y.dtype)
        return (y.reshape(len(y), -1) @ back.T).reshape(len(y), *self.shape_in)

    def solve_gram(self, y, r2, s2):
        values, vectors = torch.linalg.eigh(self.matrix @ self.matrix.T)
        r2 = torch.as_tensor(r2, dtype=torch.float64).reshape(-1, 1)
        scale = r2 * values + s2
        inverse = torch.where(scale > 1e-12 * scale.max(), 1 / scale, 0.0)
        out = ((y.reshape(len(y), -1).double() @ vectors) * inverse) @ vectors.T
        return out.reshape(y.shape).to(y.dtype)


def random_operator(shape_in, m: int, seed: int = 0) -> Dense:
    d = math.prod(shape_in)
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    return Dense(matrix, shape_in)


def sampler_moments(bed: GaussianBed, score_fn, predictor="heun", steps=60, draws=None, **options):
    """Mean and covariance that `get_pc_sampler` gives, by its own loop, without Monte Carlo."""
    cls = sampling.get_predictor(predictor) if isinstance(predictor, str) else predictor
    n = rows_for(bed.d, steps + 1 if draws is None else draws)
    sampler = sampling.get_pc_sampler(
        bed.sde,
        (n, *bed.shape),
        cls,
        None,
        lambda x: x,
        0.1,
        continuous=True,
        eps=options.pop("eps", bed.sde.sampling_eps),
        dtype=torch.float64,
        steps=steps,
        schedule=options.pop("schedule", "logsnr"),
        **options,
    )
    with exact_noise(n):
        return moments(sampler(score_fn)[0])
