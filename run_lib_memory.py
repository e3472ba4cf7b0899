"""Memory: the batch that fits into it, and errors that say which would have."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path

import torch

import distributed

#: The largest batch that is chosen by memory: beyond it networks of images run no faster.
LARGEST = 1024
#: The share of the memory that is given to the batch; convolutions need workspace.
SHARE = 0.7
#: What torch, its libraries and NumPy say of memory that they do not get, in lower case.
_SAYINGS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


class OutOfMemoryError(MemoryError):
    """Memory ran out; the message names the setting to try."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out, of the host or of a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SAYINGS)


@contextlib.contextmanager
def remedy_for_memory(what: str, remedy: str) -> Iterator[None]:
    """Say what to do where memory runs out in this block.

    Args:
      what: was done, such as 'a training step of 128 images'.
      remedy: the settings to try.

    Raises: OutOfMemoryError in place of the errors of torch, NumPy and Python; one that was raised
      inside, nearer to the cause, passes.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise OutOfMemoryError(
            f"{what} needs more memory than there is; {remedy} ({reason})"
        ) from error


def remedy_in_training(config) -> str:
    """The micro-batches to try where a training step does not fit."""
    batch, parts = config.training.batch_size, config.training.grad_accumulation
    share = batch // distributed.world_size()
    more = next((n for n in range(2 * parts, share + 1) if share % n == 0), None)
    others = [
        f"--config.training.{key}={value}"
        for key, value in (("activation_checkpointing", True), ("precision", "bf16"))
        if config.training[key] != value
    ]
    if more is not None:
        return (
            f"try --config.training.grad_accumulation={more}, the same steps by {share // more} "
            f"images at a time{''.join(f', or {other}' for other in others)}"
        )
    return f"try {' and '.join(others)}, or a smaller network" if others else "a smaller network"


def remedy_in_evaluation(images: int) -> str:
    """The batch to try where one of `images` does not fit."""
    if images <= 1:
        return "one image at a time is the least; use a smaller network, or another device"
    return f"try --config.eval.batch_size={images // 2}, or 0 for as many as fit"


# --- batches chosen by memory -------------------------------------------------------------------


def batch_that_fits(config) -> int:
    """The largest power of two of images, at most LARGEST, whose activations fit into memory.

    They are those that the backward pass of `models.estimate` keeps, which a likelihood needs too,
    and sampling only in part.

    Raises: ValueError where a network's need cannot be estimated.
    """
    each, weights = _needs(config)
    room = SHARE * _memory(torch.device(config.device)) - weights
    batch = 1
    while batch < LARGEST and 2 * batch * each <= room:
        batch *= 2
    return batch


def _needs(config) -> tuple[int, int]:
    """Bytes of activations for each image more, and of weights."""
    from models.estimate import estimate  # late: it loads much of torch

    asked = copy.deepcopy(config)
    with asked.unlocked():
        asked.training.update(
            precision="fp32", activation_checkpointing=False, grad_accumulation=1, compile=False
        )
    costs = []
    for images in (1, 2):
        asked.training.batch_size = images
        costs.append(estimate(asked))
    each = costs[1].activation_bytes - costs[0].activation_bytes
    if each <= 0:
        raise ValueError(
            "eval.batch_size=0 goes by an estimate of memory, which this network does not give; "
            "use a number, such as --config.eval.batch_size=64"
        )
    return each, costs[0].weight_bytes


def _memory(device: torch.device) -> float:
    """Bytes that this process may take: free ones where it is alone; its part of all where there
    are several, which must choose alike."""
    alone = distributed.world_size() == 1
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused if alone else total
    limits = [_address_space(free=alone), *_host_memory(free=alone)]
    return min(limit for limit in limits if limit) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _host_memory(free: bool) -> Iterator[float]:
    """Bytes of the machine, and of this container where it has a limit; those that are free."""
    fields = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, value, *_ = line.replace(":", " ").split()
            fields[name] = 1024.0 * int(value)
    total = fields.get("MemTotal", 8 * 2.0**30)  # of a system that does not say
    yield fields.get("MemAvailable", total / 2) if free else total
    for folder, limit, used, cached in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # 'max' where there is none
            most = float(Path(folder, limit).read_text())
            yield max(most - _used(folder, used, cached), 1) if free else most


#: Of both versions of control groups: the folder, the files of a container's limit and of what it
#: uses, and the line of memory.stat that says how much of that is files read earlier, which go
#: where room is needed.
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        *("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_inactive_file",
    ),
)


def _used(folder: str, used: str, cached: str) -> float:
    stat = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
    return float(Path(folder, used).read_text()) - float(stat.get(cached, 0))


def _address_space(free: bool) -> float:
    """Bytes of the address space, or those left, where `ulimit -v` limits it, else 0."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return 0.0
    pages = 0
    if free:
        with contextlib.suppress(OSError):  # of a system without /proc
            pages = int(Path("/proc/self/statm").read_text().split()[0])
    return max(limit - pages * resource.getpagesize(), 1.0)
