"""Pictures of the user's for `--mode control`: images and masks from files, checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import data_lib
from data_lib_files import EXTENSIONS, FORMATS, decode
from operators import PATTERNS, mask_pattern
from run_lib_journal import log
from run_lib_state import fixed_subset


def read_images(config, size: int = 0, channels: int = 0) -> tuple[list[str], torch.Tensor]:
    """Names and levels, uint8 (n, C, H, W), of the images that `config.control` names.

    They are `control.image`, a file or the first files of a folder by name, or the first held-out
    images of the data set.

    Args:
      size, channels: that images must have; 0 for those of the network.

    Raises: FileNotFoundError where there is none; ValueError for one that cannot be decoded, or
      does not fit and may not be made to (`control.fit`).
    """
    c, data = config.control, config.data
    size, channels = size or data.image_size, channels or data.num_channels
    if not c.image:
        if (size, channels) != (data.image_size, data.num_channels):
            raise ValueError(
                "control.measured needs the measurements' files; set --config.control.image"
            )
        held_out = data_lib.get_image_sets(config)[1]
        chosen = fixed_subset(len(held_out), c.num_images)
        return [f"held_out_{int(i):05d}" for i in chosen], held_out.take(chosen)
    found = _files(Path(c.image).expanduser())
    paths = found[: c.num_images]
    if len(found) > len(paths):
        log.warning("the first %d of %d images in %s; see control.num_images", len(paths),
                    len(found), c.image)  # fmt: skip
    images = [_decode(path, size, channels, c.fit) for path in paths]
    return _names(paths), _to_levels(torch.from_numpy(np.stack(images)), config)


def _names(paths: list[Path]) -> list[str]:
    """The files' names without their extensions, where that leaves them different."""
    stems = [path.stem for path in paths]
    return [p.name.replace(".", "_") if stems.count(p.stem) > 1 else p.stem for p in paths]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"control.image: expected an image or a folder of them at {path}")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise FileNotFoundError(f"control.image: expected images in the folder {path}, found none")
    return found


def _decode(path: Path, size: int, channels: int, fit: bool, recolour: bool = False):
    """The pixels uint8 (channels, size, size) of a file; with `recolour` in any colours."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            found, mode, transparent = opened.size, opened.mode, False
            if opened.has_transparency_data:
                lowest = opened.convert("RGBA").getchannel("A").getextrema()[0]
                transparent = lowest < 255  # type: ignore[operator]
        content = path.read_bytes()
        pixels = decode(content, channels, size)
        colours = decode(content, 3, size).astype(int) if channels == 1 else None
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ValueError(
            f"{path}: expected an image, got a file that cannot be decoded "
            f"({type(error).__name__}: {error})"
        ) from error
    if not fit and found != (size, size):
        raise ValueError(
            f"{path}: expected an image of {size} x {size} pixels, got {found[0]} x {found[1]}; "
            "resize it, or set --config.control.fit=True"
        )
    if transparent and not fit:
        raise ValueError(
            f"{path}: expected an image without transparent pixels, which would be laid on white; "
            "flatten it, or set --config.control.fit=True"
        )
    if colours is not None:  # grey may be saved with a palette, or with three equal channels
        wrong = np.ptp(colours, axis=0).max() > 2
    else:
        wrong = mode in ("1", "L", "LA", "F") or mode.startswith("I")
    if not fit and not recolour and wrong:
        wanted = "grey" if channels == 1 else "colour"
        raise ValueError(
            f"{path}: expected an image in {wanted}, got Pillow's mode {mode}; convert it, or set "
            "--config.control.fit=True"
        )
    return pixels


def _to_levels(images: torch.Tensor, config) -> torch.Tensor:
    """Bytes of 256 levels as the data's levels."""
    levels = config.data.levels
    if levels == 256:
        return images
    return (images.float() / 255 * (levels - 1)).round().to(torch.uint8)


def read_mask(config, shape: tuple[int, int, int], share: float = 0.5, seed: int = 0):
    """The mask `control.mask` (1, H, W): true where a pixel is known; white in a file.

    Args:
      shape: (C, H, W) of the images.
      share, seed: of a pattern, see `operators.mask_pattern`.

    Raises: FileNotFoundError, ValueError for a name or file that is none, for one of another size,
      and for one that knows all or nothing.
    """
    name, size = config.control.mask, config.data.image_size
    if name in PATTERNS:
        known = mask_pattern(name, shape, share, seed)
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"control.mask: expected an image file, or what is unknown as one of "
                f"{', '.join(PATTERNS)}; got {name!r}"
            )
        pixels = _decode(path, size, 1, config.control.fit, recolour=True)
        share = float(((pixels > 63) & (pixels < 192)).mean())
        if share > 0.1 and not config.control.fit:
            raise ValueError(
                f"control.mask: expected black and white, got {share:.0%} grey pixels in {path}; "
                "make it so, or set --config.control.fit=True to take light ones as known"
            )
        known = torch.from_numpy(pixels)[0] > 127
    if known.all() or not known.any():
        raise ValueError(
            f"control.mask={name!r} knows {'every' if known.all() else 'no'} pixel; white is known "
            "and black is to be found"
        )
    return known[None]
