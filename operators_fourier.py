"""Operators that a Fourier transform makes cheap: blur, Fourier undersampling, random projection.

The real basis is Hartley's: with F the unitary Fourier transform, H = Re F − Im F has the real
kernel cos + sin, is symmetric and its own inverse, and diagonalises every circular filter whose
frequency response is real and even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from operators_base import SVD, Constants, Operator, image_shape, mask_tensor, whole_shape

Tensor = torch.Tensor


def hartley(x: Tensor, axes: Sequence[int] = (-2, -1)) -> Tensor:
    """The discrete Hartley transform over `axes`: real, orthonormal and its own inverse."""
    F = torch.fft.fftn(x, dim=tuple(axes), norm="ortho")
    return F.real - F.imag


# --- blur -------------------------------------------------------------------------------------


class Blur(Operator):
    """Circular convolution of every channel with one kernel, (B, C, H, W).

    Args:
      shape: (C, H, W).
      kernel: (h, w), odd and no larger than the image; centred.
      cut: frequencies whose response is below this share of the largest are left out of A itself,
        so that A⁺ does not blow up what is hardly measured.
    """

    def __init__(self, shape: Sequence[int], kernel: Tensor, cut: float = 0.0):
        C, H, W = image_shape(shape, "blur")
        kernel = torch.as_tensor(kernel).double().cpu()
        if kernel.ndim != 2 or any(n % 2 == 0 for n in kernel.shape):
            raise ValueError(
                f"blur needs a kernel (h, w) of odd sides, got {tuple(kernel.shape)}; pad with "
                "zeros, so that it has a centre"
            )
        h, w = kernel.shape
        if h > H or w > W:
            raise ValueError(
                f"a blur kernel of {h} x {w} is larger than the image, {H} x {W}; use a smaller "
                "size, std or length"
            )
        if not 0 <= cut < 1:
            raise ValueError(f"blur needs a cut of 0 ≤ cut < 1, got {cut}; 0.03 is often used")
        super().__init__((C, H, W), (C, H, W))
        self.kernel = kernel
        spread = torch.zeros(H, W, dtype=torch.float64)
        spread[:h, :w] = kernel
        spread = torch.roll(spread, (-(h // 2), -(w // 2)), (0, 1))
        gain = torch.fft.fft2(spread).abs()
        self._gain = torch.where(gain < cut * gain.max(), 0.0, gain)
        response = torch.where(self._gain[:, : W // 2 + 1] > 0, torch.fft.rfft2(spread), 0)
        size = response.abs()
        faint = size <= 1e-14 * size.max()  # its phase is rounding
        phase = torch.where(faint, 1.0, response / torch.where(faint, 1.0, size))
        self._constants = Constants(response=response, phase=phase)

    def _filter(self, name: str, x: Tensor, conjugate: bool = False) -> Tensor:
        response = self._constants(name, x)
        response = response.conj() if conjugate else response
        return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=self.shape_in[1:])

    def forward(self, x):
        return self._filter("response", x)

    def transpose(self, y):
        return self._filter("response", y, conjugate=True)

    def _svd(self):
        # A = P |A|: |A| is even and Hartley's basis its eigenvectors, P turns phases.
        def box(c):
            return hartley(c.reshape(len(c), *self.shape_in))

        return SVD(
            self._gain.expand(self.shape_in).reshape(-1),
            V=box,
            Vt=lambda x: hartley(x).reshape(len(x), -1),
            U=lambda c: self._filter("phase", box(c)),
            Ut=lambda y: hartley(self._filter("phase", y, conjugate=True)).reshape(len(y), -1),
        )


def gaussian_kernel(std: float, size: int) -> Tensor:
    """A Gaussian of `std` pixels on `size` x `size` pixels, of sum 1."""
    u = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-0.5 * (u / std) ** 2)
    return torch.outer(line, line) / line.sum() ** 2


def motion_kernel(length: float, angle: float) -> Tensor:
    """A line of `length` pixels at `angle` degrees, anticlockwise from the right; its sum is 1."""
    half = (length - 1) / 2
    size = 2 * math.ceil(half) + 1
    along = torch.linspace(-half, half, 64 * size, dtype=torch.float64)
    turn = math.radians(angle)
    points = torch.stack([-along * math.sin(turn), along * math.cos(turn)], 1) + size // 2
    grid = torch.arange(size, dtype=torch.float64)
    # Every point of the line is shared out linearly among the four pixels about it.
    weights = (1 - (points.unsqueeze(2) - grid).abs()).clamp(min=0)
    return torch.einsum("pi,pj->ij", weights[:, 0], weights[:, 1]) / len(points)


class GaussianBlur(Blur):
    """Blur by a Gaussian.

    Args:
      shape: (C, H, W).
      std: in pixels.
      size: of the kernel, odd; by default 3 std to each side, as far as the image goes.
      cut: as `Blur`.
    """

    def __init__(self, shape: Sequence[int], std: float = 1.5, size: int = 0, cut: float = 0.0):
        _, H, W = image_shape(shape, "blur")
        if not std > 0:
            raise ValueError(f"a Gaussian blur needs std > 0 pixels, got {std}")
        if size < 0 or size > max(H, W):
            raise ValueError(
                f"a blur kernel of {size} pixels does not fit images of {H} x {W}; use a smaller "
                "size, or 0 to choose it"
            )
        size = size or min(2 * math.ceil(3 * std) + 1, (min(H, W) - 1) // 2 * 2 + 1)
        super().__init__(shape, gaussian_kernel(std, size), cut)


class MotionBlur(Blur):
    """Blur by a straight movement.

    Args:
      shape: (C, H, W).
      length: in pixels.
      angle: in degrees, anticlockwise from the right.
      cut: as `Blur`.
    """

    def __init__(
        self, shape: Sequence[int], length: float = 9.0, angle: float = 45.0, cut: float = 0.0
    ):
        longest = 2 * max(image_shape(shape, "blur")[1:])
        if not 1 <= length <= longest:
            raise ValueError(
                f"a motion blur of these images needs a length of 1 to {longest} pixels, got "
                f"{length}"
            )
        super().__init__(shape, motion_kernel(length, angle), cut)


# --- Fourier undersampling --------------------------------------------------------------------


class MRI(Operator):
    """Some frequencies of the unitary Fourier transform of every channel, (B, C, 2, m): real and
    imaginary parts.

    x is real, so that frequencies k and −k say the same: a value of 1 where both are known or
    k = −k, 1/√2 where one is.

    Args:
      shape: (C, H, W).
      mask: true or non-zero where known, (H, W), with frequency 0 at [H//2, W//2]; or the name of a
        pattern: 'cartesian', whole columns at random and a block of them about 0, or 'random',
        single frequencies and a rectangle about 0.
      acceleration: the pattern keeps 1/acceleration of all.
      centre: of which this share of a side about frequency 0, all kept.
      seed: of the pattern.
    """

    def __init__(
        self,
        shape: Sequence[int],
        mask: Any = "cartesian",
        acceleration: float = 4.0,
        centre: float = 0.08,
        seed: int = 0,
    ):
        C, H, W = image_shape(shape, "mri")
        if isinstance(mask, str):
            mask = frequency_pattern(mask, (H, W), acceleration, centre, seed)
        self.mask = mask_tensor(mask)
        if self.mask.shape != (H, W) or not self.mask.any():
            raise ValueError(
                f"mri needs a mask of frequencies ({H}, {W}) that keeps some, got "
                f"{tuple(self.mask.shape)} that keeps {int(self.mask.sum())}"
            )
        kept = torch.fft.ifftshift(self.mask)
        known = kept.reshape(-1).nonzero()[:, 0]
        super().__init__((C, H, W), (C, 2, len(known)))
        mirrored = torch.roll(kept.flip((0, 1)), (1, 1), (0, 1))
        weight = (kept.double() + mirrored.double()) / 2  # of AᵀA in Hartley's basis
        basis = weight.expand(C, H, W).reshape(-1).nonzero()[:, 0]
        self._values = weight.expand(C, H, W).reshape(-1)[basis].sqrt()
        self._constants = Constants(known=known, basis=basis, s=self._values)

    def forward(self, x):
        F = torch.fft.fft2(x, norm="ortho").flatten(-2)
        kept = F.index_select(-1, self._constants("known", x))
        return torch.stack([kept.real, kept.imag], -2)

    def transpose(self, y):
        C, H, W = self.shape_in
        F = torch.complex(y[..., 0, :], y[..., 1, :])
        full = F.new_zeros(len(y), C, H * W).index_copy(-1, self._constants("known", y), F)
        return torch.fft.ifft2(full.reshape(len(y), C, H, W), norm="ortho").real

    def _svd(self):
        def V(c):
            flat = c.new_zeros(len(c), math.prod(self.shape_in))
            flat = flat.index_copy(1, self._constants("basis", c), c)
            return hartley(flat.reshape(len(c), *self.shape_in))

        def Vt(x):
            flat = hartley(x).reshape(len(x), -1)
            return flat.index_select(1, self._constants("basis", x))

        return SVD(
            self._values,
            V=V,
            Vt=Vt,
            U=lambda c: self.forward(V(c / self._constants("s", c))),
            Ut=lambda y: Vt(self.transpose(y)) / self._constants("s", y),
        )


#: Names of patterns of frequencies.
FREQUENCIES = ("cartesian", "random")


def frequency_pattern(
    name: str, size: tuple[int, int], acceleration: float, centre: float, seed: int
) -> Tensor:
    """A mask (H, W) of frequencies, 0 at [H//2, W//2]; see `MRI`."""
    if name not in FREQUENCIES:
        known = ", ".join(FREQUENCIES)
        raise ValueError(f"mask {name!r} of frequencies is unknown; known: {known}, or a tensor")
    if not acceleration >= 1 or not 0 <= centre <= 1:
        raise ValueError(
            f"expected acceleration ≥ 1 and a centre of 0 to 1, got {acceleration} and {centre}"
        )
    H, W = size
    near = [((torch.arange(n) - n // 2).abs() < max(centre * n, 1) / 2) for n in size]
    lines = name == "cartesian"
    middle = near[1] if lines else (near[0].unsqueeze(1) & near[1]).reshape(-1)
    total = W if lines else H * W
    # The middle first, then the others in a random order.
    order = torch.rand(total, generator=torch.Generator().manual_seed(seed)) - middle.float()
    kept = torch.zeros(total, dtype=torch.bool)
    kept[order.argsort()[: max(round(total / acceleration), int(middle.sum()), 1)]] = True
    return kept.expand(H, W).clone() if lines else kept.reshape(H, W)


# --- compressed sensing -----------------------------------------------------------------------


class CompressedSensing(Operator):
    """A random projection to (B, m) with orthonormal rows: signs at random, Hartley's transform of
    all numbers of x, and m of the results at random (Do et al. 2012).

    Args:
      shape: of one sample, any.
      ratio: m as a share of the numbers of x.
      seed: of signs and rows.
    """

    def __init__(self, shape: Sequence[int], ratio: float = 0.25, seed: int = 0):
        n = math.prod(whole_shape(shape))
        if not 0 < ratio <= 1:
            raise ValueError(f"compressed sensing needs 0 < ratio ≤ 1, got {ratio}")
        m = max(round(ratio * n), 1)
        super().__init__(shape, (m,))
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (n,), generator=generator) * 2.0 - 1
        rows = torch.randperm(n, generator=generator)[:m].sort().values
        self._constants = Constants(signs=signs.double(), rows=rows)

    def forward(self, x):
        flat = hartley(x.reshape(len(x), -1) * self._constants("signs", x), (-1,))
        return flat.index_select(1, self._constants("rows", x))

    def transpose(self, y):
        flat = y.new_zeros(len(y), math.prod(self.shape_in))
        flat = hartley(flat.index_copy(1, self._constants("rows", y), y), (-1,))
        return (flat * self._constants("signs", y)).reshape(len(y), *self.shape_in)

    def _svd(self):
        ones = torch.ones(self.shape_out, dtype=torch.float64)
        return SVD(ones, self.transpose, self.forward, lambda c: c, lambda y: y)
