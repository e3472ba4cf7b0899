"""Several processes by torch.distributed: who I am, sums over all, and errors that reach everyone.

Without a launcher everything here describes one process and communicates nothing; under
`torchrun` the same code runs in every process of the group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from typing import Any

import torch
import torch.distributed as dist


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
def process_group(device, timeout_s: float = 1800.0):
    """Join the group that the launcher describes, nccl on GPUs and gloo on CPUs; leave it after.

    Does nothing without a launcher, or inside a group that exists already.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    device = local_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


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


@contextlib.contextmanager
def together():
    """What fails in one process in this block fails in all, with that process's message.

    The block itself must not communicate. For checks before long work: no process is left
    waiting for one that has gone.

    Raises: the process's own error, or the same kind of error with the other's message.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    said = gather(None if failure is None else (type(failure).__name__, str(failure)))
    if failure is not None:
        raise failure
    for number, other in enumerate(said):
        if other is not None:
            kinds = {k.__name__: k for k in (FileNotFoundError, PermissionError, OSError)}
            raise kinds.get(other[0], ValueError)(f"process {number}: {other[1]}")
