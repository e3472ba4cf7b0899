"""Agreement with torch-fidelity, clean-fid and prdc on identical features, to 1e-6 relative."""

import numpy as np
import pytest
import torch
from toys_inception import write_weights

import evaluation
import evaluation_features
import evaluation_inception
import evaluation_metrics as metrics


def features(n, d=48, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix / d**0.5
    return (x + seed / 10).relu() * scale


X, Y = features(600, scale=1.1), features(500, seed=1)


def test_fid_is_torch_fidelitys():
    peer = pytest.importorskip("torch_fidelity.metric_fid")
    statistics = [peer.fid_features_to_statistics(z) for z in (X, Y)]
    want = peer.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    got = metrics.frechet_inception_distance(
        metrics.grouped_moments(X), *evaluation.gaussian_stats(Y)
    )
    assert got["fid"] == pytest.approx(want, rel=1e-6)


def test_kid_is_torch_fidelitys():
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    want = peer.kid_features_to_metric(
        X, Y, kid_subsets=20, kid_subset_size=200, rng_seed=2020, verbose=False
    )
    got = metrics.kernel_inception_distance(X, Y, subsets=20, subset_size=200)
    assert got["kid"] == pytest.approx(want["kernel_inception_distance_mean"], rel=1e-6)
    assert got["kid_std"] == pytest.approx(want["kernel_inception_distance_std"], rel=1e-6)


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_is_torch_fidelitys(splits):
    peer = pytest.importorskip("torch_fidelity.metric_isc")
    logits = features(403, 20)
    want = peer.isc_features_to_metric(logits, splits=splits, shuffle=False)
    got = metrics.inception_score(logits)
    mean = got["is"] if splits == 1 else got["is_splits"]
    assert mean == pytest.approx(want["inception_score_mean"], rel=1e-6)
    if splits > 1:
        assert got["is_splits_std"] == pytest.approx(want["inception_score_std"], rel=1e-6)


def test_precision_and_recall_are_torch_fidelitys():
    peer = pytest.importorskip("torch_fidelity.metric_prc")
    want = peer.prc_features_to_metric(X, Y, prc_neighborhood=3, prc_batch_size=100, verbose=False)
    got = metrics.precision_recall_density_coverage(X, Y)
    for key in ("precision", "recall"):
        assert 0.05 < got[key] < 1
        assert got[key] == pytest.approx(want[key], rel=1e-6)


def test_density_and_coverage_are_prdcs():
    peer = pytest.importorskip("prdc")
    want = peer.compute_prdc(Y.numpy(), X.numpy(), nearest_k=5)
    got = metrics.precision_recall_density_coverage(X, Y, k_precision=5)
    for key in ("precision", "recall", "density", "coverage"):
        assert got[key] == pytest.approx(want[key], rel=1e-6), key


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frechet_distance_is_clean_fids():
    fid = pytest.importorskip("cleanfid.fid")
    moments = [[np.asarray(part) for part in evaluation.gaussian_stats(z)] for z in (X, Y)]
    try:
        want = fid.frechet_distance(*moments[0], *moments[1])
    except TypeError:
        pytest.skip("clean-fid calls sqrtm(disp=), which this SciPy does not have")
    got = evaluation.frechet_distance(*moments[0], *moments[1])
    assert got == pytest.approx(float(want), rel=1e-6)


def test_kernel_distance_is_clean_fids():
    fid = pytest.importorskip("cleanfid.fid")
    x, y = X[:300], Y[:300]
    want = fid.kernel_distance(x.numpy(), y.numpy(), num_subsets=1, max_subset_size=300)
    assert metrics._polynomial_mmd(x, y) == pytest.approx(want, rel=1e-6)


def test_the_resize_is_torch_fidelitys_bit_for_bit():
    peer = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    generator = torch.Generator().manual_seed(0)
    for height, width in ((32, 32), (300, 17)):
        x = torch.randint(0, 256, (2, 3, height, width), generator=generator).float()
        want = peer.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
        assert torch.equal(evaluation_inception.resize_tensorflow(x), want)


def test_random_weights_give_torch_fidelitys_features_and_logits(tmp_path):
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = str(write_weights(tmp_path / "random.pth"))
    images = torch.randint(0, 256, (2, 3, 32, 32)).byte()
    theirs = peer.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], path)
    with torch.no_grad():
        pool, logits = theirs(images)
    got = evaluation_features.get_extractor("legacy_tensorflow", path)(images)
    torch.testing.assert_close(got.pool, pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.logits, logits, rtol=1e-4, atol=1e-4)
