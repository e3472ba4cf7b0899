"""Deep NCSN++ with the sub-VP SDE on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import deep, ncsnpp, subvp


def get_config():
    """Return the configuration of the experiment."""
    return deep(subvp(ncsnpp(get_default_configs())))
