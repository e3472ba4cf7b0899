"""The notebooks of docs/ run from the first cell to the last, and say what they promise."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, monkeypatch, **settings: str) -> str:
    """Everything that the notebook's cells print, executed in docs/."""
    import nbformat
    from nbclient import NotebookClient

    for key, value in {**settings, "PYTHONWARNINGS": "ignore"}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(ROOT / "docs" / name, as_version=4)
    where = {"metadata": {"path": str(ROOT / "docs")}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "\n".join(out.get("text", "") for out in outputs)


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern!r} is not in\n{text}"
    return [float(value) for value in found.groups()]


def test_the_tutorial_runs_and_its_claims_hold(monkeypatch):
    text = run("tutorial.ipynb", monkeypatch)
    stuck, truth = numbers(r"left cluster: ([\d.]+) of the samples, ([\d.]+) of the data", text)
    assert stuck < 0.1 < truth
    d, of_truth = numbers(r"to the truth ([\d.]+), of the truth to itself ([\d.]+)", text)
    assert d < 1.5 * of_truth
    (kl,) = numbers(r"KL\(truth‖model\) = ([\d.]+)", text)
    assert kl < 0.1
    exact, replaced, particles = numbers(
        r"exact (-?[\d.]+), replacement (-?[\d.]+), mmps -?[\d.]+, smc (-?[\d.]+)", text
    )
    assert abs(particles - exact) < 0.15 < abs(replaced - exact)


@pytest.mark.slow
def test_the_demo_runs_and_two_networks_give_close_codes(monkeypatch, tmp_path):
    text = run("demo.ipynb", monkeypatch, DEMO_NOTEBOOK=str(tmp_path), DEMO_NOTEBOOK_STEPS="600")
    same, different = numbers(
        r"codes of one image: ([\d.]+); of different images: (-?[\d.]+)", text
    )
    assert same > different + 0.2
    image, another = numbers(
        r"by the other: ([\d.]+) with the image, (-?[\d.]+) with another", text
    )
    assert image > 0.8 > another
    (change,) = numbers(r"largest change of grey: ([\d.e-]+)", text)
    assert change < 1e-5
    assert re.search(r"there and back: root mean square error [\d.]+e-0[2-9]", text)


@pytest.mark.parametrize("name", ["tutorial.ipynb", "demo.ipynb"])
def test_notebooks_are_kept_with_their_outputs_and_without_errors(name):
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    kinds = {out.output_type for cell in cells for out in cell.outputs}
    assert "display_data" in kinds or "execute_result" in kinds
    assert "error" not in kinds
    assert os.path.getsize(ROOT / "docs" / name) < 1_500_000
