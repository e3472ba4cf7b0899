"""What a stranger stumbled over once (docs/walk.md)."""

import subprocess
import sys
from pathlib import Path

import pytest

import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return sys.path


def test_a_config_anywhere_finds_the_modules_beside_it(tmp_path, path, monkeypatch):
    (tmp_path / "parts_of_a_stranger.py").write_text("WIDTH = 48\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "import parts_of_a_stranger\n"
        "from configs.vp.digits_ddpmpp_continuous import get_config as digits\n\n\n"
        "def get_config():\n"
        "    config = digits()\n"
        "    config.model.nf = parts_of_a_stranger.WIDTH\n"
        "    return config\n"
    )
    assert main.load_config(str(file)).model.nf == 48
    monkeypatch.delitem(sys.modules, "parts_of_a_stranger")


@pytest.mark.parametrize(
    ("words", "last"),
    [
        ("--mode trian", "value should be one of <train|eval"),
        ("--wrkdir x", "Did you mean: workdir ?"),
        ("--config.training.n_iters=3", "expected --config FILE too"),
        ("--mode train --workdir x", "--mode train needs --config"),
        ("train", "stray arguments ['train']"),
    ],
)
def test_a_wrong_command_shows_examples_and_ends_with_what_is_wrong(words, last):
    command = [sys.executable, str(ROOT / "main.py"), *words.split()]
    run = subprocess.run(command, capture_output=True, text=True)
    said = run.stdout + run.stderr
    assert run.returncode == 1
    assert "Traceback" not in said
    assert last in said.strip().rsplit("\n\n", 1)[-1]
    if not words.startswith("--config."):
        assert "python main.py --config configs/vp/digits_ddpmpp_continuous.py" in said
