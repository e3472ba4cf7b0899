"""`--mode stats`: reference statistics of a configuration's data."""

from pathlib import Path

import numpy as np
import pytest
import toys_processes
from PIL import Image
from toys_processes import tiny

import data_lib
import evaluation_stats
import run_lib
import run_lib_stats


def pixels(path, **changes):
    return tiny(eval__extractor="pixels", eval__stats=str(path), **changes)


def test_statistics_are_those_of_all_training_images(tmp_path):
    config = pixels(tmp_path / "digits.npz", eval__stats_features=50)
    path = run_lib.statistics(config)
    made = evaluation_stats.read_statistics(path)
    train_set, _ = data_lib.get_image_sets(config)
    x = train_set.take(range(len(train_set))).flatten(1).double().numpy()
    x = np.round(x * (255 / 16)) / 255
    np.testing.assert_allclose(made.mu, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(made.sigma, np.cov(x.T), atol=1e-6)
    assert (made.n, made.features.shape) == (1497, (50, 64))
    expected = {"dataset": "digits", "resolution": [8, 8], "flip": False, "extractor": "pixels"}
    assert made.protocol.items() >= expected.items()


def _statistics(path):
    run_lib.statistics(pixels(path))


def test_statistics_do_not_depend_on_the_number_of_processes(tmp_path):
    _statistics(tmp_path / "one.npz")
    toys_processes.run(2, _statistics, tmp_path / "two.npz")
    one, two = (evaluation_stats.read_statistics(tmp_path / f"{n}.npz") for n in ("one", "two"))
    np.testing.assert_allclose(one.sigma, two.sigma, rtol=1e-9, atol=1e-12)
    assert np.array_equal(one.features, two.features)
    assert one.protocol["images_hash"] == two.protocol["images_hash"]


def test_a_folder_has_statistics_under_its_own_name(tmp_path, monkeypatch):
    folder = tmp_path / "Photos"
    folder.mkdir()
    for i in range(12):
        pixel = np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixel).save(folder / f"{i}.png")
    changes = {"data__dataset": "folder", "data__path": str(folder), "data__num_channels": 3}
    config = tiny(eval__extractor="pixels", data__levels=256, data__workers=0, **changes)
    assert run_lib_stats.statistics_path(config).parts[-3:] == (
        "assets",
        "stats",
        "photos_8_pixels.npz",
    )
    changes["data__path"] = str(folder / "train")  # a part of the set
    part = tiny(eval__extractor="pixels", data__levels=256, **changes)
    assert run_lib_stats.statistics_path(part) == run_lib_stats.statistics_path(config)
    config.eval.stats = str(tmp_path / "out")
    assert run_lib.statistics(config) == tmp_path / "out.npz"


def test_statistics_of_another_folder_of_the_same_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lib_stats, "__file__", str(tmp_path / "run_lib_stats.py"))
    (tmp_path / "assets").mkdir()
    changes = {"eval__extractor": "pixels", "data__levels": 256, "data__workers": 0}
    first, second = (
        tiny(data__dataset="folder", data__path=str(tmp_path / name / "own"), **changes)
        for name in ("a", "b")
    )
    for config in (first, second):
        folder = Path(config.data.path) / "train"
        folder.mkdir(parents=True)
        for i in range(4):
            pixel = np.random.RandomState(i).randint(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(pixel).save(folder / f"{i}.png")
        (folder / "0.png").rename(folder.parent / "test.png")
    path = run_lib.statistics(first)
    assert path == tmp_path / "assets" / "stats" / "own_8_pixels.npz"
    assert run_lib.statistics(first) == path  # made again
    first.data.path += "/train"  # a part of it
    assert run_lib_stats.statistics_path(first) == path
    with pytest.raises(ValueError, match=r"images in .*/b/own, got those of .*/a/own.*eval\.stats"):
        run_lib.statistics(second)
    second.eval.stats = str(tmp_path / "second.npz")
    assert run_lib.statistics(second) == tmp_path / "second.npz"
    path.write_bytes(b"damaged")  # is of nobody
    second.eval.stats = ""
    assert run_lib.statistics(second) == path


def test_the_data_advise_the_largest_noise(tmp_path, capsys):
    config = pixels(tmp_path / "digits.npz")
    run_lib.statistics(config)
    said = capsys.readouterr().out
    train_set, _ = data_lib.get_image_sets(config)
    x = train_set.take(range(len(train_set))).flatten(1).double() / 16
    largest = float((x[:, None] - x[None]).norm(dim=2).max()) * (2 if config.data.centered else 1)
    assert f"largest distance of 1,497 training images: {largest:.3g}" in said
    assert "model.num_scales" in said


def test_missing_weights_are_said_before_the_work(tmp_path):
    config = tiny(eval__stats=str(tmp_path / "x.npz"), eval__extractor="legacy_tensorflow")
    with pytest.raises(FileNotFoundError, match=r"eval\.inception_path"):
        run_lib.statistics(config)
