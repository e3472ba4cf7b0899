"""DDPM with the discrete VP SDE on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ddpm, discrete_vp


def get_config():
    """Return the configuration of the experiment."""
    return ddpm(discrete_vp(get_default_configs()))
