"""Data: sets, splits, batches, dequantisation, files of every kind, and errors that help."""

import gzip
import io
import itertools
import logging
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import data_lib_files
import datasets
from configs.validation import complete
from data_lib import (
    ImageSet,
    eval_batches,
    get_data_inverse_scaler,
    get_data_scaler,
    get_image_sets,
    prepare,
    quantize,
    resize,
    to_channels,
    train_batches,
)
from data_lib_files import decode, list_images, split_images

SHARED_MNIST = Path(__file__).resolve().parents[2] / "shared/data/MNIST/raw"


def make_config(**data) -> Any:
    return complete({"data": data})


def digits_config(**data) -> Any:
    return make_config(dataset="digits", image_size=8, num_channels=1, levels=17, **data)


def numbered(n, labels=False) -> ImageSet:
    """A set whose i-th image is filled with i."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).clone()
    return ImageSet("numbered", images, torch.arange(n) if labels else None)


def numbers(batch):
    return batch.images[:, 0, 0, 0].tolist()


# Scalers


@pytest.mark.parametrize("centered", [True, False])
def test_inverse_scaler_undoes_the_scaler(centered):
    config = make_config(centered=centered)
    x = torch.linspace(0, 1, 5)
    scaled = get_data_scaler(config)(x)
    assert scaled.min() == (-1 if centered else 0) and scaled.max() == 1
    assert torch.allclose(get_data_inverse_scaler(config)(scaled), x)


# Batches


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 23])
def test_training_epochs_are_permutations_across_batch_borders(batch_size):
    batches = train_batches(numbered(10), batch_size, seed=0)
    stream = list(itertools.chain(*(numbers(next(batches)) for _ in range(40))))
    epochs = [stream[i : i + 10] for i in range(0, len(stream) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)


def test_training_order_depends_on_the_seed_and_the_step_alone():
    stream = list(map(numbers, itertools.islice(train_batches(numbered(10), 4, 3), 12)))
    again = list(map(numbers, itertools.islice(train_batches(numbered(10), 4, 3), 12)))
    other = list(map(numbers, itertools.islice(train_batches(numbered(10), 4, 4), 12)))
    assert stream == again != other
    for start in (1, 5, 11):
        resumed = train_batches(numbered(10), 4, 3, start_step=start)
        assert list(map(numbers, itertools.islice(resumed, 12 - start))) == stream[start:]


def test_labels_travel_with_their_images():
    for batch in itertools.islice(train_batches(numbered(9, labels=True), 4, 0), 5):
        assert batch.labels is not None and batch.labels.tolist() == numbers(batch)


@pytest.mark.parametrize("batch_size", [1, 4, 10, 16])
def test_evaluation_sees_every_image_once_in_order(batch_size):
    batches = list(eval_batches(numbered(10), batch_size))
    assert list(itertools.chain(*map(numbers, batches))) == list(range(10))
    assert len(batches[-1].images) == (10 % batch_size or batch_size)


def test_a_batch_size_of_0_is_refused():
    with pytest.raises(ValueError, match="batch size >= 1"):
        next(train_batches(numbered(3), 0, 0))
    with pytest.raises(ValueError, match="batch size >= 1"):
        next(eval_batches(numbered(3), 0))


def test_an_image_set_wants_uint8_of_four_dimensions():
    with pytest.raises(ValueError, match="uint8"):
        ImageSet("floats", torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="non-empty"):
        ImageSet("empty", torch.zeros(0, 1, 2, 2, dtype=torch.uint8))


# prepare


def test_without_dequantisation_levels_become_a_lattice_from_0_to_1():
    x = torch.arange(17, dtype=torch.uint8).view(1, 1, 1, 17)
    y = prepare(x, digits_config())
    assert y.dtype == torch.float32 and torch.allclose(y * 16, x.float())
    assert (prepare(x, digits_config(centered=True)).min(), y.max()) == (-1, 1)


@pytest.mark.parametrize("levels", [17, 256])
def test_dequantised_pixels_stay_on_their_level(levels):
    x = torch.randint(0, levels, (64, 1, 16, 16), dtype=torch.uint8)
    config = make_config(levels=levels)
    y = prepare(x, config, dequantize=True, generator=torch.Generator().manual_seed(0))
    assert y.min() >= 0 and y.max() < 1
    assert torch.equal((y * levels).floor(), x.float())
    assert abs((y * levels - x).mean() - 0.5) < 0.02


def test_dequantisation_does_not_round_up_to_the_next_level(monkeypatch):
    almost_1 = 1 - 2.0**-24
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, almost_1))
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    y = prepare(x, make_config(), dequantize=True)
    assert y.max() < 1 and torch.equal((y * 256).floor(), x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_images_of_any_precision_come_back_as_their_levels(dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = (levels.double() / 255).to(dtype)
    assert torch.equal(quantize(x, make_config(uniform_dequantization=False)), levels)


def test_flips_mirror_whole_images_about_half_of_the_time():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(400, 3, 2, 2)
    y = prepare(x, make_config(), flip=True, generator=torch.Generator().manual_seed(0))
    left = y[..., 0].flatten(1)
    assert ((left == 0).all(1) | (left == 1).all(1)).all()
    assert 140 < (left[:, 0] == 1).sum() < 260
    assert torch.equal(prepare(x, make_config()), (x / 255).float())


def test_prepare_repeats_with_its_generator():
    x = torch.randint(0, 256, (4, 3, 4, 4), dtype=torch.uint8)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return prepare(x, make_config(), "cpu", flip=True, dequantize=True, generator=generator)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_prepare_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        prepare(torch.zeros(1, 3, 4, 4), make_config())


# Digits


def test_digits_are_split_the_same_way_for_every_seed():
    train, held_out = get_image_sets(digits_config())
    assert (len(train), len(held_out), train.shape) == (1497, 300, (1, 8, 8))
    assert train.levels == 17 and train.images is not None and train.images.max() == 16
    other = digits_config()
    other.seed = 7
    assert torch.equal(get_image_sets(other)[1].take(range(300)), held_out.take(range(300)))
    # Frozen: numbers of other runs would not be comparable any more.
    assert held_out.labels is not None and held_out.labels[:8].tolist() == [4, 5, 6, 9, 4, 7, 8, 9]


def test_digits_are_split_into_disjoint_parts_that_make_up_the_whole():
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    parts = [part.take(range(len(part))) for part in get_image_sets(digits_config())]
    rows = sorted(map(tuple, torch.cat(parts).flatten(1).tolist()))
    assert rows == sorted(map(tuple, bunch.data.astype(int).tolist()))


def test_levels_that_the_data_do_not_have_are_refused():
    with pytest.raises(ValueError, match=r"levels: expected 17.*got 256"):
        get_image_sets(make_config(dataset="digits"))
    with pytest.raises(ValueError, match="levels: expected 256"):
        get_image_sets(make_config(dataset="MNIST", levels=17))


# Resizing and channels


def test_resizing_keeps_the_integer_levels_and_averages_when_shrinking():
    x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    x[..., ::2] = 16
    small = resize(x, 4, levels=17)
    assert small.dtype == torch.uint8 and small.shape == (2, 1, 4, 4)
    assert small.min() >= 6 and small.max() <= 10  # one pixel in two without antialiasing
    assert resize(x, 19, levels=17).max() <= 16
    assert resize(x, 8) is x


def test_channels_are_repeated_or_weighted_as_pillow_does():
    colour = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8)
    grey = to_channels(colour, 1)
    pillow = [np.asarray(Image.fromarray(c.permute(1, 2, 0).numpy()).convert("L")) for c in colour]
    assert np.abs(grey[:, 0].numpy().astype(int) - np.stack(pillow)).max() <= 1
    assert torch.equal(to_channels(grey, 3)[:, 2], grey[:, 0])


# Named data sets


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10", "SVHN", "CELEBA"])
def test_missing_data_are_reported_at_once_with_a_remedy(name, tmp_path):
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"data\.root.*data\.download=True") as caught:
        get_image_sets(make_config(dataset=name, root=str(tmp_path)))
    assert time.perf_counter() - started < 0.5
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["LSUN", "FFHQ", "CelebAHQ", "folder"])
def test_data_that_are_read_as_folders_ask_for_a_path(name):
    with pytest.raises(FileNotFoundError, match=r"config\.data\.path"):
        get_image_sets(make_config(dataset=name, category="bedroom", tfrecords_path="/x.tfrecords"))


def test_an_unknown_data_set_is_refused_naming_the_known_ones():
    with pytest.raises(ValueError, match="cifar10"):
        get_image_sets(make_config(dataset="imagenet"))
    with pytest.raises(ValueError, match="num_channels"):
        get_image_sets(make_config(num_channels=2))


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def fake_mnist(root, n=12):
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 28, 28))
    for split in ("train", "t10k"):
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(n) % 10)
    return torch.tensor(images, dtype=torch.uint8)


def test_mnist_is_read_as_it_is_and_resized_on_demand(tmp_path):
    pixels = fake_mnist(tmp_path)
    config = make_config(dataset="MNIST", root=str(tmp_path), image_size=28, num_channels=1)
    train, test = get_image_sets(config)
    assert torch.equal(train.take(range(12))[:, 0], pixels) and len(test) == 12
    assert train.labels is not None and train.labels.tolist() == [i % 10 for i in range(12)]
    config.data.update(image_size=32, num_channels=3)
    assert get_image_sets(config)[0].shape == (3, 32, 32)


@pytest.mark.skipif(not SHARED_MNIST.exists(), reason="the real MNIST is not here")
def test_the_real_mnist_has_its_known_first_labels(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for path in SHARED_MNIST.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    config = make_config(dataset="MNIST", root=str(tmp_path), image_size=28, num_channels=1)
    train, test = get_image_sets(config)
    assert (len(train), len(test), train.shape) == (60000, 10000, (1, 28, 28))
    assert train.labels is not None and train.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_cifar10_is_read_channel_by_channel(tmp_path, monkeypatch):
    torchvision_datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "_load_meta", lambda self: None)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 5]}))
    train, test = get_image_sets(make_config(dataset="CIFAR10", root=str(tmp_path)))
    assert (len(train), len(test)) == (10, 2)
    assert torch.equal(test.take([0, 1]).flatten(1), torch.from_numpy(pixels))
    assert test.labels is not None and test.labels.tolist() == [3, 5]


def test_damaged_cifar10_is_reported_with_the_reason(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"nothing")
    with pytest.raises(FileNotFoundError, match=r"CIFAR10.*corrupted.*download=True"):
        get_image_sets(make_config(dataset="CIFAR10", root=str(tmp_path)))


def test_celeba_takes_the_central_140_pixels_of_its_official_parts(tmp_path):
    folder = tmp_path / "celeba/img_align_celeba"
    folder.mkdir(parents=True)
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[39:179, 19:159] = 200
    for i in range(5):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    lines = "".join(f"{i}.png {part}\n" for i, part in enumerate("00121"))
    (tmp_path / "celeba/list_eval_partition.txt").write_text(lines)
    config = make_config(dataset="CELEBA", root=str(tmp_path), image_size=64)
    train, held_out = get_image_sets(config)
    assert (len(train), len(held_out), train.shape) == (2, 2, (3, 64, 64))
    assert (train.take([0]) == 200).all()


# Folders and archives


def colour_image(seed, size=(10, 10)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour_image(i).save(folder / name)
    return folder


def zipped(folder, prefix=""):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


NAMES = [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in range(3)]


@pytest.mark.parametrize("form", ["folder", "parent", "zip", "zip with a top folder"])
def test_train_and_test_sub_folders_are_the_split_and_classes_the_labels(form, tmp_path):
    path = save_images(tmp_path / "up/images", NAMES)
    path = {
        "folder": lambda: path,
        "parent": lambda: path.parent,
        "zip": lambda: zipped(path),
        "zip with a top folder": lambda: zipped(path, "images/"),
    }[form]()
    config = make_config(dataset="folder", path=str(path), image_size=10)
    train, held_out = get_image_sets(config)
    assert (len(train), len(held_out)) == (6, 6)
    expected = np.stack([np.asarray(colour_image(i)) for i in range(6)])
    assert np.array_equal(train.take(range(6)).permute(0, 2, 3, 1).numpy(), expected)
    for part in (train, held_out):
        assert part.labels is not None and part.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("archive", [False, True])
def test_a_plain_folder_is_split_by_a_fraction_that_never_changes(archive, tmp_path):
    path = save_images(tmp_path / "images", [f"{i:02}.png" for i in range(20)])
    path = zipped(path) if archive else path
    train, held_out = split_images(path, None, 0.2)
    assert (len(train), len(held_out)) == (16, 4)
    assert sorted(train.names + held_out.names) == list(list_images(path).names)
    assert list(train.names) == sorted(train.names) and train.labels is None
    assert split_images(path, None, 0.2)[1].names == held_out.names


def test_eval_path_is_held_out_whole(tmp_path):
    path = save_images(tmp_path / "images", ["1.png", "2.png"])
    other = save_images(tmp_path / "other", ["3.png"])
    train, held_out = split_images(path, other, 0.1)
    assert (train.names, held_out.names) == (("1.png", "2.png"), ("3.png",))
    split = save_images(tmp_path / "split", NAMES)
    assert len(split_images(split, other, 0.1)[0]) == 6


def test_images_of_eval_path_are_never_trained_on(tmp_path):
    names = [f"{folder}{i}.png" for folder in ("a/", "b/", "held/a/", "held/b/") for i in (0, 1)]
    path = save_images(tmp_path / "leak", names)
    (path / "link").symlink_to(path / "held", target_is_directory=True)
    (path / "a/link.png").symlink_to(path / "held/a/0.png")
    train, held_out = split_images(path, path / "b/../held", 0.1)
    assert train.names == ("a/0.png", "a/1.png", "b/0.png", "b/1.png")
    assert held_out.names == ("a/0.png", "a/1.png", "b/0.png", "b/1.png")
    assert [part.labels.tolist() for part in (train, held_out)] == [[0, 0, 1, 1]] * 2


def test_what_remains_beside_eval_path_is_split_into_the_same_classes(tmp_path):
    path = save_images(tmp_path / "images", NAMES)
    train, held_out = split_images(path, path / "test", 0.1)
    assert [part.labels.tolist() for part in (train, held_out)] == [[0, 0, 0, 1, 1, 1]] * 2
    assert all(name.startswith("train/") for name in train.names)


def test_training_on_a_part_of_eval_path_is_refused(tmp_path):
    path = save_images(tmp_path / "images", NAMES)
    for inner in (path, path / "train", path / "train/a"):
        with pytest.raises(ValueError, match=r"data\.path .* inside data\.eval_path"):
            split_images(inner, path, 0.1)
    archive = zipped(path)
    with pytest.raises(ValueError, match="inside"):
        split_images(archive, archive, 0.1)
    (tmp_path / "alias").mkdir()
    (tmp_path / "alias/link").symlink_to(path, target_is_directory=True)
    with pytest.raises(ValueError, match="got only such as are in data"):
        split_images(tmp_path / "alias", path, 0.1)


def test_a_third_part_is_left_out_and_said_to_be(tmp_path, caplog):
    path = save_images(tmp_path / "images", [*NAMES, "val/a/0.png", "notes/0.png"])
    with caplog.at_level(logging.INFO, "score_sde"):
        train, held_out = split_images(path, None, 0.1)
    assert (train.base, held_out.base) == ("train/", "test/")
    [message] = caplog.messages
    assert "training on train (6 images), evaluating on test (6 images)" in message
    assert message.endswith("not using notes, val")


def test_two_named_parts_need_no_word(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "score_sde"):
        split_images(save_images(tmp_path / "images", NAMES), None, 0.1)
    assert caplog.messages == []


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("name", ["val", "test", "eval"])
def test_an_evaluation_folder_without_train_is_held_out_of_the_rest(
    name, archive, tmp_path, caplog
):
    names = [f"{folder}{c}/{i}.png" for folder in ("", f"{name}/") for c in "ab" for i in (0, 1)]
    path = save_images(tmp_path / "images", names)
    path = zipped(path, "top/") if archive else path
    with caplog.at_level(logging.INFO, "score_sde"):
        train, held_out = split_images(path, None, 0.1)
    assert [part.labels.tolist() for part in (train, held_out)] == [[0, 0, 1, 1]] * 2
    assert all(f"{name}/" in n for n in held_out.names)
    assert not any(f"{name}/" in n for n in train.names)
    [message] = caplog.messages
    assert "training on the rest (4 images)" in message and f"{name} (4 images)" in message


def test_the_classes_of_the_rest_may_lie_in_a_folder_of_any_name(tmp_path):
    path = save_images(tmp_path / "images", [n.replace("train", "mine") for n in NAMES])
    train, held_out = split_images(path, None, 0.1)
    assert [part.labels.tolist() for part in (train, held_out)] == [[0, 0, 0, 1, 1, 1]] * 2


def test_evaluation_folders_alone_are_refused(tmp_path):
    path = save_images(tmp_path / "images", ["test/1.png", "val/2.png"])
    with pytest.raises(ValueError, match="expected training images, got only test, val"):
        split_images(path, None, 0.1)


def test_a_truncated_zip_is_to_be_made_again(tmp_path):
    path = zipped(save_images(tmp_path / "images", NAMES))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"images\.zip is not a readable zip .*; make it again"):
        list_images(path)


def test_one_image_cannot_be_split(tmp_path):
    path = save_images(tmp_path / "images", ["1.png"])
    with pytest.raises(ValueError, match="eval_path"):
        split_images(path, None, 0.1)


def test_a_folder_without_images_is_reported(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/._1.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="found 2 files and no image"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="zip"):
        list_images(tmp_path / "notes.txt")


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_damaged_image_is_named(damage, archive, tmp_path):
    path = save_images(tmp_path / "images", [f"{i}.png" for i in range(4)])
    content = (path / "2.png").read_bytes()
    bad = {"empty": b"", "truncated": content[: len(content) // 2], "text": b"no image"}[damage]
    (path / "2.png").write_bytes(bad)
    path = zipped(path) if archive else path
    with pytest.raises(ValueError, match=r"2\.png: expected an image.*replace or delete"):
        get_image_sets(make_config(dataset="folder", path=str(path), image_size=8))


def test_a_folder_too_large_for_memory_is_decoded_when_taken(tmp_path):
    path = save_images(tmp_path / "images", NAMES)
    config = make_config(dataset="folder", path=str(path), image_size=10)
    in_memory, _ = get_image_sets(config)
    config.data.memory_gib = 0.0
    lazy, _ = get_image_sets(config)
    assert lazy.images is None and (len(lazy), lazy.shape) == (6, (3, 10, 10))
    pairs = zip(train_batches(in_memory, 4, 0), train_batches(lazy, 4, 0), strict=False)
    for a, b in itertools.islice(pairs, 5):
        assert torch.equal(a.images, b.images)
        assert a.labels is not None and b.labels is not None
        assert torch.equal(a.labels, b.labels)
    assert [len(batch.images) for batch in eval_batches(lazy, 4)] == [4, 2]


def test_lsun_looks_into_the_folder_of_its_category(tmp_path):
    save_images(tmp_path, ["bedroom/1.png", "bedroom/2.png", "church/3.png"])
    config = make_config(dataset="LSUN", category="bedroom", path=str(tmp_path), image_size=8)
    assert [len(part) for part in get_image_sets(config)] == [1, 1]


# Decoding


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **({"format": "PNG"} | options))
    return stream.getvalue()


KINDS = {
    "grey": lambda: colour_image(0).convert("L"),
    "colour": lambda: colour_image(0),
    "RGBA": lambda: colour_image(0).convert("RGBA"),
    "grey and alpha": lambda: colour_image(0).convert("LA"),
    "palette": lambda: colour_image(0).convert("P"),
    "bits": lambda: colour_image(0).convert("1"),
    "16 bits": lambda: Image.fromarray(np.full((10, 10), 40000, np.uint16)),
    "wide": lambda: colour_image(0, (31, 7)),
    "tall": lambda: colour_image(0, (7, 31)),
    "tiny": lambda: colour_image(0, (1, 1)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_decoded_to_the_same_shape(kind, channels):
    pixels = decode(encoded(KINDS[kind]()), channels, 8)
    assert pixels.shape == (channels, 8, 8) and pixels.dtype == np.uint8


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = colour_image(3)
    assert np.array_equal(decode(encoded(image), 3, 10).transpose(1, 2, 0), np.asarray(image))


def test_16_bit_grey_is_scaled_rather_than_cut():
    levels = np.array([[0, 257, 40000, 65535]] * 4, np.uint16)
    assert decode(encoded(Image.fromarray(levels)), 1, 4)[0, 0].tolist() == [0, 1, 156, 255]


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (decode(encoded(clear), 3, 4) == 255).all()


def test_the_centre_is_kept_and_photographs_are_turned_upright():
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    assert (decode(encoded(Image.fromarray(pixels)), 3, 4) == 255).all()
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 255  # the top row, which orientation 6 turns to the right edge
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(Image.fromarray(pixels), exif=exif), 1, 4)[0]
    assert turned[:, 3].tolist() == [255] * 4 and turned[:, :3].max() == 0


def test_floating_point_images_are_refused_for_want_of_a_range(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "1.tif")
    with pytest.raises(ValueError, match=r"1\.tif.*8 or 16 bits"):
        list_images(tmp_path).with_shape((1, 4, 4)).read([0])


def test_hidden_files_are_left_out(tmp_path):
    save_images(tmp_path, ["1.png", ".hidden.png", ".cache/2.png"])
    assert list_images(tmp_path).names == ("1.png",)
    assert data_lib_files.EXTENSIONS[0] == ".png"


# The door for score_sde_pytorch code


def door_config(**data):
    config = digits_config(centered=True, **data)
    config.training.batch_size = 64
    config.eval.batch_size = 128
    return config


def test_get_dataset_yields_nhwc_floats_in_0_1_for_ever():
    train, held_out, builder = datasets.get_dataset(door_config())
    assert builder is None and (len(train), len(held_out)) == (24, 5)
    for ds in (train, held_out):
        batches = iter(ds)
        batch = list(itertools.islice(batches, 30))[-1]
        image = batch["image"]._numpy()
        assert image.shape == (64, 8, 8, 1) and image.dtype == np.float32
        assert image.min() >= 0 and image.max() == 1
        assert torch.from_numpy(image).float().permute(0, 3, 1, 2).shape == (64, 1, 8, 8)
        assert batch["label"]._numpy().shape == (64,)


def test_get_dataset_leaves_every_scaling_to_the_caller():
    config = door_config()
    plain = next(iter(datasets.get_dataset(config, True, evaluation=True)[1]))["image"]
    config.data.update(centered=False, logit_alpha=0.05)
    logits = next(iter(datasets.get_dataset(config, True, evaluation=True)[1]))["image"]
    assert np.array_equal(logits, plain)


def test_get_dataset_for_evaluation_sees_every_image_once():
    _, held_out, _ = datasets.get_dataset(door_config(), evaluation=True)
    sizes = [len(batch["image"]) for batch in held_out]
    assert sizes == [128, 128, 44] and len(held_out) == 3
    seen = np.concatenate([batch["image"]._numpy() for batch in held_out])
    images = get_image_sets(door_config())[1].take(range(300))
    assert np.array_equal(seen, (images.permute(0, 2, 3, 1) / 16).numpy())


def test_get_dataset_draws_fresh_noise_in_every_pass():
    _, held_out, _ = datasets.get_dataset(door_config(), True, evaluation=True)
    first, second = (np.concatenate([b["image"] for b in held_out]) for _ in range(2))
    assert first.max() < 1 and not np.array_equal(first, second)
    assert np.array_equal(np.floor(first * 17), np.floor(second * 17))
    again = next(iter(datasets.get_dataset(door_config(), True, evaluation=True)[1]))["image"]
    assert np.array_equal(first[:128], again)


@pytest.mark.parametrize("evaluation", [False, True])
def test_get_dataset_flips_training_images_only(evaluation):
    config = door_config(random_flip=True)
    train, held_out, _ = datasets.get_dataset(config, evaluation=evaluation)
    for ds, image_set, flips in zip(
        (train, held_out), get_image_sets(config), (not evaluation, False), strict=True
    ):
        known = {tuple(row) for row in image_set.take(range(len(image_set))).flatten(1).tolist()}
        images = next(iter(ds))["image"]
        rows = (images.reshape(len(images), -1) * 16).round().astype(int).tolist()
        assert all(tuple(row) in known for row in rows) != flips


def test_get_dataset_takes_an_old_config_and_leaves_it_alone():
    import ml_collections

    config = ml_collections.ConfigDict(
        {
            "data": {
                "dataset": "digits",
                "levels": 17,
                "image_size": 8,
                "num_channels": 1,
                "random_flip": False,
                "centered": True,
            },
            "training": {"batch_size": 8},
            "eval": {"batch_size": 8},
        }
    )
    before = config.to_dict()
    assert next(iter(datasets.get_dataset(config)[0]))["image"].shape == (8, 8, 8, 1)
    assert config.to_dict() == before
