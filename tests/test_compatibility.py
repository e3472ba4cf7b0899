"""Versions: of the library, and of what it is made with (docs/compatibility.md, .ci/matrix.py)."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import configs

ROOT = Path(__file__).resolve().parent.parent
SETUP = (ROOT / "setup.py").read_text()
PAGE = (ROOT / "docs" / "compatibility.md").read_text()
OWN = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {".venv", "build", "runs"} & set(path.relative_to(ROOT).parts)
]


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.Name, ast.alias)):
            yield node.id if isinstance(node, ast.Name) else node.name


def test_nothing_calls_scipys_sqrtm():
    """SciPy 1.18 took `disp=` away; a covariance is symmetric, and has eigenvalues instead."""
    assert len(OWN) > 200
    assert [str(path) for path in OWN if "sqrtm" in names(path)] == []


def test_the_command_line_setup_and_the_library_name_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", configs.__version__)
    command = [sys.executable, str(ROOT / "main.py"), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == configs.__version__
    assert 'version="' not in SETUP
    for path in ("setup.py", "main.py"):
        assert configs.__version__ not in (ROOT / path).read_text()


def test_every_requirement_has_a_lower_bound_and_the_oldest_corner_pins_it(matrix):
    section = re.search(r"install_requires=\[(.*?)\n    \]", SETUP, re.DOTALL)[1]
    required = re.findall(r'^ +"(.+?)"', section, re.MULTILINE)
    assert len(required) >= 12
    pins = matrix.lower_bounds()
    assert [f"{r.replace('>=', '==')}.*" for r in required] == pins
    assert "torch==2.6.*" in pins
    assert "numpy==1.26.*" in pins


def test_the_page_names_every_lower_bound_and_every_python(matrix):
    for pin in matrix.lower_bounds():
        name, low = pin.removesuffix(".*").split("==")
        assert re.search(rf"\| {re.escape(name)} +\| {re.escape(low)}", PAGE), pin
    for version in matrix.PYTHONS:
        assert re.search(rf"\| {re.escape(version)} ", PAGE), version
    oldest = re.search(r'python_requires=">=(.+)"', SETUP)[1]
    assert oldest == matrix.PYTHONS[0]


def test_the_matrix_finds_this_python_and_refuses_another(matrix):
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert matrix.interpreter(here, {here: sys.executable}) == sys.executable
    assert matrix.interpreter("2.0", {"2.0": sys.executable}) is None
