"""NCSN with NCSNv2's technique 5 on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ncsn


def get_config():
    """Return the configuration of the experiment."""
    config = ncsn(get_default_configs())
    config.model.ema_rate = 0.999
    return config
