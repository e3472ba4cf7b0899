"""Checkouts of other libraries made for the tests: folders with the names that the adapters ask
for, whose code is this library's own."""

import sys
import types
from pathlib import Path

import losses
import models.ema
import models.ncsnpp
import models.utils
import sampling
import sde_lib

#: Where the files of a made checkout find what they hand on.
HOME = "made_for_benchmarks"


def score_sde(folder: Path) -> Path:
    """A folder that is known as score_sde_pytorch, with our modules under its names; a likelihood
    it has none."""
    network = types.SimpleNamespace(**vars(models.utils))
    network.create_model = lambda config: InDataParallel(models.utils.create_model(config))
    home = types.ModuleType(HOME)
    home.known = {
        "losses": losses,
        "models.utils": network,
        "models.ema": models.ema,
        "models.ncsnpp": models.ncsnpp,
        "sampling": sampling,
        "sde_lib": sde_lib,
    }
    sys.modules[HOME] = home
    for name in [*home.known, "likelihood", "op.upfirdn2d"]:
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != folder:
            (path.parent / "__init__.py").write_text("")
        handed = f"import {HOME} as home, sys\nknown = home.known.get({name!r})\n"
        handed += "globals().update(vars(known) if known else {})\n"
        path.write_text(handed + ("import op.upfirdn2d\n" if name == "models.ncsnpp" else ""))
    return folder


class InDataParallel(sys.modules["torch"].nn.Module):
    """A network inside another, as the original's are."""

    def __init__(self, network):
        super().__init__()
        self.module = network

    def forward(self, x, labels):
        return self.module(x, labels)


NETWORKS = """
import torch

class SongUNet(torch.nn.Module):
    def __init__(self, in_channels, out_channels, **options):
        super().__init__()
        self.options = options
        self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x, noise_labels, class_labels):
        assert noise_labels.shape == x.shape[:1]
        return torch.conv2d(x, self.conv.weight.to(x.dtype), padding=1)

class EDMPrecond(torch.nn.Module):
    def __init__(self, img_resolution, img_channels, model_type, use_fp16, **options):
        super().__init__()
        assert model_type == "SongUNet"
        self.model = SongUNet(img_channels, img_channels, **options)

    def forward(self, x, sigma):
        return self.model(x, sigma, None)
"""
DATASET = """
import pathlib
import numpy as np
from PIL import Image

class ImageFolderDataset:
    def __init__(self, path):
        self.paths = sorted(pathlib.Path(path).rglob("*.jpg"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return np.array(Image.open(self.paths[i])).transpose(2, 0, 1), 0
"""
GENERATE = """
import click

@click.command()
@click.option("--seeds", type=click.IntRange(min=1))
def main(seeds):
    raise RuntimeError

def edm_sampler(net, latents, num_steps=18):
    assert not net.training
    return net(latents, latents[:, 0, 0, 0])
"""


def edm(folder: Path) -> Path:
    """A folder that is known as EDM's, whose network is one convolution."""
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "__init__.py").write_text("")
    (folder / "training" / "networks.py").write_text(NETWORKS)
    (folder / "training" / "dataset.py").write_text(DATASET)
    (folder / "generate.py").write_text(GENERATE)
    return folder
