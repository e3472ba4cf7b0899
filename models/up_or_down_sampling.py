"""FIR up- and downsampling of images by plain depthwise convolutions.

With u the image with factor − 1 zeros put after every pixel and k̂ = k / Σk the filter,

    upsample:    y[n]  = gain · factor² · Σ_m u[m] k̂[n + ⌊p/2⌋ − m]
    downsample:  y[n]  = gain · Σ_m x[m] k̂[factor · n + len(k) − 1 − ⌈p/2⌉ − m]

in both directions of the image, pixels outside it being zero and p = len(k) − factor
(upfirdn2d of StyleGAN2, Karras et al. 2020). One depthwise (transposed) convolution each, so that
every derivative exists, in every dtype, on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_FILTERS: dict[tuple, torch.Tensor] = {}


def _taps(k: Any, factor: int, gain: float) -> tuple[tuple[float, ...], ...]:
    """The square filter of sum `gain`, from a row of taps (its outer product) or a matrix."""
    if k is None:
        k = (1.0,) * factor
    rows = k.tolist() if hasattr(k, "tolist") else list(k)
    if rows and not hasattr(rows[0], "__len__"):
        rows = [[a * b for b in rows] for a in rows]
    total = sum(sum(row) for row in rows)
    if not rows or any(len(row) != len(rows) for row in rows) or total == 0:
        raise ValueError(
            f"a FIR filter needs a row of taps or a square matrix, of non-zero sum, got {k!r}; "
            "use (1, 3, 3, 1)"
        )
    return tuple(tuple(float(v) * gain / total for v in row) for row in rows)


def _make_filter(taps, flip: bool, channels: int, device, dtype) -> torch.Tensor:
    # Not an inference tensor, whatever the mode of the first caller: later ones may train.
    with torch.inference_mode(False):
        matrix = torch.tensor(taps, dtype=torch.float64, device="cpu")
        matrix = (matrix.flip(0, 1) if flip else matrix).to(device=device, dtype=dtype)
        return matrix.expand(channels, 1, -1, -1).contiguous()


def _filter(taps, flip: bool, x: torch.Tensor) -> torch.Tensor:
    """The taps as a depthwise weight (C, 1, k, k) for `x`, made once per device and dtype."""
    if type(x) not in (torch.Tensor, nn.Parameter):  # a fake or distributed tensor: keep none
        return _make_filter(taps, flip, x.shape[1], x.device, x.dtype)
    key = (taps, flip, x.shape[1], x.device, x.dtype)
    if key not in _FILTERS:
        _FILTERS[key] = _make_filter(*key[:3], x.device, x.dtype)
    return _FILTERS[key]


def _in_fast_dtype(operation, x: torch.Tensor) -> torch.Tensor:
    # Depthwise convolutions in bfloat16 are 20 to 70 times slower than in float32 on a CPU.
    low = x.dtype in (torch.bfloat16, torch.float16)
    if x.device.type != "cpu" or not (low or torch.is_autocast_enabled("cpu")):
        return operation(x)
    with torch.autocast("cpu", enabled=False):
        return operation(x.float() if low else x).to(x.dtype)


def _fir_down(x: torch.Tensor, taps, factor: int, before: int, after: int) -> torch.Tensor:
    """Pad, filter by k (true convolution), keep every factor-th pixel."""

    def operation(x):
        common = max(0, min(before, after))
        if not before == after == common:
            extra = (before - common, after - common)
            x = F.pad(x, extra + extra)
        weight = _filter(taps, True, x)
        return F.conv2d(x, weight, stride=factor, padding=common, groups=x.shape[1])

    return _in_fast_dtype(operation, x)


def _fir_up(x: torch.Tensor, taps, factor: int, before: int, after: int) -> torch.Tensor:
    """Insert zeros, filter by k (full convolution), crop `before` and `after`."""

    def operation(x):
        common = max(0, min(before, after))
        weight = _filter(taps, False, x)
        y = F.conv_transpose2d(x, weight, stride=factor, padding=common, groups=x.shape[1])
        if before == after == common:
            return y
        extra = (common - before, common - after)
        return F.pad(y, extra + extra)

    return _in_fast_dtype(operation, x)


def upsample_2d(x, k=None, factor=2, gain: float = 1):
    """Upsample images by a FIR filter, (B, C, H, W) -> (B, C, factor·H, factor·W).

    Args:
      x: the images.
      k: taps of a separable filter, or a square matrix; normalised to sum 1. Default: ones,
        which is nearest-neighbour upsampling.
      factor: whole upsampling factor.
      gain: what a constant image is multiplied by.
    """
    taps = _taps(k, factor, gain * factor**2)
    p = len(taps) - factor
    return _fir_up(x, taps, factor, p // 2, (p + 1) // 2)


def downsample_2d(x, k=None, factor=2, gain: float = 1):
    """Downsample images by a FIR filter, (B, C, H, W) -> (B, C, H/factor, W/factor).

    Arguments as in `upsample_2d`; the default filter is average pooling.
    """
    taps = _taps(k, factor, gain)
    p = len(taps) - factor
    return _fir_down(x, taps, factor, (p + 1) // 2, p // 2)


def naive_upsample_2d(x, factor=2):
    """Repeat every pixel, (B, C, H, W) -> (B, C, factor·H, factor·W)."""
    return F.interpolate(x, scale_factor=float(factor), mode="nearest")


def naive_downsample_2d(x, factor=2):
    """Average over windows, (B, C, H, W) -> (B, C, H/factor, W/factor).

    Raises:
      ValueError: the height or width is not a multiple of the factor.
    """
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(
            f"naive_downsample_2d needs a height and width divisible by {factor}, "
            f"got {tuple(x.shape[2:])}; pad the images"
        )
    return F.avg_pool2d(x, factor)


def naive_upsample_conv_2d(x, w, bias=None):
    """`naive_upsample_2d(x, 2)` and a 3x3 convolution of padding 1, in one.

    The taps that meet the same pixel are summed first: a 4x4 transposed convolution of stride 2,
    with 4/9 of the multiplications.

    Args:
      x: images (B, C, H, W).
      w: weight (out, C, 3, 3).
      bias: (out,) or None.
    """
    padded = F.pad(w.flip(2, 3), (1, 1, 1, 1))
    rows = padded[..., 1:, :] + padded[..., :-1, :]
    folded = rows[..., 1:] + rows[..., :-1]
    return F.conv_transpose2d(x, folded.transpose(0, 1), bias, stride=2, padding=1)


def _check_weight(w) -> None:
    if w.ndim != 4 or w.shape[2] != w.shape[3]:
        raise ValueError(
            f"a resampling convolution needs a weight (out, in, n, n), got {tuple(w.shape)}"
        )


def upsample_conv_2d(x, w, k=None, factor=2, gain: float = 1):
    """Insert zeros, correlate with `w`, filter: (B, C, H, W) -> (B, out, factor·H, factor·W).

    Away from the border equal to `conv2d(upsample_2d(x, k, factor, gain), w)` with n // 2 pixels
    of padding; at the border it is padded once, not twice. A transposed convolution with the
    flipped and transposed weight, which score_sde_pytorch could not run.

    Args:
      x: images (B, C, H, W).
      w: weight (out, C / groups, n, n), n odd; the groups follow from the shapes.
      k, factor, gain: as in `upsample_2d`.
    """
    _check_weight(w)
    out, per_group, n, _ = w.shape
    groups = x.shape[1] // per_group
    taps = _taps(k, factor, gain * factor**2)
    p = len(taps) - factor - (n - 1)
    transposed = w.flip(2, 3).unflatten(0, (groups, out // groups)).transpose(1, 2).flatten(0, 1)
    y = F.conv_transpose2d(x, transposed, stride=factor, groups=groups)
    return _fir_down(y, taps, 1, (p + 1) // 2 + factor - 1, p // 2 + factor - 1)


def conv_downsample_2d(x, w, k=None, factor=2, gain: float = 1, *, bias=None):
    """Filter, then correlate with `w` strided: (B, C, H, W) -> (B, out, H/factor, W/factor).

    Away from the border equal to `downsample_2d(conv2d(x, w), k, factor, gain)`. Arguments as in
    `upsample_conv_2d`; `bias` (out,) is added to the result.
    """
    _check_weight(w)
    taps = _taps(k, factor, gain)
    p = len(taps) - factor + w.shape[2] - 1
    y = _fir_down(x, taps, 1, (p + 1) // 2, p // 2)
    return F.conv2d(y, w, bias, stride=factor, groups=x.shape[1] // w.shape[1])


class Conv2d(nn.Module):
    """A convolution with FIR up- or downsampling by two built in (Karras et al. 2020).

    Args:
      in_ch, out_ch: channels.
      kernel: odd window size.
      up, down: resample before or after; not both.
      resample_kernel: taps of the FIR filter.
      use_bias: whether there is a `bias` (out_ch,) beside `weight` (out_ch, in_ch, kernel, kernel).
      kernel_init: a function of the weight's shape; zeros by default.

    Raises:
      ValueError: up and down together, or an even window.
    """

    def __init__(
        self,
        in_ch,
        out_ch,
        kernel,
        up=False,
        down=False,
        resample_kernel=(1, 3, 3, 1),
        use_bias=True,
        kernel_init=None,
    ):
        super().__init__()
        if up and down:
            raise ValueError("Conv2d needs up or down, got both; use one of them")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"Conv2d needs an odd kernel size, got {kernel}; use 3")
        shape = (out_ch, in_ch, kernel, kernel)
        self.weight = nn.Parameter(kernel_init(shape) if kernel_init else torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(out_ch)) if use_bias else None
        self.up = up
        self.down = down
        self.resample_kernel = tuple(resample_kernel)
        self.kernel = kernel
        self.use_bias = use_bias

    def forward(self, x):
        if self.down:
            return conv_downsample_2d(x, self.weight, self.resample_kernel, bias=self.bias)
        if not self.up:
            return F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2)
        y = upsample_conv_2d(x, self.weight, self.resample_kernel)
        return y if self.bias is None else y + self.bias.reshape(-1, 1, 1)
