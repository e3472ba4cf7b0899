"""Deep NCSN++ with the VE SDE on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import deep, ncsnpp, ve


def get_config():
    """Return the configuration of the experiment."""
    return deep(ve(ncsnpp(get_default_configs())))
