"""Data at scale: order without replay, kept indices, zips and lmdbs, workers, draws per image."""

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import data_lib_batches
import data_lib_index
import data_lib_sources
from configs.validation import complete
from data_lib import ImageSet, eval_batches, get_image_sets, prepare, train_batches
from data_lib_batches import Shuffled, automatic_workers
from data_lib_files import list_images
from data_lib_index import Names, Watched
from distributed import share
from randomness import Draws

ROOT = Path(__file__).resolve().parent.parent
SIZE = 6


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the indices of the person who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make_config(**data) -> Any:
    return complete({"data": {"image_size": SIZE, **data}})


def encoded(i: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


def expected_images(n: int) -> torch.Tensor:
    pixels = [np.asarray(Image.open(io.BytesIO(encoded(i)))) for i in range(n)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def make_folder(path: Path, n: int) -> Path:
    for i in range(n):
        file = path / "ab"[i % 2] / f"{i // 2:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i))
    return path


def make_zip(path: Path, n: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for i in range(n):
            archive.writestr(f"{'ab'[i % 2]}/{i // 2:04}.png", encoded(i))
    return path


def make_lmdb(path: Path, n: int, first: int = 0) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="pip install lmdb")
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=2**22) as environment, environment.begin(write=True) as all_:
        for i in range(n):
            key = bytes(np.random.default_rng(i + first).integers(0, 256, 20, dtype=np.uint8))
            all_.put(key, encoded(i + first, "WEBP" if i % 2 else "PNG"))
    return path


SOURCES = {
    "folder": lambda path, n: make_folder(path / "images", n),
    "zip": lambda path, n: make_zip(path / "images.zip", n),
    "lmdb": lambda path, n: make_lmdb(path / "images_lmdb", n),
}


def lazy_set(path: Path, **options) -> ImageSet:
    files = list_images(path).with_shape((3, SIZE, SIZE))
    return ImageSet("lazy", None, torch.arange(len(files)), files=files, **options)


def first(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def equal(these, those) -> bool:
    return len(these) == len(those) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(these, those, strict=True)
    )


def numbered(n: int) -> ImageSet:
    images = torch.arange(n).byte().view(n, 1, 1, 1).expand(n, 3, SIZE, SIZE).contiguous()
    return ImageSet("numbered", images, torch.arange(n))


# Order


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [5, 8, 23])
def test_the_parts_of_all_processes_make_up_the_batch_of_one(processes, batch_size):
    whole = first(train_batches(numbered(10), batch_size, 3), 9)
    parts = [
        first(
            train_batches(numbered(10), batch_size, 3, part=share(batch_size, processes, rank)), 9
        )
        for rank in range(processes)
    ]
    for batch, *rows in zip(whole, *parts, strict=True):
        assert torch.equal(batch.labels, torch.cat([row.labels for row in rows]))
        assert torch.equal(batch.images, torch.cat([row.images for row in rows]))


def test_rows_that_a_batch_does_not_have_are_refused():
    for part in (range(4, 4), range(2, 5), range(-1, 2)):
        with pytest.raises(ValueError, match=r"rows of a batch of 4.*at most 4 processes"):
            train_batches(numbered(10), 4, 0, part=part)


def test_any_step_of_a_large_set_is_reached_by_one_permutation_of_its_epoch(monkeypatch):
    order, drawn = Shuffled(200_000, 128, 7), []
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or draw(seed))
    places = order(10**9)
    epoch, place = divmod(10**9 * 128, 200_000)
    assert drawn == [(7, epoch)]
    assert np.array_equal(places, draw((7, epoch)).permutation(200_000)[place : place + 128])


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_evaluation_shares_hold_every_image_once(processes):
    seen = [
        batch.labels.tolist()
        for rank in range(processes)
        for batch in eval_batches(numbered(10), 4, part=share(10, processes, rank))
    ]
    assert list(itertools.chain(*seen)) == list(range(10))
    chosen = torch.tensor([7, 1, 1])
    assert [b.labels.tolist() for b in eval_batches(numbered(10), 2, part=chosen)] == [[7, 1], [1]]


# Draws


def draws(first_row=0, count=8, seed=1) -> Draws:
    return Draws(seed, 5, first_row, count, 8)


def prepared(x, numbers, device=None):
    config = make_config()
    return prepare(x, config, device, flip=True, dequantize=True, draws=numbers)


def test_flips_and_dequantisation_belong_to_the_image_not_to_its_batch():
    x = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    whole = prepared(x, draws())
    for parts in (2, 3, 8):
        rows = [share(8, parts, rank) for rank in range(parts)]
        split = [prepared(x[r.start : r.stop], draws(r.start, len(r))) for r in rows]
        micro = [prepared(x[r.start : r.stop], draws().rows(r.start, r.stop)) for r in rows]
        assert torch.equal(torch.cat(split), whole) and torch.equal(torch.cat(micro), whole)
    torch.rand(3)
    assert torch.equal(prepared(x, draws()), whole)
    assert not torch.equal(prepared(x, draws(seed=2)), whole)


def test_draws_leave_pixels_on_their_levels_and_flip_half_of_the_images():
    numbers = Draws(0, 0, 0, 400)
    x = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(400, 3, 2, 2)
    y = prepare(x, make_config(), flip=True, dequantize=True, draws=numbers)
    levels = (y * 256).floor()
    flipped = levels[:, 0, 0, 0] == 255
    assert 150 < flipped.sum() < 250
    assert torch.equal(levels, torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x).float())
    noise = y * 256 - levels
    assert abs(noise.mean() - 0.5) < 0.02 and abs(noise.std() - 12**-0.5) < 0.01


def test_without_draws_the_global_generator_gives_the_flips_and_then_the_noise():
    x = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    torch.manual_seed(3)
    y = prepare(x, make_config(), flip=True, dequantize=True)
    torch.manual_seed(3)
    mirrored, noise = torch.rand(8) < 0.5, torch.rand(8, 3, 4, 4)
    upright = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
    assert torch.equal(y, (upright + noise) / 256)


def test_draws_of_another_number_of_images_are_refused():
    x = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"draws of 4 images .* got draws of 8"):
        prepare(x, make_config(), draws=draws())
    with pytest.raises(ValueError, match="no generator beside them"):
        prepare(x, make_config(), draws=draws(0, 4), generator=torch.Generator())


# Names and indices


def test_a_name_costs_its_letters_and_a_few_bytes():
    names = [f"shard_{i % 100:03}/img{i:08}.png" for i in range(20_000)]
    compact = Names.of(names)
    assert len(pickle.dumps(compact)) < 20_000 * (len("img00000000.png") + 13)
    assert [compact[i] for i in (0, 1, 777, 19_999)] == [names[i] for i in (0, 1, 777, 19_999)]


def test_names_of_any_letters_come_back():
    names = ["é/ü ñ.png", "日本.png", "a/b/\udcff.png", "x.png", "a/b/c.png", ""]
    compact = Names.of(names)
    assert [compact[i] for i in range(len(compact))] == names


def old(path: Path) -> Path:
    """Give a folder's tree, or a file, a time long past, so that its index may be kept."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(each, (1e9, 1e9))
    return path


@pytest.fixture
def looks(monkeypatch):
    """Count how often something is searched, however small; every index is worth keeping."""
    seen = []
    monkeypatch.setattr(data_lib_index, "KEEP_FROM", 1)
    for kind in (data_lib_sources.Folder, data_lib_sources.Zip, data_lib_sources.Lmdb):

        def find(self, watched, _find=kind._find):
            seen.append(self.path)
            return _find(self, watched)

        monkeypatch.setattr(kind, "_find", find)
    return seen


@pytest.mark.parametrize("kind", SOURCES)
def test_an_index_is_kept_and_read_again(kind, looks, tmp_path):
    path = SOURCES[kind](tmp_path, 7)
    old(path)
    before, again = list_images(path), list_images(path)
    assert len(looks) == 1 and again.names == before.names and again.base == before.base
    assert torch.equal(again.read(range(7)), before.read(range(7)))


def test_a_kept_index_keeps_names_of_any_letters(tmp_path):
    names = ["a\0b/x\n.png", "c/\udcff.png", "\0/é.png"]  # keys of an lmdb may be so
    index, watched = data_lib_index.Index(Names.of(names), 3), Watched()
    (tmp_path / "data").mkdir()
    watched.add(tmp_path / "data")
    data_lib_index._keep(tmp_path / "index.npz", index, watched)
    kept = data_lib_index._load(tmp_path / "index.npz")
    assert kept is not None and [kept.names[i] for i in range(3)] == names and not kept.columns


CHANGES = {
    "a file is added": lambda path: (path / "a/new.png").write_bytes(encoded(9)),
    "a file is removed": lambda path: (path / "b/0000.png").unlink(),
    "a file is renamed": lambda path: (path / "a/0000.png").rename(path / "a/zero.png"),
    "a folder is added": lambda path: make_folder(path / "c", 2),
    "a folder is renamed": lambda path: (path / "a").rename(path / "z"),
    "a file moves": lambda path: (path / "a/0000.png").rename(path / "b/moved.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_is_searched_again_when(change, looks, tmp_path):
    path = old(make_folder(tmp_path / "images", 6))
    before = list_images(path).names
    CHANGES[change](path)
    after = list_images(path).names
    assert len(looks) == 2 and after != before
    assert set(after) == {p.relative_to(path).as_posix() for p in path.rglob("*.png")}


def test_a_file_overwritten_in_place_needs_no_new_index_and_is_read_anew(looks, tmp_path):
    path = old(make_folder(tmp_path / "images", 2))
    list_images(path)
    (path / "a/0000.png").write_bytes(encoded(1))
    files = list_images(path).with_shape((3, SIZE, SIZE))
    assert len(looks) == 1 and torch.equal(files.read([0]), expected_images(2)[1:])


def test_a_zip_made_again_is_searched_again(looks, tmp_path):
    path = old(make_zip(tmp_path / "images.zip", 4))
    assert len(list_images(path)) == 4
    make_zip(path, 6)
    assert len(list_images(path)) == 6 and len(looks) == 2


def test_an_index_of_something_that_just_changed_is_not_kept(looks, tmp_path):
    path = make_folder(tmp_path / "images", 2)
    list_images(path), list_images(path)
    assert len(looks) == 2


def test_a_damaged_index_is_made_again(looks, tmp_path):
    path = old(make_folder(tmp_path / "images", 4))
    list_images(path)
    [kept] = data_lib_index.cache_folder().glob("*.npz")
    for damage in (b"", kept.read_bytes()[:200], b"nothing at all"):
        kept.write_bytes(damage)
        assert len(list_images(path)) == 4
    assert len(looks) == 4


def test_a_cache_that_cannot_be_written_costs_no_more_than_the_search(looks, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = old(make_folder(tmp_path / "images", 4))
    assert len(list_images(path)) == len(list_images(path)) == 4 and len(looks) == 2


def test_the_index_of_a_small_folder_is_not_worth_keeping(tmp_path):
    list_images(old(make_folder(tmp_path / "images", 4)))
    assert not data_lib_index.cache_folder().exists()


def test_a_folder_linked_into_itself_is_entered_once(tmp_path):
    path = make_folder(tmp_path / "images", 4)
    (path / "a/loop").symlink_to(path, target_is_directory=True)
    (path / "twin").symlink_to(path / "b", target_is_directory=True)
    assert [name.split("/")[0] for name in list_images(path).names] == [*"aabb", "twin", "twin"]


def big_folder(path: Path, n: int) -> Path:
    path.mkdir()
    for i in range(n):
        os.close(os.open(f"{path}/{i:08}.png", os.O_CREAT | os.O_WRONLY))
    os.utime(path, (1e9, 1e9))
    return path


@pytest.mark.parametrize("n", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_large_flat_folder_starts_from_its_kept_index(n, tmp_path, looks):
    path = big_folder(tmp_path / "images", n)
    before = list_images(path)
    started = time.perf_counter()
    after = list_images(path)
    seconds = time.perf_counter() - started
    print(f"{n:,} files: {seconds:.3f} s")
    assert len(looks) == 1 and len(after) == n == len(before)
    assert after.source.index.names[n - 1] == f"{n - 1:08}.png"


# Zips


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("pread", [True, False])
def test_files_of_a_zip_are_read_by_their_place(method, pread, tmp_path, monkeypatch):
    if not pread:
        monkeypatch.delattr(os, "pread")
    source = list_images(make_zip(tmp_path / "images.zip", 6, method)).source
    for i in range(6):  # sorted by name: a/0000, a/0001, ..., b/0000, ...
        assert source.content(i) == encoded(2 * (i % 3) + i // 3)


def test_a_zip_of_many_files_has_its_own_large_directory(tmp_path):
    path, n = tmp_path / "many.zip", 70_000  # beyond 65,535 the directory is a Zip64 one
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(n):
            archive.writestr(zipfile.ZipInfo(f"{i:05}.png"), b"%d" % i)
    source = list_images(path).source
    assert len(source.index.names) == n
    assert [source.content(i) for i in (0, 65_536, n - 1)] == [b"0", b"65536", b"%d" % (n - 1)]


def test_a_damaged_part_of_a_zip_is_named(tmp_path):
    path = make_zip(tmp_path / "images.zip", 4, zipfile.ZIP_STORED)
    content = path.read_bytes()
    path.write_bytes(content.replace(encoded(2)[-20:], bytes(20)))
    with pytest.raises(ValueError, match=r"images\.zip/a/0001\.png: .*wrong checksum"):
        list_images(path).read(range(4))


def test_a_zip_of_another_compression_is_refused_at_once(tmp_path):
    path = make_zip(tmp_path / "images.zip", 2, zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match=r"a/0000\.png, which is encrypted or .* method 14"):
        list_images(path)


# Lmdb


def test_an_lmdb_gives_its_values_in_the_order_of_its_keys(tmp_path):
    path = make_lmdb(tmp_path / "some_lmdb", 9)
    files = list_images(path).with_shape((3, SIZE, SIZE))
    keys = [bytes(np.random.default_rng(i).integers(0, 256, 20, dtype=np.uint8)) for i in range(9)]
    order = sorted(range(9), key=keys.__getitem__)
    assert [name.encode("utf-8", "surrogateescape") for name in files.names] == sorted(keys)
    assert torch.equal(files.read(range(9)), expected_images(9)[order])
    assert len(list_images(path / "data.mdb")) == 9


@pytest.mark.parametrize("points_at", ["the set", "the folder of both"])
def test_lsun_takes_the_lmdbs_by_the_names_that_its_authors_give(points_at, tmp_path):
    train = make_lmdb(tmp_path / "church_outdoor_train_lmdb", 7)
    make_lmdb(tmp_path / "church_outdoor_val_lmdb", 3, first=7)
    path = train if points_at == "the set" else tmp_path
    config = make_config(dataset="LSUN", category="church_outdoor", path=str(path))
    sets = get_image_sets(config)
    assert [len(part) for part in sets] == [7, 3]
    known = {tuple(image.flatten().tolist()) for image in expected_images(10)[7:]}
    assert {tuple(image.flatten().tolist()) for image in sets[1].take(range(3))} == known


def test_lsun_without_a_validation_part_holds_out_a_fraction(tmp_path):
    path = make_lmdb(tmp_path / "bedroom_train_lmdb", 10)
    sets = get_image_sets(make_config(dataset="LSUN", path=str(path), eval_fraction=0.2))
    assert [len(part) for part in sets] == [8, 2]


def test_a_missing_lmdb_package_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="pip install lmdb"):
        list_images(tmp_path)


def test_a_damaged_lmdb_is_reported(tmp_path):
    pytest.importorskip("lmdb", reason="pip install lmdb")
    (tmp_path / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match="not a readable lmdb"):
        list_images(tmp_path)


# Workers


@pytest.mark.parametrize("kind", SOURCES)
def test_who_decodes_does_not_change_the_batches(kind, tmp_path):
    image_set = lazy_set(SOURCES[kind](tmp_path, 11))
    assert image_set.files is not None
    held = ImageSet("held", image_set.files.read(range(11)), torch.arange(11))
    expected = first(train_batches(held, 4, 3, 5), 6)
    for workers in (0, 1, 2):
        assert equal(first(train_batches(image_set, 4, 3, 5, workers=workers), 6), expected)
        part = first(train_batches(image_set, 4, 3, 5, part=range(1, 3), workers=workers), 6)
        assert all(torch.equal(p.images, e.images[1:3]) for p, e in zip(part, expected))
        assert equal(list(eval_batches(image_set, 4, workers=workers)), list(eval_batches(held, 4)))


@pytest.mark.parametrize("kind", SOURCES)
def test_files_travel_to_processes_that_do_not_fork(kind, tmp_path):
    files = list_images(SOURCES[kind](tmp_path, 5)).with_shape((3, SIZE, SIZE))
    expected = files.read(range(5))
    assert torch.equal(pickle.loads(pickle.dumps(files)).read(range(5)), expected)


def test_the_image_set_says_who_decodes(tmp_path, monkeypatch):
    counts = []
    decode = data_lib_batches._by_processes
    monkeypatch.setattr(
        data_lib_batches, "_by_processes", lambda *a: counts.append(a[1]) or decode(*a)
    )
    path = make_folder(tmp_path / "images", 8)
    for workers in (0, 1, 2, -1):
        config = make_config(dataset="folder", path=str(path), memory_gib=0.0, workers=workers)
        first(train_batches(get_image_sets(config)[0], 4, 0), 2)
    assert counts == [1, 2, automatic_workers()] and 1 <= automatic_workers() <= 8


def test_images_in_memory_need_nobody(tmp_path, monkeypatch):
    config = make_config(dataset="folder", path=str(make_folder(tmp_path, 8)), workers=4)
    monkeypatch.delattr(data_lib_batches, "_by_processes")
    monkeypatch.delattr(data_lib_batches, "_by_threads")
    train, held_out = get_image_sets(config)
    assert train.images is not None and len(first(train_batches(train, 4, 0, workers=4), 3)) == 3
    assert len(list(eval_batches(held_out, 4, workers=4))) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_draws_nothing_from_the_global_generator(workers, tmp_path):
    before = torch.get_rng_state()
    first(train_batches(lazy_set(make_folder(tmp_path, 8)), 4, 0, workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named_when_it_is_reached(workers, tmp_path):
    path = make_folder(tmp_path / "images", 8)
    (path / "b/0002.png").write_bytes(b"no image")
    batches = eval_batches(lazy_set(path), 4, workers=workers)
    assert len(next(batches).images) == 4
    with pytest.raises(ValueError, match=r"b/0002\.png: expected an image.*replace or delete"):
        next(batches)


def test_several_damaged_images_are_named_together(tmp_path):
    path = make_folder(tmp_path / "images", 8)
    for name in ("a/0001", "b/0000", "b/0003"):
        (path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a/0001.*likewise b/0000\.png, b/0003\.png"):
        list_images(path).read(range(8))


def test_a_set_read_batch_by_batch_is_tried_before_the_work_begins(tmp_path):
    path = make_folder(tmp_path / "images", 8)
    for file in path.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be decoded"):
        get_image_sets(make_config(dataset="folder", path=str(path), memory_gib=0.0))


def test_workers_end_with_their_batches(tmp_path):
    batches = train_batches(lazy_set(make_folder(tmp_path, 8)), 4, 0, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_decoding_a_batch_takes_no_lock_that_processes_share(tmp_path, monkeypatch):
    files = list_images(make_folder(tmp_path, 4)).with_shape((3, SIZE, SIZE))
    monkeypatch.setitem(sys.modules, "tqdm", None)  # its lock outlives a worker killed inside it
    assert torch.equal(files.read(range(4), threads=1), files.read(range(4), threads=2))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS"])
def test_the_loss_of_a_worker_comes_with_a_remedy(name, tmp_path):
    batches = train_batches(lazy_set(make_folder(tmp_path, 8)), 4, 0, workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, getattr(signal, name))
    with pytest.raises(ChildProcessError, match=r"one of them was killed.*config\.data\.workers=0"):
        first(batches, 9)  # the next ones are here already
    assert not multiprocessing.active_children()


PROGRAM = """
import multiprocessing, subprocess, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_data_scale as t
from pathlib import Path
multiprocessing.set_start_method({method!r})
batches = t.train_batches(t.lazy_set(Path({path!r})), 4, 0, workers=2)
next(batches)
workers = [str(child.pid) for child in multiprocessing.active_children()]
for name in {signals}:
    subprocess.run(["kill", f"-{{name}}", *workers], check=True)
print(len(t.first(batches, 60)), flush=True)
{end}
"""


def run_program(tmp_path: Path, signals: tuple[str, ...], end: str = "", method="fork") -> Any:
    """Signal the workers of a program that trains, as another program; a hang is a failure."""
    options = dict(
        root=str(ROOT), tests=str(ROOT / "tests"), signals=signals, end=end, method=method
    )
    program = PROGRAM.format(path=str(make_folder(tmp_path / "images", 8)), **options)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )


def test_a_worker_that_is_killed_ends_the_run_with_its_message(tmp_path):
    result = run_program(tmp_path, ("KILL",))
    assert result.returncode == 1
    assert "ChildProcessError" in result.stderr and "one of them was killed" in result.stderr


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("end", "method"),
    [
        ("raise KeyError", "fork"),
        slow("", "fork"),
        slow("sys.exit(3)", "fork"),
        slow("raise KeyError", "forkserver"),
        slow("", "spawn"),
    ],
)
def test_signals_to_the_group_leave_workers_to_the_trainer_and_they_end_with_it(
    end, method, tmp_path
):
    result = run_program(tmp_path, ("TERM", "INT"), end, method)
    assert result.stdout.split() == ["60"], result.stderr
    assert result.returncode == {"": 0, "sys.exit(3)": 3, "raise KeyError": 1}[end]


# Configuration


def test_workers_and_memory_are_checked():
    with pytest.raises(ValueError, match=r"data\.workers: expected a number of processes"):
        make_config(workers=-2)
    with pytest.raises(ValueError, match=r"data\.memory_gib"):
        make_config(memory_gib=-1.0)
