"""What is checked before a run begins: the batch, the folder, and whose weights are in it."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import distributed
from configs.validation import flatten
from files import remove_unfinished
from files_reading import read_json
from run_lib_journal import log, plain

#: Objectives whose networks are no scores: they draw no samples and have no likelihood.
NO_SCORE = ("classifier", "dequantization")
#: The keys, or sections, that weights already trained depend on …
_WEIGHTS = (
    "model",
    "training.sde",
    "training.continuous",
    "data.image_size",
    "data.num_channels",
    "data.centered",
)
#: … and where a training goes from there.
_COURSE = (*_WEIGHTS, "seed", "optim", "training", "data")
#: Keys of `model` that leave a trained network as it is.
_NOT_WEIGHTS = (
    "model.dropout",
    "model.label_dropout",
    "model.ema_rate",
    "model.ema_rates",
    "model.ema_profiles",
)
#: Keys that say how far, how fast and how loudly a training goes there, or where the files are.
_FREE = (
    "training.n_iters",
    "training.snapshot_freq",
    "training.snapshot_freq_for_preemption",
    "training.snapshot_sampling",
    "training.num_snapshot_samples",
    "training.log_freq",
    "training.eval_freq",
    "training.eval_images",
    "training.posthoc_freq",
    "training.max_nonfinite",
    "training.precision",
    "training.grad_accumulation",
    "training.compile",
    "training.channels_last",
    "training.activation_checkpointing",
    "training.find_unused_parameters",
    "training.force_workdir",
    "data.root",
    "data.download",
    "data.path",
    "data.eval_path",
    "data.tfrecords_path",
    "data.workers",
    "data.memory_gib",
)


def check_batch(config) -> None:
    """Every process takes the same number of images, in equal micro-batches.

    Raises: ValueError where that cannot be.
    """
    batch, processes = config.training.batch_size, distributed.world_size()
    parts = config.training.grad_accumulation
    if batch % (processes * parts):
        nearest = max(batch // (processes * parts), 1) * processes * parts
        raise ValueError(
            f"training.batch_size={batch} is the number of images of all processes together; "
            f"{processes} processes × {parts} micro-batches do not divide it; "
            f"use --config.training.batch_size={nearest}, or another training.grad_accumulation"
        )


def check_same_experiment(config, workdir: Path, training: bool) -> None:
    """Refuse to go on in a workdir whose weights belong to another experiment.

    Evaluation compares what the weights depend on; training also what decides where it goes:
    seed, optimizer, objective, data. `config.training.force_workdir` lets the new settings pass.

    Raises: ValueError that lists the keys that differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    known = read_json(path, "the configuration of a run; use another --workdir to start anew")
    known, asked = (dict(flatten(c)) for c in (known, plain(config)))
    fixed, free = (_COURSE, _FREE) if training else (_WEIGHTS, _NOT_WEIGHTS)

    def matters(key: str) -> bool:
        return key not in free and any(key == k or key.startswith(f"{k}.") for k in fixed)

    differ = [
        f"{key}: {known[key]!r} there, {asked[key]!r} now"
        for key in asked
        if key in known and matters(key) and known[key] != asked[key]
    ]
    if differ and config.training.force_workdir:
        log.warning("going on in %s with other settings (%s)", workdir, "; ".join(differ))
    elif differ:
        raise ValueError(
            f"{workdir} belongs to another experiment ({'; '.join(differ)}); use its settings, "
            "another --workdir, or --config.training.force_workdir to go on with the new ones"
        )


def check_writable(workdir: Path, flag: str = "--workdir") -> None:
    """Make the folder that `flag` names, and a file in it.

    Raises: OSError that says why it cannot be.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        raise kind(
            f"{flag} {workdir}: expected a folder to write in, got: {error.strerror}; "
            "choose another, or change its permissions"
        ) from error


def tidy(workdir: Path) -> None:
    """Remove the unfinished files that killed trainings left in `workdir`."""
    remove_unfinished(workdir, "config.json", "history.jsonl")
    for pattern in ("checkpoints*", "ema", "samples/iter_*"):
        for folder in workdir.glob(pattern):
            remove_unfinished(folder, "*")


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keep a second training, or evaluation, out of `workdir`.

    The system lets go when the process ends, however it ends: no lock is left behind. It is POSIX's
    lock of a file, which processes that decode images do not inherit. On NFS it holds between
    machines where the server runs lockd (NFSv3) or speaks NFSv4; where there are no locks none is
    taken, and the log says so.

    Raises: ValueError where another process holds the folder: which one, where, and since when.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(workdir / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"{workdir} is in use: {file.read().strip() or 'another process'} works there; "
                "wait for it, end it, or use another --workdir"
            ) from error
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): start no second training in it", workdir, error)
        with contextlib.suppress(OSError):  # on a full disk it is locked all the same
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(
                file.fileno(),
                f"process {os.getpid()} on {socket.gethostname()}, since {since},\n".encode(),
            )
        yield
