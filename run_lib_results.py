"""What an evaluation writes down: one JSON for each checkpoint, TensorBoard, the report."""

from __future__ import annotations

import contextlib
import json
import numbers
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_lib
import evaluation
import visualize_report
from files import appending
from files_reading import read_json
from run_lib_journal import log, plain, read_history, write_json
from run_lib_likelihood import ESTIMATORS, NOTES, count
from run_lib_metrics import TRAIN_IMAGES, real_images, unit
from run_lib_shards import UNREADABLE, Rows

#: Largest number of numbers an image may have, for its nearest training image to be looked for.
NEIGHBOR_NUMBERS = 3 * 64 * 64
#: Points of the model, and true ones, in the report.
POINTS_SHOWN = 2000
#: Curves over checkpoints, by what they are called: where they are in the results.
_CURVES = {
    "FID": ("metrics", "fid", "fid_se"),
    "KID": ("metrics", "kid", "kid_se"),
    **{label: (part, "mean", "standard_error") for part, label in ESTIMATORS.values()},
    "loss": ("loss", "mean", "standard_error"),
}
#: Ends of the names of numbers that are chosen, not found: no curves.
_SETTINGS = ("_seed", "_num_subsets", "_subset_size", "_num_splits")
#: Beginnings of the names of numbers that are found, not chosen.
_OUTCOMES = ("mean", "standard_error", "evaluations", "terms", "by_samples", "effective")


class Results:
    """The results of one checkpoint at `stem`.json, part by part; the main process's files.

    Parts that an earlier evaluation of the same weights left stay until they are replaced.
    """

    def __init__(self, stem: Path, number: int, step: int, weights: str):
        self.path = Path(f"{stem}.json")
        self.content: dict[str, Any] = {
            "checkpoint": number,
            "step": step,
            "weights_sha256": weights,
            "protocol": {},
        }
        if self.path.exists():
            known = _read(self.path)
            if known is not None and known.get("weights_sha256") == weights:
                self.content = known

    def keep(self, part: str, protocol: dict[str, Any], **values) -> None:
        """Write the values of a part, and how they came to be."""
        self.content.update(values)
        self.content["protocol"][part] = protocol
        write_json(self.path, self.content)


def _read(path: Path) -> dict[str, Any] | None:
    """The results at `path`; None where they are damaged, or something else."""
    try:
        known = read_json(path)
    except (OSError, ValueError):
        return None
    parts = [known.get(part, {}) for part in ("protocol", *(part for part, *_ in _CURVES.values()))]
    right = "protocol" in known and isinstance(known.get("step"), int)
    return known if right and all(isinstance(part, dict) for part in parts) else None


def to_tensorboard(workdir: Path, results: dict[str, Any], suffix: str) -> None:
    """The numbers of a checkpoint as scalars eval/… at its step."""
    from torch.utils.tensorboard import SummaryWriter

    folder = workdir / "tensorboard"
    with appending(folder), SummaryWriter(str(folder)) as writer:
        for part in ("loss", "metrics", *(part for part, _ in ESTIMATORS.values())):
            for name, value in results.get(part, {}).items():
                real = isinstance(value, numbers.Real) and not isinstance(value, bool)
                if real and not name.endswith(_SETTINGS):
                    tag = f"{part}/{name}" if part != "metrics" else name
                    writer.add_scalar(f"eval{suffix}/{tag}", value, results["step"])


def write_report(
    config, workdir: Path, stem: Path, suffix: str, results, sets, frames, pictures=None
) -> None:
    """Write workdir/report.html on all that is known of the checkpoint, and of those before it.

    Args:
      suffix: of the files, where the data are not those of the training.
      sets: the training and the evaluation images; None where they are not there.
      frames: of the sampling of some samples, or None.
      pictures: captions of the figures `stem`_<name>.png, by name.
    """
    points = data_lib.is_points(config)
    count = POINTS_SHOWN if points else 300
    samples = _rows_of(stem, "samples", count) if "sampling" in results else None
    samples = None if samples is None else torch.from_numpy(samples)
    real, neighbors = None, None
    if points and samples is not None:
        real = sets[1].take(range(len(samples)))
    elif samples is not None:
        samples = unit(samples)
    if samples is not None and sets is not None and not points:
        real = real_images(sets[1], 64)
        if samples[0].numel() <= NEIGHBOR_NUMBERS:
            train = real_images(sets[0], TRAIN_IMAGES)
            distances, indices = evaluation.nearest_neighbors(samples, train)
            neighbors = (train[indices.flatten()], distances.flatten())
    path = workdir / f"report{suffix}.html"
    data = sets[1].name.split("/")[0] if sets is not None else config.data.dataset
    visualize_report.write_report(
        path,
        title=f"{config.training.sde} on {data}",
        subtitle=f"{workdir.resolve().name}, checkpoint {results['checkpoint']}, "
        f"step {results['step']:,}",
        config_text=json.dumps(plain(config), indent=2),
        samples=samples,
        real=real,
        train_neighbors=neighbors,
        loss_history=read_history(workdir),
        frames=frames,
        bpd=_bits(stem, results),
        gaps=results.get("gaps"),
        metrics=results.get("metrics"),
        rows=_rows(results, "points" if points else "images"),
        pictures=[
            (Path(f"{stem}_{name}.png").read_bytes(), caption)
            for name, caption in (pictures or {}).items()
        ],
        curves=curves(stem.parent, suffix, results),
        protocol=protocol_rows(results),
        max_images=POINTS_SHOWN if points else 64,
        max_pairs=96 if config.data.image_size <= 16 else 48,
    )
    log.info("results in %s.json, report in %s", stem, path)


def _bits(stem: Path, results) -> dict[str, tuple[np.ndarray, str]]:
    """Bits/dim by image of every estimator, with a note, by its name in the report."""
    found = {}
    for part, label in ESTIMATORS.values():
        rows = _rows_of(stem, part, name="bpd") if part in results else None
        if rows is not None:
            note = f"{NOTES[part]} {count(len(rows), 'image')}."
            found[label.replace("bits/dim", "Bits per dimension")] = rows.mean(axis=1), note
    return found


def _rows_of(stem: Path, part: str, first: int | None = None, name="") -> np.ndarray | None:
    """The first rows of an array, by default the part's own, of `stem`_<part>.npz; None where it is
    gone or damaged: the numbers of an earlier evaluation are in the JSON still."""
    with contextlib.suppress(*UNREADABLE), Rows(Path(f"{stem}_{part}.npz"), name or part) as rows:
        return rows.take(range(rows.shape[0] if first is None else first))
    return None


def _rows(results, of: str) -> list[visualize_report.Row]:
    loss = results.get("loss")
    rows = _rows_of_points(results["likelihood"]) if "likelihood" in results else []
    if not loss:
        return rows
    note = f"Mean over {loss['images']:,} held-out {of}, under fixed times and noise."
    return [("Loss", loss["mean"], loss.get("standard_error"), note), *rows]


#: Rows of likelihoods of points: the key, the name, how to read it.
_NATS = (
    ("log_likelihood", "log p, nats", "Of held-out points by the probability-flow ODE."),
    ("elbo", "ELBO, nats", "A lower bound for the reverse SDE."),
    ("truth", "log p of the truth, nats", "Of the same points; no model can do better on average."),
    ("kl", "KL(truth‖model), nats", "The difference of the two; 0 is perfect."),
)


def _rows_of_points(found: dict[str, Any]) -> list[visualize_report.Row]:
    return [
        (name, found[key]["mean"], found[key]["standard_error"], note) for key, name, note in _NATS
    ]


def curves(folder: Path, suffix: str, results) -> dict[str, tuple[list, list, list]]:
    """Scores over the checkpoints evaluated in `folder`, by name: steps, values, errors; of those
    that came about as `results` did. Names that fewer than two checkpoints have are left out."""
    paths = [
        path
        for path in folder.glob(f"ckpt_*{suffix}.json")
        if path.stem.removeprefix("ckpt_").removesuffix(suffix).isdigit()
    ]
    known = sorted(filter(None, map(_read, paths)), key=lambda r: r["step"])
    found = {}
    for name, (part, value, error) in _CURVES.items():
        rows = [
            (r["step"], r[part][value], r[part].get(error) or 0.0)
            for r in known
            if r.get(part, {}).get(value) is not None and _how(r, part) == _how(results, part)
        ]
        if len(rows) > 1:
            found[name] = tuple(list(column) for column in zip(*rows))
    return found


def _how(results: dict[str, Any], part: str) -> Any:
    """What two checkpoints must have in common for their numbers to be compared."""
    protocol = results["protocol"].get("sampling" if part == "metrics" else part, {})
    if part != "metrics":
        how = {key: v for key, v in results.get(part, {}).items() if not key.startswith(_OUTCOMES)}
        return protocol.get("weights"), how
    features = protocol.get("features", {})
    extractor, reference = features.get("extractor", {}), features.get("reference", {})
    return (
        protocol.get("weights"),
        {key: v for key, v in results.get("sampling", {}).items() if key != "evaluations"},
        [extractor.get(key) for key in ("extractor", "weights_sha256", "resize")],
        reference.get("sha256"),
    )


def protocol_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The protocol, as a reader of the report wants it: what, and how."""
    protocol, rows = results["protocol"], [("weights", _weights(results))]
    if "sampling" in results:
        rows += _sampling_rows(results["sampling"])
    features = protocol.get("sampling", {}).get("features")
    if features:
        extractor, reference = features["extractor"], features["reference"]
        origin = reference["protocol"].get("split", "unknown origin")
        told = ", ".join(map(str, features["metrics"]))
        rows += [
            ("feature metrics", f"{told}; docs/evaluation.md says how"),
            ("features", f"{extractor['extractor']}, resize: {extractor.get('resize', '?')}"),
            ("extractor's weights", f"SHA-256 {extractor['weights_sha256'] or 'not known'}"),
            ("reference", f"{reference['n'] or 'unknown number of'} images of "
             f"{origin}; {Path(reference['file']).name}"),
            ("reference statistics", f"SHA-256 {reference['sha256']}"),
        ]  # fmt: skip
    for part, label in ESTIMATORS.values():
        if part in results:
            rows += _bits_rows(label, results[part])
    last = list(protocol.values())[-1] if protocol else {}
    versions = ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items())
    return [*rows, ("seed", str(last.get("seed"))), ("versions", versions)]


def _bits_rows(label: str, b: dict[str, Any]) -> list[tuple[str, str]]:
    how = f"eps {b['eps']:g}"
    if "points" in b:
        how += f", {count(b['points'], 'time')} an image"
    else:
        how += f", {b['trace_estimator']} trace, {count(b.get('probes', 1), 'probe')}, "
        how += f"{b.get('solver', 'RK45')}, rtol {b['rtol']:g}, atol {b['atol']:g}"
    if "samples" in b:
        how += f", {count(b['samples'], 'dequantisation')} in one bound"
    if "evaluations_mean" in b:
        how += f", {b['evaluations_mean']:.0f} evaluations an image"
    images = f"{count(b['images'], 'image')} of {b['dataset']}, {count(b['repeats'], 'repeat')}, "
    images += f"{b['dequantization']} dequantisation of {b['levels']} levels"
    return [(label, f"{images}; {how}")]


def _weights(results) -> str:
    known = [part["weights"] for part in results["protocol"].values()]
    average = known[-1] if known else "weights"
    digest = results["weights_sha256"]
    return f"{average}, of checkpoint {results['checkpoint']}; SHA-256 {digest}"


def _sampling_rows(s: dict[str, Any]) -> list[tuple[str, str]]:
    method = s["method"]
    if method == "pc":
        method = f"predictor {s['predictor']}, corrector {s['corrector']}"
        method += f" (snr {s['snr']:g}, {s['n_steps_each']} steps)" * (s["corrector"] != "none")
        method += f", {s['schedule']} grid"
    if s["solver"]:
        method += f", {s['solver']}"
    return [
        ("samples", f"{s['images']:,}"),
        ("sampler", f"{method}, {s['evaluations']:g} evaluations of the network a batch"),
        ("sampling ends at", f"t = {s['eps']:g}, "
         + ("the mean of the last step" if s["noise_removal"] else "with the last step's noise")),
        ("seeds", s["seeds"]),
    ]  # fmt: skip
