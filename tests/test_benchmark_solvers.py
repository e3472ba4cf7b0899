"""The solver benchmark: its distances and orders are right, and it runs from end to end."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch

import sde_lib
from benchmarks import solver_quality, solver_report, solvers
from benchmarks.solver_beds import Member, Mixture, members, processes, sliced_wasserstein
from benchmarks.solver_orders import declared_order, observed_order
from benchmarks.solver_quality import Digits, Summary, first_to_reach, reaches, steps_for

ROOT = Path(__file__).resolve().parent.parent
EVERY = {m.label: m for m in members()}


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_d():
    x = torch.randn(500, 3, dtype=torch.float64)
    shift = torch.tensor([3.0, 0.0, 4.0])
    found = sliced_wasserstein(x, x[torch.randperm(500)] + shift, projections=4000)
    assert found == pytest.approx(5 / math.sqrt(3), rel=0.03)
    assert sliced_wasserstein(x, x[torch.randperm(500)]) < 1e-12
    with pytest.raises(ValueError, match="as many points"):
        sliced_wasserstein(x, x[:10])


@pytest.mark.parametrize("name", processes())
def test_the_reference_flow_carries_the_mixture_to_the_data(name):
    sde = processes()[name]
    bed = Mixture.ring(sde, k=3, std=0.2)
    start = torch.tensor(0.5 * sde.T, dtype=torch.float64)
    end = torch.tensor(sde.sampling_eps, dtype=torch.float64)
    alpha, sigma = sde_lib.alpha_sigma(sde, start)
    x = alpha * bed.sample(400, 1) + sigma * torch.randn(400, 2, dtype=torch.float64)
    found = bed.flow(x, start, end)
    floor = sliced_wasserstein(bed.sample(400, 2), bed.sample(400, 3))
    assert sliced_wasserstein(found, bed.sample(400, 4)) < 4 * floor


@pytest.mark.parametrize("label", ["ddim", "dpmpp_3m", "dpmpp_3m legacy", "tau_exponential τ=1"])
@pytest.mark.parametrize("name", ["VE", "rectified flow"])
def test_observed_orders_are_those_declared(label, name):
    sde = processes()[name]
    declared = declared_order(EVERY[label], sde)
    assert observed_order(EVERY[label], sde) == pytest.approx(declared, abs=0.25)


def test_a_wrong_order_is_seen():
    """A Heun's method that evaluates its second stage in the wrong place."""
    cls = EVERY["heun"].cls

    class Wrong(cls):
        def advance(self, x, t, s):
            good, _ = super().advance(x, t, s)
            first = s.alpha / t.alpha * x + s.alpha * (s.rho - t.rho) * self.eps(x, t)
            return 0.9 * good + 0.1 * first, good

    sde = processes()["VP"]
    assert declared_order(Member("wrong", Wrong), sde) == 2
    assert observed_order(Member("wrong", Wrong), sde) < 1.3


def test_numbers_of_steps_spend_at_most_the_evaluations():
    for nfe in (5, 20, 50):
        for per_step in (1, 2, 3):
            assert nfe - per_step < (steps_for(nfe, per_step) - 1) * per_step + 1 <= nfe


def test_the_first_to_reach_stays_there():
    reference = Summary(1000, 1.0, 0.03)
    points = [Summary(n, m, 0.04) for n, m in ((5, 2.0), (8, 1.05), (10, 1.3), (20, 1.09), (50, 1))]
    assert reaches(points[1], reference) and not reaches(points[2], reference)
    assert first_to_reach(points, reference) == points[3]
    assert first_to_reach(points[:3], reference) is None


@pytest.mark.slow
def test_the_quick_benchmark_runs_and_can_be_redrawn(tmp_path, capsys):
    solvers.main(["--quick", "--output", str(tmp_path)])
    table = (tmp_path / "solvers.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert {r["bed"] for r in rows} == {"about", "orders", "agreement", "mixture"}
    page = (tmp_path / "solvers.md").read_text()
    assert all(f"| `{label}`" in page for label in EVERY)
    (tmp_path / "solvers.png").unlink()
    solvers.main(["--redraw", "--output", str(tmp_path)])
    assert (tmp_path / "solvers.png").stat().st_size > 5000
    assert (tmp_path / "solvers.md").read_text() == page
    assert "solvers.csv" in capsys.readouterr().out


def test_the_digits_are_sampled_scored_and_reported(tmp_path, monkeypatch):
    """On a network of two training steps, which the benchmark trains where it finds none."""
    whole = solver_quality.digits_config()

    def short():
        config = whole.copy_and_resolve_references()
        config.training.update(n_iters=2, snapshot_freq=2, snapshot_freq_for_preemption=2)
        config.training.update(log_freq=1, eval_freq=2)
        config.model.update(nf=8, num_res_blocks=1)
        return config

    monkeypatch.setattr(solver_quality, "digits_config", short)
    monkeypatch.setattr(solver_quality, "CHOSEN", ("ddim", "dpmpp_2m_sde"))
    loose = {
        "dpm_solver_adaptive": (solver_quality.ADAPTIVE["dpm_solver_adaptive"][0], (1.0,), False)
    }
    monkeypatch.setattr(solver_quality, "ADAPTIVE", loose)
    bed = Digits(tmp_path, samples=20, seeds=2)
    assert bed.step == 2 and bed.real.shape == (1797, 64)
    told = []
    rows = list(solver_quality.digit_rows(bed, (5,), 6, told.append))
    assert len(told) == 4 and len(rows) == 4 * 2 * 2
    assert all(math.isfinite(r.value) and r.value > 0 for r in rows)
    found = solver_quality.summarise(rows, "digits", "frechet")
    assert (
        found["ddim"][0].nfe == 5 and found["reference: euler_maruyama + none, 6 steps"][0].nfe == 6
    )
    assert "deterministic solvers" in solver_report._digits_table(rows).lower()
    solver_report.plot(rows, tmp_path / "plot.png")


def test_the_page_in_the_docs_is_of_the_present_catalogue():
    page = (ROOT / "docs/solvers.md").read_text()
    sde = processes()["VP"]
    for label, member in EVERY.items():
        line = re.search(rf"^\| `{re.escape(label)}`( ~)? \| (\d) \|(.*)\|$", page, re.MULTILINE)
        assert line is not None, f"{label} is missing; run python -m benchmarks.solvers --publish"
        declared = declared_order(member, sde)
        observed = [float(v) for v in line[3].split("|")]
        assert int(line[2]) == declared and len(observed) == len(processes())
        assert min(observed) > declared - 0.25, label
