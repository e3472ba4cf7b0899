"""Every figure of the README and of docs/, made anew: `make gallery`.

    python -m benchmarks.gallery                  # the toys: ten minutes on two cores
    python -m benchmarks.gallery --only face      # one of them
    python -m benchmarks.gallery --all            # the others too: hours
    python -m benchmarks.gallery --list

A toy is trained where its folder in --runs holds no checkpoint yet (--fresh trains it anew), and
evaluated; its figures go to assets/toys/, and its numbers, read from the JSON of the evaluation,
to the table of docs/toys.md. Runs that others need are found or made in --runs as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import evaluation_points
import main as command
import visualize
import visualize_plane
from data_lib_points import get_density
from run_lib_pictures import CELLS, save_figure
from visualize_points import HALF_SIDE

ROOT = Path(__file__).resolve().parents[1]
ASSETS, PAGE = ROOT / "assets", ROOT / "docs" / "toys.md"
#: The toys, in the order of the page, and which of their figures are on it.
TOYS = {
    "ring": ("likelihood",),
    "bird": ("marginals",),
    "face": ("score", "marginals"),
    "swissroll": ("marginals", "paths", "family", "likelihood"),
    "moons": ("family",),
    "mixture": ("score", "paths"),
    "ring_langevin": ("score", "steps"),
    "ring_annealed": ("marginals",),
}
#: Quality of WebP, dots an inch of a figure in assets/, and points of a sample shown.
QUALITY, WIDTH, SHOWN = 85, 1300, 2000
BEGIN, END = "<!-- written by make gallery -->", "<!-- end of what make gallery writes -->"


class Item(NamedTuple):
    """A part of the gallery: what it makes, how, and whether it takes longer than minutes."""

    about: str
    make: Callable[[argparse.Namespace], None]
    long: bool = False


# --- commands -----------------------------------------------------------------------------------


def run(*words: Any) -> dict[str, float]:
    """Run a command in the checkout, and return the seconds that it took.

    Raises: SystemExit where it fails.
    """
    words = tuple(map(str, words))
    print("$", " ".join(words), flush=True)
    wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        raise SystemExit(f"{' '.join(words)}: ended with status {status}; see its last lines above")
    cpu = sum(getattr(after, f) - getattr(before, f) for f in ("ru_utime", "ru_stime"))
    return {"wall": time.monotonic() - wall, "cpu": cpu}


def trained(config: str, folder: Path, *options: str) -> None:
    """Train `config` in `folder`, where no finished checkpoint is there, and evaluate it."""
    seconds = folder / "seconds.json"
    known = json.loads(seconds.read_text()) if seconds.exists() else {}
    base = ("main.py", "--config", config, "--workdir", folder, *options)
    if "train" not in known:
        known["train"] = run(*base, "--mode", "train")
        known["load"] = os.getloadavg()[0]
    spent = run(*base, "--mode", "eval")
    known.setdefault("eval", spent)  # later ones find samples that are there
    seconds.write_text(json.dumps(known, indent=1))


# --- the toys -----------------------------------------------------------------------------------


def toy(name: str) -> Callable[[argparse.Namespace], None]:
    def make(args):
        folder = args.runs / name
        if args.fresh and folder.exists():
            shutil.rmtree(folder)
        trained(f"configs/toy/{name}.py", folder)
        stem = newest(folder)
        for figure in TOYS[name]:
            publish(Path(f"{stem}_{figure}.png"), args.assets / "toys" / f"{name}_{figure}.webp")

    return make


def newest(folder: Path) -> Path:
    """eval/ckpt_<k> of the newest checkpoint that was evaluated.

    Raises: FileNotFoundError where there is none.
    """
    found = [p for p in (folder / "eval").glob("ckpt_*.json") if p.stem[5:].isdigit()]
    if not found:
        raise FileNotFoundError(f"{folder}: expected an evaluation, eval/ckpt_<k>.json, got none")
    return max(found, key=lambda p: int(p.stem[5:])).with_suffix("")


def publish(source: Path, target: Path) -> None:
    """The picture as WebP of at most WIDTH pixels' width."""
    import io

    from PIL import Image

    with Image.open(source) as file:
        picture = file.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize(
            (WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS
        )
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=6)
    target.parent.mkdir(parents=True, exist_ok=True)
    visualize.write_atomic(target, buffer.getvalue())
    print(f"  {target.relative_to(ROOT) if ROOT in target.parents else target}: "
          f"{target.stat().st_size // 1000} kB")  # fmt: skip


def overview(args) -> None:
    """All toys, the truth above and the samples of the model below; the animation of one."""
    names = [name for name in TOYS if (args.runs / name / "eval").is_dir()]
    shown = [name for name in names if "_" not in name]
    grid = evaluation_points.grid(HALF_SIDE, CELLS)[0]
    exact, model = [], {}
    for name in shown:
        config = command.load_config(str(ROOT / "configs" / "toy" / f"{name}.py"))
        exact.append(_density(config).log_density(grid))
        with np.load(f"{newest(args.runs / name)}_samples.npz") as file:
            model[name] = torch.from_numpy(file["samples"])
    figure = visualize_plane.truth_and_points(exact, list(model.values()), shown)
    path = args.runs / "overview.png"
    save_figure(figure, path)
    publish(path, args.assets / "toys" / "overview.webp")
    if "face" in shown:
        film = Path(f"{newest(args.runs / 'face')}_sampling.webp")
        shutil.copyfile(film, args.assets / "toys" / "face_sampling.webp")
    write_table(args, names)


def _density(config):
    here = os.getcwd()
    os.chdir(ROOT)  # configs name assets/ring.png
    try:
        return get_density(config)
    finally:
        os.chdir(here)


#: Columns of the table: heading, and the cell of a toy's results and seconds.
_COLUMNS: dict[str, Callable[[dict, dict], str]] = {
    "sliced Wasserstein": lambda r, s: _value(r, "metrics", "sliced_wasserstein"),
    "of the truth": lambda r, s: _value(r, "metrics", "sliced_wasserstein_true"),
    "ratio": lambda r, s: f"{r['metrics']['sliced_wasserstein_ratio']:.2f}",
    "KL, nats": lambda r, s: _nats(r, "kl"),
    "ELBO gap, nats": lambda r, s: _nats(r, "elbo_gap"),
    "CPU s: train": lambda r, s: f"{s['train']['cpu']:.0f}",
    "eval": lambda r, s: f"{s['eval']['cpu']:.0f}",
}


def _value(results: dict, part: str, key: str) -> str:
    values = results[part]
    return f"{values[key]:.4f} ± {values[key + '_se']:.4f}"


def _nats(results: dict, key: str) -> str:
    if "likelihood" not in results:
        return "–"
    found = results["likelihood"][key]
    return f"{found['mean']:.3f} ± {found['standard_error']:.3f}"


def table(runs: Path, names: Sequence[str]) -> str:
    """The numbers of the toys as a table in Markdown."""
    rows = [["toy", *_COLUMNS], ["---"] * (1 + len(_COLUMNS))]
    for name in names:
        results = json.loads(newest(runs / name).with_suffix(".json").read_text())
        seconds = json.loads((runs / name / "seconds.json").read_text())
        link = f"[{name}](../configs/toy/{name}.py)"
        rows.append([link, *(cell(results, seconds) for cell in _COLUMNS.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_table(args, names: Sequence[str]) -> None:
    """Put the table between its marks in the page.

    Raises: ValueError for a page without the marks.
    """
    text = args.page.read_text()
    if not (BEGIN in text and END in text):
        raise ValueError(f"{args.page}: expected the lines {BEGIN!r} and {END!r}; put them back")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    content = f"{before}{BEGIN}\n{table(args.runs, names)}\n{END}{after}"
    visualize.write_atomic(args.page, content.encode())
    print(f"  {args.page.name}: {len(names)} toys")


# --- the others ---------------------------------------------------------------------------------


def solvers(args) -> None:
    demo = args.runs / "demo"
    trained("configs/vp/digits_ddpmpp_continuous.py", demo)
    run("-m", "benchmarks.solvers", "--workdir", demo, "--publish")


def inverse(args) -> None:
    run("-m", "benchmarks.inverse", "--publish")


def mnist(args) -> None:
    config, folder = "configs/vp/mnist_ddpmpp_continuous.py", args.runs / "mnist"
    trained(config, folder, "--config.eval.enable_bpd=False")
    shutil.copyfile(f"{newest(folder)}_sampling.webp", args.assets / "mnist_sampling.webp")
    base = ("main.py", "--config", config, "--workdir", folder, "--mode", "sample")
    run(*base, "--num", 64, "--output", args.assets / "mnist_samples.png")


ITEMS = {
    **{name: Item(f"configs/toy/{name}.py", toy(name)) for name in TOYS},
    "overview": Item("all toys side by side, and the table of docs/toys.md", overview),
    "inverse": Item("docs/inverse_problems.md: minutes", inverse, True),
    "solvers": Item("docs/solvers.md: half an hour, on the digits of `make demo`", solvers, True),
    "mnist": Item("README: an hour; needs MNIST in ~/data", mnist, True),
}


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names, with commas; by default the toys")
    parser.add_argument("--all", action="store_true", help="what takes long, too")
    parser.add_argument("--fresh", action="store_true", help="train the toys anew")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/gallery")
    parser.add_argument("--assets", type=Path, default=ASSETS, help=argparse.SUPPRESS)
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.runs = args.runs.resolve()
    args.chosen = [n for n in args.only.split(",") if n]
    unknown = [n for n in args.chosen if n not in ITEMS]
    if unknown:
        parser.error(f"--only: expected names of {', '.join(ITEMS)}, got {', '.join(unknown)}")
    args.chosen = args.chosen or [n for n, item in ITEMS.items() if args.all or not item.long]
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    if args.list:
        for name, item in ITEMS.items():
            print(f"{name:14} {item.about}")
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(args.chosen):
        print(f"[{i + 1}/{len(args.chosen)}] {name}: {ITEMS[name].about}", flush=True)
        ITEMS[name].make(args)


if __name__ == "__main__":
    main()
