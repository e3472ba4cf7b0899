"""Deep DDPM++ with the sub-VP SDE on CIFAR-10."""

import ml_collections

from configs.default_cifar10_configs import get_default_configs
from configs.families import ddpmpp, deep, subvp


def get_config() -> ml_collections.ConfigDict:
    """Return the configuration of the experiment."""
    return deep(subvp(ddpmpp(get_default_configs())))
