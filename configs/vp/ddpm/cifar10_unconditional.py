"""DDPM that is not told the time, with the discrete VP SDE on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ddpm, discrete_vp


def get_config():
    """Return the configuration of the experiment."""
    config = ddpm(discrete_vp(get_default_configs()))
    config.model.conditional = False
    return config
