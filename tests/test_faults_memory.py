"""Evaluations larger than memory: what is kept on disk is put together and read part by part."""

import tracemalloc

import numpy as np
import pytest
from toys_processes import tiny

import run_lib_eval
import run_lib_metrics
import run_lib_shards
from run_lib_results import _rows_of
from run_lib_shards import Rows, Shards

MIB = 2**20
#: Samples of 64 x 64 colour pixels, 96 MiB in all, made in parts of 1.5 MiB.
COUNT, SHAPE, SIZE = 8192, (3, 64, 64), 128


def images(places):
    """Images that differ and compress at once."""
    found = np.zeros((len(places), *SHAPE), np.uint8)
    found[:, 0, 0, :4] = np.asarray(places, "<u4").view(np.uint8).reshape(-1, 4)
    return found


def work(places):
    return {"samples": images(places), "evaluations": np.full(len(places), 7.0)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The shards, and the most memory that making them took."""
    shards = Shards(tmp_path_factory.mktemp("large") / "ckpt_1_samples.npz", {"a": 1})
    tracemalloc.start()
    shards.fill(COUNT, SIZE, work, "samples", "image")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return shards, peak


def test_the_finished_file_is_put_together_a_part_at_a_time(made):
    shards, peak = made
    total = COUNT * np.prod(SHAPE)
    print(f"{total / MIB:.0f} MiB of samples, at most {peak / MIB:.1f} MiB in memory")
    assert total >= 96 * MIB
    assert peak < 24 * MIB
    assert not shards.folder.exists()


def test_what_was_put_together_is_what_was_made(made):
    shards, _ = made
    with np.load(shards.path) as file:  # as anybody reads it
        assert file["samples"].shape == (COUNT, *SHAPE)
        assert np.array_equal(file["samples"][:, 0, 0, :4].copy().view("<u4").ravel(), range(COUNT))
        assert np.array_equal(file["places"], np.arange(COUNT))
        assert (file["evaluations"] == 7).all()


def test_features_and_pictures_read_no_more_than_they_show(made):
    shards, _ = made
    tracemalloc.start()
    with shards.rows("samples") as samples:
        for start in range(0, COUNT, SIZE):
            places = range(start, start + SIZE)
            assert np.array_equal(samples.take(places), images(places))
    first = _rows_of(shards.path.with_name("ckpt_1"), "samples", 300)
    assert first is not None and len(first) == 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * MIB


def test_images_too_large_for_distances_on_pixels_are_shown_and_not_held():
    config = tiny(data__image_size=64, data__num_channels=3)
    evaluation = run_lib_eval.Evaluation.__new__(run_lib_eval.Evaluation)
    evaluation.config = config
    assert evaluation._looked_at(50_000) == run_lib_eval.SHOWN
    evaluation.config = tiny()
    assert evaluation._looked_at(50_000) == run_lib_metrics.METRIC_IMAGES


def test_rows_are_read_in_any_order_and_no_further_than_there_are(tmp_path):
    path = tmp_path / "x.npz"
    x = np.random.RandomState(0).rand(50, 3)
    np.savez_compressed(path, x=x)
    with Rows(path, "x") as rows:
        for start, stop in ((40, 60), (0, 7), (7, 7), (3, 50), (50, 60)):
            assert np.array_equal(rows.take(range(start, stop)), x[start:stop])


def test_a_merge_of_larger_and_smaller_parts_keeps_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lib_shards, "_CHUNK", 40)  # a few rows at a time
    shards = Shards(tmp_path / "x.npz", {})

    def rows(places):
        return {"x": np.array(places)[:, None] * np.ones(3), "y": np.array(places, np.int32)}

    for count, size in ((20, 7), (33, 4), (50, 50)):  # each goes on from the last
        shards.fill(count, size, rows, "x", "row")
        found = shards.read(count)
        assert np.array_equal(found["x"][:, 2], np.arange(count))
        assert np.array_equal(found["y"], np.arange(count))


def test_parts_that_are_all_there_are_put_together_after_a_kill(tmp_path):
    """What a process leaves that is killed while it puts them together."""
    shards = Shards(tmp_path / "x.npz", {})
    for start in (0, 4):
        places = range(start, start + 4)
        shards._write(shards.folder / f"{start:09d}.npz", {"x": np.array(places)}, places)
    shards.fill(8, 4, lambda places: pytest.fail("made again"), "x", "row")
    assert shards.read(8)["x"].tolist() == list(range(8))
    assert not shards.folder.exists()
    shards._write(shards.folder / "000000004.npz", {"x": np.arange(4, 8)}, range(4, 8))
    shards.fill(8, 4, lambda places: pytest.fail("made again"), "x", "row")  # killed in the rmtree
    assert not shards.folder.exists()
