"""Random weights for Inception under which features and logits differ from image to image."""

import torch
from torch import nn

import evaluation_inception as inception


def pictures(n, channels=3, height=8, width=8, seed=0):
    """Noise: uint8 (n, channels, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=generator).byte()


def write_weights(path, seed=0):
    """Write random weights in pytorch-fid's form to `path`.

    Under torchvision's own initial weights every image has nearly the same features: any FID is
    about 0 and IS 1, whatever the metrics do. Here each layer keeps the variance (He et al. 2015),
    and the batch norms hold the moments of smooth and rough images, so that images stay apart.
    """
    torch.manual_seed(seed)
    net = inception.architecture()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    sizes = (1, 2, 4, 8, 28, 64)
    images = [pictures(1, height=n, width=n, seed=seed + n).float() for n in sizes]
    with torch.no_grad():
        net.train()(torch.cat([(inception.resize_tensorflow(x) - 128) / 128 for x in images]))
    torch.save(net.state_dict(), path)
    return path
