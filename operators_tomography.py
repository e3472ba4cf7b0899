"""Computed tomography: the Radon transform of small images, by a sparse matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from operators_base import SVD, Constants, Operator, dense_svd, image_shape

Tensor = torch.Tensor

#: The largest image whose singular values are computed.
PIXELS = 64 * 64


def radon_matrix(size: tuple[int, int], angles: Tensor, detectors: int) -> Tensor:
    """Line integrals of an image, (angles · detectors, H · W), sparse, float64.

    The ray of a detector at distance s from the centre, at angle θ, runs through the points
    s (cos θ, sin θ) + r (−sin θ, cos θ) in (x right, y up); the image is interpolated linearly at
    points one pixel apart, and is 0 outside. Lengths are in units of the image's longer side.
    """
    H, W = size
    reach = math.ceil(math.hypot(H, W) / 2)
    s = torch.arange(detectors, dtype=torch.float64) - (detectors - 1) / 2
    # Where a ray is upright or level its points fall on the pixels themselves.
    r = torch.arange(-reach, reach + 1, dtype=torch.float64) + ((max(H, W) - 1) / 2 % 1)
    rows, columns, weights = [], [], []
    for i, theta in enumerate(torch.deg2rad(angles.double())):
        cos, sin = torch.cos(theta), torch.sin(theta)
        x = (W - 1) / 2 + s.unsqueeze(1) * cos - r * sin
        y = (H - 1) / 2 - s.unsqueeze(1) * sin - r * cos
        ray = (i * detectors + torch.arange(detectors)).unsqueeze(1).expand(x.shape)
        for dy in (0, 1):
            for dx in (0, 1):
                px, py = x.floor() + dx, y.floor() + dy
                w = (1 - (x - px).abs()) * (1 - (y - py).abs())
                inside = (px >= 0) & (px < W) & (py >= 0) & (py < H) & (w > 0)
                rows.append(ray[inside])
                columns.append((py * W + px)[inside].long())
                weights.append(w[inside] / max(H, W))
    indices = torch.stack([torch.cat(rows), torch.cat(columns)])
    shape = (len(angles) * detectors, H * W)
    return torch.sparse_coo_tensor(
        indices, torch.cat(weights), shape, check_invariants=True
    ).coalesce()


class Radon(Operator):
    """Line integrals of every channel at several angles, (B, C, angles, detectors).

    Made for small images: singular values up to 64 x 64, which costs 10 to 100 s once there and
    nothing at 32 x 32; by conjugate gradients beyond.

    Args:
      shape: (C, H, W).
      angles: their number, evenly spaced in [0°, span).
      span: in degrees; less than 180 is limited-angle tomography.
      detectors: one pixel apart; by default as many as see the whole image.
    """

    def __init__(
        self, shape: Sequence[int], angles: int = 30, span: float = 180.0, detectors: int = 0
    ):
        C, H, W = image_shape(shape, "ct")
        if not 1 <= angles <= 10_000 or not 0 < span <= 180 or not 0 <= detectors <= 100_000:
            raise ValueError(
                f"ct needs 1 to 10,000 angles, a span of 0 to 180 degrees and detectors ≥ 0, "
                f"got {angles}, {span} and {detectors}"
            )
        detectors = detectors or math.ceil(math.hypot(H, W))
        super().__init__((C, H, W), (C, angles, detectors))
        theta = torch.arange(angles, dtype=torch.float64) * (span / angles)
        matrix = radon_matrix((H, W), theta, detectors)
        self._constants = Constants(A=matrix, At=matrix.t().coalesce())

    def _apply(self, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        planes = x.reshape(len(x) * self.shape_in[0], -1)
        return torch.sparse.mm(self._constants(name, x), planes.T).T.reshape(len(x), *shape)

    def forward(self, x):
        return self._apply("A", x, self.shape_out)

    def transpose(self, y):
        return self._apply("At", y, self.shape_in)

    def _svd(self):
        C, H, W = self.shape_in
        if H * W > PIXELS:
            return None
        matrix = self._constants("A", torch.zeros((), dtype=torch.float64)).to_dense()
        plane = dense_svd(matrix, (H, W), self.shape_out[1:])

        def by_channel(fn, shape):
            return lambda v: fn(v.reshape(len(v) * C, *v.shape[2:])).reshape(len(v), *shape)

        def coefficients(c):
            return c.reshape(len(c), C, -1)

        return SVD(
            plane.values.repeat(C),
            V=lambda c: by_channel(plane.V, self.shape_in)(coefficients(c)),
            Vt=by_channel(plane.Vt, (-1,)),
            U=lambda c: by_channel(plane.U, self.shape_out)(coefficients(c)),
            Ut=by_channel(plane.Ut, (-1,)),
        )
