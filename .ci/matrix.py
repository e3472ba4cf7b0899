"""The suite under other versions: `make matrix`, or `python .ci/matrix.py [CORNER ...]`.

A corner is a Python with versions of everything that the library needs:

    oldest   Python 3.10 and the lower bound of every requirement in setup.py
    3.11     that Python and the newest version of everything that has one for it (3.12, 3.13, …)

With no corner named: `oldest` and the newest Python found here; `all` is every Python found. CI
(`.ci/run`) is one corner, that of its own Python, since `make test` installs the newest versions.
Each corner gets a virtual environment of its own (7 GB on Linux, as torch brings CUDA), which is
deleted afterwards. Python's standard library is all that this file needs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
#: What goes wrong first under other versions; a few minutes with the installation.
QUICK = (
    *("test_parity", "test_compatibility", "test_structure", "test_packaging", "test_run_lib"),
    *(
        "test_checkpoint_formats",
        "test_evaluation",
        "test_divergence",
        "test_precision",
        "test_resume",
    ),
)
SHOWN = ("torch", "torchvision", "numpy", "scipy")


def lower_bounds() -> list[str]:
    """setup.py's `name>=1.2` as constraints `name==1.2.*`."""
    section = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    assert section is not None
    return [f"{name}=={low}.*" for name, low in re.findall(r'"([\w-]+)>=([\d.]+)', section[1])]


def interpreter(version: str, given: dict[str, str]) -> str | None:
    """A program that is this Python: as given, on the PATH, or one of pyenv's."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for program in (given.get(version), shutil.which(f"python{version}"), *map(str, pyenv)):
        if program:
            said = subprocess.run([program, "-c", code], capture_output=True, text=True)
            if said.stdout.strip() == version:
                return program
    return None


def install(python: str, folder: Path, pins: list[str]) -> Path:
    """A virtual environment with the library, editable, and its tests' needs; its interpreter."""
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    inside = folder / "bin" / "python"
    (folder / "pins.txt").write_text("\n".join(pins))
    pip = [inside, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--progress-bar", "off"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, "-c", folder / "pins.txt", "-e", ".[test]"], cwd=ROOT, check=True)
    return inside


def versions(inside: Path) -> list[str]:
    code = f"from importlib.metadata import version; print(*map(version, {SHOWN}))"
    said = subprocess.run([inside, "-c", code], capture_output=True, text=True, check=True)
    return said.stdout.split()


def suite(inside: Path, log: Path, workers: str, quick: bool) -> str:
    """pytest's own last line, such as '6471 passed, 2 skipped in 199.12s'."""
    command = [inside, "-m", "pytest", "-m", "not slow", "-n", workers, "-p", "no:cacheprovider"]
    files = [f"tests/{name}.py" for name in QUICK] if quick else []
    with log.open("w") as out:
        subprocess.run([*command, *files], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    return log.read_text().strip().rpartition("\n")[2].strip("= ")


def run(corner: str, python: str, options: argparse.Namespace) -> list[str]:
    """A line of the table."""
    folder = ROOT / "build" / "matrix" / corner
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        inside = install(python, folder, lower_bounds() if corner == "oldest" else [])
        result = suite(inside, folder.with_suffix(".log"), options.workers, options.quick)
        found = versions(inside)
    except subprocess.CalledProcessError as error:
        found, result = ["?"] * len(SHOWN), f"not installed: exit {error.returncode}"
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{corner}: {result} ({(time.monotonic() - start) / 60:.0f} min)", flush=True)
    return [*found, result]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The suite under other versions.")
    parser.add_argument("corners", nargs="*", metavar="CORNER", help="oldest, 3.12 …, or all")
    parser.add_argument("--quick", action="store_true", help="ten test files of all")
    parser.add_argument("--keep", action="store_true", help="leave the environments where they are")
    parser.add_argument("--workers", default="2", help="processes of pytest")
    parser.add_argument(
        "--python", nargs="*", default=[], metavar="3.14=PATH", help="interpreters elsewhere"
    )
    options = parser.parse_args()
    unknown = set(options.corners) - {"all", "oldest", *PYTHONS}
    if unknown:
        known = ", ".join(("all", "oldest", *PYTHONS))
        parser.error(f"no such corner: {', '.join(sorted(unknown))}; there are {known}")
    return options


def main() -> int:
    options = arguments()
    given = dict(pair.split("=", 1) for pair in options.python)
    here = {version: interpreter(version, given) for version in PYTHONS}
    found = [version for version in PYTHONS if here[version]]
    corners = options.corners or ["oldest", *found[-1:]]
    if "all" in corners:
        corners = ["oldest", *PYTHONS]
    rows = []
    for corner in corners:
        version = PYTHONS[0] if corner == "oldest" else corner
        python = here[version]
        absent = [*["–"] * len(SHOWN), "not run: no such Python here"]
        rows.append([corner, version, *(run(corner, python, options) if python else absent)])
    print("\n| corner | Python |", " | ".join(SHOWN), "| result |")
    print("|" + "---|" * (len(SHOWN) + 3))
    for row in rows:
        print("|", " | ".join(row), "|")
    return int(
        any(not re.match(r"\d+ passed", row[-1]) for row in rows if "not run" not in row[-1])
    )


if __name__ == "__main__":
    sys.exit(main())
