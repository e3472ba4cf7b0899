"""What a run writes down: log lines, a progress bar, history.jsonl, TensorBoard, JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import visualize

log = logging.getLogger("score_sde")


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log to the terminal and, appending, to the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(path), _BarFriendlyHandler()]
    for handler in handlers:
        handler.setFormatter(form)
        log.addHandler(handler)
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagate
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class _BarFriendlyHandler(logging.Handler):
    def emit(self, record):
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def progress_bar(total: int, initial: int = 0, **options):
    """A progress bar; without a terminal it speaks up twice a minute only."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, initial=initial, dynamic_ncols=True, mininterval=interval,
        maxinterval=interval, smoothing=0.1, **options,
    )  # fmt: skip


def write_json(path: Path, content) -> None:
    """Write `content` to `path`, whole or not at all; null for numbers that JSON does not have."""
    text = json.dumps(_strict(content), indent=2, allow_nan=False)
    visualize.write_atomic(path, f"{text}\n".encode())


def _strict(value):
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(config) -> dict:
    """A configuration as JSON-able values."""
    return json.loads(json.dumps(config.to_dict(), default=str))


class Journal:
    """Progress bar, log lines, history.jsonl and TensorBoard of a training run."""

    def __init__(self, workdir: Path, config, state):
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        self.history = _open_history(workdir / "history.jsonl", state["step"])
        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=state["step"])
        self.writer.add_text("config", f"```\n{json.dumps(plain(config), indent=1)}\n```")
        self.bar = progress_bar(
            config.training.n_iters, state["step"], desc="training", unit="step"
        )
        self.losses: list[float] = []
        self.since, self.nonfinite = time.perf_counter(), 0

    def after_step(self, state, loss: torch.Tensor) -> None:
        self.losses.append(float(loss))
        self.bar.update(1)
        step, t = state["step"], self.config.training
        if step % t.log_freq and step != t.n_iters:
            return
        seconds = time.perf_counter() - self.since
        rate = len(self.losses) * t.batch_size / seconds
        finite = [x for x in self.losses if math.isfinite(x)]
        mean = sum(finite) / len(finite) if finite else math.nan
        nonfinite = state.get("nonfinite", 0)
        if nonfinite > self.nonfinite:
            log.warning("step %d: %d steps not finite so far, each skipped", step, nonfinite)
        self.bar.set_postfix({"loss": f"{mean:.4g}", "images/s": f"{rate:.0f}"})
        lr = state["optimizer"].param_groups[0]["lr"]
        self._write(step, loss=mean, images_per_second=rate, lr=lr, nonfinite=nonfinite)
        self.losses, self.nonfinite = [], nonfinite
        self.since = time.perf_counter()

    def eval_loss(self, state, loss: float) -> None:
        self._write(state["step"], eval_loss=loss)
        self.since = time.perf_counter()

    def _write(self, step: int, **values) -> None:
        self.history.write(json.dumps(_strict({"step": step, **values})) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.history.flush()
        self.writer.flush()

    def close(self) -> None:
        self.bar.close()
        self.history.close()
        self.writer.close()


def _open_history(path: Path, step: int):
    """Open history.jsonl to go on at `step`; lines that a killed run wrote beyond it go."""
    kept = [line for line in _read_lines(path) if json.loads(line)["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)
    return open(path, "a")


def _read_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    while lines and not _is_json(lines[-1]):
        lines.pop()
    return lines


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_history(workdir) -> dict[str, list[float]] | None:
    """steps, losses, eval_steps and eval_losses of a run, or None where it has none."""
    rows = [json.loads(line) for line in _read_lines(Path(workdir) / "history.jsonl")]
    train_rows, eval_rows = (
        [r for r in rows if r.get(key) is not None] for key in ("loss", "eval_loss")
    )
    if not train_rows:
        return None
    return {
        "steps": [r["step"] for r in train_rows],
        "losses": [r["loss"] for r in train_rows],
        "eval_steps": [r["step"] for r in eval_rows],
        "eval_losses": [r["eval_loss"] for r in eval_rows],
    }
