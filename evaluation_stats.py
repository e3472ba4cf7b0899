"""Statistics of a data set in feature space: made, written with their protocol, read, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distributed
from evaluation import _require_finite, _require_symmetric
from evaluation_features import Extractor, as_bytes
from evaluation_metrics import Moments
from files import write_atomically
from files_reading import Npz

#: Keys of a .npz that hold single features (n, d): score_sde's own, clean-fid's for KID.
_FEATURE_KEYS = ("pool_3", "feats")
#: What statistics and extractor must have in common, where both say it.
_SHARED = ("extractor", "weights_sha256", "resize")


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set's features, maybe some of the features, and how they were made.

    Shapes: mu (d,), sigma (d, d), float64; features (k, d) float32 or None. `n` is the number of
    images, 0 where nothing says it. `protocol` is empty for files of others, which record none.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int
    protocol: dict[str, Any] = field(default_factory=dict)
    features: np.ndarray | None = None
    source: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of μ, Σ and n: names these statistics in results."""
        digest = hashlib.sha256(str(int(self.n)).encode())
        for x in (self.mu, self.sigma):
            digest.update(np.ascontiguousarray(x, dtype="<f8").tobytes())
        return digest.hexdigest()


def write_statistics(path: str | Path, statistics: Statistics) -> Path:
    """Write statistics as a .npz of mu, sigma, n, protocol (JSON) and maybe features; its path.

    The file appears whole or not at all. It opens without pickle, and mu and sigma are where other
    programs look for them. In a group of processes the main one writes.
    """
    path = Path(path).expanduser()
    path = path if path.suffix == ".npz" else path.with_name(path.name + ".npz")
    if not distributed.is_main():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    protocol = {**statistics.protocol, "sha256": statistics.hash}
    arrays = {
        "mu": np.asarray(statistics.mu, dtype=np.float64),
        "sigma": np.asarray(statistics.sigma, dtype=np.float64),
        "n": np.asarray(statistics.n, dtype=np.int64),
        "protocol": np.asarray(json.dumps(protocol)),
    }
    if statistics.features is not None:
        arrays["features"] = np.asarray(statistics.features, dtype=np.float32)
    write_atomically(path, lambda file: np.savez(file, **arrays))
    return path


def read_statistics(path: str | Path) -> Statistics:
    """Statistics from a .npz of ours or of a published layout.

    - mu, sigma, n, protocol (features): write_statistics
    - pool_3: features of all images, score_sde; feats: the same, clean-fid for KID
    - mu, sigma: TTUR, pytorch-fid, clean-fid, EDM. guided-diffusion's reference batches hold mu_s
      and sigma_s beside them (of the spatial features of sFID) and arr_0 (images): not used.

    Errors: FileNotFoundError; ValueError for other layouts, for entries that are not finite or not
    of one size, a sigma that is not symmetric, and where the recorded hash is not that of the
    content.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"reference statistics: expected a file at {path}; make it with "
            "`python main.py --mode stats --config …`, or name one by --config.eval.stats"
        )
    try:
        statistics = _parse(path, Npz(path))
    except (TypeError, OverflowError, RecursionError, MemoryError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: expected statistics, got arrays of other types ({error}); make or fetch it "
            "again"
        ) from error
    d = statistics.mu.size
    if statistics.mu.shape != (d,) or statistics.sigma.shape != (d, d):
        raise ValueError(
            f"{path}: expected mu (d,) and sigma (d, d), got {statistics.mu.shape} and "
            f"{statistics.sigma.shape}"
        )
    for name in ("mu", "sigma"):
        _require_finite(torch.from_numpy(getattr(statistics, name)), f"{path}: {name}")
    _require_symmetric(torch.from_numpy(statistics.sigma), f"{path}: sigma")
    recorded = str(statistics.protocol.get("sha256", statistics.hash))
    if recorded != statistics.hash:
        raise ValueError(
            f"{path}: the content has the hash {statistics.hash[:12]}…, and {recorded[:12]}… is "
            "recorded; the file was changed after it was made: make or fetch it again"
        )
    return statistics


def recorded_protocol(path: Path) -> dict[str, Any]:
    """The protocol in a .npz of ours, alone; {} where there is none that can be read."""
    try:
        protocol = json.loads(str(Npz(path)["protocol"]))
    except (ValueError, RecursionError):
        return {}
    return protocol if isinstance(protocol, dict) else {}


def _parse(path: Path, file: Any) -> Statistics:
    source = str(path)
    for name in set(file.files) & {"mu", "sigma", "n", "features", *_FEATURE_KEYS}:
        if file.kind(name) not in ("iu" if name == "n" else "fiu"):
            raise ValueError(f"{path}: expected numbers in {name}, got {file.kind(name)!r}")
    if {"mu", "sigma"} <= set(file.files):
        mu, sigma = (np.asarray(file[key], dtype=np.float64) for key in ("mu", "sigma"))
        if "protocol" not in file.files:
            return Statistics(mu, sigma, 0, source=source)
        features = file["features"] if "features" in file.files else None
        protocol = json.loads(str(file["protocol"]))
        if not isinstance(protocol, dict) or "n" not in file.files or file.shape("n"):
            raise ValueError(f"{path}: expected n, a number, and a protocol; make it again")
        if features is not None and (features.ndim != 2 or features.shape[1] != mu.size):
            raise ValueError(f"{path}: expected features (k, {mu.size}), got {features.shape}")
        return Statistics(mu, sigma, int(file["n"]), protocol, features, source)
    for key in _FEATURE_KEYS:
        if key in file.files:
            features = np.asarray(file[key], dtype=np.float32)
            if features.ndim < 2 or len(features) < 2:
                raise ValueError(f"{path}: expected features (n, d) in {key}, got {features.shape}")
            features = features.reshape(len(features), -1)
            _require_finite(torch.from_numpy(features), f"{path}: {key}")
            moments = Moments.of(features)
            mu, sigma = moments.mu.numpy(), moments.sigma.numpy()
            return Statistics(mu, sigma, len(features), {}, features, source)
    hint = ""
    if "arr_0" in file.files:
        hint = f"; arr_0 {file.shape('arr_0')} are images: compute statistics of them"
    raise ValueError(
        f"{path}: expected mu and sigma, pool_3 or feats, got {sorted(file.files)}{hint}"
    )


def check_compatible(
    statistics: Statistics,
    extractor: Extractor,
    *,
    resolution: int | Sequence[int],
    channels: int,
    dataset: str = "",
) -> list[str]:
    """Refuse statistics that another extractor, convention or resolution made; notes on the rest.

    What a published file does not record cannot be checked: it is accepted, with a sentence that
    says so, to be kept beside the result.

    Errors: ValueError with both sides and the remedy.
    """
    where = statistics.source or "the reference statistics"
    remedy = "make statistics for this configuration with --mode stats, or set --config.eval.stats"
    if extractor.dim and extractor.dim != len(statistics.mu):
        raise ValueError(
            f"{where}: expected {extractor.dim} features of {extractor.name!r}, got "
            f"{len(statistics.mu)}; {remedy}"
        )
    if not statistics.protocol:
        return [
            f"{where} records no protocol: that it is of this data set at this resolution, and of "
            f"the extractor {extractor.name!r}, could not be checked."
        ]
    size = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
    wanted = {**extractor.protocol(), "resolution": size, "image_channels": channels}
    for key in (*_SHARED, "resolution", "image_channels"):
        got = statistics.protocol.get(key)
        if got and wanted.get(key) and got != wanted[key]:
            raise ValueError(f"{where}: expected {key} {wanted[key]}, got {got}; {remedy}")
    recorded = statistics.protocol.get("dataset", "")
    if dataset and recorded and recorded.lower() != dataset.lower():
        return [f"{where} is of the data set {recorded!r}, the samples are of {dataset!r}."]
    return []


def dataset_statistics(
    image_set: Any,
    extractor: Extractor,
    *,
    batch_size: int = 64,
    keep_features: int = 0,
    seed: int = 2020,
    dataset: str = "",
    progress: Callable[[int], Any] = lambda n: None,
) -> Statistics:
    """Statistics of every image of a set: as they are, in uint8, none flipped, none left out.

    `image_set` has `len`, `shape`, `take(indices)`, `levels` and `name` (data_lib.ImageSet). The
    images are shared out over the processes; each gets the statistics of all. `keep_features` of
    the features, of images drawn by `seed` (all, in order, where there are no more), are kept for
    KID and precision/recall. `progress(n)` is told of each batch.

    Shapes: as Statistics. Equal for any number of processes and any batch, to rounding.
    Errors: ValueError for fewer than 2 images.
    """
    total = len(image_set)
    if total < 2:
        raise ValueError(f"{image_set.name}: a covariance needs at least 2 images, got {total}")
    kept = np.sort(np.random.RandomState(seed).permutation(total)[: min(keep_features, total)])
    mine: list[np.ndarray] = []
    images_hash, moments = 0, None
    share = distributed.share(total)
    # A process without a share still learns the number of features, from the first image.
    with distributed.together():
        for start in range(share.start, max(share.stop, share.start + 1), batch_size):
            indices = list(range(start, min(start + batch_size, share.stop)))
            images = as_bytes(image_set.take(indices or [0]), image_set.levels)
            pool = extractor(images).pool
            moments = moments or Moments(pool.shape[1], pool.device)
            if indices:
                moments.update(pool)
                images_hash += _images_hash(images)
                mine.append(pool.cpu().numpy()[np.isin(indices, kept)])
                progress(len(indices))
    assert moments is not None
    moments = moments.reduce()
    features = None
    if keep_features:
        features = np.concatenate([part for parts in distributed.gather(mine) for part in parts])
    channels, height, width = image_set.shape
    protocol = {
        **extractor.protocol(),
        "dataset": dataset or image_set.name,
        "split": image_set.name,
        "count": total,
        "resolution": [height, width],
        "image_channels": channels,
        "levels": image_set.levels,
        "flip": False,
        "images_hash": f"{sum(distributed.gather(images_hash)) % 2**64:016x}",
        "features_kept": len(kept),
    }
    return Statistics(
        moments.mu.cpu().numpy(), moments.sigma.cpu().numpy(), moments.n, protocol, features
    )


def _images_hash(images: torch.Tensor) -> int:
    """Sum of the hashes of images: names a set of images whatever their order."""
    hashes = (hashlib.sha256(image.numpy().tobytes()).digest()[:8] for image in images.cpu())
    return sum(int.from_bytes(digest, "big") for digest in hashes)
