"""What `make demo` promises, on the shipped configuration."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_leaves_a_report_with_the_promised_numbers(tmp_path):
    started = time.perf_counter()
    for mode in ("train", "eval"):
        config = "configs/vp/digits_ddpmpp_continuous.py"
        words = [f"--config={config}", f"--workdir={tmp_path}", f"--mode={mode}"]
        subprocess.run([sys.executable, "main.py", *words], cwd=ROOT, check=True)
    print(f"train and eval: {time.perf_counter() - started:.0f} s")
    (result,) = (tmp_path / "eval").glob("ckpt_*.json")
    numbers = json.loads(result.read_text())
    print({key: numbers[key] for key in ("bpd", "metrics")})
    assert numbers["bpd"]["images"] == 300
    assert numbers["bpd"]["mean"] <= 2.1  # independent pixel histograms: 2.41
    assert 0.40 <= numbers["metrics"]["one_nn_accuracy"] <= 0.62  # a full Gaussian: 0.89
    page = (tmp_path / "report.html").read_text()
    for heading in ("Samples", "Sampling", "Training and likelihood", "Nearest training images"):
        assert f"<h2>{heading}</h2>" in page
