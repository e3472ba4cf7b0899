"""DDPM with the VP SDE on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ddpm, vp


def get_config():
    """Return the configuration of the experiment."""
    return ddpm(vp(get_default_configs()))
