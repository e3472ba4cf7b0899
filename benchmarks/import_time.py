"""How long users wait for the first thing: importing the library, the command line's help, and the
first training step of the digits.

    python -m benchmarks.import_time [--peer score_sde_pytorch=PATH]

Every measurement is a process of its own, and they take turns. Importing is measured against
`import torch` alone in the same run. The first training step is a training of one step, from the
start of `main.py` to its end, checkpoint and report included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders, harness, tables

ROOT = Path(__file__).resolve().parent.parent
#: Packages that take long to import and serve few purposes.
HEAVY = (
    "scipy",
    "torchvision",
    "matplotlib",
    "tensorboard",
    "sklearn",
    "pandas",
    "cleanfid",
    "PIL",
    "tqdm",
    "tensorflow",
    "jax",
)
#: What is imported, by the name of its row; the first is what the others are held against.
IMPORTS = {
    "import torch": "import torch",
    "import sde_lib, sampling": "import sde_lib, sampling",
    "import losses, likelihood, models": "import losses, likelihood, models",
}
#: The seconds that a row may take, and whether they are those above `import torch`.
GOALS = {
    "import sde_lib, sampling": (True, 0.3),
    "main.py --help": (True, 1.0),
    "first training step": (False, 10.0),
}


def python(code: str, folder: Path = ROOT) -> Callable[[], None]:
    """A fresh interpreter that runs `code` in a folder."""

    def run():
        _call([sys.executable, "-c", code], folder)

    return run


def main_help() -> None:
    """main.py --help, which absl ends with 1."""
    said = _call([sys.executable, "main.py", "--help"], ROOT, ended=1)
    if "--workdir" not in said:
        raise RuntimeError(f"main.py --help says nothing of --workdir: {said[-500:]}")


def _call(command: list[str], folder: Path, ended: int = 0) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != ended:
        what = " ".join(command)
        raise RuntimeError(f"{what} in {folder} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def heavy(code: str, folder: Path = ROOT) -> list[str]:
    """The HEAVY packages that `code` imports, beside those that torch imports itself."""
    probe = (
        f"import sys, torch; own = set(sys.modules)\n{code}\n"
        f"print(*[n for n in {HEAVY!r} if n in sys.modules and n not in own])"
    )
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout.split("\n")[-2].split() if done.returncode == 0 else ["failed"]


def one_step(device: str, folder: str, count: list[int]) -> Callable[[], None]:
    """A training of the digits of one step, in a folder of its own each time."""

    def train():
        count[0] += 1
        config = ROOT / "configs" / "vp" / "digits_ddpmpp_continuous.py"
        flags = [f"--config={config}", f"--workdir={folder}/{count[0]}", "--mode=train"]
        changes = ["training.n_iters=1", "training.snapshot_sampling=False", f"device={device}"]
        _call(
            [sys.executable, "main.py", *flags, *(f"--config.{c}" for c in changes)],
            ROOT,
        )
        if not list(Path(folder, str(count[0])).rglob("*.pth")):
            raise RuntimeError(f"no checkpoint after a training of one step in {folder}")

    return train


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it in turn: seconds of each process, what is above `import torch`, and what heavy
    packages it imports."""
    works: dict[str, Callable[[], None]] = {n: python(code) for n, code in IMPORTS.items()}
    works["main.py --help"] = main_help
    imported = {name: heavy(code) for name, code in IMPORTS.items()}
    imported["main.py --help"] = heavy("import main")
    for name, folder in args.peer:
        if name == "score_sde_pytorch":
            title = f"{name}: import sde_lib, sampling"
            works[title] = python(IMPORTS["import sde_lib, sampling"], Path(folder))
            imported[title] = heavy(IMPORTS["import sde_lib, sampling"], Path(folder))
        else:
            title = f"{name}: import training.networks"
            works[title] = python("import training.networks", Path(folder))
            imported[title] = heavy("import training.networks", Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        if args.first_step:
            works["first training step"] = one_step(args.device, folder, [0])
        device = torch.device("cpu")
        spent = harness.in_turn(works, device, args.repeats, args.warmup)
    rows: dict[str, Any] = {name: {"seconds": seconds} for name, seconds in spent.items()}
    base = tables.median(rows["import torch"])
    for name, row in rows.items():
        row["above_torch"] = round(tables.median(row) - base, 4)
        row["heavy"] = imported.get(name, [])
    return {"rows": rows, "tables": [table(rows)]}


def table(rows: dict[str, Any]) -> dict[str, Any]:
    """What was measured beside what it may be."""
    body = []
    for name, row in rows.items():
        above, goal = GOALS.get(name, (False, 0.0))
        may_be = f"≤ {goal:g} s{' above' if above else ''}" if goal else ""
        cells = [name, tables.duration(tables.median(row)), f"{row['above_torch']:+.2f} s", may_be]
        body.append([*cells, ", ".join(row["heavy"])])
    head = ["process", "time", "above import torch", "may be", "heavy packages beside torch's own"]
    return {"title": "from the start of a process to its end", "head": head, "rows": body}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser("import_time", __doc__)
    add = parser.add_argument
    add("--peer", type=contenders.peer, action="append", default=[], help="NAME=FOLDER")
    add("--no-first-step", dest="first_step", action="store_false", help="leave the training out")
    return harness.parse(parser, given)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its table, write its JSON, and return the report."""
    return harness.run("import_time", parse(given), measure)


if __name__ == "__main__":
    main()
