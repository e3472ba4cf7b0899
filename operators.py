"""Linear measurement operators: A, its adjoint, pseudo-inverse and singular values.

    y = A x_0 + σ_y z

`get_operator(name, shape, **options)` makes one for samples of `shape`; `catalogue()` lists names
and options. The abstract class is in `operators_base.py`, super-resolution in
`operators_sampling.py`, blur, Fourier undersampling and compressed sensing in
`operators_fourier.py`, the Radon transform in `operators_tomography.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch

import arguments
from operators_base import (
    SVD,
    Composition,
    Constants,
    Operator,
    image_shape,
    mask_tensor,
    register_operator,
    registered,
    whole_shape,
)
from operators_fourier import MRI, Blur, CompressedSensing, GaussianBlur, MotionBlur, hartley
from operators_sampling import AveragePool, Bicubic
from operators_tomography import Radon

__all__ = [
    "DECOUPLING",
    "MRI",
    "SVD",
    "AveragePool",
    "Bicubic",
    "Blur",
    "Composition",
    "CompressedSensing",
    "GaussianBlur",
    "Grey",
    "Mask",
    "MotionBlur",
    "Operator",
    "Radon",
    "catalogue",
    "couple",
    "decouple",
    "get_operator",
    "hartley",
    "register_operator",
]


def get_operator(name: str, shape: Sequence[int], **options: Any) -> Operator:
    """The operator registered under `name`, for samples of `shape` without the batch axis.

    Raises: ValueError for an unknown name, and for an option that it does not have.
    """
    known = registered()
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"operator {name!r} is unknown; known: {', '.join(sorted(known))}")
    has = _options(known[name])
    unknown = sorted(set(options) - set(has))
    if unknown:
        raise ValueError(
            f"operator {name!r} has no option {', '.join(map(repr, unknown))}; its options are "
            f"{', '.join(has) or 'none'}"
        )
    for key, value in options.items():
        if type(has[key]) in _CHECKS:
            _CHECKS[type(has[key])](**{key: value})
    return known[name](shape, **options)


#: What options may be, by the type of their defaults.
_CHECKS = {int: arguments.whole, float: arguments.real, tuple: arguments.numbers_of}


def catalogue() -> dict[str, dict[str, Any]]:
    """Every operator's options and their defaults, by name."""
    return {name: _options(maker) for name, maker in sorted(registered().items())}


def _options(maker) -> dict[str, Any]:
    parameters = list(inspect.signature(maker).parameters.values())
    return {p.name: p.default for p in parameters[1:]}


# --- inpainting -------------------------------------------------------------------------------


class Mask(Operator):
    """The known numbers of x, as a vector: y = x[mask], (B, m).

    Args:
      shape: of one sample.
      mask: true or non-zero where known, of a shape that broadcasts to `shape`, such as (H, W) for
        images; or the name of a pattern of images, one of PATTERNS.
      share: of the pattern: the unknown share of the height and width ('centre'), of one of the two
        ('left', 'top'), or of the pixels ('random').
      seed: of 'random'.
    """

    def __init__(
        self,
        shape: Sequence[int],
        mask: Any = "centre",
        share: float = 0.5,
        seed: int = 0,
    ):
        shape = whole_shape(shape)
        if isinstance(mask, str):
            mask = mask_pattern(mask, shape, share, seed)
        mask = mask_tensor(mask)
        try:
            self.mask = mask.expand(shape).clone()
        except RuntimeError:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} does not broadcast to samples of shape "
                f"{shape}; expected (H, W), (1, H, W) or (C, H, W)"
            ) from None
        known = self.mask.reshape(-1).nonzero()[:, 0]
        if not len(known):
            raise ValueError("the mask leaves nothing known; it is true where x is known")
        super().__init__(shape, (len(known),))
        self._constants = Constants(known=known)

    def forward(self, x):
        return x.reshape(len(x), -1).index_select(1, self._constants("known", x))

    def transpose(self, y):
        flat = y.new_zeros(len(y), math.prod(self.shape_in))
        flat = flat.index_copy(1, self._constants("known", y), y)
        return flat.reshape(len(y), *self.shape_in)

    def _svd(self):
        ones = torch.ones(self.shape_out, dtype=torch.float64)
        return SVD(ones, self.transpose, self.forward, lambda c: c, lambda y: y)


#: Names of masks: what is unknown of an image.
PATTERNS = ("centre", "left", "top", "random")


def mask_pattern(name: str, shape: Sequence[int], share: float, seed: int = 0) -> torch.Tensor:
    """A mask (H, W), true where known; see `Mask`."""
    _, H, W = image_shape(shape, f"mask {name!r}")
    if name not in PATTERNS:
        raise ValueError(f"mask {name!r} is unknown; known: {', '.join(PATTERNS)}, or a tensor")
    if not 0 <= share < 1:
        raise ValueError(f"a mask needs an unknown share of 0 ≤ share < 1, got {share}")
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(H * W, generator=generator)
        return (order >= round(share * H * W)).reshape(H, W)
    mask = torch.ones(H, W, dtype=torch.bool)
    h, w = round(share * H), round(share * W)
    top, left = (H - h) // 2, (W - w) // 2
    holes = {
        "centre": (slice(top, top + h), slice(left, left + w)),
        "left": (slice(None), slice(0, w)),
        "top": (slice(0, h), slice(None)),
    }
    mask[holes[name]] = False
    return mask


# --- grey and colour --------------------------------------------------------------------------

#: score_sde's matrix that decouples grey from colour, in closed form: its constants are these to
#: 1.2e-7. Orthonormal; its first column is the grey direction.
DECOUPLING = torch.tensor(
    [
        [1 / math.sqrt(3), -2 / math.sqrt(6), 0.0],
        [1 / math.sqrt(3), 1 / math.sqrt(6), 1 / math.sqrt(2)],
        [1 / math.sqrt(3), 1 / math.sqrt(6), -1 / math.sqrt(2)],
    ],
    dtype=torch.float64,
)


def decouple(x: torch.Tensor) -> torch.Tensor:
    """RGB (B, 3, H, W) to one grey and two colour channels, x Mᵀ by an orthonormal M: the grey
    channel is (R + G + B)/√3 (Song et al. 2021, App. I.3)."""
    return _recombine(x, DECOUPLING)


def couple(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `decouple`."""
    return _recombine(x, DECOUPLING.T)


def _recombine(x, matrix):
    if x.ndim < 3 or x.shape[-3] != 3:
        raise ValueError(f"grey and colour need 3 channels, (B, 3, H, W), got {tuple(x.shape)}")
    return torch.einsum("...ihw,ij->...jhw", x, matrix.to(x))


class Grey(Operator):
    """A grey picture of a colour one: y = Σ_c w_c x_c, (B, 1, H, W).

    Args:
      shape: (C, H, W), C ≥ 2.
      weights: w, one for each channel; by default the mean of the channels. (0.299, 0.587, 0.114)
        is what photo software computes of RGB.
    """

    def __init__(self, shape: Sequence[int], weights: Sequence[float] = ()):
        C, H, W = image_shape(shape, "grey")
        weights = tuple(weights) or (1 / C,) * C
        if C < 2 or len(weights) != C or not any(weights):
            raise ValueError(
                f"grey needs images of several channels and a weight for each, got {C} channels "
                f"and weights {weights}"
            )
        super().__init__((C, H, W), (1, H, W))
        self._constants = Constants(w=torch.tensor(weights, dtype=torch.float64).reshape(C, 1, 1))
        self.norm = math.hypot(*weights)

    def forward(self, x):
        return (x * self._constants("w", x)).sum(1, keepdim=True)

    def transpose(self, y):
        return y * self._constants("w", y)

    def _svd(self):
        values = torch.full((math.prod(self.shape_out),), self.norm, dtype=torch.float64)
        return SVD(
            values,
            V=lambda c: self.transpose(c.reshape(len(c), *self.shape_out)) / self.norm,
            Vt=lambda x: self.forward(x).reshape(len(x), -1) / self.norm,
            U=lambda c: c.reshape(len(c), *self.shape_out),
            Ut=lambda y: y.reshape(len(y), -1),
        )


for _name, _maker in {
    "mask": Mask,
    "inpaint": Mask,
    "grey": Grey,
    "superres": AveragePool,
    "superres_bicubic": Bicubic,
    "deblur_gaussian": GaussianBlur,
    "deblur_motion": MotionBlur,
    "compressed_sensing": CompressedSensing,
    "mri": MRI,
    "ct": Radon,
}.items():
    register_operator(_maker, name=_name)
