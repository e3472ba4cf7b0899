"""The benchmark of inverse problems: its exact moments, its tables, its picture."""

import pytest
import torch
from toys_inverse import COV2, MEAN2, Dense

import sampling
import sde_lib
from benchmarks import inverse, inverse_report
from benchmarks.inverse_beds import (
    Design,
    GaussianBed,
    MixtureBed,
    distance,
    exact_noise,
    moments,
    rows_for,
    total_variation,
)

FIRST = Dense(torch.tensor([[1.0, 0.0]]), (2,))
Y = torch.tensor([[1.2]], dtype=torch.float64)


def test_a_design_has_exact_moments():
    design = Design(64)
    x = torch.cat([design.take(5), design.take(3)], 1)
    mean, cov = moments(x)
    assert torch.equal(mean, torch.zeros(8).double()) and torch.equal(cov, torch.eye(8).double())
    with pytest.raises(ValueError, match="used up"):
        design.take(56)
    with pytest.raises(ValueError, match="power of two"):
        Design(60)


def test_exact_noise_gives_the_variance_that_many_samples_tend_to():
    sde = sde_lib.VPSDE()
    bed = GaussianBed(sde, MEAN2, COV2)

    def sampler(rows, **options):
        return sampling.get_pc_sampler(
            sde,
            (rows, 2),
            sampling.get_predictor("ancestral_sampling"),
            None,
            lambda x: x,
            0.1,
            continuous=True,
            steps=12,
            schedule="logsnr",
            dtype=torch.float64,
            **options,
        )(bed.score_fn)[0]

    with exact_noise(rows_for(2, 13)):
        mean, cov = moments(sampler(rows_for(2, 13)))
    many = moments(sampler(20_000, generator=torch.Generator().manual_seed(0)))
    assert max(distance(*many, mean, cov)[:1]) < 0.03
    assert (many[1] / cov - 1).abs().max() < 0.05


def test_the_posterior_of_a_gaussian_is_that_of_conditioning():
    bed = GaussianBed(sde_lib.VPSDE(), MEAN2, COV2)
    mean, cov = bed.posterior(FIRST, Y, 0.0)
    assert torch.allclose(mean, torch.tensor([1.2, -0.7 + 0.54 * 0.8], dtype=torch.float64))
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.36 - 0.54**2]], dtype=torch.float64)
    assert torch.allclose(cov, expected, atol=1e-12)
    mean, cov = bed.posterior(FIRST, Y, 1.0)
    assert mean[0] == pytest.approx(0.8) and cov[0, 0] == pytest.approx(0.5)
    assert distance(mean, cov, mean, cov) == pytest.approx((0, 1, 1))
    assert distance(mean + cov[0] / cov[0, 0].sqrt(), 4 * cov, mean, cov) == pytest.approx(
        (0.5**0.5, 2, 2)
    )


def test_the_posterior_of_a_mixture_is_bayes_on_a_grid():
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    bed = MixtureBed(sde_lib.VPSDE(), means, torch.tensor([0.5, 0.7]), torch.tensor([0.3, 0.7]))
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    prior = sum(
        w * torch.exp(-(grid - m).square().sum(1) / (2 * s**2)) / (2 * torch.pi * s**2)
        for w, m, s in zip((0.3, 0.7), means.double(), (0.5, 0.7), strict=True)
    )
    likelihood = torch.exp(-0.5 * ((grid[:, 0] - 1.2) / 0.4) ** 2) / (0.4 * (2 * torch.pi) ** 0.5)
    joint = prior * likelihood
    cell = (axis[1] - axis[0]) ** 2
    evidence = (joint.sum() * cell).log()
    assert bed.log_evidence(FIRST, Y, 0.4) == pytest.approx(float(evidence), abs=1e-5)
    weights, centres, _ = bed.posterior(FIRST, Y, 0.4)
    mean = (joint[:, None] * grid).sum(0) / joint.sum()
    assert torch.allclose((weights[:, None] * centres).sum(0), mean, atol=1e-5)


def test_total_variation_is_0_for_exact_and_1_for_distant_samples():
    law = (torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    edges = torch.linspace(-5, 5, 11, dtype=torch.float64)
    x = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert total_variation(x, None, law, edges) < 0.02
    assert total_variation(x + 20, None, law, edges) == pytest.approx(1, abs=1e-3)
    weights = torch.zeros(100_000, dtype=torch.float64)
    assert total_variation(x, weights, law, edges) < 0.02


def rows():
    out = [inverse.Row("a", "y", "y", 1.0)]
    for method in ("truth", "prior", "mmps", "dps"):
        for name, value in zip(("m0", "m1", "c00", "c01", "c11"), (0, 0, 1, 0.5, 1), strict=True):
            out.append(inverse.Row("a", method, name, value))
    for method, found in (("mmps", (0.01, 0.99, 1.0)), ("dps", (0.5, 0.7, 1.2))):
        for metric, value in zip(("mean", "low", "high"), found, strict=True):
            out.append(inverse.Row("a", method, metric, value))
    return [
        *out,
        inverse.Row("m", "exact samples", "tv", 0.02),
        inverse.Row("m", "mmps", "tv", 0.1),
    ]


def test_the_report_has_tables_and_a_picture(tmp_path):
    text = inverse_report.tables(rows())
    assert "| MMPS | **0.01, 0.99–1.00** |" in text
    assert "| DPS, best ζ | 0.50, 0.70–1.20 |" in text
    assert "| exact samples | 0.020 |" in text
    page = tmp_path / "page.md"
    page.write_text(f"above\n{inverse_report.BEGIN}\nold\n{inverse_report.END}\nbelow\n")
    inverse_report.insert(page, text)
    written = page.read_text()
    assert "old" not in written and written.startswith("above") and "MMPS" in written
    assert written.rstrip().endswith("below")
    with pytest.raises(ValueError, match="must have one"):
        page.write_text("no markers")
        inverse_report.insert(page, text)
    inverse_report.plot(rows(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_every_solver_of_inverse_problems_is_measured():
    from controllable_generation_methods import load_inverse_solvers

    # SDEdit samples around a guide, which is no measurement of A x.
    assert set(load_inverse_solvers()) - {"sdedit"} == set(inverse.SETTINGS)
