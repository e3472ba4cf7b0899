"""Points in the plane as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

#: Half the side of the square that is shown, and the colour of a point, red, green and blue.
HALF_SIDE = 2.5
_INK = (0x25, 0x63, 0xEB)
#: A dot: the ink of one point on the pixels around its own.
_DOT = ((0.2, 0.5, 0.2), (0.5, 1.0, 0.5), (0.2, 0.5, 0.2))


def points_image(
    points: torch.Tensor | np.ndarray, size: int = 400, half_side: float = HALF_SIDE
) -> Image:
    """Dots on white on the square [-half_side, half_side]², y upwards: a Pillow image, RGB.

    Dots that overlap are darker; those outside of the square are left out.

    Shapes: (n, 2). Errors: ValueError for other shapes and values that are not finite.
    """
    from PIL import Image

    x = torch.as_tensor(points).detach().cpu().double()
    if x.ndim != 2 or x.shape[1] != 2 or not torch.isfinite(x).all():
        raise ValueError(
            f"expected finite points of shape (n, 2), got shape {tuple(x.shape)}; choose two "
            "coordinates, as in x[:, :2]"
        )
    column, row = (
        ((sign * x[:, i] / half_side + 1) / 2 * size).floor().long().numpy()
        for i, sign in enumerate((1, -1))
    )
    seen = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    ink = np.zeros((size + 2, size + 2))
    for i, weights in enumerate(_DOT):
        for j, weight in enumerate(weights):
            np.add.at(ink, (row[seen] + i, column[seen] + j), weight)
    # As many points hide as much as one dot would at 1,000 points.
    shade = 1 - np.exp(-1.2 * ink[1:-1, 1:-1, None] * min(1.0, (1000 / max(len(x), 1)) ** 0.5))
    return Image.fromarray((255 * (1 - shade) + np.array(_INK) * shade).astype(np.uint8))
