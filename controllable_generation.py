"""Conditional sampling with one unconditional network: what is known steers the samples.

Inpainting and colouring (Song et al. 2021, App. I) keep the state to its known part, in the
constrained loop of `controllable_generation_loop.py`; class-conditional sampling (section 5) adds
the gradient of a noise-conditional classifier, `controllable_generation_classes.py`, to the score.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from controllable_generation_classes import (
    classifier_accuracy,
    classifier_gradient,
    classifier_score,
    get_pc_conditional_sampler,
    guided_from_config,
)
from controllable_generation_loop import (
    Constraint,
    KnownPart,
    check_finite,
    get_constrained_sampler,
)
from models.utils import get_score_fn

__all__ = [
    "Constraint",
    "KnownPart",
    "classifier_accuracy",
    "classifier_gradient",
    "classifier_score",
    "get_constrained_sampler",
    "get_pc_colorizer",
    "get_pc_conditional_sampler",
    "get_pc_inpainter",
    "guided_from_config",
    "known_grey",
    "known_pixels",
]


def get_pc_inpainter(
    sde,
    predictor,
    corrector,
    inverse_scaler,
    snr,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
    *,
    device=None,
    **options,
) -> Callable:
    """pc_inpainter(model, data, mask) -> images whose known pixels are those of `data`, exactly.

    `data` (B, *) are images as the network sees them, and `mask`, of their shape or one that
    broadcasts to it, is 1 at known pixels and 0 at those to find; data may be anything there. The
    known pixels are noised to the time of the state, from T on, and are the data's at the end;
    the mean of the last step (`denoise`) is that of the unknown pixels (`KnownPart`).

    Args:
      sde ... eps: as `sampling.get_pc_sampler`; any predictor, any corrector.
      device: of the images; by default the network's, else that of `data`.
      options: steps, schedule, rho, dtype, generator, seeds, callback, progress.

    Raises: ValueError here for pairs that cannot run; before sampling, for a mask or data that do
      not fit.
    """
    settings = {"n_steps": n_steps, "probability_flow": probability_flow, "denoise": denoise}
    settings |= {"continuous": continuous, "eps": eps, "device": device}
    make = _maker(sde, predictor, corrector, inverse_scaler, snr, settings, options)

    def pc_inpainter(model, data, mask):
        _check_images(data)
        return make(model, data, lambda x: known_pixels(sde, x, mask))

    return pc_inpainter


def get_pc_colorizer(
    sde,
    predictor,
    corrector,
    inverse_scaler,
    snr,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
    *,
    device=None,
    **options,
) -> Callable:
    """pc_colorizer(model, gray_scale_img) -> images in colour with the same grey, to rounding.

    `gray_scale_img` is (B, 3, H, W) as the network sees it, or (B, 1, H, W); grey is the mean of
    the channels, which is the first coordinate of the published orthonormal basis
    (1, 1, 1)/√3, (−2, 1, 1)/√6, (0, 1, −1)/√2, over √3. Of a picture in colour only that is used.

    Args, and what is raised: as `get_pc_inpainter`.
    """
    settings = {"n_steps": n_steps, "probability_flow": probability_flow, "denoise": denoise}
    settings |= {"continuous": continuous, "eps": eps, "device": device}
    make = _maker(sde, predictor, corrector, inverse_scaler, snr, settings, options)

    def pc_colorizer(model, gray_scale_img):
        _check_images(gray_scale_img)
        if gray_scale_img.ndim != 4 or gray_scale_img.shape[1] not in (1, 3):
            raise ValueError(
                "expected grey images (B, 3, H, W) or (B, 1, H, W), got shape "
                f"{tuple(gray_scale_img.shape)}"
            )
        images = gray_scale_img.expand(-1, 3, -1, -1)
        return make(model, images, lambda x: known_grey(sde, x))

    return pc_colorizer


def known_pixels(sde, data: torch.Tensor, mask: torch.Tensor) -> KnownPart:
    """The constraint of inpainting: where mask is 1 the state is `data`, noised.

    Raises: ValueError for a mask that does not broadcast to the data's shape or is not 0 or 1, and
      for known pixels that are not finite.
    """
    mask = torch.as_tensor(mask)
    fits = mask.ndim <= data.ndim and all(
        n in (1, size) for n, size in zip(reversed(mask.shape), reversed(data.shape))
    )
    if not fits:
        raise ValueError(
            f"expected a mask of the data's shape {tuple(data.shape)}, or one that broadcasts to "
            f"it, such as (B, 1, H, W); got {tuple(mask.shape)}"
        )
    wrong = mask[(mask != 0) & (mask != 1)]
    if len(wrong):
        raise ValueError(
            f"expected a mask of 0 (unknown) and 1 (known), got {wrong[0].item():g}; binarise it, "
            "such as (mask > 0.5).float()"
        )
    known = mask.to(data.device).bool()
    known = known.expand(data.shape)
    data = torch.where(known, data, torch.zeros_like(data))
    check_finite(data, "known pixels")

    def project(x, other):
        return torch.where(known, other, x)

    return KnownPart(sde, data, project)


def known_grey(sde, data: torch.Tensor) -> KnownPart:
    """The constraint of colouring: the mean over the channels is that of `data`, noised.

    Raises: ValueError for data that are not finite.
    """
    check_finite(data, "grey images")

    def project(x, other):
        return x + (other - x).mean(dim=1, keepdim=True)

    return KnownPart(sde, data, project)


def _check_images(data) -> None:
    if not torch.is_tensor(data) or not data.is_floating_point() or not data.numel():
        kind = f"{data.dtype} of shape {tuple(data.shape)}" if torch.is_tensor(data) else type(data)
        raise ValueError(
            f"expected images as the network sees them, a floating-point tensor, got {kind}; "
            "scale them first (data_lib.get_data_scaler)"
        )


def _maker(sde, predictor, corrector, inverse_scaler, snr, settings, options) -> Callable:
    """make(model, data, constraint) -> samples of the data's shape; its settings checked now."""

    def sampler(shape, constrain, **chosen):
        arguments = (sde, shape, predictor, corrector, inverse_scaler, snr)
        return get_constrained_sampler(*arguments, constrain=constrain, **{**settings, **chosen})

    checked = {name: value for name, value in options.items() if name != "seeds"}
    sampler((1, 1, 1, 1), Constraint(), **checked)

    def make(model, data, constraint):
        score_fn = get_score_fn(sde, model, train=False, continuous=settings["continuous"])
        where = settings["device"] or score_fn.device or data.device
        wide = {"dtype": torch.promote_types(data.dtype, torch.float32), **options}
        hold = constraint(data.to(where))
        return sampler(data.shape, hold, **{**wide, "device": where})(score_fn)[0]

    return make
