"""Points in the plane: their densities, scores and samples, and the distances between them."""

import math

import numpy as np
import pytest
import torch

import data_lib
import data_lib_points
import evaluation_points
from configs.validation import complete
from data_lib_densities import EqualGaussians, Gaussians, Pixels

SETS = [name for name in data_lib_points.point_sets() if name != "image_density"]
SMOOTH = [name for name in SETS if name != "checkerboard"]


def toy(dataset, **data):
    points = {"num_channels": 2, "image_size": 1, "centered": False, "random_flip": False}
    return complete({"data": {"dataset": dataset, **points, **data}, "device": "cpu"})


def density(name):
    return data_lib_points.get_density(toy(name))


def on_grid(half_side, size):
    return evaluation_points.grid(half_side, size)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (1.0, 0.2), (0.6, 0.5)])
@pytest.mark.parametrize("name", SETS)
def test_a_density_integrates_to_one_at_every_noise_level(name, alpha, sigma):
    x, cell = on_grid(4.0, 128)
    total = torch.exp(density(name).log_density(x, alpha, sigma)).sum() * cell
    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_a_score_is_the_gradient_of_the_log_density(name):
    p = density(name)
    x = (2 * torch.randn(64, 2, dtype=torch.float64)).requires_grad_()
    alpha, sigma = torch.rand(64).double() * 0.7 + 0.3, torch.rand(64).double() * 0.8 + 0.05
    (expected,) = torch.autograd.grad(p.log_density(x, alpha, sigma).sum(), x)
    score = p.score(x, alpha, sigma)
    assert torch.isfinite(score).all()
    assert torch.allclose(score, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SETS)
def test_samples_fall_into_cells_as_often_as_the_density_says(name):
    n, p = 200_000, density(name)
    fine, cell = on_grid(3.0, 120)
    expected = (torch.exp(p.log_density(fine + 1e-9)) * cell).reshape(24, 5, 24, 5).sum((1, 3))
    x = p.sample(n, 5)
    found = np.histogram2d(x[:, 1], x[:, 0], bins=24, range=[[-3, 3]] * 2)[0] / n
    error = torch.sqrt(expected * (1 - expected) / n) + 1e-9
    sure = expected * n > 20
    assert ((torch.from_numpy(found) - expected).abs() / error)[sure].max() < 5


@pytest.mark.parametrize("name", SETS)
def test_the_marginals_are_those_of_noisy_samples(name):
    p, alpha, sigma = density(name), 0.7, 0.5
    x_0 = p.sample(40_000, 1)
    at = torch.tensor([[0.0, 0.0], [1.0, -0.5], [-0.4, 1.1]], dtype=torch.float64)
    kernel = torch.exp(-(torch.cdist(at, alpha * x_0) ** 2) / (2 * sigma**2)) / (
        2 * math.pi * sigma**2
    )
    error = kernel.std(dim=1) / 200
    assert (
        (torch.exp(p.log_density(at, alpha, sigma)) - kernel.mean(dim=1)).abs() < 5 * error
    ).all()


@pytest.mark.parametrize("name", SETS)
def test_points_lie_on_the_canvas_with_a_standard_deviation_near_one(name):
    x = density(name).sample(20_000, 0)
    assert x.std(dim=0).min() > 0.6 and x.std(dim=0).max() < 1.4
    assert (x.abs() < data_lib_points.CANVAS).all(dim=1).double().mean() > 0.98


@pytest.mark.parametrize("name", SETS)
def test_where_only_noise_is_left_the_density_is_that_of_the_noise(name):
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = density(name).log_density(x, 0.0, 1.5)
    exact = torch.distributions.Normal(0.0, 1.5).log_prob(x).sum(dim=1)
    assert torch.allclose(log_p, exact, rtol=0, atol=1e-6)
    assert torch.allclose(density(name).score(x, 0.0, 1.5), -x / 1.5**2, rtol=0, atol=1e-6)


def test_a_batch_may_hold_data_and_noisy_points():
    p, gen = Pixels(torch.eye(2), 1.0), torch.Generator().manual_seed(0)
    x = 2 * torch.rand(40, 2, generator=gen, dtype=torch.float64) - 1
    sigma = torch.tensor([0.0, 0.3], dtype=torch.float64).repeat(20)
    mixed = p.log_density(x, 1.0, sigma)
    assert torch.equal(mixed[::2], p.log_density(x[::2], 1.0, 0.0))
    assert torch.equal(mixed[1::2], p.log_density(x[1::2], 1.0, 0.3))


def test_far_from_all_pixels_density_and_score_are_still_right():
    """There the nearest pixel alone counts, as a Gaussian's would."""
    p = Pixels(torch.ones(1, 1), 0.5)
    x = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    sigma = 0.1
    # ∫_{−½}^{½} N(x; u, σ²) du ≈ N(x; ½, σ²) σ²/(x − ½)
    far = (x[0, 0] - 0.5).item()
    exact = -(far**2) / (2 * sigma**2) + math.log(sigma / far / math.sqrt(2 * math.pi))
    assert p.log_density(x, 1.0, sigma).item() == pytest.approx(exact, rel=1e-6)
    assert p.score(x, 1.0, sigma)[0, 0].item() == pytest.approx(-far / sigma**2, rel=1e-4)


def test_one_gaussian_is_the_closed_form():
    C = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    p = Gaussians([[0.3, -0.2]], C[None])
    x, alpha, sigma = torch.randn(9, 2, dtype=torch.float64), 0.8, 0.4
    m = alpha * torch.tensor([0.3, -0.2], dtype=torch.float64)
    V = alpha**2 * C + sigma**2 * torch.eye(2, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(m, V)
    assert torch.allclose(p.log_density(x, alpha, sigma), exact.log_prob(x), atol=1e-12)
    assert torch.allclose(p.score(x, alpha, sigma), -(x - m) @ torch.linalg.inv(V), atol=1e-12)


def test_equal_gaussians_are_gaussians():
    means = torch.randn(5, 2, dtype=torch.float64)
    a = EqualGaussians(means, 0.3, [1, 2, 3, 4, 5])
    b = Gaussians(means, 0.09 * torch.eye(2).double().expand(5, 2, 2), [1, 2, 3, 4, 5])
    x = torch.randn(20, 2, dtype=torch.float64)
    assert torch.allclose(a.log_density(x, 0.5, 0.7), b.log_density(x, 0.5, 0.7), atol=1e-12)
    assert torch.allclose(a.score(x, 0.5, 0.7), b.score(x, 0.5, 0.7), atol=1e-12)


# --- as a data set --------------------------------------------------------------------------


def test_training_points_are_always_the_same_and_others_are_held_out():
    first, held_out = data_lib.get_image_sets(toy("moons", num_points=500))
    config = toy("moons", num_points=500)
    config.seed = 7
    again, _ = data_lib.get_image_sets(config)
    assert torch.equal(first.points, again.points) and first.shape == (2,)
    assert len(first) == 500 and len(held_out) == data_lib_points.HELD_OUT
    assert not (first.points[:, None] == held_out.points[None, :500]).all(dim=2).any()


def test_points_reach_the_network_as_they_are():
    config = toy("rings", num_points=100)
    points = data_lib.get_image_sets(config)[0]
    batch = next(data_lib.train_batches(points, 32, 0))
    x = data_lib.prepare(batch.images, config, "cpu")
    assert x.shape == (32, 2) and torch.equal(x, batch.images) and batch.labels is None
    assert data_lib.data_shape(config) == (2,)


def test_settings_of_images_are_refused_for_points_with_what_to_set():
    config = toy("moons", centered=True, random_flip=True)
    with pytest.raises(ValueError, match=r"--config\.data\.centered=False"):
        data_lib.get_image_sets(config)


def test_an_unknown_data_set_names_the_points_too():
    with pytest.raises(ValueError, match="swissroll"):
        data_lib.get_image_sets(toy("moonz"))


def test_a_density_of_ones_own_is_a_data_set():
    @data_lib_points.register_points(name="test_dot")
    def dot(data):
        return EqualGaussians([[0.0, 0.0]], 0.5)

    try:
        train, _ = data_lib.get_image_sets(toy("test_dot", num_points=2000))
        assert train.points.std().item() == pytest.approx(0.5, rel=0.05)
    finally:
        del data_lib_points._POINT_SETS["test_dot"]


# --- images as densities --------------------------------------------------------------------


def picture(tmp_path, rows, mode="L"):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.fromarray(np.asarray(rows, np.uint8)).convert(mode).save(path)
    return str(path)


def test_dark_pixels_are_the_data_with_the_top_of_the_picture_on_top(tmp_path):
    path = picture(tmp_path, [[0, 255, 255, 255], [255, 255, 255, 255]])
    p = data_lib_points.get_density(toy("image_density", image=path))
    x = p.sample(1000, 0)  # one pixel of four by two: top left
    assert x[:, 0].min() >= -2 and x[:, 0].max() <= -1
    assert x[:, 1].min() >= 0 and x[:, 1].max() <= 1
    assert p.log_density(x).exp().mean().item() == pytest.approx(1.0)


def test_the_threshold_says_what_is_dark(tmp_path):
    path = picture(tmp_path, [[0, 100], [200, 255]])
    for threshold, dark in ((0.2, 1), (0.5, 2), (0.9, 3)):
        config = toy("image_density", image=path, image_threshold=threshold)
        assert (data_lib_points.get_density(config).weights > 0).sum() == dark


def test_transparent_pixels_are_white(tmp_path):
    from PIL import Image

    path = tmp_path / "clear.png"
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.save(path)
    p = data_lib_points.get_density(toy("image_density", image=str(path)))
    assert (p.weights > 0).tolist() == [[False, True]]


def test_a_missing_or_white_image_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.data.image=assets/ring.png"):
        data_lib_points.get_density(toy("image_density"))
    with pytest.raises(ValueError, match="threshold"):
        data_lib_points.get_density(toy("image_density", image=picture(tmp_path, [[255, 255]])))


# --- distances ------------------------------------------------------------------------------


def test_the_sliced_distance_of_a_shift_is_its_length_over_the_root_of_the_dimension():
    a, d = torch.randn(100, 2), torch.tensor([0.6, -0.8])
    found = evaluation_points.sliced_wasserstein(a, a + d, 10_000)
    assert found == pytest.approx(1 / math.sqrt(2), rel=0.02)
    assert evaluation_points.sliced_wasserstein(a, a[torch.randperm(100)]) == 0


def test_the_sliced_distance_of_two_gaussians_is_the_difference_of_their_widths():
    n = 20_000
    a, b = torch.randn(n, 2), 1.5 * torch.randn(n, 2)  # W₂ along every direction: 0.5
    assert evaluation_points.sliced_wasserstein(a, b, 32) == pytest.approx(0.5, rel=0.04)


def test_the_discrepancy_of_gaussians_is_its_closed_form():
    """With k = exp(−‖x − y‖²/2), x − y is N(−m, 2 I): E k = exp(−‖m‖²/6)/3 in the plane."""
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1500, 2, generator=gen) for _ in range(2))
    m = torch.tensor([0.8, 0.3])
    exact = 2 / 3 * (1 - math.exp(-float(m @ m) / 6))
    assert evaluation_points.mmd2(a, b + m, scales=(1.0,)) == pytest.approx(exact, rel=0.15)
    assert abs(evaluation_points.mmd2(a, b)) < 5e-3
    with pytest.raises(ValueError, match="at least 2 points of each, got 1 and 1500"):
        evaluation_points.mmd2(a[:1], b)


def test_the_divergence_of_gaussians_on_a_grid_is_its_closed_form():
    x, cell = on_grid(6.0, 120)
    p, q = (Gaussians([[m, 0.0]], s**2 * torch.eye(2)[None]) for m, s in ((0.0, 0.7), (0.4, 0.9)))
    found = evaluation_points.kl_on_grid(p.log_density(x), q.log_density(x), cell)
    exact = 2 * math.log(0.9 / 0.7) - 1 + (0.7 / 0.9) ** 2 + 0.4**2 / (2 * 0.9**2)
    assert found["kl"] == pytest.approx(exact, abs=1e-7)
    assert found["mass_p"] == pytest.approx(1) and found["mass_q"] == pytest.approx(1)


def test_true_points_are_as_far_from_the_truth_as_the_truth(monkeypatch):
    monkeypatch.setattr(evaluation_points, "POINTS", 500)
    p = density("moons")
    found = evaluation_points.compare(p.sample(2500, 77), p.sample)
    assert 0.6 < found["sliced_wasserstein_ratio"] < 1.6
    worse = evaluation_points.compare(p.sample(2500, 77) * 1.2, p.sample)
    assert worse["sliced_wasserstein_ratio"] > 2
    assert worse["mmd2"] > 5 * worse["mmd2_se"]


def test_an_image_of_16_bits_is_read_as_dark_as_it_is(tmp_path):
    from PIL import Image

    levels = np.linspace(0, 65535, 64).astype(np.uint16)
    Image.fromarray(np.tile(levels, (64, 1))).save(tmp_path / "ramp.png")
    density = data_lib_points.get_density(
        toy("image_density", image=str(tmp_path / "ramp.png"), image_threshold=0.5)
    )
    assert 0.45 < (density.weights > 0).double().mean() < 0.55


def test_a_picture_is_opened_as_images_of_a_folder_are(tmp_path):
    from PIL import Image

    bars = Image.fromarray(np.repeat([[0, 255, 255, 255]], 2, 0).astype(np.uint8))
    exif = bars.getexif()
    exif[0x112] = 6  # turn right: what is on the left comes to the top
    bars.save(tmp_path / "turned.png", exif=exif)
    dark = data_lib_points.get_density(toy("image_density", image=str(tmp_path / "turned.png")))
    assert (dark.weights > 0).tolist() == [[False] * 2] * 3 + [[True] * 2]  # rows from the bottom
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "numbers.tif")
    with pytest.raises(ValueError, match="no known range"):
        data_lib_points.get_density(toy("image_density", image=str(tmp_path / "numbers.tif")))


def test_a_file_that_is_no_image_is_refused_by_its_name(tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match=r"notes.png.*expected an image file"):
        data_lib_points.get_density(toy("image_density", image=str(tmp_path / "notes.png")))


def test_our_drawings_are_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    density = data_lib_points.get_density(toy("image_density", image="assets/ring.png"))
    assert density.sample(10, 0).shape == (10, 2)
