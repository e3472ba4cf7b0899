"""What is imported, and when: a user who asks for help, or for a process, waits for torch alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Packages that serve one thing each.
LATE = (
    *("scipy", "sklearn", "pandas", "torchvision", "cleanfid", "matplotlib", "PIL"),
    *("tensorboard", "tensorflow", "diffusers", "safetensors", "torch_fidelity"),
)
#: Parts of torch that are slow to import.
LATE_OF_TORCH = ("torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "sympy")

#: Of torch 2.6 it loads sympy.
TORCH = "import torch.utils.checkpoint"


def loaded(code: str, *arguments: str) -> set[str]:
    """The names of LATE and of torch's that a fresh interpreter has after this code."""
    tail = (
        "\nimport json, sys\n"
        f"names = {[*LATE, *LATE_OF_TORCH, 'torch']}\n"
        "sys.stdout.flush()\n"
        "sys.stderr.write('@' + json.dumps([n for n in names if n in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code + tail, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stderr.rsplit("@", 1)[1]))


def test_the_rooms_of_mathematics_import_torch_and_numpy_alone():
    code = "import sde_lib, sampling, solvers, losses, likelihood, divergence, ode, operators\n"
    code += "import models.ncsnpp, models.ddpm, controllable_generation, checkpoints"
    assert loaded(code) == loaded(TORCH)


def test_putting_a_run_together_imports_nothing_that_it_may_not_need():
    assert loaded("import run_lib") <= loaded(TORCH)


RUN = """
import sys
import main
try:
    main.run()
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--help",), set()),
        (("--helpfull",), set()),
        (("--config", "configs/vp/digits_ddpmpp_continuous.py", "--help"), {"torch"}),
    ],
    ids=["help", "helpfull", "help of a config"],
)
def test_help_imports_nothing_that_it_does_not_need(arguments, found):
    assert loaded(RUN, *arguments) <= found
