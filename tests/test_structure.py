"""The layout of the house: which room imports which, and what gets installed."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOORS = {"utils", "datasets"}
# Seams (modules named after their room) share the room's row.
ROOMS = {
    "arguments": set(),  # which every room may import
    "randomness": set(),
    "files": set(),
    "distributed": set(),
    "sde_lib": set(),
    "parametrization": {"sde_lib"},
    "divergence": {"sde_lib", "randomness"},
    "ode": set(),
    "models": {"sde_lib", "parametrization", "files"},
    "losses": {
        "sde_lib",
        "parametrization",
        "models",
        "divergence",
        "distributed",
        "randomness",
    },
    "sampling": {"sde_lib", "parametrization", "models", "ode"},
    "solvers": {"sampling", "sde_lib", "parametrization", "ode"},
    "likelihood": {"sde_lib", "parametrization", "models", "ode", "divergence", "randomness"},
    "operators": set(),
    "controllable_generation": {
        "sde_lib",
        "parametrization",
        "models",
        "sampling",
        "solvers",
        "operators",
        "randomness",
    },
    "configs": set(),
    "data_lib": {"distributed", "files"},
    "evaluation": {"distributed", "files", "randomness"},
    "checkpoints": {"models", "configs", "files"},
    "visualize": {"files"},
    "run_lib": None,  # every room
    "benchmarks": None,
    "main": {"run_lib", "checkpoints", "configs"},  # convert needs no run
}


def room_of(name: str) -> str | None:
    rooms = [room for room in ROOMS if name == room or name.startswith((room + "_", room + "."))]
    return max(rooms, key=len) if rooms else None


def modules():
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "models").rglob("*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name not in DOORS | {"setup"}:
            yield pytest.param(name, path, id=name)


def imports(path: Path, package: str):
    """Top-level names imported anywhere in a file, relative imports resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "" if node.level == 0 else package


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_a_room_imports_only_what_its_row_names(name, path):
    room = room_of(name)
    assert room is not None, f"{name} belongs to no room of the README's table"
    allowed = ROOMS[room]
    for imported in imports(path, name.split(".")[0]):
        assert imported.split(".")[0] not in DOORS, f"{name} uses the door {imported}"
        target = room_of(imported)
        if target not in (None, room, "arguments") and allowed is not None:
            assert target in allowed, f"{name} imports {imported}"


def test_every_module_is_installed_but_the_doors():
    section = re.search(r"py_modules=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert section is not None
    named = set(re.findall(r'"(\w+)"', section[1]))
    there = {path.stem for path in ROOT.glob("*.py")} - DOORS - {"setup"}
    assert named == there


def test_every_package_folder_has_an_init():
    for package in ("models", "configs"):
        for folder in [ROOT / package, *(ROOT / package).rglob("*")]:
            if folder.is_dir() and list(folder.glob("*.py")):
                assert (folder / "__init__.py").exists(), folder


def test_the_readme_names_every_room():
    readme = (ROOT / "README.md").read_text()
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in readme, path.name


def test_importing_the_mathematics_loads_no_heavy_package():
    import subprocess

    code = (
        "import sys, sde_lib, sampling, losses, likelihood; "
        "print([m for m in ('scipy', 'torchvision', 'matplotlib', 'tensorboard', 'sklearn', "
        "'tensorflow', 'jax') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
