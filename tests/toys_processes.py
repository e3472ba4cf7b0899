"""Several processes for a test: as torchrun starts them, without the seconds that it takes."""

import contextlib
import io
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

from configs.vp import digits_ddpmpp_continuous

TINY = {
    "model.nf": 8,
    "model.num_res_blocks": 1,
    "model.num_scales": 30,
    "training.batch_size": 16,
    "training.n_iters": 6,
    "training.snapshot_freq": 100,
    "training.snapshot_freq_for_preemption": 100,
    "training.log_freq": 2,
    "training.eval_freq": 100,
    "training.snapshot_sampling": False,
}


def tiny(**changes):
    """A configuration that trains in milliseconds a step; `training__n_iters=7` sets a key."""
    config = digits_ddpmpp_continuous.get_config()
    for key, value in {**TINY, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        *sections, name = key.split(".")
        part = config
        for section in sections:
            part = part[section]
        part[name] = value
    config.device = "cpu"
    return config


PRELOADED = [
    "models.ncsnpp",
    "pytest",
    "run_lib",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.utils.tensorboard",
]


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Child:
    """`function(*args)` in a process of its own, which has imported everything already."""

    def __init__(self, function, *args, environment=None):
        context = _context()
        self.results, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_child, args=(sender, environment or {}, function, args)
        )
        self.process.start()
        sender.close()
        self.pid = self.process.pid

    def end(self, timeout=120):
        """Its exit code, what it returned or raised (as text), and what it wrote to stderr."""
        answer = (None, "")
        with contextlib.suppress(EOFError):
            if self.results.poll(timeout):
                answer = self.results.recv()
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"the process did not end in {timeout} s")
        return self.process.exitcode, *answer


def _child(sender, environment, function, args):
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    text, code, result = io.StringIO(), 0, None
    sys.stderr = text
    try:
        result = function(*args)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            text.write(code)
            code = 1
    except BaseException as error:
        code, result = 1, f"{type(error).__name__}: {error}"
        text.write(traceback.format_exc())
    sender.send((result, text.getvalue()))
    sys.stderr = sys.__stderr__
    os._exit(code or 0)


def start(n: int, function, *args) -> list[Child]:
    """`function(*args)` in n processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1"}
    return [
        Child(
            function,
            *args,
            environment={
                **{k: str(v) for k, v in group.items()},
                "MASTER_PORT": str(port),
                "RANK": str(i),
                "LOCAL_RANK": str(i),
            },
        )
        for i in range(n)
    ]


def run(n: int, function, *args, timeout=120) -> list:
    """What `function(*args)` returned in each of n processes of one group.

    Raises: AssertionError, with what it said, where one of them failed.
    """
    ends = [child.end(timeout) for child in start(n, function, *args)]
    for code, _, text in ends:
        assert code == 0, text
    return [result for _, result, _ in ends]


ROOT = Path(__file__).resolve().parent.parent
