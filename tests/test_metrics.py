"""Metrics in feature space against closed forms, brute force and simulation."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluation
import evaluation_metrics as metrics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_of(x):
    mu, sigma = evaluation.gaussian_stats(x)
    return SimpleNamespace(mu=mu, sigma=sigma, n=len(x), features=x)


# Streaming moments


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (7, 0, 20, 23)])
def test_moments_of_parts_are_those_of_the_whole(sizes):
    x = normal(50, 6) + 1e4  # a mean that would swallow the digits of a sum of squares
    mu, sigma = evaluation.gaussian_stats(x)
    updated, merged = metrics.Moments(6), metrics.Moments(6)
    for part in x.split(list(sizes)):
        updated.update(part)
        merged.merge(metrics.Moments.of(part))
    for moments in (updated, merged, metrics.Moments.of(x, block=9)):
        assert moments.n == 50
        torch.testing.assert_close(moments.mu, mu, rtol=1e-14, atol=0)
        torch.testing.assert_close(moments.sigma, sigma, rtol=0, atol=1e-10)


def test_moments_refuse_what_is_not_features():
    with pytest.raises(ValueError, match=r"expected features \(B, 3\)"):
        metrics.Moments(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="finite"):
        metrics.Moments(1).update(torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="at least 2 images"):
        _ = metrics.Moments(1).update(torch.zeros(1, 1)).sigma


# FID


@pytest.mark.parametrize("n", [100, 400])
def test_fid_of_a_set_to_itself_is_zero_even_if_singular(n):
    x = normal(n, 128)
    result = metrics.frechet_inception_distance(
        metrics.grouped_moments(x), *evaluation.gaussian_stats(x)
    )
    assert 0 <= result["fid"] < 1e-9 and result["fid_num_samples"] == n


def test_fid_is_the_frechet_distance_of_all_samples_together():
    x, y = normal(101, 5), normal(80, 5, seed=1) * 2 + 1
    got = metrics.frechet_inception_distance(
        metrics.grouped_moments(x), *evaluation.gaussian_stats(y)
    )
    assert got["fid"] == pytest.approx(evaluation.frechet_distance_from_samples(x, y), rel=1e-12)


def test_fids_standard_error_is_the_spread_over_sets_of_samples():
    mu, sigma = torch.zeros(8), torch.eye(8)
    results = [
        metrics.frechet_inception_distance(
            metrics.grouped_moments(1.1 * normal(300, 8, seed=seed) + 0.3), mu, sigma
        )
        for seed in range(80)
    ]
    spread = np.std([r["fid"] for r in results])
    error = math.sqrt(np.mean([r["fid_se"] ** 2 for r in results]))
    assert error == pytest.approx(spread, rel=0.25)


def test_fid_of_few_samples_is_doubted():
    assert len(metrics.fid_notes(50000, 2048)) == 0
    assert len(metrics.fid_notes(2048, 2048)) == 1
    assert len(metrics.fid_notes(2047, 2048)) == 2
    assert "mostly bias" in metrics.fid_notes(2000, 64)[0]


# KID


def test_kid_is_the_unbiased_estimator_by_brute_force():
    x, y = normal(6, 3), normal(6, 3, seed=1) + 1

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    want = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 30
    want -= 2 * sum(k(a, b) for a in x for b in y) / 36
    assert metrics._polynomial_mmd(x, y) == pytest.approx(want, rel=1e-12)


def test_kid_of_gaussians_is_closed_form_within_its_error():
    """E k(x, y) = Σ_p C(3, p) m_p(x) m_p(y) in one dimension, with the moments of N(a, 1)."""

    def moments(a):
        return np.array([1, a, a * a + 1, a**3 + 3 * a])

    gap = moments(0.3) - moments(0)
    want = float((np.array([1, 3, 3, 1]) * gap**2).sum())
    got = metrics.kernel_inception_distance(normal(4000, 1) + 0.3, normal(4000, 1, seed=1))
    assert abs(got["kid"] - want) < 3 * got["kid_se"] and got["kid_se"] < 0.5 * want
    assert got["kid_subset_size"] == 1000 and got["kid_num_samples"] == 4000


def test_kids_standard_error_covers_the_spread_over_sets():
    results = [
        metrics.kernel_inception_distance(
            normal(400, 8, seed=seed) + 0.3, normal(400, 8, seed=1000 + seed), subsets=20
        )
        for seed in range(60)
    ]
    spread = np.std([r["kid"] for r in results])
    error = math.sqrt(np.mean([r["kid_se"] ** 2 for r in results]))
    assert 0.8 * spread < error < 1.7 * spread


def test_kid_depends_on_the_seed_alone():
    x, y = normal(50, 4), normal(40, 4, seed=1)
    first, second, other = (metrics.kernel_inception_distance(x, y, seed=s) for s in (1, 1, 2))
    assert first == second != other
    with pytest.raises(ValueError, match="at least 4 features"):
        metrics.kernel_inception_distance(x[:3], y)


# Inception Score


def test_inception_score_is_1_without_information_and_the_number_of_classes_with_all():
    assert metrics.inception_score(torch.ones(40, 7))["is"] == pytest.approx(1)
    sure = 1e4 * torch.eye(7)[torch.arange(140) % 7]
    got = metrics.inception_score(sure)
    assert got["is"] == pytest.approx(7) and got["is_splits"] == pytest.approx(7)
    assert got["is_se"] == pytest.approx(0, abs=1e-6)


def test_inception_score_is_its_formula_on_all_images_and_on_consecutive_parts():
    logits = normal(103, 5)
    p = logits.softmax(1)

    def score(p):
        return float((p * (p / p.mean(0)).log()).sum(1).mean().exp())

    parts = [score(p[i * 103 // 4 : (i + 1) * 103 // 4]) for i in range(4)]
    got = metrics.inception_score(logits.float(), splits=4)
    assert got["is"] == pytest.approx(score(p), rel=1e-6)
    assert got["is_splits"] == pytest.approx(np.mean(parts), rel=1e-6)
    assert got["is_splits_std"] == pytest.approx(np.std(parts), rel=1e-5)


def test_inception_scores_standard_error_is_the_spread_over_sets():
    results = [metrics.inception_score(2 * normal(300, 10, seed=seed)) for seed in range(80)]
    spread = np.std([r["is"] for r in results])
    assert math.sqrt(np.mean([r["is_se"] ** 2 for r in results])) == pytest.approx(spread, rel=0.25)


# Precision, recall, density, coverage


def brute_force(x, y, k3=3, k5=5):
    def radii(z, k):
        return [sorted(float((a - b).norm()) for b in z)[k] for a in z]  # 0 is itself

    rx, ry, ry5 = radii(x, k3), radii(y, k3), radii(y, k5)
    d = [[float((a - b).norm()) for b in y] for a in x]
    n, m = len(x), len(y)
    return {
        "precision": np.mean([any(d[i][j] <= ry[j] for j in range(m)) for i in range(n)]),
        "recall": np.mean([any(d[i][j] <= rx[i] for i in range(n)) for j in range(m)]),
        "density": sum(d[i][j] <= ry5[j] for i in range(n) for j in range(m)) / (5 * n),
        "coverage": np.mean([any(d[i][j] <= ry5[j] for i in range(n)) for j in range(m)]),
    }


@pytest.mark.parametrize("block_bytes", [None, 1])
def test_precision_and_recall_are_their_definition_in_blocks_of_any_size(monkeypatch, block_bytes):
    if block_bytes:
        monkeypatch.setattr(metrics, "_BLOCK_BYTES", block_bytes)
    x, y = normal(40, 3) + 0.7, normal(30, 3, seed=1)
    got = metrics.precision_recall_density_coverage(x, y)
    for key, value in brute_force(x, y).items():
        assert got[key] == pytest.approx(float(value), abs=1e-12), key


def test_blocks_of_distances_are_bounded_however_wide_the_points_are(monkeypatch):
    seen, double = [], metrics._double
    monkeypatch.setattr(metrics, "_double", lambda x: (seen.append(x.numel()), double(x))[1])
    monkeypatch.setattr(metrics, "_BLOCK_BYTES", 8 * 5000)
    x = normal(50, 1000)
    got = torch.cat([distances for _, distances in metrics._squared_distances(x, x)])
    assert max(seen) <= 5000
    torch.testing.assert_close(got, (x[:, None] - x).square().sum(2), atol=1e-9, rtol=1e-12)


def test_precision_and_recall_of_a_set_to_itself_and_to_one_far_away():
    x = normal(100, 4)
    got = metrics.precision_recall_density_coverage(x.float(), x.float())
    assert [got[k] for k in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert got["density"] == pytest.approx(6 / 5)  # five neighbours and itself
    got = metrics.precision_recall_density_coverage(x, x + 1e3)
    assert [got[k] for k in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]


def test_collapse_to_one_mode_has_precision_without_recall():
    y = normal(400, 8)
    got = metrics.precision_recall_density_coverage(0.2 * normal(400, 8, seed=1), y)
    assert got["precision"] > 0.95 and got["recall"] < 0.05


def test_copies_are_at_distance_zero():
    """Balls around points that occur often have radius 0 and hold their copies."""
    x = 10 * normal(3, 64).repeat(8, 1)
    got = metrics.precision_recall_density_coverage(x, x)
    assert [got[k] for k in ("precision", "recall", "coverage")] == [1, 1, 1]


def test_standard_errors_of_precision_and_recall_are_the_spread_over_sets():
    results = [
        metrics.precision_recall_density_coverage(
            normal(300, 6, seed=seed) + 0.4, normal(300, 6, seed=1000 + seed)
        )
        for seed in range(50)
    ]
    for key in ("precision", "recall", "density", "coverage"):
        spread = np.std([r[key] for r in results])
        error = math.sqrt(np.mean([r[f"{key}_se"] ** 2 for r in results]))
        assert 0.7 * spread < error < 1.5 * spread, key


# All together


def test_all_metrics_in_one_call_go_into_json_with_their_doubts():
    x, y = normal(120, 4).float(), normal(200, 4, seed=1).float()
    with pytest.warns(UserWarning, match="mostly bias"):
        result = metrics.feature_metrics(x, normal(120, 9), reference_of(y))
    assert json.loads(json.dumps(result)) == result and len(result["notes"]) == 1
    assert result["fid_num_reference"] == 200
    assert result["prdc_num_samples"] == result["prdc_num_reference"] == 120
    for key in ("fid", "kid", "is", "precision", "recall", "density", "coverage"):
        assert result[f"{key}_se"] > 0, key


@pytest.mark.parametrize(
    ("names", "n", "logits", "single", "message"),
    [
        (("fjd",), 100, True, True, "expected some of"),
        (("is",), 100, False, True, "needs an extractor that classifies"),
        (("kid",), 100, True, False, "hold none"),
        (("fid", "prdc"), 100, True, False, "hold none"),
        (("is",), 19, True, True, "at least 20, got 19"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused_beforehand(names, n, logits, single, message):
    with pytest.raises(ValueError, match=message):
        metrics.check_metrics(names, n, has_logits=logits, has_features=single)
    metrics.check_metrics(tuple(metrics.METRICS), 20, has_logits=True, has_features=True)


def test_features_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match="of one d"):
        metrics.kernel_inception_distance(normal(9, 3), normal(9, 4))
    with pytest.raises(ValueError, match="more than 5 features"):
        metrics.precision_recall_density_coverage(normal(5, 3), normal(9, 3))
