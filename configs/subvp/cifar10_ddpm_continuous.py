"""DDPM with the sub-VP SDE on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ddpm, subvp


def get_config():
    """Return the configuration of the experiment."""
    return ddpm(subvp(get_default_configs()))
