"""Batches of an image set: their order, and who decodes them.

The order is a function of the seed and the step alone, so neither the number of processes that
train, nor who decodes, nor where a run starts changes what a step sees. An epoch is one
materialised permutation of the set: at its border, and when a run starts, ten million images cost
about a second and 80 MB. Images in memory need no decoding. Others are decoded ahead of time: by
worker processes, which small files gain from most, since threads spend their time on the
interpreter's lock; or with no worker by threads of this process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from data_lib import ImageSet
    from data_lib_files import ImageFiles

#: Batches decoded ahead by each worker process, or by the threads of this process.
AHEAD = 2
MAX_WORKERS = 8


class Batch(NamedTuple):
    """Images of shape (b, C, H, W), uint8, and labels of shape (b,), int64, or None."""

    images: torch.Tensor
    labels: torch.Tensor | None


def train_batches(
    image_set: ImageSet,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    part: range | None = None,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Yield shuffled batches of ``batch_size`` for ever, or the rows ``part`` of each.

    The batch of a step depends on (``seed``, step) alone, so that a run resumed at ``start_step``
    sees what it would have seen, at once. Every epoch is one permutation of the set; a batch may
    cross the border of two epochs and may be larger than the set. Processes that train together
    each take a ``part`` of range(batch_size), as ``distributed.share`` gives it.

    ``workers`` processes decode; 0 = threads of this process, -1 = ``automatic_workers()``; by
    default as many as the image set says. They change nothing but the speed, and end when the
    generator is closed or dropped.

    Raises ValueError for a batch size below 1 or rows that the batch does not have, and, when an
    image is reached that cannot be decoded, naming it; ChildProcessError where a worker dies.
    """
    _check_batch_size(batch_size)
    if part is not None and (not len(part) or min(part) < 0 or max(part) >= batch_size):
        raise ValueError(
            f"expected rows of a batch of {batch_size}, got {part}; use at most {batch_size} "
            "processes, each with its distributed.share of the batch"
        )
    order = Shuffled(len(image_set), batch_size, seed, part)
    return _batches(image_set, map(order, itertools.count(start_step)), workers)


def eval_batches(
    image_set: ImageSet,
    batch_size: int,
    *,
    part: Sequence[int] | None = None,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Yield every image, or every one of ``part``, once, in order; the last batch may be smaller.

    ``part`` holds places in the set: ``distributed.share(len(image_set))`` gives each of several
    processes its own. ``workers`` and errors as for ``train_batches``.
    """
    _check_batch_size(batch_size)
    places = range(len(image_set)) if part is None else part
    chunks = (places[i : i + batch_size] for i in range(0, len(places), batch_size))
    return _batches(image_set, (np.asarray(chunk, np.int64) for chunk in chunks), workers)


def automatic_workers() -> int:
    """Return how many worker processes this machine has cores for, for each that trains on it."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"expected a batch size >= 1, got {batch_size}; use 128")


class Shuffled:
    """Places in a set of ``n`` by step: ``batch_size`` a step, each epoch in its own order."""

    def __init__(self, n: int, batch_size: int, seed: int, part: range | None = None):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.part = range(batch_size) if part is None else part
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> np.ndarray:
        """Return the places of the batch's rows ``part``."""
        epochs, places = np.divmod(step * self.batch_size + np.array(self.part, np.int64), self.n)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            places[at] = self._order(int(epoch))[places[at]]
        return places

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            self._epoch, self._permutation = epoch, order
        return self._permutation


def _batches(
    image_set: ImageSet, places: Iterator[np.ndarray], workers: int | None
) -> Generator[Batch, None, None]:
    if image_set.files is None:
        return (image_set.batch(chosen) for chosen in places)
    workers = image_set.workers if workers is None else workers
    workers = automatic_workers() if workers < 0 else workers
    decoded = functools.partial(_by_processes if workers else _by_threads, image_set.files, workers)
    return _labelled(image_set, places, decoded)


def _labelled(
    image_set: ImageSet,
    places: Iterator[np.ndarray],
    decoded: Callable[[Iterator[np.ndarray]], Iterator[torch.Tensor]],
) -> Generator[Batch, None, None]:
    """Give decoded images their labels; the decoder takes places ahead of what it yields."""
    taken: deque[np.ndarray] = deque()

    def remembered() -> Iterator[np.ndarray]:
        for chosen in places:
            taken.append(chosen)
            yield chosen

    for images in decoded(remembered()):
        chosen = taken.popleft()
        yield Batch(images, None if image_set.labels is None else image_set.labels[chosen])


def _by_threads(
    files: ImageFiles, workers: int, places: Iterator[np.ndarray]
) -> Iterator[torch.Tensor]:
    """Decode in this process, ``AHEAD`` batches ahead."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(files.read, p) for p in itertools.islice(places, AHEAD))
        while ahead:
            images = ahead.popleft().result()
            ahead.extend(pool.submit(files.read, p) for p in itertools.islice(places, 1))
            yield images


@contextlib.contextmanager
def _signals_held_back():
    """Start processes that are born with SIGTERM and SIGINT held back; here both come after."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where a group gets no signals
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _by_processes(
    files: ImageFiles, workers: int, places: Iterator[np.ndarray]
) -> Iterator[torch.Tensor]:
    """Decode in worker processes, in order, each ``AHEAD`` batches ahead."""
    ended, word = multiprocessing.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        workers, initializer=_begin_worker, initargs=(files, os.getpid(), ended, word)
    )

    def ask(count: int) -> list[Future]:
        with _signals_held_back():  # workers may be started by any of these
            return [pool.submit(_read, chosen) for chosen in itertools.islice(places, count)]

    try:
        ahead = deque(ask(AHEAD * workers))
        while ahead:
            images = ahead.popleft().result()
            if isinstance(images, ValueError):
                raise images
            ahead.extend(ask(1))
            yield torch.from_numpy(images)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"expected images from {workers} processes that decode them, got: one of them was "
            "killed; where memory is short, use fewer by --config.data.workers, or "
            "--config.data.workers=0 for threads of this process"
        ) from error
    finally:  # the word first: a worker that was killed may have kept the lock of the pool's queue
        word.close()
        pool.shutdown(cancel_futures=True)
        ended.close()


#: In a worker: the image files that it decodes, handed over once and not with every batch.
_FILES: list[ImageFiles] = []


def _begin_worker(files: ImageFiles, trainer: int, ended: Connection, word: Connection) -> None:
    """Leave it to the process that trains when to end: signals to the whole group are for that.

    A job that is to save and go gets SIGTERM or SIGINT in all its processes, and the step that it
    is in still needs its images. A worker ends when the process that trains says so or is no more.
    """
    _FILES[:] = [files]
    word.close()  # that of the process that trains is the last
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # before any other thread begins, which would take it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_the_word_of, args=(trainer,), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # macOS, where any SIGTERM ends the worker
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_after, args=(ended,), daemon=True).start()


def _end_after(ended: Connection) -> None:
    ended.poll(None)  # its other end is closed, or who held it is no more
    os._exit(0)


def _end_at_the_word_of(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _read(places: np.ndarray) -> np.ndarray | ValueError:
    """In a worker: the images at some places, or why there are none."""
    try:
        return _FILES[0].read(places, threads=1).numpy()
    except (OSError, ValueError) as error:
        return ValueError(str(error))  # a raised one would arrive wrapped in tracebacks
