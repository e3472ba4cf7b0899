"""`--mode control`: conditional generation from pictures to pictures, by a trained checkpoint."""

from __future__ import annotations

from pathlib import Path

import distributed
import sde_lib
import visualize
from files import remove_unfinished
from files_reading import read_json
from run_lib_checks import check_same_experiment, check_writable
from run_lib_control_job import Job, Outcome
from run_lib_control_tasks import get_task
from run_lib_journal import log, logging_to, plain, write_json
from run_lib_state import complete_here, create_state, find_checkpoints, load_averages
from visualize_compare import save_comparison

#: Columns of samples that the comparison shows.
SHOWN = 6


def control(config, workdir, output: str | Path = "", *, checkpoint: int = -1) -> Path:
    """Do what `config.control` describes with a checkpoint's averaged weights.

    Writes to the folder `output`, by default workdir/control/<task>: samples as PNG files, named
    after image and sample; comparison.png; sampling.webp, the way from noise; results.json, the
    numbers and how they came about.

    Args:
      checkpoint: its number; -1 is the newest.

    Returns: the folder.

    Raises: ValueError, OSError for what is wrong with configuration, images, mask or checkpoint,
      before the sampling.
    """
    if distributed.launched():
        raise ValueError("--mode control runs in one process; start it with python, not torchrun")
    config, workdir = complete_here(config), Path(workdir)
    task = get_task(config)
    config.eval.begin_ckpt = config.eval.end_ckpt = checkpoint
    number = find_checkpoints(config, workdir)[-1]
    folder = Path(output or workdir / "control" / config.control.task).expanduser()
    check_writable(folder, "--output" if output else "--workdir")
    remove_unfinished(folder, "*.png", "*.webp", "results.json")
    check_same_experiment(config, workdir, training=False)
    sde, state = sde_lib.get_sde(config), create_state(config)
    job = Job(config, sde, state["model"])
    with logging_to(folder / "log.txt"):
        run = task(job)  # reads the images: what is wrong with them is said now
        weights = load_averages(config, workdir, number, state)
        log.info("%s by checkpoint %d, step %d", config.control.task, number, state["step"])
        outcome = run()
        outcome.frames = outcome.frames or job.frames
        files = write_outcome(outcome, folder)
        remove_earlier(folder, files)
        about = {"checkpoint": number, "step": state["step"], "weights_sha256": weights}
        about["files"] = files
        content = {**outcome.numbers, **about, "config": plain(config)}
        write_json(folder / "results.json", content)
        for line in summary(outcome):
            log.info("%s", line)
        log.info("pictures in %s", folder)
    return folder


def remove_earlier(folder: Path, files: list[str]) -> None:
    """Remove the files of an earlier run in this folder that are not among these."""
    if (folder / "results.json").exists():
        try:
            earlier = list(read_json(folder / "results.json").get("files", []))
        except (TypeError, ValueError):  # damaged, and about to be replaced
            return
        for name in sorted({name for name in earlier if isinstance(name, str)} - set(files)):
            if (folder / name).resolve().is_relative_to(folder.resolve()):
                (folder / name).unlink(missing_ok=True)


def write_outcome(outcome: Outcome, folder: Path) -> list[str]:
    """The samples, the comparison and the animation of an outcome as files in `folder`; their
    names."""
    files = ["comparison.png"]
    for name, samples in zip(outcome.names, outcome.samples):
        for k, sample in enumerate(samples):
            files.append(f"{name}_{k:02d}.png")
            visualize.save_image(sample.clamp(0, 1), folder / files[-1])
    samples = outcome.samples.unbind(1)[: len(outcome.headings) or SHOWN]
    headings = outcome.headings or [f"sample {k + 1}" for k in range(len(samples))]
    columns = [*outcome.columns, *zip(headings, samples)]
    if outcome.samples.shape[1] > 1 and outcome.truth is not None:
        columns.append(("mean", outcome.samples.mean(1)))
    if outcome.truth is not None:
        columns.append(("truth", outcome.truth))
    shown = [(name, images.clamp(0, 1)) for name, images in columns]
    save_comparison(shown, folder / "comparison.png", rows=outcome.names)
    if outcome.frames:
        files.append("sampling.webp")
        visualize.animation(outcome.frames, folder / files[-1])
    return files


def summary(outcome: Outcome) -> list[str]:
    """The numbers of an outcome, one line each."""
    return [
        f"{name.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in outcome.numbers.items()
        if isinstance(value, int | float | str)
    ]
