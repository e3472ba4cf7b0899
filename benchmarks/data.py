"""How fast batches arrive from each kind of source, and whether training would wait for them.

    python -m benchmarks.data [--path FOLDER] [--size 32] [--needed 3600] [--peer edm=PATH]

For memory, folder, .zip and lmdb, and 0 to 4 workers: images a second as fast as they come, and
the share of its time that a trainer consuming `--needed` images a second waits for them. (A GPU
trains the full-size CIFAR-10 networks at about 3,600 images a second in bf16; `--needed` of other
trainings is their batch size over their time per step.)

The limits, measured in the same run: Pillow decoding the same files held in memory, one core, with
nothing else done; the same and this library's crop, resize and copy (`decode`); and as a peer
torchvision's ImageFolder in a DataLoader with as many workers; `--peer edm=PATH` adds EDM's own
data set, which takes images of the size wanted only. (score_sde_pytorch reads by TensorFlow.)
"""

import argparse
import contextlib
import functools
import importlib
import io
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import contenders, harness
from benchmarks.peers import absent, checkout, modules_of
from configs.validation import complete
from data_lib import ImageSet, prepare, train_batches
from data_lib_files import ImageFiles, decode, list_images
from randomness import Draws

#: Batches before the clock starts.
WARM_UP = 16


def synthetic(folder: Path, count: int, size: int) -> Path:
    """Write JPEGs a third wider than they are tall, smooth with some detail, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (max(2, size // 8),) * 2 + (3,), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size * 4 // 3, size), Image.Resampling.BICUBIC)
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "ab"[i % 2] / f"{i:06}.jpg", quality=90)
    return folder


def contents(files: ImageFiles, count: int) -> list[bytes]:
    """The bytes of the first images, in memory."""
    return [files.source.content(int(row)) for row in files.rows[:count]]


def zipped(files: ImageFiles, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in zip(files.names, contents(files, len(files)), strict=True):
            archive.writestr(name, content)
    return path


def in_lmdb(files: ImageFiles, path: Path) -> Path:
    import lmdb

    size = 2 * sum(map(len, contents(files, len(files)))) + 2**26
    with lmdb.open(str(path), map_size=size) as environment, environment.begin(write=True) as all_:
        for name, content in zip(files.names, contents(files, len(files)), strict=True):
            all_.put(name.encode(), content)
    return path


def rate(batches: Iterator[Any], seconds: float) -> float:
    """Images a second over about `seconds`, once all workers run."""
    for _ in range(WARM_UP):
        next(batches)
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        images += len(next(batches)[0])
    return images / (time.perf_counter() - started)


def waiting(batches: Iterator[Any], options: argparse.Namespace) -> float:
    """The share of the time that a trainer of `needed` images a second waits for batches."""
    step, waited = options.batch_size / options.needed, 0.0
    for _ in range(WARM_UP):
        next(batches)
    started = time.perf_counter()
    while time.perf_counter() - started < options.seconds:
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        time.sleep(step)
    return waited / (time.perf_counter() - started)


def one_core(work: Callable[[bytes], Any], files: list[bytes], seconds: float) -> float:
    """Calls a second of `work` on these files, one after the other."""
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for content in files[:64]:
            work(content)
        done += len(files[:64])
    return done / (time.perf_counter() - started)


def pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def torchvision_batches(path: Path, size: int, batch_size: int, workers: int):
    """What one would write with torchvision: bytes of shape (B, 3, size, size), and labels."""
    from torchvision import datasets, transforms

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    images = datasets.ImageFolder(str(path), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(
        images, batch_size, shuffle=True, num_workers=workers, drop_last=True
    )
    while True:
        yield from loader


def edm_batches(folder: str, path: Path, batch_size: int, workers: int):
    """EDM's data set of a folder in a DataLoader: bytes of shape (B, 3, size, size), and labels."""
    with modules_of(checkout(folder, "edm", "training/dataset.py")), absent("click"):
        module = importlib.import_module("training.dataset")
        images = module.ImageFolderDataset(path=str(path))
        loader = torch.utils.data.DataLoader(
            images, batch_size, shuffle=True, num_workers=workers, drop_last=True
        )
        while True:
            yield from loader


def sources(path: Path, size: int, scratch: Path) -> dict[str, ImageSet]:
    """The same images in memory, as a folder, as a .zip and, with the package, as an lmdb."""
    files = list_images(path)
    places = {"folder": path, "zip": zipped(files, scratch / "images.zip")}
    try:
        places["lmdb"] = in_lmdb(files, scratch / "images_lmdb")
    except ImportError:
        print("without lmdb: pip install lmdb")
    read = {name: list_images(place).with_shape((3, size, size)) for name, place in places.items()}
    known = {name: ImageSet(name, None, files=files) for name, files in read.items()}
    whole = read["folder"]
    return {"memory": ImageSet("memory", whole.read(range(len(whole)), show=True)), **known}


def cases(path: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Callable]:
    """What is measured: by name, a function that starts a stream of batches."""
    made: dict[str, Callable] = {}
    for name, image_set in sources(path, options.size, scratch).items():
        for workers in [0] if name == "memory" else options.workers:
            made[f"{name}, {workers} workers"] = functools.partial(
                train_batches, image_set, options.batch_size, 0, workers=workers
            )
    for workers in options.workers:
        made[f"torchvision, {workers} workers"] = functools.partial(
            torchvision_batches, path, options.size, options.batch_size, workers
        )
        for name, folder in options.peer:
            if name == "edm" and fits(path, options.size):
                made[f"{name}, {workers} workers"] = functools.partial(
                    edm_batches, folder, path, options.batch_size, workers
                )
    return made


def fits(path: Path, size: int) -> bool:
    """Whether the images have the size wanted, so that nothing need be cut."""
    with Image.open(next(p for p in sorted(path.rglob("*")) if p.is_file())) as image:
        return image.size == (size, size)


def prepare_rate(options: argparse.Namespace) -> float:
    """Images a second through `prepare`, with flips and dequantisation drawn per image."""
    config = complete({"device": options.device})
    count, steps, started = options.batch_size, 0, time.perf_counter()
    images = torch.zeros((count, 3, options.size, options.size), dtype=torch.uint8)
    while time.perf_counter() - started < options.seconds:
        draws = Draws(0, steps, 0, count)
        x = prepare(images, config, config.device, flip=True, dequantize=True, draws=draws)
        steps += 1
    x.sum().item()  # what runs on a GPU has ended
    return steps * count / (time.perf_counter() - started)


def measure(path: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every number of the report; the rounds are interleaved and their median is taken."""
    held = contents(list_images(path), 2000)
    rates: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    known = cases(path, options, scratch)
    for _ in range(options.repeats):
        limits = {
            "pillow, 1 core": pillow,
            "decode, 1 core": lambda content: decode(content, 3, options.size),
        }
        for name, work in limits.items():
            rates.setdefault(name, []).append(one_core(work, held, options.seconds))
        for name, start in known.items():
            with contextlib.closing(start()) as batches:
                rates.setdefault(name, []).append(rate(batches, options.seconds))
            with contextlib.closing(start()) as batches:
                waits.setdefault(name, []).append(waiting(batches, options))
        rates.setdefault("prepare", []).append(prepare_rate(options))
    return {
        "images_per_second": {name: statistics.median(all_) for name, all_ in rates.items()},
        "share_of_time_waiting": {name: statistics.median(all_) for name, all_ in waits.items()},
        "rounds": {"images_per_second": rates, "share_of_time_waiting": waits},
    }


def table(results: dict[str, Any], needed: float) -> dict[str, Any]:
    """The medians, and the share of its time that a trainer waits."""
    body = []
    for name, speed in results["images_per_second"].items():
        share = results["share_of_time_waiting"].get(name)
        body.append([name, f"{speed:,.0f}", "" if share is None else f"{share:.1%}"])
    head = ["source", "images/s", f"a trainer of {needed:,.0f} images/s waits"]
    return {"title": "batches as fast as they come", "head": head, "rows": body}


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Everything measured on the images of `--path`, or on made ones where it is not there."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(options.path).expanduser()
        if options.synthetic or not path.is_dir():
            path = synthetic(Path(scratch) / "made", options.synthetic or 2000, options.size)
        count = len(list_images(path))
        results = measure(path, options, Path(scratch))
        oblong = not fits(path, options.size)
    notes = {
        "images": f"{count:,} files for {options.size} pixels, batches of {options.batch_size}"
    }
    for name, _ in options.peer:
        if name == "score_sde_pytorch":
            notes[name] = "reads by TensorFlow, and is left out"
        elif oblong:
            notes[name] = f"takes images of {options.size} pixels only, and is left out"
    return {"notes": notes, **results, "tables": [table(results, options.needed)]}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.parser("data", __doc__)
    add = parser.add_argument
    add("--peer", type=contenders.peer, action="append", default=[], help="edm=FOLDER")
    add("--path", default="~/data/cifar10-jpeg/train", help="a folder of images")
    add("--size", type=int, default=32, help="pixels a side")
    add("--batch-size", type=int, default=128)
    add("--needed", type=float, default=3600, help="images a second")
    add("--workers", type=harness.numbers, default=[0, 1, 2, 4], help="0,1,2")
    add("--seconds", type=float, default=2.0, help="of each measurement")
    add("--synthetic", type=int, default=0, help="make so many images instead")
    parser.set_defaults(repeats=3)
    return harness.parse(parser, given)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print its table, write its JSON, and return the report."""
    return harness.run("data", parse(given), report)


if __name__ == "__main__":
    main()
