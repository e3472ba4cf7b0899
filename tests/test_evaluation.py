"""Evaluation against closed forms, brute force and simulation."""

import math

import numpy as np
import pytest
import torch

import evaluation


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def random_spd(d, seed):
    a = normal(d, 2 * d, seed=seed)
    return a @ a.T / (2 * d)


# Fréchet distance


def test_frechet_distance_of_a_shift_is_its_square():
    sigma = random_spd(5, 0)
    shift = torch.tensor([3.0, 0, 4, 0, 0])
    assert evaluation.frechet_distance(torch.zeros(5), sigma, shift, sigma) == pytest.approx(25)


def test_frechet_distance_of_commuting_covariances_is_closed_form():
    basis = torch.linalg.qr(normal(6, 6)).Q
    s1, s2 = uniform(6, seed=1).double(), uniform(6, seed=2).double()
    got = evaluation.frechet_distance(
        torch.zeros(6), basis * s1**2 @ basis.T, torch.zeros(6), basis * s2**2 @ basis.T
    )
    assert got == pytest.approx(float((s1 - s2).square().sum()), abs=1e-12)


@pytest.mark.parametrize("d", [1, 7, 64])
def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product(d):
    s1, s2, mu1, mu2 = random_spd(d, 1), random_spd(d, 2), normal(d, seed=3), normal(d, seed=4)
    cross = np.sqrt(np.linalg.eigvals((s1 @ s2).numpy())).real.sum()  # tr √(Σ₁Σ₂)
    want = float((mu1 - mu2).square().sum() + s1.trace() + s2.trace()) - 2 * cross
    assert evaluation.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(want, rel=1e-8)
    assert evaluation.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(want, rel=1e-8)
    arrays = [x.numpy() for x in (mu1, s1, mu2, s2)]
    assert evaluation.frechet_distance(*arrays) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("n", [20, 300])
def test_frechet_distance_of_a_set_to_itself_is_zero_even_if_singular(n):
    x = normal(n, 64)
    assert 0 <= evaluation.frechet_distance_from_samples(x, x) < 1e-9


def test_frechet_distance_refuses_what_does_not_match():
    mu, sigma = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match="sigma2 must have shape"):
        evaluation.frechet_distance(mu, sigma, mu, torch.eye(4))
    with pytest.raises(ValueError, match="mu2 must be finite"):
        evaluation.frechet_distance(mu, sigma, mu + math.nan, sigma)
    with pytest.raises(ValueError, match="symmetric"):
        evaluation.frechet_distance(mu, sigma, mu, sigma + torch.ones(3, 3).triu(1))


def test_gaussian_stats_are_numpys_mean_and_unbiased_covariance_in_float64():
    x = 1000 + normal(50, 4).float()
    mu, sigma = evaluation.gaussian_stats(x)
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(mu, x.double().mean(0))
    np.testing.assert_allclose(sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)
    with pytest.raises(ValueError, match="flatten"):
        evaluation.gaussian_stats(torch.zeros(3, 1, 2, 2))


# Nearest neighbours


def test_nearest_neighbors_are_exact_and_do_not_depend_on_the_chunk():
    q, r = normal(23, 1, 3, 3), normal(40, 1, 3, 3, seed=1)
    brute = (q.flatten(1).unsqueeze(1) - r.flatten(1).unsqueeze(0)).norm(dim=2)
    want = brute.sort(dim=1)
    for chunk in (None, 1, 7, 100):
        distances, indices = evaluation.nearest_neighbors(q, r, k=3, chunk_size=chunk)
        torch.testing.assert_close(distances, want.values[:, :3])
        assert torch.equal(indices, want.indices[:, :3])


def test_nearest_neighbors_of_copies_are_at_distance_zero():
    x = 1e4 + uniform(30, 50)
    distances, indices = evaluation.nearest_neighbors(x, x.flip(0))
    assert (distances == 0).all()
    assert torch.equal(indices[:, 0], torch.arange(29, -1, -1))


def test_nearest_neighbors_refuse_other_dimensions_and_k():
    with pytest.raises(ValueError, match="one dimension"):
        evaluation.nearest_neighbors(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="k must be"):
        evaluation.nearest_neighbors(torch.zeros(2, 3), torch.zeros(2, 3), k=3)


def test_one_nn_accuracy_is_one_for_disjoint_sets_and_zero_for_copies():
    a = normal(50, 4)
    apart = evaluation.nearest_neighbor_accuracy(a, a + 100)
    assert apart.accuracy == apart.real == apart.fake == 1
    copies = evaluation.nearest_neighbor_accuracy(a, a.flip(0))
    assert copies.accuracy == copies.real == copies.fake == 0
    assert 0 < copies.standard_error < 0.05


@pytest.mark.parametrize("d", [2, 30])
def test_one_nn_accuracy_of_equal_distributions_is_a_half_with_the_stated_error(d):
    tests = [
        evaluation.nearest_neighbor_accuracy(
            normal(100, d, seed=2 * i), normal(100, d, seed=2 * i + 1)
        )
        for i in range(300)
    ]
    accuracy = torch.tensor([t.accuracy for t in tests])
    spread = float(accuracy.std())
    assert abs(float(accuracy.mean()) - 0.5) < 4 * spread / math.sqrt(300)
    stated = float(torch.tensor([t.standard_error for t in tests]).mean())
    assert stated == pytest.approx(spread, rel=0.15)


def test_one_nn_ties_count_a_half():
    # Each point of a has one copy in a and one in b, so own and other distance are both 0.
    a = normal(10, 3).repeat(2, 1)
    test = evaluation.nearest_neighbor_accuracy(a, a)
    assert (test.real, test.fake, test.accuracy) == (0.5, 0.5, 0.5)


def test_one_nn_per_set_accuracies_tell_the_more_concentrated_set():
    test = evaluation.nearest_neighbor_accuracy(normal(100, 30), 0.7 * normal(100, 30, seed=1))
    assert test.fake > 0.9 and test.real < 0.2
    assert test.accuracy == pytest.approx((test.real + test.fake) / 2)


def test_one_nn_does_not_depend_on_the_chunk_and_refuses_unequal_sizes():
    a, b = normal(31, 3), 1.3 * normal(31, 3, seed=1)
    want = evaluation.nearest_neighbor_accuracy(a, b)
    assert all(
        evaluation.nearest_neighbor_accuracy(a, b, chunk_size=c) == want for c in (1, 8, 1000)
    )
    with pytest.raises(ValueError, match="equally many"):
        evaluation.nearest_neighbor_accuracy(a, b[:30])


# Low-dimensional images


def test_low_dimensional_metrics_of_real_images_match_their_own_floor():
    images = uniform(900, 1, 4, 4)
    got = evaluation.low_dimensional_metrics(images[:200], images[200:450], images[450:])
    assert got["num_samples"] == 200 and got["num_reference"] == 250 and got["notes"] == []
    error = got["frechet_distance_pixels_se"]
    assert 0 < error < got["frechet_distance_pixels"]
    floor = got["frechet_distance_pixels_train"]
    assert abs(got["frechet_distance_pixels"] - floor) < 6 * error
    assert abs(got["one_nn_accuracy"] - 0.5) < 4 * got["one_nn_accuracy_se"]
    assert got["nearest_train_distance"] == pytest.approx(
        got["nearest_train_distance_reference"], rel=0.1
    )
    again = evaluation.low_dimensional_metrics(images[:200], images[200:450], images[450:])
    assert again == got


def test_low_dimensional_metrics_expose_copies_of_the_training_set():
    images = uniform(300, 1, 4, 4)
    got = evaluation.low_dimensional_metrics(images[:100], images[200:], images[:200])
    assert got["nearest_train_distance"] == 0 < got["nearest_train_distance_reference"]


def test_low_dimensional_metrics_without_training_images_have_no_training_keys():
    got = evaluation.low_dimensional_metrics(uniform(40, 1, 3, 3), uniform(40, 1, 3, 3, seed=1))
    assert not [key for key in got if "train" in key]


def test_low_dimensional_metrics_say_what_large_images_leave_out():
    with (
        pytest.warns(UserWarning, match="No standard error"),
        pytest.warns(UserWarning, match="unreliable: 20 images for 300 dimensions"),
    ):
        got = evaluation.low_dimensional_metrics(uniform(20, 3, 10, 10), uniform(30, 3, 10, 10))
    assert "frechet_distance_pixels" in got and "frechet_distance_pixels_se" not in got
    assert len(got["notes"]) == 2
    with pytest.warns(UserWarning, match="use FID"):
        got = evaluation.low_dimensional_metrics(uniform(5, 3, 20, 20), uniform(5, 3, 20, 20))
    assert "frechet_distance_pixels" not in got and "one_nn_accuracy" in got


def test_low_dimensional_metrics_refuse_other_ranges_types_and_shapes():
    good = uniform(10, 1, 3, 3)
    with pytest.raises(ValueError, match="inverse scaler"):
        evaluation.low_dimensional_metrics(2 * good - 1, good)
    with pytest.raises(ValueError, match="divide uint8"):
        evaluation.low_dimensional_metrics((255 * good).byte(), good)
    with pytest.raises(ValueError, match="one shape"):
        evaluation.low_dimensional_metrics(good, uniform(10, 1, 3, 4))
