"""Faults on purpose: processes that kill themselves at chosen points, and what they may leave."""

import contextlib
import fnmatch
import functools
import importlib
import io
import itertools
import json
import operator
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys_processes import Child, tiny

import checkpoints
import checkpoints_convert
import files
import files_reading
import run_lib
import run_lib_control

EVERYTHING = {
    "model__num_scales": 8,
    "training__n_iters": 8,
    "training__snapshot_freq": 4,
    "training__snapshot_freq_for_preemption": 2,
    "training__log_freq": 2,
    "training__eval_freq": 4,
    "training__eval_images": 20,
    "training__snapshot_sampling": True,
    "training__num_snapshot_samples": 2,
    "sampling__steps": 4,
    "eval__begin_ckpt": 1,
    "eval__end_ckpt": 1,
    "eval__enable_sampling": True,
    "eval__enable_bpd": True,
    "eval__likelihood": "elbo",
    "eval__elbo_points": 2,
    "eval__bpd_num_images": 6,
    "eval__bpd_repeats": 1,
    "eval__num_samples": 12,
    "eval__batch_size": 4,
    "eval__extractor": "pixels",
    "eval__metrics": ("fid",),
    "control__num_images": 1,
    "control__num_samples": 2,
}


def configuration(workdir, **changes):
    """Everything that a run can do, tiny; the statistics lie in the workdir."""
    return tiny(**{**EVERYTHING, "eval__stats": str(workdir / "stats.npz"), **changes})


def convert(workdir, output, format):
    """The first checkpoint in another format."""
    source = workdir / "checkpoints" / "checkpoint_1.pth"
    checkpoints_convert.convert(source, workdir / output, format, configuration(workdir))


MODES = {
    "train": lambda w: run_lib.train(configuration(w), w),
    "stats": lambda w: run_lib.statistics(configuration(w, eval__batch_size=500)),
    "eval": lambda w: run_lib.evaluate(configuration(w), w),
    "sample": lambda w: run_lib.sample(configuration(w), w, w / "drawn", num=6),
    "sample npz": lambda w: run_lib.sample(configuration(w), w, w / "drawn.npz", num=6),
    "sample png": lambda w: run_lib.sample(configuration(w), w, w / "drawn.png", num=6),
    "control": lambda w: run_lib_control.control(configuration(w), w),
    "convert": lambda w: convert(w, "out.pth", "native"),
    "convert score_sde": lambda w: convert(w, "original.pth", "score_sde"),
    "convert safetensors": lambda w: convert(w, "out.safetensors", "safetensors"),
}


# --- kills ----------------------------------------------------------------------------------


def die(*_, **__):
    """As by kill -9: nothing is cleaned up, nothing flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def replace(path, make):
    """Put make(what is there) at 'module.name' or 'module.Class.name'."""
    module, _, rest = path.partition(".")
    *owners, name = rest.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, make(getattr(owner, name)))


def calls(path, number):
    """The process dies as it begins to call this for the number-th time."""
    count = itertools.count(1)

    def make(function):
        @functools.wraps(function)
        def dying(*args, **options):
            if next(count) == number:
                die()
            return function(*args, **options)

        return dying

    replace(path, make)


def writes(name, number):
    """The process dies when half of the number-th piece of a file of this name is written."""
    count = itertools.count(1)

    def make(write):
        def torn(self, data):
            unfinished = fnmatch.fnmatch(Path(self.file.name).name, f".{name}.*.tmp")
            if unfinished and next(count) == number:
                half = memoryview(data).cast("B")
                self.file.write(half[: len(half) // 2])
                self.file.flush()
                die()
            return write(self, data)

        return torn

    replace("files._Watched.write", make)


def renames(name, number):
    """The process dies when the number-th file of this name is complete and not yet in place."""
    count = itertools.count(1)

    def make(rename):
        def dying(source, target):
            moved = fnmatch.fnmatch(Path(source).name, f".{name}.*.tmp")
            if moved and next(count) == number:
                die()
            rename(source, target)

        return dying

    replace("os.replace", make)


KINDS = {"calls": calls, "writes": writes, "renames": renames}


def work(mode, workdir, fault=None):
    """Do this mode, maybe with a fault (kind, where, which time)."""
    if fault is not None:
        KINDS[fault[0]](*fault[1:])
    MODES[mode](workdir)


def killed(mode, workdir, fault) -> bool:
    """Whether a process that does this with a fault was killed by it."""
    child = Child(work, mode, workdir, fault)
    code, said, text = child.end(300)
    assert code in (0, -signal.SIGKILL), (fault, said, text)
    return code != 0


# --- what is there --------------------------------------------------------------------------


def whole(path: Path) -> None:
    """Raise where a file is half-written, or cannot be read for what it is."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":  # it grows: what was being appended may be cut
        for line in path.read_text().splitlines()[:-1]:
            json.loads(line)
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            assert arrays.zip.testzip() is None
            assert all(arrays[key].size >= 0 for key in arrays.files)
    elif path.suffix in (".pth", ".safetensors"):
        checkpoints.load_file(path)
    elif path.suffix in (".png", ".webp"):
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>")


def files_of(workdir) -> dict[Path, bytes]:
    """The content of every file that has its name, by its path in the workdir."""
    found = {}
    for path in sorted(Path(workdir).rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            found[path.relative_to(workdir)] = path.read_bytes()
    return found


def check(workdir, before: dict[Path, bytes], removed=()) -> None:
    """Every file is whole; none that was there is gone, but those of these patterns."""
    after = files_of(workdir)
    for path in after:
        whole(Path(workdir) / path)
    for path in before:
        gone = path not in after and not any(path.match(pattern) for pattern in removed)
        assert not gone, f"{path} is lost"


def left(workdir) -> list[Path]:
    """Unfinished files."""
    return sorted(Path(workdir).rglob(".*.tmp"))


#: What depends on the machine, the moment, or where the workdir is.
PASSING = ("log.txt", "events.out*", "config.json", "report*.html", ".lock")


def contents(workdir) -> dict[str, object]:
    """What each file of a run says, in a form that can be compared; without what is passing."""
    found: dict[str, object] = {}
    for path, data in files_of(workdir).items():
        if any(path.match(pattern) for pattern in PASSING):
            continue
        full = Path(workdir) / path
        if path.suffix == ".npz":
            with np.load(full) as arrays:
                found[str(path)] = {k: (arrays[k].dtype, arrays[k].tobytes()) for k in arrays.files}
        elif path.suffix == ".pth":
            found[str(path)] = frozen(torch.load(full, weights_only=True))
        elif path.suffix == ".safetensors":  # its notes come in any order
            found[str(path)] = frozen(files_reading.load_safetensors(full))
        elif path.name == "history.jsonl":
            rows = [json.loads(line) for line in data.decode().splitlines()]
            passing = ("images_per_second", "memory_gib")
            found[str(path)] = [{k: v for k, v in row.items() if k not in passing} for row in rows]
        elif path.suffix == ".json":
            found[str(path)] = without_paths(json.loads(data))
        else:
            found[str(path)] = data
    return found


def without_paths(value):
    if isinstance(value, dict):
        return {k: without_paths(v) for k, v in value.items() if k not in ("file", "stats")}
    return value


def frozen(value):
    """A saved state as plain values."""
    if isinstance(value, dict):
        return {key: frozen(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        buffer = io.BytesIO()
        np.save(buffer, value.numpy())
        return buffer.getvalue()
    return value


def same(workdir, expected) -> None:
    """The run says what the uninterrupted one says, file by file."""
    got = contents(workdir)
    assert got.keys() == expected.keys()
    differ = [name for name in got if not operator.eq(got[name], expected[name])]
    assert not differ, differ


# --- disks ----------------------------------------------------------------------------------


class Disk:
    """A file system of its own in a folder, where one can be mounted; else the test is skipped."""

    def __init__(self, folder, kib: int = 1024):
        self.folder, self.kib = Path(folder), kib

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.kib}k", "tmpfs", str(self.folder)]
        try:
            refused = subprocess.run(mount, capture_output=True).returncode
        except OSError:
            refused = True
        if refused:
            pytest.skip("no file system can be mounted here")
        return self

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def fill(self, free_kib: int) -> None:
        """Leave so much room."""
        self.room()
        free = shutil.disk_usage(self.folder).free - 1024 * free_kib
        with open(self.folder / "ballast", "wb") as file, contextlib.suppress(OSError):
            file.write(b"\0" * max(free, 0))

    def room(self) -> None:
        """Make the room that `fill` took."""
        (self.folder / "ballast").unlink(missing_ok=True)

    def set(self, option: str) -> None:
        """Remount it 'ro' or 'rw'."""
        remount = ["mount", "-o", f"remount,{option}", str(self.folder)]
        subprocess.run(remount, check=True, capture_output=True)


assert files._Watched.write  # `writes` depends on it
