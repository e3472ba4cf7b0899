"""DDPM with the discrete VE SDE (SMLD) on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ddpm, ve


def get_config():
    """Return the configuration of the experiment."""
    config = ddpm(ve(get_default_configs()))
    config.training.continuous = False
    return config
