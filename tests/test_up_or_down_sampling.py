"""FIR resampling against its definition, and its derivatives."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import up_or_down_sampling as resampling


def numpy_upfirdn(x, k, up, down, before, after):
    """Insert zeros, pad, convolve, decimate: one image (H, W), straight from the definition."""
    H, W = x.shape
    u = np.zeros((H * up, W * up))
    u[::up, ::up] = x
    u = np.pad(u, ((max(before, 0), max(after, 0)),) * 2)
    crop = slice(max(-before, 0), -max(-after, 0) or None)
    u = u[crop, crop]
    flipped, n = k[::-1, ::-1], len(k)
    out = [
        [(u[i : i + n, j : j + n] * flipped).sum() for j in range(u.shape[1] - n + 1)]
        for i in range(u.shape[0] - n + 1)
    ]
    return np.array(out)[::down, ::down]


def numpy_taps(k, gain=1.0):
    k = np.asarray(k, dtype=np.float64)
    k = np.outer(k, k) if k.ndim == 1 else k
    return k * gain / k.sum()


KERNELS = [
    (1, 3, 3, 1),
    (1, 2, 1),
    (1, 1),
    (1,),
    (1, 2, 3, 5, 4),
    (1, 4, 6, 5, 3, 1),
    [[1, 2, 0], [3, 5, 1], [0, 1, 4]],
]


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("k", KERNELS, ids=str)
def test_fir_resampling_equals_upfirdn(k, factor):
    x = torch.randn(2, 3, 6, 12, dtype=torch.float64)
    p = len(k) - factor
    up = resampling.upsample_2d(x, k, factor=factor, gain=1.5)
    down = resampling.downsample_2d(x, k, factor=factor, gain=1.5)
    assert up.shape == (2, 3, 6 * factor, 12 * factor)
    for b, c in itertools.product(range(2), range(3)):
        image = x[b, c].numpy()
        want = numpy_upfirdn(
            image, numpy_taps(k, 1.5 * factor**2), factor, 1, (p + 1) // 2 + factor - 1, p // 2
        )
        np.testing.assert_allclose(up[b, c], want, atol=1e-12)
        want = numpy_upfirdn(image, numpy_taps(k, 1.5), 1, factor, (p + 1) // 2, p // 2)
        np.testing.assert_allclose(down[b, c], want, atol=1e-12)
    for function, y in ((resampling.upsample_2d, up), (resampling.downsample_2d, down)):
        z = function(x.float(), k, factor=factor, gain=1.5)
        torch.testing.assert_close(z.double(), y, atol=1e-6 * y.abs().max().item(), rtol=0)


@pytest.mark.parametrize("k", [(1, 3, 3, 1), (1, 2, 3, 5, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_resampling_convolutions_equal_upfirdn_and_correlation(k, n):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    w = torch.randn(4, 3, n, n, dtype=torch.float64)
    up, down = resampling.upsample_conv_2d(x, w, k), resampling.conv_downsample_2d(x, w, k)
    # Zeros between the pixels and the weight as one filter of a full convolution, then the FIR.
    zeros = torch.zeros(2, 3, 11, 15, dtype=torch.float64)
    zeros[:, :, ::2, ::2] = x
    full = F.conv2d(zeros, w, padding=n - 1)
    p = len(k) - 2 - (n - 1)
    q = len(k) - 2 + (n - 1)
    for b, c in itertools.product(range(2), range(4)):
        taps = numpy_taps(k, 4.0)
        want = numpy_upfirdn(full[b, c].numpy(), taps, 1, 1, (p + 1) // 2 + 1, p // 2 + 1)
        np.testing.assert_allclose(up[b, c], want, atol=1e-12)
    filtered = [
        [numpy_upfirdn(i.numpy(), numpy_taps(k), 1, 1, (q + 1) // 2, q // 2) for i in image]
        for image in x
    ]
    want = F.conv2d(torch.tensor(np.array(filtered)), w, stride=2)
    torch.testing.assert_close(down, want, atol=1e-12, rtol=0)
    assert up.shape == (2, 4, 12, 16)
    assert down.shape == (2, 4, 3, 4)


def test_upsampling_convolution_equals_upsampling_then_convolution_inside():
    x, w = torch.randn(1, 4, 8, 8), torch.randn(6, 2, 3, 3)
    for factor in (2, 3):
        fused = resampling.upsample_conv_2d(x, w, (1, 3, 3, 1), factor=factor)
        apart = resampling.upsample_2d(x, (1, 3, 3, 1), factor=factor)
        apart = F.conv2d(apart, w, padding=1, groups=2)
        assert fused.shape == apart.shape
        inside = (..., slice(4, -4), slice(4, -4))
        torch.testing.assert_close(fused[inside], apart[inside], atol=1e-5, rtol=1e-5)


def test_folded_nearest_upsampling_convolution_equals_its_two_steps():
    x, w, b = torch.randn(2, 3, 5, 4), torch.randn(6, 3, 3, 3), torch.randn(6)
    want = F.conv2d(resampling.naive_upsample_2d(x), w, b, padding=1)
    torch.testing.assert_close(resampling.naive_upsample_conv_2d(x, w, b), want)


def test_naive_resampling_repeats_and_averages():
    x = torch.randn(2, 3, 6, 12)
    up = resampling.naive_upsample_2d(x, 3)
    assert torch.equal(up, x.repeat_interleave(3, 2).repeat_interleave(3, 3))
    torch.testing.assert_close(resampling.naive_downsample_2d(up, 3), x)
    torch.testing.assert_close(resampling.upsample_2d(x, None, 3), up)
    torch.testing.assert_close(
        resampling.downsample_2d(x, None, 3), resampling.naive_downsample_2d(x, 3)
    )
    with pytest.raises(ValueError, match="divisible by 4"):
        resampling.naive_downsample_2d(x, 4)


@pytest.mark.parametrize("up", [True, False])
def test_resampling_has_right_first_and_second_derivatives(up):
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    conv = resampling.upsample_conv_2d if up else resampling.conv_downsample_2d
    fir = resampling.upsample_2d if up else resampling.downsample_2d

    def function(x, w):
        return fir(x, (1, 2, 3, 5)).sum() ** 2 + conv(x, w, (1, 3, 3, 1)).tanh().sum()

    assert torch.autograd.gradcheck(function, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, w))


@pytest.mark.parametrize("function", [resampling.upsample_2d, resampling.downsample_2d])
def test_resampling_in_bfloat16_is_as_good_as_rounding(function):
    x = torch.randn(2, 3, 8, 8)
    y = function(x.bfloat16(), (1, 3, 3, 1))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, function(x.bfloat16().float(), (1, 3, 3, 1)).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x, (1, 3, 3, 1)), function(x, (1, 3, 3, 1)))
        assert function(x, (1, 3, 3, 1)).dtype == torch.float32


def test_filters_are_made_once_and_serve_training_after_inference_mode(monkeypatch):
    resampling._FILTERS.clear()
    with torch.inference_mode():
        resampling.upsample_2d(torch.randn(1, 2, 4, 4), (1, 3, 3, 1))
    monkeypatch.setattr(resampling, "_make_filter", None)  # a second filter would need it
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    resampling.upsample_2d(x, [1, 3, 3, 1]).sum().backward()
    assert x.grad is not None


def test_resampling_refuses_what_it_cannot_do():
    x = torch.randn(1, 2, 4, 4)
    for k in ((), (1, -1), [[1, 2], [3]]):
        with pytest.raises(ValueError, match="FIR filter"):
            resampling.upsample_2d(x, k)
    with pytest.raises(ValueError, match="up or down, got both"):
        resampling.Conv2d(2, 2, 3, up=True, down=True)
    with pytest.raises(ValueError, match="odd kernel"):
        resampling.Conv2d(2, 2, 2)
    with pytest.raises(ValueError, match="weight"):
        resampling.upsample_conv_2d(x, torch.randn(2, 2, 3))
