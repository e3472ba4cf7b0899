"""Features: what a metric sees of an image. Extractors by name, built in or your own.

An extractor takes uint8 images (B, C, H, W) of any number and returns `Features`; its `protocol()`
says all that another person needs to compute the same numbers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from evaluation_inception import CONVENTIONS, Inception, file_hash, find_weights

#: Of the published configurations: the paper's convention.
DEFAULT = "legacy_tensorflow"
_EXTRACTORS: dict[str, Any] = {}


class Features(NamedTuple):
    """Pooled features (B, d) and, of networks that classify, logits (B, classes)."""

    pool: torch.Tensor
    logits: torch.Tensor | None = None


def register_extractor(network: Any = None, *, name: str | None = None):
    """Register an extractor of features under `name`, to be chosen by `config.eval.extractor`.

    It is called on uint8 images (B, C, H, W) and returns features (B, d), or a pair of features and
    logits. A function or an nn.Module is used as it is; a class is made by `cls()`, or by
    `cls(path)` where a file of weights is named. An attribute `protocol`, a dictionary, is added to
    the protocol of every number computed with it.
    """

    def register(network):
        key = (name or network.__name__).lower()
        if key in _EXTRACTORS:
            raise ValueError(f"an extractor named {key!r} is already registered: use another name")
        _EXTRACTORS[key] = network
        return network

    return register if network is None else register(network)


def get_extractor(
    name: str = DEFAULT,
    path: str = "",
    device: torch.device | str = "cpu",
    download: bool = False,
    *,
    batch_size: int = 64,
) -> Extractor:
    """The extractor called `name`, with its weights, checked and on `device`.

    Built in are `legacy_tensorflow` (the paper's), `clean`, `legacy_pytorch` (Inception under
    three conventions, see docs/evaluation.md) and `pixels`. `path` is a local file of weights;
    `download` lets clean-fid fetch Inception's where there is none. In a group of processes, all
    must call this.

    Errors: ValueError for an unknown name and for weights that are not what they should be,
    FileNotFoundError with the remedy where there are none.
    """
    key = name.lower()
    if key in CONVENTIONS:
        network: Any = Inception(key, find_weights(path, download))
    elif key not in _EXTRACTORS:
        known = sorted([*CONVENTIONS, *_EXTRACTORS])
        raise ValueError(
            f"eval.extractor={name!r} is unknown; known: {', '.join(known)}; register your own "
            "with evaluation_features.register_extractor"
        )
    else:
        network = _make(key, _EXTRACTORS[key], path)
    return Extractor(key, network, device, batch_size=batch_size)


def _make(name: str, network: Any, path: str) -> Any:
    if not inspect.isclass(network):
        if path:
            raise ValueError(
                f"the extractor {name!r} is not a class, so it takes no eval.inception_path, got "
                f"{path!r}; leave the path empty"
            )
        return network
    make: Any = network
    if not path:
        return make()
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"weights of {name!r}: expected a file at {file}")
    made = make(str(file))
    if not getattr(made, "weights_hash", ""):
        made.weights_hash = file_hash(file)
    return made


@register_extractor(name="pixels")
class Pixels(nn.Module):
    """x/255, flattened: for toy data, where no network is needed."""

    def __init__(self):
        super().__init__()
        self.protocol = {"resize": "none; x/255, flattened", "channels": "as they are"}

    def forward(self, images):
        return images.flatten(1).float() / 255


class Extractor:
    """A network that is asked for features in one way: uint8 in, evaluation mode, full precision.

    Attributes: `name`; `weights_hash`, SHA-256 of the file of weights, or else of the module's
    state ('' for a function, whose content cannot be known); `dim`, the number d of features, or 0
    where only a call can tell.
    """

    def __init__(
        self, name: str, network: Callable, device: torch.device | str = "cpu", *, batch_size=64
    ):
        self.name, self.device, self.batch_size = name, torch.device(device), batch_size
        if isinstance(network, nn.Module):
            network = network.to(self.device).eval()
        self.network = network
        self.dim: int = getattr(network, "dim", 0)
        self.weights_hash: str = getattr(network, "weights_hash", "") or state_hash(network)

    def protocol(self) -> dict[str, Any]:
        """What another person needs to compute the same features."""
        packages = ("torch", "torchvision", "clean-fid", "pillow", "numpy")
        return {
            "extractor": self.name,
            "weights_sha256": self.weights_hash,
            **getattr(self.network, "protocol", {}),
            "input": "uint8",
            "versions": {name: _version(name) for name in packages},
        }

    def __call__(self, images: torch.Tensor) -> Features:
        """Features of uint8 images (B, C, H, W) of 256 levels, on the extractor's device.

        Errors: ValueError for other types and shapes, and for features that are not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"the extractor {self.name!r} needs uint8 images (B, C, H, W), got {images.dtype} "
                f"of shape {tuple(images.shape)}; round images in [0, 1] by "
                "data_lib.quantize(x, config)"
            )
        parts = [self._part(part.to(self.device)) for part in images.split(self.batch_size)]
        pool = torch.cat([part.pool for part in parts])
        if not torch.isfinite(pool).all():
            raise ValueError(f"the extractor {self.name!r} gave NaN or infinite features")
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(pool, torch.cat(logits) if logits else None)

    @torch.no_grad()
    def _part(self, images: torch.Tensor) -> Features:
        # TensorFloat-32 moves features in the third digit, and FID with them.
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with (
                torch.autocast(self.device.type, enabled=False),  # the caller's
                torch.backends.cudnn.flags(
                    enabled=True, benchmark=False, deterministic=True, allow_tf32=False
                ),
            ):
                out = self.network(images)
        finally:
            torch.set_float32_matmul_precision(precision)
        pool, logits = out if isinstance(out, tuple) else (out, None)
        if not isinstance(pool, torch.Tensor) or pool.ndim != 2 or len(pool) != len(images):
            raise ValueError(
                f"the extractor {self.name!r} must return features ({len(images)}, d) of as many "
                f"images, got {tuple(getattr(pool, 'shape', ())) or type(pool).__name__}; flatten "
                "or pool them"
            )
        return Features(pool.detach(), None if logits is None else logits.detach())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def state_hash(network: Any) -> str:
    """SHA-256 of a module's parameters and buffers by name, '' for what is no module."""
    if not isinstance(network, nn.Module) or not network.state_dict():
        return ""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_bytes(images: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """uint8 images of `levels` levels spread over 0 … 255, as extractors expect them.

    x ↦ round(255 x/(levels − 1)); images of 256 levels stay as they are.
    """
    if levels == 256:
        return images
    return (images.float() * (255 / (levels - 1))).round().clamp(0, 255).byte()
