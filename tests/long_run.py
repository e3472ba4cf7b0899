"""Hours of training, evaluating and sampling in one process, watched for what grows.

    python tests/long_run.py --minutes 60 --output long_run/

Half of the time is one uninterrupted training, with data workers, checkpoints, snapshots,
TensorBoard and losses; the other half short rounds of train (resumed), eval, sample and stats.
Every few seconds: resident memory (of this process, and of its children), open files, threads,
child processes, names in /dev/shm, temporary files. After a warm-up a line is fitted to each;
what grows by more than three standard errors beyond its allowance fails. Leaves watched.csv,
watched.png and numbers.json. The step and the history grow by design: both are on disk.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import numpy as np
from PIL import Image
from toys_processes import tiny

#: What is watched: its unit, and the growth in an hour that is no leak.
WATCHED = {
    "memory": ("MiB", 16.0),
    "memory of children": ("MiB", 16.0),
    "open files": ("", 1.0),
    "threads": ("", 1.0),
    "children": ("", 1.0),
    "shared memory": ("names", 1.0),
    "temporary files": ("", 1.0),
}
#: The share of each phase that is its warm-up.
WARM_UP = 0.25


def children() -> list[int]:
    """The processes that this one started, and those that they started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(text.rsplit(")", 1)[1].split()[1])
    mine, found = {os.getpid()}, []
    for pid in sorted(parents):
        if parents[pid] in mine:
            mine.add(pid)
            found.append(pid)
    return found


def resident(pid) -> float:
    """Resident memory in MiB that is not shared with other processes' files; 0 once it is gone."""
    try:
        pages, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except OSError:
        return 0.0
    return (int(pages) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / 2**20


def look(temporary: Path, workdir: Path) -> list[float]:
    """One value for each of WATCHED."""
    others = children()
    names = tuple(f"torch_{pid}_" for pid in (os.getpid(), *others))
    shared = [name for name in os.listdir("/dev/shm") if name.startswith(names)]
    unfinished = [*temporary.rglob("*"), *workdir.rglob(".*.tmp")]
    return [
        resident("self"),
        sum(map(resident, others)),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        len(others),
        len(shared),
        len(unfinished),
    ]


class Watch(threading.Thread):
    """Looks every `every` seconds; `rows` holds (seconds, phase, values)."""

    def __init__(self, temporary: Path, workdir: Path, every: float):
        super().__init__(daemon=True)
        self.places, self.every, self.rows = (temporary, workdir), every, []
        self.phase, self.since, self.over = "start", time.monotonic(), threading.Event()

    def run(self):
        while not self.over.wait(self.every):
            self.rows.append((time.monotonic() - self.since, self.phase, look(*self.places)))


def growth(seconds, values) -> tuple[float, float]:
    """The slope of a line by least squares, and its standard error, in an hour.

    Neighbouring looks are alike: the error is that of the means of twenty stretches.
    """
    stretches = np.array_split(np.arange(len(seconds)), min(20, len(seconds)))
    t, y = (np.array([np.mean(np.take(x, s)) for s in stretches]) for x in (seconds, values))
    t = (t - t.mean()) / 3600
    slope = float(t @ y / (t @ t))
    rest = y - y.mean() - slope * t
    return slope, float(np.sqrt(rest @ rest / max(len(y) - 2, 1) / (t @ t)))


def write_images(folder: Path, count: int = 400) -> None:
    """Pictures of noise that are decoded batch by batch."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.RandomState(i).randint(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


def configuration(folder: Path, **changes):
    """Everything switched on, tiny, with workers."""
    settings = {
        "data__dataset": "folder",
        "data__path": str(folder / "images"),
        "data__levels": 256,
        "data__workers": 2,
        "data__memory_gib": 0.0,
        "training__log_freq": 10,
        "training__eval_freq": 100,
        "training__eval_images": 40,
        "training__snapshot_freq": 400,
        "training__snapshot_freq_for_preemption": 200,
        "training__snapshot_sampling": True,
        "training__num_snapshot_samples": 4,
        "sampling__steps": 8,
        "eval__begin_ckpt": -1,
        "eval__end_ckpt": -1,
        "eval__enable_sampling": True,
        "eval__enable_bpd": True,
        "eval__bpd_num_images": 8,
        "eval__bpd_repeats": 1,
        "eval__rtol": 1e-2,
        "eval__atol": 1e-2,
        "eval__num_samples": 40,
        "eval__batch_size": 20,
        "eval__extractor": "pixels",
        "eval__metrics": ("fid", "kid"),
        "eval__stats": str(folder / "stats.npz"),
    }
    return tiny(**{**settings, **changes})


def one_training(folder: Path, minutes: float) -> None:
    """A training that is asked to end after some minutes."""
    import run_lib

    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        run_lib.train(configuration(folder, training__n_iters=10**9), folder / "one")
    except SystemExit as end:
        if end.code != 128 + signal.SIGTERM:
            raise
    finally:
        timer.cancel()


def rounds(folder: Path, minutes: float) -> int:
    """Rounds of every mode; how many there were."""
    import run_lib

    end, count = time.monotonic() + 60 * minutes, 0
    workdir = folder / "rounds"
    while time.monotonic() < end:
        count += 1
        run_lib.train(configuration(folder, training__n_iters=40 * count), workdir)
        run_lib.statistics(configuration(folder))
        run_lib.evaluate(configuration(folder), workdir)
        run_lib.sample(configuration(folder), workdir, folder / "samples.npz", num=20)
    return count


def draw(rows, path: Path) -> None:
    """The watched quantities over time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(WATCHED), 1, figsize=(9, 2 * len(WATCHED)), sharex=True)
    for i, (name, ax) in enumerate(zip(WATCHED, axes)):
        for phase in dict.fromkeys(phase for _, phase, _ in rows):
            t, y = zip(*((t / 60, v[i]) for t, p, v in rows if p == phase))
            ax.plot(t, y, lw=0.8, label=phase)
        ax.set_ylabel(f"{name}\n{WATCHED[name][0]}".strip())
        ax.set_ylim(bottom=0)
    axes[0].legend()
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def judged(rows) -> tuple[dict, list[str]]:
    """Growth in an hour by phase and quantity, with its error; and what of it is too much."""
    found, wrong = {}, []
    for phase in dict.fromkeys(phase for _, phase, _ in rows):
        t, values = zip(*((t, v) for t, p, v in rows if p == phase))
        first = int(WARM_UP * len(t))
        for i, (name, (unit, allowed)) in enumerate(WATCHED.items()):
            y = [v[i] for v in values][first:]
            slope, error = growth(t[first:], y)
            found[f"{phase}: {name}"] = {"per_hour": slope, "error": error, "mean": np.mean(y)}
            if slope - 3 * error > allowed:
                wrong.append(f"{phase}: {name} grows by {slope:.3g} ± {error:.2g} {unit} an hour")
    return found, wrong


def watched(folder: Path, minutes: float, every: float = 3.0) -> tuple[dict, list[str]]:
    """Run both phases in `folder`; what `judged` says."""
    import run_lib

    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    write_images(folder / "images")
    run_lib.statistics(configuration(folder))
    watch = Watch(temporary, folder, every)
    watch.start()
    for watch.phase, work in (("one training", one_training), ("rounds", rounds)):
        count = work(folder, minutes / 2)
        watch.rows.pop() if watch.rows else None  # it may have looked while the phase ended
    watch.over.set()
    watch.join()
    found, wrong = judged(watch.rows)
    found["rounds"] = count
    found["looks"] = len(watch.rows)
    (folder / "numbers.json").write_text(json.dumps(found, indent=2))
    with open(folder / "watched.csv", "w") as file:
        table = csv.writer(file)
        table.writerow(["seconds", "phase", *WATCHED])
        table.writerows([t, phase, *values] for t, phase, values in watch.rows)
    draw(watch.rows, folder / "watched.png")
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=Path("long_run"))
    asked = parser.parse_args()
    found, wrong = watched(asked.output.resolve(), asked.minutes)
    for name, value in found.items():
        if isinstance(value, dict):
            value = "{mean:.5g}, {per_hour:+.3g} ± {error:.2g} an hour".format(**value)
        print(f"{name}: {value}")
    sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
