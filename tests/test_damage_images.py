"""One corrupt file among many: named, and left out where that is asked for."""

import errno
import io
import logging
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data_lib
import data_lib_files
from configs.defaults import get_default_configs

N = 300
BAD = (17, 18, 250)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 images of two classes, three of them damaged, each in another way."""
    root = tmp_path_factory.mktemp("images")
    for i in range(N):
        path = root / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i % 256, i // 256, 9)).save(path)
    paths = [root / f"class{i % 2}" / f"{i:03}.png" for i in BAD]
    data = paths[0].read_bytes()
    paths[0].write_bytes(data[: len(data) // 2])
    paths[1].write_bytes(b"")
    flipped = bytearray(paths[2].read_bytes())
    flipped[flipped.index(b"IDAT") + 6] ^= 4
    paths[2].write_bytes(flipped)
    return root


def config(folder, **data):
    made = get_default_configs()
    made.data.update(dataset="folder", path=str(folder), image_size=8, eval_fraction=0.1, **data)
    return made


@pytest.mark.parametrize("memory_gib", [0.0, 2.0])
def test_a_corrupt_file_is_named_with_how_to_go_on(folder, memory_gib):
    with pytest.raises(ValueError, match=r"/(017|018|250)\.png: expected an image.*skip_corrupt"):
        for images in data_lib.get_image_sets(config(folder, memory_gib=memory_gib)):
            images.take(range(len(images)))


@pytest.mark.parametrize("memory_gib", [0.0, 2.0])
def test_corrupt_files_are_left_out_counted_and_named(folder, memory_gib, caplog):
    with caplog.at_level(logging.WARNING, logger="score_sde"):
        sets = data_lib.get_image_sets(config(folder, memory_gib=memory_gib, skip_corrupt=True))
    assert sum(map(len, sets)) == N - len(BAD)
    warned = " ".join(r.message for r in caplog.records)
    assert (
        all(f"{i:03}.png" in warned for i in BAD) and "cannot be decoded and are left out" in warned
    )
    for part in sets:
        batch = part.batch(range(len(part)))
        number = batch.images[:, 0, 0, 0].long() + 256 * batch.images[:, 1, 0, 0].long()
        assert torch.equal(number % 2, batch.labels)
        assert not set(number.tolist()) & set(BAD)


def test_what_is_left_has_one_order_for_any_workers_and_after_a_resume(folder):
    def batches(workers, start=0):
        part = data_lib.get_image_sets(
            config(folder, memory_gib=0.0, skip_corrupt=True, workers=workers)
        )[0]
        made = data_lib.train_batches(part, 32, seed=1, start_step=start)
        found = [next(made).images for _ in range(6 - start)]
        made.close()
        return found

    want = batches(0)
    for got in (batches(2), [*want[:3], *batches(0, start=3)]):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_the_split_does_not_depend_on_what_is_left_out(folder):
    """So that a repaired file goes back to its place, and no other changes sides."""
    some = data_lib.get_image_sets(config(folder, memory_gib=0.0, skip_corrupt=True))
    names = [set(part.files.names) for part in some]
    whole = data_lib_files.split_images(folder, None, 0.1)
    for kept, part in zip(names, whole, strict=True):
        assert kept == {n for n in part.names if int(n[-7:-4]) not in BAD}


def test_a_file_is_not_left_out_for_a_failure_of_the_machine(folder, monkeypatch):
    """Else one process of several, or a resumed run, would train on another set."""

    def content(self, i):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(data_lib_files.Folder, "content", content)
    with pytest.raises(OSError, match="Too many open files"):
        data_lib.get_image_sets(config(folder, skip_corrupt=True))


def test_a_folder_of_nothing_but_damaged_files_is_refused(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"0\.png: expected an image"):
        data_lib.get_image_sets(config(tmp_path, skip_corrupt=True))


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_a_flipped_bit_in_the_pixels_of_a_png_is_found(place):
    """Pillow compares no checksum of the pixels."""
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    data = bytearray(file.getvalue())
    data[data.index(b"IDAT") + 20 + place] ^= 2
    with pytest.raises(ValueError, match="wrong checksum of 'IDAT'"):
        data_lib_files.decode(bytes(data), 3, 16)


@pytest.mark.parametrize("first", ["damaged", "lying"])
def test_a_zip_whose_first_image_is_damaged_names_it(tmp_path, first):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", b"no picture")
    if first == "lying":
        data = bytearray(path.read_bytes())
        data[26:28] = b"\xff\xff"  # the length of the first name, in its local header
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"images\.zip/0\.png: expected an image"):
        data_lib_files.list_images(path).read([0, 1, 2])


@pytest.mark.slow
def test_a_damaged_lmdb_is_refused_or_read_and_never_ends_the_process(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    import random

    whole = tmp_path / "whole"
    environment = lmdb.open(str(whole), map_size=2**22)
    pictures = []
    with environment.begin(write=True) as transaction:
        for i in range(40):
            file = io.BytesIO()
            pixels = np.random.RandomState(i).randint(0, 256, (8 + i, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(file, "PNG")
            pictures.append(file.getvalue())
            transaction.put(f"{i:03}".encode(), file.getvalue())
    environment.close()
    good, dice = (whole / "data.mdb").read_bytes(), random.Random(0)
    counted = {"refused": 0, "loaded": 0}
    for number in range(60):
        folder = tmp_path / f"lmdb{number}"
        folder.mkdir()
        data = bytearray(good)
        if number % 3:
            for _ in range(number % 7 + 1):
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        else:
            data = data[: dice.randrange(len(data))]
        (folder / "data.mdb").write_bytes(data)
        try:
            files = data_lib_files.list_images(folder).with_shape((3, 8, 8))
            files.read(range(len(files)))
            counted["loaded"] += 1
        except (ValueError, FileNotFoundError) as error:
            assert f"lmdb{number}" in str(error)
            counted["refused"] += 1
    print(counted)
    assert counted["refused"] > 20


def idx(array):
    """MNIST's format: a magic number, the shape, the bytes."""
    head = (0x800 + array.ndim).to_bytes(4, "big")
    return head + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize("how", ["cut", "empty", "magic", "labels"])
def test_damaged_files_of_a_named_data_set_are_named(tmp_path, how):
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for part in ("train", "t10k"):
        pixels = rng.randint(0, 256, (6, 28, 28)).astype(np.uint8)
        labels = np.arange(6 - (how == "labels"), dtype=np.uint8)
        images = idx(pixels)
        images = {"cut": images[:3000], "empty": b"", "magic": b"\xff" + images[1:]}.get(
            how, images
        )
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    settings = get_default_configs()
    settings.data.update(dataset="MNIST", root=str(tmp_path), image_size=28, num_channels=1)
    with pytest.raises(FileNotFoundError, match=r"MNIST: expected .*train-images-idx3-ubyte, got"):
        data_lib.get_image_sets(settings)
