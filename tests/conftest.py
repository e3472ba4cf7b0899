"""Shared by all tests: the library on the path, one thread, seeds."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("MPLBACKEND", "Agg")
# Also for the programs that tests start: two workers with all threads each stall one another.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a benchmark may have set it, and sums of two threads round otherwise


@pytest.fixture
def cases(record_property):
    """Counts what a test tries (`toys_properties.Cases`); the sum is printed at the end."""
    from toys_properties import Cases

    counted = Cases()
    yield counted
    record_property("cases", counted.count)
    record_property("ran", counted.ran)


def pytest_terminal_summary(terminalreporter):
    reports = [
        r for r in terminalreporter.stats.get("", []) if getattr(r, "when", "") == "teardown"
    ]
    kept = [pair for r in reports for pair in r.user_properties]
    cases, ran = ([value for name, value in kept if name == key] for key in ("cases", "ran"))
    if cases:
        said = f"cases: {sum(cases)} in {len(cases)} tests, of which {sum(ran)} ran to their end"
        terminalreporter.write_line(said)
