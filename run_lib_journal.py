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
from typing import Any

import numpy as np
import torch

import distributed
import visualize
from files import appending
from sampling_loop import steady_bar

log = logging.getLogger("score_sde")


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log to the terminal and, appending, to the file `path`; processes other than the main one
    say on the terminal what is wrong, and nothing else."""
    main = distributed.is_main()
    handlers: list[logging.Handler] = [_BarFriendlyHandler()]
    if main:
        with contextlib.suppress(OSError):  # a folder to read from only: the terminal has it all
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(path))
    who = "" if main else f"process {distributed.rank()}: "
    form = logging.Formatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S")
    for handler in handlers:
        handler.setFormatter(form)
        log.addHandler(handler)
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO if main else logging.WARNING)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagate
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """A log that a full disk does not fill the terminal with tracebacks for."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self):
        with contextlib.suppress(OSError):
            super().close()


class _BarFriendlyHandler(logging.Handler):
    """The terminal; where it shows the bar, that says what the lines of progress say."""

    def emit(self, record):
        from tqdm import tqdm

        if not (getattr(record, "progress", False) and sys.stderr.isatty()):
            tqdm.write(self.format(record), file=sys.stderr)


def progress_bar(total: int, initial: int = 0, **options):
    """A progress bar of the main process; without a terminal it speaks up twice a minute only."""
    options.setdefault("disable", not distributed.is_main())
    interval = 0.2 if sys.stderr.isatty() else 30.0
    options.setdefault("delay", 0.0 if sys.stderr.isatty() else interval)
    return steady_bar()(
        total=total, initial=initial, dynamic_ncols=True, mininterval=interval,
        maxinterval=interval, miniters=1, smoothing=0.1, **options,
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


#: Borders of the bins of λ = log(α/σ) by which the loss is logged: noise to the left.
LAMBDA_BORDERS = (-4.0, -2.0, 0.0, 2.0, 4.0)
LAMBDA_BINS = tuple(
    f"{low:g}..{high:g}"
    for low, high in zip((-math.inf, *LAMBDA_BORDERS), (*LAMBDA_BORDERS, math.inf), strict=True)
)


class Journal:
    """Progress bar, log lines, history.jsonl and TensorBoard of a training run.

    Every process has one, since some numbers are sums over all; the main one writes.
    """

    def __init__(self, workdir: Path, config, state):
        self.config, self.main = config, distributed.is_main()
        self.history, self.writer, known = None, None, set()
        step = state["step"]
        if self.main:
            from torch.utils.tensorboard import SummaryWriter

            self.history, known = _open_history(workdir / "history.jsonl", step)
            # What a killed run wrote beyond this step is hidden.
            self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
            text = f"```\n{json.dumps(plain(config), indent=1)}\n```"
            self.writer.add_text("config", text, step)
        self.known = distributed.broadcast(known)
        self.bar = progress_bar(
            config.training.n_iters,
            step,
            desc="training",
            unit="step",
            disable=not (self.main and sys.stderr.isatty()),
        )
        self.clock = _Clock(step)
        self.losses: list[torch.Tensor] = []
        self.parts: list[dict[str, Any]] = []
        self.nonfinite, self.last_eval = state.get("nonfinite", 0), ""

    def has(self, step: int, name: str) -> bool:
        """Whether the history had `name` at `step` when this run began."""
        return (step, name) in self.known

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done here is no training, and not counted as such in images per second."""
        with self.clock.paused():
            yield

    def after_step(self, state, loss: torch.Tensor, info: dict[str, Any]) -> None:
        """Note a step: the global loss, and the step's `info` (losses.get_step_fn)."""
        self.losses.append(loss)
        self.parts.append(info)
        step, t = state["step"], self.config.training
        self.bar.update(1)
        if step % t.log_freq == 0 or step == t.n_iters:
            self._summarize(state)
        self.clock.tick(step)

    def _summarize(self, state) -> None:
        step, t = state["step"], self.config.training
        losses = torch.stack(self.losses).double().cpu().numpy()
        finite = losses[np.isfinite(losses)]
        mean = float(finite.mean()) if len(finite) else math.nan
        nonfinite = state.get("nonfinite", 0)
        if nonfinite > self.nonfinite:
            log.warning("step %d: %d steps not finite so far, each skipped", step, nonfinite)
        norms = [info["grad_norm"] for info in self.parts if math.isfinite(info["grad_norm"])]
        rate, left = self.clock.rate(step) * t.batch_size, self.clock.left(step, t.n_iters)
        lr, images = self.parts[-1]["lr"], f"{rate:.3g}" if rate < 100 else f"{rate:,.0f}"
        self._write(
            step,
            loss=mean,
            loss_by_lambda=loss_by_lambda(self.parts),
            grad_norm=sum(norms) / len(norms) if norms else math.nan,
            lr=lr,
            images_per_second=rate,
            memory_gib=peak_memory_gib(self.config.device),
            nonfinite=nonfinite,
            # of a run that came back between two lines, or ended there: fewer than log_freq
            **({} if len(losses) == t.log_freq else {"steps_averaged": len(losses)}),
        )
        self.bar.set_postfix_str(f"loss {mean:.4g}, {images} images/s{self.last_eval}")
        line = f"step {step:,} of {t.n_iters:,}: loss {mean:.5g}{self.last_eval}, lr {lr:.3g}"
        line += f", {images} images/s, {left} left" if rate else ""
        log.info(line, extra={"progress": True})
        self.losses, self.parts, self.nonfinite = [], [], nonfinite

    def eval_loss(self, step: int, name: str, loss: float, images: int) -> None:
        """Note a loss on `images` images of the evaluation set."""
        self._write(step, **{name: loss, "images": images})
        if name == "eval_loss":
            self.last_eval = f", held out {loss:.5g}"
        if name != "eval_loss" or step == self.config.training.n_iters:
            log.info("step %d: loss %.5g on %d held-out images", step, loss, images)

    def samples(self, step: int, images: torch.Tensor) -> None:
        """Put a grid of samples into TensorBoard."""
        if self.writer is not None:
            grid = np.asarray(visualize.image_grid(images).convert("RGB"))
            self.writer.add_image("samples", grid, step, dataformats="HWC")

    def _write(self, step: int, **values) -> None:
        if self.history is None or self.writer is None:
            return
        with appending(Path(self.history.name)):
            self.history.write(json.dumps(_strict({"step": step, **values})) + "\n")
        with appending(Path(self.writer.log_dir)):
            for name, value in values.items():
                rows = value if isinstance(value, dict) else {"": value}
                for part, number in rows.items():
                    if number is not None and name not in ("images", "steps_averaged"):
                        self.writer.add_scalar(f"{name}/{part}" if part else name, number, step)

    def flush(self) -> None:
        """Hand everything to the file system."""
        if self.history is not None and self.writer is not None:
            with appending(Path(self.history.name)):
                self.history.flush()
            with appending(Path(self.writer.log_dir)):
                self.writer.flush()

    def close(self) -> None:
        """End the bar and the files."""
        self.bar.close()
        with contextlib.ExitStack() as closing:  # both, also where one cannot be
            if self.history is not None and self.writer is not None:
                closing.callback(_close, self.history, self.history.name)
                closing.callback(_close, self.writer, self.writer.log_dir)


def _close(file, path) -> None:
    with appending(Path(path)):
        file.close()


class _Clock:
    """Steps per second of training alone, and the time to the end of everything.

    The first step, which compiles and allocates, is not counted.
    """

    def __init__(self, step: int):
        self.first = self.since = None
        self.step, self.pause = step, 0.0

    def tick(self, step: int) -> None:
        if self.first is None:
            self.first = (step, time.perf_counter())
            self.since = self.first

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start

    def rate(self, step: int) -> float:
        """Steps per second since the last call; 0 where there was none to measure."""
        now = time.perf_counter()
        if self.since is None:
            return 0.0
        steps, seconds = step - self.since[0], now - self.since[1] - self.pause
        self.since, self.pause = (step, now), 0.0
        return steps / seconds if steps and seconds > 0 else 0.0

    def left(self, step: int, total: int) -> str:
        """The time to step `total` at the pace so far, evaluation and samples included."""
        if self.first is None or step == self.first[0]:
            return "?"
        seconds = (time.perf_counter() - self.first[1]) / (step - self.first[0]) * (total - step)
        return duration(seconds)


def duration(seconds: float) -> str:
    """A time as a person says it: 40 s, 12 min, 3 h 05 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def loss_by_lambda(parts: list[dict[str, Any]]) -> dict[str, float | None]:
    """The mean loss of the images, over all processes, by bin of λ = log(α/σ); None for bins that
    nothing fell into. Numbers that are not finite are left out.

    `parts` holds `losses` and `lambda`, both (B,), of each step.
    """
    losses, lam = (
        torch.cat([p[key].double().cpu() for p in parts]) for key in ("losses", "lambda")
    )
    known = losses.isfinite() & ~lam.isnan()
    bins = torch.bucketize(lam[known], torch.tensor(LAMBDA_BORDERS, dtype=torch.float64))
    sums = torch.zeros(2, len(LAMBDA_BINS), dtype=torch.float64)
    sums[0].index_add_(0, bins, losses[known])
    sums[1].index_add_(0, bins, torch.ones_like(losses[known]))
    total, count = distributed.all_sum(sums).tolist()
    return {name: total[i] / count[i] if count[i] else None for i, name in enumerate(LAMBDA_BINS)}


def peak_memory_gib(device) -> float:
    """The most memory used so far, in GiB: of the GPU, or of this process on the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _open_history(path: Path, step: int):
    """history.jsonl, opened to go on at `step`, and the (step, name) that it has of that step;
    lines that a killed run wrote beyond it go."""
    kept = [row for row in _read_rows(path) if row["step"] <= step]
    text = "".join(f"{json.dumps(row)}\n" for row in kept)
    visualize.write_atomic(path, text.encode())
    return open(path, "a"), {(step, name) for row in kept if row["step"] == step for name in row}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a history; a line that is damaged, such as a killed run's last one, is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_history(workdir) -> dict[str, list[float]] | None:
    """steps, losses, eval_steps and eval_losses of a run, or None where it has none."""
    rows = _read_rows(Path(workdir) / "history.jsonl")
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
