"""Damaged files of every kind that is read: the right content, or one error that names the file.

Fast: 80 damages of each of 33 kinds, above 2,000; `slow` ten thousand. Seeds are fixed.
"""

import collections
import copy
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import toys_damage as toys
from PIL import Image

import checkpoints
import data_lib_files
import data_lib_index
import evaluation_stats
import files_reading
import run_lib_journal
import run_lib_results
from checkpoints_export import export_content
from models import ema, ema_posthoc
from run_lib_shards import Shards

COUNT, MANY = 80, 400


def tree_equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tree_equal(a[k], b[k]) for k in a)
    if isinstance(a, set):  # of pictures: a name has no checksum, and may end in another kind's
        return a <= b
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(tree_equal, a, b))
    return a == b or (a != a and b != b)


def state(step=3, network=None):
    torch.manual_seed(step)
    network = network or torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    sum(p.square().sum() for p in network.parameters()).backward()
    optimizer.step()
    averages = ema.Averages(network.parameters(), 0.99, rates=(0.9,), profiles=(0.1,))
    averages.update(network.parameters())
    return {"model": network, "optimizer": optimizer, "ema": averages, "step": step}


def content_of(now):
    return copy.deepcopy(checkpoints.content_of(now))


# --- the kinds ------------------------------------------------------------------------------


def bytes_of(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def native(folder):
    path = folder / "checkpoint.pth"
    checkpoints.save_checkpoint(path, state())
    return path, path.read_bytes(), checkpoints.load_file, True


def restored(folder):
    path, content, _, _ = native(folder)

    def load(path):
        now = state(step=5)
        before = content_of(now)
        try:
            checkpoints.restore_checkpoint(path, now)
        except ValueError:
            assert tree_equal(content_of(now), before), "a refused file has changed the state"
            raise
        return content_of(now)

    return path.with_name("restored.pth"), content, load, True


def original(folder):
    """score_sde_pytorch's: DataParallel's names, a NumPy learning rate, no version."""
    saved = content_of(state())
    saved["model"] = {f"module.{key}": value for key, value in saved["model"].items()}
    saved["optimizer"]["param_groups"][0]["lr"] = np.float64(1e-3)
    return (
        folder / "original.pth",
        bytes_of(lambda f: torch.save(saved, f)),
        checkpoints.load_file,
        True,
    )


def old_torch(folder):
    saved = content_of(state())
    content = bytes_of(lambda f: torch.save(saved, f, _use_new_zipfile_serialization=False))
    return folder / "old.pth", content, checkpoints.load_file, False


def ncsnv2(folder):
    now = content_of(state())
    saved = [now["model"], now["optimizer"], 1, 7, {"0.weight": now["model"]["0.weight"]}]
    return (
        folder / "list.pth",
        bytes_of(lambda f: torch.save(saved, f)),
        checkpoints.load_file,
        True,
    )


def safetensors(folder):
    pytest.importorskip("safetensors")
    path, now = folder / "c.safetensors", content_of(state())
    now["ema"] = {k: now["ema"][k] for k in ("decay", "num_updates", "shadow_params")}
    export_content(path, now, state()["model"], "safetensors")
    return path, path.read_bytes(), checkpoints.load_file, True


def flax(folder):
    msgpack = pytest.importorskip("msgpack")

    def array(*shape):
        value = np.random.RandomState(0).randn(*shape).astype(np.float32)
        return msgpack.ExtType(1, msgpack.packb((shape, "float32", value.tobytes())))

    layer = {"Conv_0": {"kernel": array(3, 3, 2, 4), "bias": array(4)}}
    moment = {"grad_ema": array(4), "grad_sq_ema": array(4)}
    tree = {
        "step": 5, "lr": 1e-3, "ema_rate": 0.999, "params_ema": layer,
        "optimizer": {
            "target": layer, "state": {"step": 5, "param_states": {"Conv_0": {"bias": moment}}}
        },
    }  # fmt: skip
    return folder / "checkpoint_5", msgpack.packb(tree), checkpoints.load_file, False


def diffusers(part):
    def make(folder):
        pytest.importorskip("diffusers")
        from safetensors.torch import save

        tensors = {"conv_in.weight": torch.randn(4, 3, 3, 3), "conv_in.bias": torch.randn(4)}
        notes = {"step": 7, "sha256": files_reading.tensors_hash(tensors, {"step": 7})}
        contents = {
            "unet/config.json": json.dumps({"sample_size": 8, "act_fn": "silu"}).encode(),
            "unet/diffusion_pytorch_model.safetensors": save(tensors),
            "score_sde.json": json.dumps(notes).encode(),
            "model_index.json": b"{}",
        }
        (folder / "unet").mkdir(parents=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        # options, such as "act_fn", are held to the network's later
        return (
            folder / part,
            contents[part],
            lambda _: checkpoints.load_file(folder),
            part.endswith(".safetensors"),
        )

    make.__name__ = f"diffusers {Path(part).name}"
    return make


def profiles(folder):
    now = state()
    path = now["ema"].save_snapshot(folder / "ema", 3)

    def load(path):
        head = ema_posthoc._read(path)
        return {**head, "tensors": [[v.clone() for v in part] for part in head["tensors"]]}

    return path, path.read_bytes(), load, True


def dequantizer(folder):
    from configs.defaults import get_default_configs
    from models.dequantizer import Dequantizer

    config = get_default_configs()
    config.data.update(num_channels=1, image_size=2, levels=17)
    config.model.update(nf=2, num_res_blocks=1, couplings=1, spline_bins=2)
    now = state(network=Dequantizer(config))
    checkpoints.save_checkpoint(folder / "dequantizer.pth", now)

    def load(path):
        into = {"model": Dequantizer(config), "step": 0}
        checkpoints.restore_checkpoint(path, into)
        return into["model"].state_dict()

    return folder / "dequantizer.pth", (folder / "dequantizer.pth").read_bytes(), load, True


def statistics(kind):
    def make(folder):
        x = np.random.RandomState(0).randn(40, 5)
        mu, sigma = x.mean(0), np.cov(x, rowvar=False)
        path = folder / f"{kind}.npz"
        if kind == "ours":
            whole = evaluation_stats.Statistics(
                mu, sigma, 40, {"extractor": "pixels"}, np.float32(x)
            )
            evaluation_stats.write_statistics(path, whole)
        else:
            arrays = {"pool_3": x} if kind == "score_sde" else {"feats": x} if kind == "kid" else {}
            np.savez(path, **(arrays or {"mu": mu, "sigma": sigma}))

        def load(path):
            found = evaluation_stats.read_statistics(path)
            return [found.mu, found.sigma, found.n, found.features, found.protocol]

        return path, path.read_bytes(), load, True

    make.__name__ = f"statistics {kind}"
    return make


def image(format, mode="RGB", **options):
    def make(folder):
        pixels = np.random.RandomState(1).randint(0, 256, (24, 24, 3)).astype(np.uint8)
        pixels = np.asarray(Image.fromarray(pixels).resize((48, 48)))
        picture = Image.fromarray(pixels).convert(mode)
        content = bytes_of(lambda f: picture.save(f, format, **options))
        (folder / "set").mkdir(parents=True)
        path = folder / "set" / f"a.{format.lower()}"
        path.write_bytes(content)
        files = data_lib_files.list_images(folder / "set").with_shape((3, 48, 48))
        return path, content, lambda _: files.read([0]), format == "PNG"

    make.__name__ = f"image {format} {mode}"
    return make


def zipped(method):
    def make(folder):
        pictures = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(4)]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for i, pixels in enumerate(pictures):
                content = bytes_of(lambda f, p=pixels: Image.fromarray(p).save(f, "BMP"))
                archive.writestr(f"class{i % 2}/{i}.bmp", content)

        def load(path):
            files = data_lib_files.list_images(path).with_shape((3, 8, 8))
            return {*map(bytes, files.read(range(len(files))).flatten(1).numpy())}

        return folder / "images.zip", file.getvalue(), load, True

    make.__name__ = f"zip {method}"
    return make


def index(folder):
    names = data_lib_index.Names.of(f"a/{i}.png" for i in range(50))
    found = data_lib_index.Index(names, 50, {"link": np.zeros(50, bool)})
    (folder / "data").mkdir()
    watched = data_lib_index.Watched()
    watched.add(folder / "data")
    path = folder / "index.npz"
    data_lib_index._keep(path, found, watched)

    def load(path):
        kept = data_lib_index._load(path)
        if kept is None:
            raise ValueError(f"{path} cannot be used")  # and is made again
        return [[kept.names[i] for i in range(len(kept.names))], kept.columns]

    return path, path.read_bytes(), load, True


def shard(folder):
    shards = Shards(folder / "samples.npz", {"seed": 1})
    rows = {"samples": np.arange(60, dtype=np.float32).reshape(20, 3)}
    shards._write(shards.path, rows, range(20))

    def load(path):
        known = shards._known(20)
        if not known.all():
            raise ValueError(f"{path} cannot be used")  # and is made again
        return shards.read(20)

    return shards.path, shards.path.read_bytes(), load, True


def results(folder):
    content = {
        "checkpoint": 1,
        "step": 5,
        "protocol": {"loss": {"weights": "a"}},
        "loss": {"mean": 1},
    }
    (folder / "ckpt_1.json").write_text(json.dumps(content))

    def load(path):
        found = run_lib_results._read(path)
        run_lib_results.curves(folder, "", content)
        if found is None:
            raise ValueError(f"{path} cannot be used")
        return found

    return folder / "ckpt_1.json", (folder / "ckpt_1.json").read_bytes(), load, False


def history(folder):
    rows = [{"step": k, "loss": 1 / k, "eval_loss": None} for k in range(1, 9)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / "history.jsonl"

    def load(path):
        run_lib_journal.read_history(folder)
        file, _ = run_lib_journal._open_history(folder / "copy.jsonl", 5)
        file.close()

    return path, content, load, False


def config(folder):
    path = folder / "config.json"
    content = json.dumps({"data": {"dataset": "digits"}, "seed": 1}).encode()
    return path, content, lambda p: files_reading.read_json(p, "a configuration"), False


MAKERS = [
    native, restored, original, old_torch, ncsnv2, safetensors, flax, profiles, dequantizer,
    diffusers("unet/config.json"), diffusers("unet/diffusion_pytorch_model.safetensors"),
    diffusers("score_sde.json"),
    *map(statistics, ("ours", "score_sde", "kid", "published")),
    image("PNG"), image("PNG", "P"), image("JPEG"), image("WEBP"), image("GIF", "P"), image("BMP"),
    image("TIFF"), image("TIFF", compression="tiff_lzw"), image("PPM"),
    zipped(zipfile.ZIP_STORED), zipped(zipfile.ZIP_DEFLATED), zipped(zipfile.ZIP_BZIP2),
    index, shard, results, history, config,
]  # fmt: skip
IN_PLACE = ("diffusers", "image", "shard", "history")


@pytest.mark.parametrize("count", [COUNT, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_damaged_file_is_read_rightly_or_refused_with_its_name(make, count, tmp_path):
    path, content, load, exact = make(tmp_path)
    suffix = "same" if make.__name__.startswith(IN_PLACE) else ""
    counted = toys.run(load, path, content, count, tree_equal, exact=exact, suffix=suffix)
    total = sum(counted.values())
    assert total == count
    by_outcome = collections.Counter()
    for (_, what), number in counted.items():
        by_outcome[what] += number
    print(f"{make.__name__}: {total} damaged files, {dict(by_outcome)}")
    assert by_outcome["refused"] >= count // 4 or make is history


def test_the_kinds_and_the_damages_are_above_two_thousand():
    assert len(MAKERS) * COUNT >= 2000
    assert len(MAKERS) * MANY >= 10_000
