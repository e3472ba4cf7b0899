"""The Inception network of December 2015, and the three ways in which the literature feeds it.

The weights are those of TensorFlow's `inception-2015-12-05`, in one of two forms: NVIDIA's
TorchScript translation (what clean-fid downloads), or the state dictionary that pytorch-fid and
torch-fidelity publish. Nothing is fetched unless asked for.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import distributed
from files_reading import UNREADABLE, load_torch

SIZE, DIM = 299, 2048
#: SHA-256 of NVIDIA's inception-2015-12-05.pt. TorchScript is a program: no other one is run.
TORCHSCRIPT_SHA256 = ("f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",)
#: First digits of the SHA-256 of files whose authors publish it (in the file's name).
PUBLISHED_SHA256 = ("6726825d",)  # pytorch-fid: pt_inception-…pth; torch-fidelity: weights-…pth
REMEDY = (
    "set --config.eval.inception_path to a local inception-2015-12-05.pt (NVIDIA's TorchScript, "
    "which clean-fid uses) or pt_inception-2015-12-05-6726825d.pth (pytorch-fid's), or "
    "--config.eval.download_inception to let clean-fid download the first (91 MB)"
)

# Resizing


def resize_tensorflow(x: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Images at size x size as TensorFlow 1's resize_bilinear(align_corners=False) made them.

    Output pixel i lies at i·(n/size) of n input pixels, without the half-pixel shift that every
    later library has: y_i = x_l + w (x_min(l+1, n−1) − x_l), l = ⌊i n/size⌋, w = i n/size − l, the
    position in float32 as there. No antialiasing.

    Shapes: (B, C, H, W) float32 to (B, C, size, size), same units.
    """
    for dim in (3, 2):  # columns first: TensorFlow's order of rounding
        n = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device)
        position = position * torch.tensor(n / size, dtype=torch.float32, device=x.device)
        low = position.long()
        weight = (position - low).view(-1, *[1] * (3 - dim))
        left = x.index_select(dim, low)
        x = left + (x.index_select(dim, (low + 1).clamp(max=n - 1)) - left) * weight
    return x


def resize_clean(x: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Images at size x size by Pillow's bicubic filter, antialiased, each channel in float32.

    Clipped to [0, 255], not rounded. Source: Parmar, Zhang and Zhu 2022 (clean-fid).

    Shapes: (B, C, H, W) float32 in [0, 255] to (B, C, size, size).
    """
    from PIL import Image

    channels = x.detach().cpu().flatten(0, 1).numpy()
    resized = [
        np.asarray(Image.fromarray(channel).resize((size, size), resample=Image.Resampling.BICUBIC))
        for channel in channels
    ]
    stacked = torch.from_numpy(np.stack(resized)).clamp(0, 255)
    return stacked.view(*x.shape[:2], size, size).to(x.device)


def resize_pytorch(x: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Images at size x size by PyTorch's bilinear interpolation, without antialiasing."""
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


class Convention(NamedTuple):
    """How an image becomes the network's input: a resize, then (x − middle)/middle."""

    resize: Callable[[torch.Tensor], torch.Tensor]
    middle: float
    words: str


CONVENTIONS = {
    "legacy_tensorflow": Convention(
        resize_tensorflow, 128.0, "TensorFlow 1 bilinear to 299, no half-pixel shift; (x-128)/128"
    ),
    "clean": Convention(
        resize_clean, 128.0, "Pillow bicubic to 299, antialiased, in float32; (x-128)/128"
    ),
    "legacy_pytorch": Convention(
        resize_pytorch, 127.5, "PyTorch bilinear to 299, not antialiased; (x-127.5)/127.5"
    ),
}

# Weights


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def find_weights(path: str, download: bool = False) -> Path:
    """The file of weights at `path`; without one, where clean-fid's download is or will be.

    Raises: FileNotFoundError with the remedy where there is no file and none may be downloaded.
    """
    if path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"Inception's weights: expected a file at {file}; {REMEDY}")
        return file
    if not download:
        raise FileNotFoundError(f"Inception's weights are needed and no file is named; {REMEDY}")
    file = Path(torch.hub.get_dir()) / "checkpoints" / "inception-2015-12-05.pt"
    with distributed.together():
        if distributed.is_main() and not file.is_file():
            _download(file)
    return file


def _download(file: Path) -> None:
    """clean-fid's download, put in place only when it is whole."""
    from cleanfid.downloads_helper import check_download_inception

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        try:
            fetched = Path(check_download_inception(fpath=folder))
            _check_program(fetched, file_hash(fetched))
            fetched.replace(file)
        except OSError as error:
            raise OSError(
                f"Inception's weights could not be downloaded ({error}); {REMEDY}"
            ) from None


def check_hash(file: Path) -> str:
    """The file's SHA-256, held to the digits in its name where it has any (as torch.hub's do).

    Raises: ValueError where they differ: the file is damaged, or another one.
    """
    digest = file_hash(file)
    named = re.search(r"-([0-9a-f]{8,64})\.pth?$", file.name)
    if named and not digest.startswith(named[1]):
        raise ValueError(
            f"{file}: expected a SHA-256 that begins with {named[1]}, as its name says, got "
            f"{digest[:8]}…; the file is damaged: fetch it again"
        )
    return digest


def _check_program(file: Path, digest: str) -> None:
    if digest not in TORCHSCRIPT_SHA256:
        raise ValueError(
            f"{file}: expected NVIDIA's TorchScript of Inception, SHA-256 "
            f"{TORCHSCRIPT_SHA256[0][:12]}…, got {digest[:12]}…, a damaged file or another "
            f"program, which is not run; {REMEDY}"
        )


def _is_torchscript(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any("/code/" in name for name in archive.namelist())
    except UNREADABLE:  # the old torch.save, or damaged: torch.load says so
        return False


class _Scripted(nn.Module):
    """NVIDIA's translation: `layers` from a 299 x 299 image to the pooled features, `output`."""

    def __init__(self, file: Path, digest: str):
        super().__init__()
        _check_program(file, digest)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, not gone
            base = torch.jit.load(file, map_location="cpu").eval()
        if not hasattr(base, "layers"):
            raise ValueError(f"{file}: expected NVIDIA's TorchScript of Inception; {REMEDY}")
        self.layers = base.layers
        self.output = getattr(getattr(base, "output", None), "weight", None)

    def forward(self, x):
        pool = self.layers(x).flatten(1)
        return pool, None if self.output is None else pool @ self.output.T


class _Translated(nn.Module):
    """The architecture that pytorch-fid's state dictionary fits, of clean-fid's blocks."""

    def __init__(self, file: Path, digest: str):
        super().__init__()
        state = load_torch(file, "cpu", what="file of Inception's weights")
        self.net = architecture()
        try:
            self.net.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}: not the weights of pytorch-fid's Inception ({str(error)[:300]}); {REMEDY}"
            ) from None
        self.output = self.net.fc.weight
        self.net.fc = nn.Identity()

    def forward(self, x):
        pool = self.net(x)
        return pool, pool @ self.output.T


def architecture() -> Any:
    """Inception as TensorFlow ran it in 2015, with weights not yet loaded.

    torchvision's network, its pooling as TensorFlow's: padding does not count in the averages, and
    the last block takes a maximum. 1008 classes, no auxiliary ones.
    """
    from cleanfid import inception_pytorch as blocks
    from torchvision.models import inception_v3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for name, inputs, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        setattr(net, f"Mixed_{name}", blocks.FIDInceptionA(inputs, pool_features=pooled))
    for name, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(net, f"Mixed_{name}", blocks.FIDInceptionC(768, channels_7x7=channels))
    net.Mixed_7b = blocks.FIDInceptionE_1(1280)
    net.Mixed_7c = blocks.FIDInceptionE_2(2048)
    return net


class Inception(nn.Module):
    """Pooled features and logits of uint8 images, under one of CONVENTIONS.

    Logits are pool · Wᵀ without the output's bias, as the authors of the Inception Score computed
    them (and NVIDIA and torch-fidelity after them).

    Shapes: (B, 1 or 3, H, W) uint8 to pool (B, 2048) and logits (B, 1008); grey images are
    repeated to three channels.
    """

    dim = DIM

    def __init__(self, convention: str, file: Path):
        super().__init__()
        self.convention = CONVENTIONS[convention]
        self.weights_hash = check_hash(file)
        self.network = (_Scripted if _is_torchscript(file) else _Translated)(
            file, self.weights_hash
        )
        self.requires_grad_(False)
        self.protocol = {
            "weights": file.name,
            "weights_published": self.weights_hash.startswith(
                (*PUBLISHED_SHA256, *TORCHSCRIPT_SHA256)
            ),
            "resize": self.convention.words,
            "channels": "3; grey images repeated",
            "logits": "without the bias of the output",
        }

    def forward(self, images):
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"Inception needs 1 or 3 channels, got {images.shape[1]}; register an extractor of "
                "your own with evaluation_features.register_extractor"
            )
        x = self.convention.resize(images.float())
        middle = self.convention.middle
        return self.network(((x - middle) / middle).expand(-1, 3, -1, -1))
