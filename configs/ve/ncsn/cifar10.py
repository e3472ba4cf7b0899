"""NCSN on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ncsn


def get_config():
    """Return the configuration of the experiment."""
    return ncsn(get_default_configs())
