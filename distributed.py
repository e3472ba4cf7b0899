"""Several processes by torch.distributed: who I am, sums over all, and errors that reach everyone.

Without a launcher everything here describes one process and communicates nothing; under
`torchrun` the same code runs in every process of the group.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

Result = TypeVar("Result")


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


def local_device(device) -> torch.device:
    """`device`, or under a launcher with GPUs the one that belongs to this process."""
    device = torch.device(device)
    if device.type == "cuda" and launched():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


@contextlib.contextmanager
def process_group(device="cuda", timeout_s: float = 1800.0):
    """Join the group that the launcher describes: gloo for tensors on the CPU, and nccl for those
    on GPUs where there are any and `device` is one.

    Does nothing without a launcher, or inside a group that exists already. The group is left in
    order only when the block ends in order: after an error the others may never answer.

    Raises: ConnectionError where another process has gone. That one says why, or this one says
      that it could not: it was killed.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    with_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    with_gpus &= torch.device(device).type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    store, number, count = _fresh_store(timeout)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE):
            raise _gone(store, error) from error
        with contextlib.suppress(Exception):  # the others end with this one: it has the word
            store.set("failed", str(number))
        raise
    dist.destroy_process_group()


def _gone(store, error: RuntimeError) -> Exception:
    """What a process says whose peer has gone: nothing, where that one or a third says it."""
    reason = str(error).splitlines()[0]
    said = False
    with contextlib.suppress(Exception):  # the store goes with the process that held it
        said = store.check(["failed"]) or store.add("told", 1) > 1
    if said:
        gone = ConnectionError(f"another process has ended, see its message ({reason})")
        return reported_elsewhere(gone)
    return ConnectionError(
        f"another process was killed, without a word ({reason}): by the system, as where memory is "
        "short, by a person, or with its machine; the same command goes on from the last "
        "checkpoint"
    )


def _fresh_store(timeout: datetime.timedelta) -> tuple[Any, int, int]:
    """The launcher's store, under a name that only the processes of this start know; this one's
    number, and their count.

    torchrun keeps its store when it starts processes again, with the addresses of the dead ones in
    it. So each process says hello by a word of its own, and the main one answers every word that
    it sees with the name, until all have confirmed it.
    """
    store, number, count = next(rendezvous("env://", timeout=timeout))
    name, waiting = uuid.uuid4().hex, set(range(1, count))
    end = time.monotonic() + timeout.total_seconds()
    if number > 0:
        store.set(f"hello/{number}", name)
        name = store.get(f"welcome/{name}").decode()
        store.set(f"{name}/{number}", "here")
        waiting.clear()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{name}/{other}"]):
                waiting.discard(other)
            elif store.check([f"hello/{other}"]):
                store.set("welcome/" + store.get(f"hello/{other}").decode(), name)
        if time.monotonic() > end:
            raise TimeoutError(f"the processes {sorted(waiting)} of {count} did not come")
        time.sleep(0.01)
    prefixed = dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]
    return prefixed, number, count


#: What gloo says of a process that is no longer there.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def parallel(model: torch.nn.Module, find_unused_parameters: bool = False) -> torch.nn.Module:
    """`model`, with its gradients averaged over the processes; itself where there is one process.

    Running statistics (BatchNorm's) are the main process's.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    wrapper = torch.nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(wrapper).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if renamed else "broadcast_buffers": any(
            name.endswith("running_mean") for name, _ in model.named_buffers()
        )
    }
    return wrapper(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
        **options,
    )


def share(n: int, of: int | None = None, index: int | None = None) -> range:
    """This process's contiguous part of range(n); parts differ by at most one in length."""
    of, index = of or world_size(), rank() if index is None else index
    return range(n * index // of, n * (index + 1) // of)


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over the processes, in a new tensor."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gather(value: Any) -> list[Any]:
    """`value` of every process, in the order of ranks; anything that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The main process's `value`, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


class Vote:
    """The largest of the numbers that the processes say, known to all of them one call later.

    One process knows at once. Several learn of it in the next call, so that nobody waits: the
    numbers travel on the CPU while the devices work.
    """

    def __init__(self):
        self._said = torch.zeros(1, dtype=torch.int64)
        self._under_way = None

    def __call__(self, number: int) -> int:
        if world_size() == 1:
            return number
        known = self.result()
        self._said = torch.tensor([number])
        self._under_way = dist.all_reduce(self._said, dist.ReduceOp.MAX, async_op=True)
        return known

    def result(self) -> int:
        """The outcome of the last call."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
        return int(self._said)


@contextlib.contextmanager
def together():
    """What fails in one process in this block fails in all, with that process's message.

    The block itself must not communicate. For checks before long work, and for what one process
    does while the others wait: no process is left waiting for one that has gone.

    Raises: the process's own error, or the same kind of error with the other's message. All but
      the first of the failed processes raise it as `reported_elsewhere`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said = gather(None if failure is None else (type(failure).__name__, str(failure)))
    failed = [number for number, other in enumerate(said) if other is not None]
    if not failed:
        return
    first = failed[0]
    if failure is None:
        kinds = {k.__name__: k for k in (FileNotFoundError, PermissionError, OSError)}
        kind, message = said[first]
        failure = kinds.get(kind, ValueError)(f"process {first}: {message}")
    raise failure if rank() == first else reported_elsewhere(failure)


def reported_elsewhere(error: Exception) -> Exception:
    """`error`, marked as one that another process tells the user of."""
    error.reported_elsewhere = True  # type: ignore[attr-defined]
    return error


def in_turn(work: Callable[[], Result]) -> Result:
    """work() in the first process of each machine, then in its others, which find what it left:
    downloads, indices, caches."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0 or world_size() == 1
    results: list[Result] = []
    for turn in (True, False):
        with together():
            if first is turn:
                results.append(work())
    return results[0]
