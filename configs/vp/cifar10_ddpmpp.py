"""DDPM++ with the discrete VP SDE on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ddpmpp, vp


def get_config():
    """Return the configuration of the experiment."""
    config = vp(ddpmpp(get_default_configs()))
    config.training.continuous = False
    config.sampling.predictor = "ancestral_sampling"
    return config
