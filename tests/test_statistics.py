"""Statistics of data sets: every image once, any layout read, the wrong ones refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data_lib
import evaluation
import evaluation_features as features
import evaluation_scales as scales
import evaluation_stats as stats


def pictures(n=50, channels=1, size=4, levels=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, levels, (n, channels, size, size), generator=generator).byte()
    return data_lib.ImageSet("toy/train", images, levels=levels)


PIXELS = features.get_extractor("pixels")


# Of a data set


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_statistics_are_of_every_image_whatever_the_batch(batch_size):
    images = pictures()
    seen = []
    got = stats.dataset_statistics(
        images, PIXELS, batch_size=batch_size, keep_features=20, progress=seen.append
    )
    assert images.images is not None
    mu, sigma = evaluation.gaussian_stats(images.images.flatten(1) / 255)
    np.testing.assert_allclose(got.mu, mu, rtol=1e-6)
    np.testing.assert_allclose(got.sigma, sigma, rtol=1e-5, atol=1e-8)
    assert got.n == got.protocol["count"] == sum(seen) == 50
    assert got.features is not None and got.features.shape == (20, 16)
    again = stats.dataset_statistics(images, PIXELS, batch_size=50, keep_features=20)
    np.testing.assert_allclose(got.mu, again.mu, rtol=1e-12)
    np.testing.assert_array_equal(got.features, again.features)
    assert got.protocol["images_hash"] == again.protocol["images_hash"]


def test_kept_features_are_all_where_that_many_are_asked_for():
    images = pictures(9)
    got = stats.dataset_statistics(images, PIXELS, keep_features=100)
    assert images.images is not None
    np.testing.assert_array_equal(got.features, images.images.flatten(1).float() / 255)
    assert stats.dataset_statistics(images, PIXELS).features is None


def test_the_images_hash_names_a_set_whatever_its_order():
    def named(images):
        image_set = data_lib.ImageSet("toy", images)
        return stats.dataset_statistics(image_set, PIXELS).protocol["images_hash"]

    images = pictures().images
    assert images is not None
    assert named(images) == named(images.flip(0)) != named(images.flip(3))


def test_fid_of_a_set_to_itself_is_below_1e_3_through_a_file(tmp_path):
    import evaluation_metrics as metrics

    images = pictures(300)
    path = stats.write_statistics(tmp_path / "toy", stats.dataset_statistics(images, PIXELS))
    reference = stats.read_statistics(path)
    got = metrics.grouped_moments(PIXELS(images.take(range(300))).pool)
    fid = metrics.frechet_inception_distance(got, reference.mu, reference.sigma)["fid"]
    assert 0 <= fid < 1e-9


def test_images_of_few_levels_are_spread_over_a_byte():
    images = pictures(levels=17)
    got = stats.dataset_statistics(images, PIXELS)
    assert images.images is not None
    np.testing.assert_allclose(got.mu, images.images.flatten(1).double().mean(0) / 16, atol=2e-3)
    assert got.protocol["levels"] == 17


WORKER = """
import sys, torch, numpy as np, data_lib, distributed
import evaluation_features as features, evaluation_stats as stats
images = data_lib.ImageSet("toy", torch.from_numpy(np.load(sys.argv[1])))

def make(name):
    pixels = features.get_extractor("pixels")
    made = stats.dataset_statistics(images, pixels, batch_size=7, keep_features=9, dataset="toy")
    stats.write_statistics(sys.argv[2] + name, made)

with distributed.process_group("cpu"):
    make("")
    distributed.share = lambda n: range(n) if distributed.is_main() else range(n, n)
    make("_uneven")
"""


def test_two_processes_give_the_statistics_of_one(tmp_path):
    """Where they share the images evenly, and where one has none."""
    np.save(tmp_path / "images.npy", pictures().images)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parent.parent

    def start(rank, size, out):
        group = dict(RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        env.update({key: str(value) for key, value in group.items() if size > 1})
        command = [sys.executable, "-c", WORKER, tmp_path / "images.npy", tmp_path / out]
        return subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    for process in [start(0, 1, "one"), start(0, 2, "two"), start(1, 2, "two")]:
        assert process.wait(120) == 0, process.stderr.read() if process.stderr else ""
    one = stats.read_statistics(tmp_path / "one.npz")
    for name in ("two", "two_uneven"):
        two = stats.read_statistics(tmp_path / f"{name}.npz")
        np.testing.assert_allclose(two.mu, one.mu, rtol=1e-12)
        np.testing.assert_allclose(two.sigma, one.sigma, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(two.features, one.features)
        assert (two.n, two.protocol["images_hash"]) == (one.n, one.protocol["images_hash"])


# Files


def test_statistics_come_back_from_a_file_with_their_protocol(tmp_path):
    made = stats.dataset_statistics(pictures(), PIXELS, keep_features=5, dataset="toy")
    path = stats.write_statistics(tmp_path / "new" / "toy.npz", made)
    read = stats.read_statistics(path)
    for name in ("mu", "sigma", "features"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert (read.n, read.hash, read.source) == (50, made.hash, str(path))
    assert read.protocol == {**made.protocol, "sha256": made.hash}
    for key in ("extractor", "weights_sha256", "resize", "input", "versions", "dataset", "split"):
        assert key in read.protocol
    assert read.protocol["resolution"] == [4, 4] and read.protocol["flip"] is False
    assert [p.name for p in path.parent.iterdir()] == ["toy.npz"]


def gaussian(d=3):
    x = np.random.default_rng(0).normal(size=(20, d)).astype(np.float32)
    return x, {"mu": x.mean(0, dtype=float), "sigma": np.cov(x.astype(float), rowvar=False)}


@pytest.mark.parametrize("layout", ["pool_3", "feats", "mu", "guided", "pool_3_images"])
def test_published_layouts_are_read(tmp_path, layout):
    x, moments = gaussian()
    content = {
        "pool_3": {"pool_3": x},
        "pool_3_images": {"pool_3": x.reshape(20, 1, 1, 3)},
        "feats": {"feats": x},
        "mu": moments,
        "guided": {
            **moments,
            "mu_s": np.zeros(7),
            "sigma_s": np.eye(7),
            "arr_0": np.zeros((2, 4, 4, 3), np.uint8),
        },
    }[layout]
    np.savez(tmp_path / "x.npz", **content)
    read = stats.read_statistics(tmp_path / "x.npz")
    np.testing.assert_allclose(read.mu, moments["mu"], atol=1e-6)
    np.testing.assert_allclose(read.sigma, moments["sigma"], atol=1e-6)
    single = layout.startswith(("pool_3", "feats"))
    assert (read.features is not None) == single and read.n == (20 if single else 0)
    assert read.protocol == {}


def test_files_that_are_no_statistics_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError, match=r"--mode stats.*eval\.stats"):
        stats.read_statistics(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"expected a \.npz"):
        stats.read_statistics(path)
    np.savez(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="are images"):
        stats.read_statistics(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"mu \(d,\) and sigma \(d, d\)"):
        stats.read_statistics(path)
    np.savez(path, mu=np.zeros(2), sigma=np.asarray([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="sigma must be symmetric"):
        stats.read_statistics(path)
    np.savez(path, mu=np.full(2, np.nan), sigma=np.eye(2))
    with pytest.raises(ValueError, match="finite"):
        stats.read_statistics(path)


def test_statistics_changed_after_they_were_made_are_refused(tmp_path):
    path = stats.write_statistics(tmp_path / "x", stats.dataset_statistics(pictures(), PIXELS))
    with np.load(path) as file:
        content = dict(file)
    content["mu"][0] += 1e-3
    np.savez(path, **content)
    with pytest.raises(ValueError, match="changed after it was made"):
        stats.read_statistics(path)


# Compatibility


def check(statistics, extractor=PIXELS, resolution=4, channels=1, **more):
    return stats.check_compatible(
        statistics, extractor, resolution=resolution, channels=channels, **more
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 8}, r"expected resolution \[8, 8\], got \[4, 4\]"),
        ({"channels": 3}, "expected image_channels 3, got 1"),
        ({"extractor": features.Extractor("mine", lambda x: x)}, "expected extractor mine"),
    ],
)
def test_statistics_of_another_resolution_or_extractor_are_refused(change, message):
    made = stats.dataset_statistics(pictures(), PIXELS, dataset="toy")
    assert check(made) == check(made, dataset="TOY") == []
    assert check(made, resolution=(4, 4)) == []
    with pytest.raises(ValueError, match=message + r".*--mode stats"):
        check(made, **change)
    assert "of the data set 'toy'" in check(made, dataset="MNIST")[0]


@pytest.mark.parametrize(("key", "value"), [("weights_sha256", "ab"), ("resize", "bicubic")])
def test_statistics_of_other_weights_or_another_convention_are_refused(key, value):
    protocol = {**PIXELS.protocol(), "weights_sha256": "cd", "resolution": [4, 4]}
    extractor = SimpleNamespace(name="pixels", dim=0, protocol=lambda: {**protocol, key: value})
    made = stats.Statistics(np.zeros(2), np.eye(2), 5, protocol)
    with pytest.raises(ValueError, match=f"expected {key} {value}"):
        check(made, extractor)


def test_a_published_file_without_a_protocol_is_accepted_with_a_note_unless_of_another_size():
    published = stats.Statistics(np.zeros(5), np.eye(5), 0, source="cifar10.npz")
    assert "cifar10.npz records no protocol" in check(published)[0]
    inception = SimpleNamespace(name="clean", dim=2048, protocol=dict)
    with pytest.raises(ValueError, match="expected 2048 features of 'clean', got 5"):
        check(published, inception)


def test_the_protocol_in_the_file_is_plain_json(tmp_path):
    path = stats.write_statistics(tmp_path / "x", stats.dataset_statistics(pictures(), PIXELS))
    with np.load(path, allow_pickle=False) as file:
        assert json.loads(str(file["protocol"]))["extractor"] == "pixels"


# Noise scales


def test_the_largest_pairwise_distance_is_brute_forces():
    images = pictures(30).images
    assert images is not None
    x = images.flatten(1).double() / 255
    want = float(torch.cdist(x, x).max())
    assert scales.largest_pairwise_distance(images) == pytest.approx(want, rel=1e-6)
    assert scales.largest_pairwise_distance(x) == pytest.approx(want, rel=1e-6)


def test_the_largest_pairwise_distance_of_known_sets():
    black_and_white = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]).repeat(5, 1, 1, 1)
    assert scales.largest_pairwise_distance(black_and_white) == pytest.approx(192**0.5)
    assert scales.largest_pairwise_distance((16 * black_and_white).byte(), levels=17) == (
        pytest.approx(192**0.5)
    )
    assert scales.largest_pairwise_distance(torch.ones(3, 2)) == 0
    with pytest.raises(ValueError, match="at least 2 images"):
        scales.largest_pairwise_distance(torch.ones(1, 2))


def test_a_subset_gives_a_lower_bound_by_seed():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    whole = scales.largest_pairwise_distance(x)
    part = scales.largest_pairwise_distance(x, subset=50, seed=1)
    assert 0 < part <= whole and part == scales.largest_pairwise_distance(x, subset=50, seed=1)


@pytest.mark.parametrize(
    ("sigma_max", "dimensions", "published"),
    [(50, 3072, 232), (90, 12288, 500), (140, 27648, 788), (190, 49152, 1086), (348, 196608, 2311)],
)
def test_the_number_of_scales_is_within_6_percent_of_ncsnv2s_table(
    sigma_max, dimensions, published
):
    gamma = scales.ncsnv2_ratio(dimensions)
    middle, width = (2 * dimensions) ** 0.5 * (gamma - 1), 3 * gamma

    def phi(x):
        return float(torch.special.ndtr(torch.tensor(x, dtype=torch.float64)))

    assert phi(middle + width) - phi(middle - width) == pytest.approx(0.5, abs=1e-9)
    got = scales.ncsnv2_num_scales(sigma_max, 0.01, dimensions)
    assert got == pytest.approx(published, rel=0.06) and got < published


def test_scales_out_of_range_are_refused():
    with pytest.raises(ValueError, match="use D >= 5"):
        scales.ncsnv2_ratio(2)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        scales.ncsnv2_num_scales(0.01, 50, 3072)
