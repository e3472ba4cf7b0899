"""NCSN++ with the discrete VP SDE on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ncsnpp, vp


def get_config():
    """Return the configuration of the experiment."""
    config = vp(ncsnpp(get_default_configs()))
    config.training.continuous = False
    config.sampling.predictor = "reverse_diffusion"
    return config
