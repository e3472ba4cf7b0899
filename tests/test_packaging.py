"""A wheel holds the library, all of it and nothing else, and works from another folder."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(path, source)
    for package in ("models", "configs"):
        shutil.copytree(ROOT / package, source / package)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", out, source], check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_room_and_no_door(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in [*ROOT.glob("*.py"), *(ROOT / "models").rglob("*.py")]:
        name = str(path.relative_to(ROOT))
        expected = name not in ("utils.py", "datasets.py", "setup.py")
        assert (name in names) == expected, name
    for path in (ROOT / "configs").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith("tests/")]


def test_the_installed_library_imports_from_another_folder(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*command, wheel], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import run_lib, sampling, configs.vp.digits_ddpmpp_continuous, models.ncsnpp; "
        "print(run_lib.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, target],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(str(target))
