"""NCSN++ with the discrete VE SDE (SMLD) on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ncsnpp, ve


def get_config():
    """Return the configuration of the experiment."""
    config = ve(ncsnpp(get_default_configs()))
    config.training.continuous = False
    config.model.embedding_type = "positional"
    return config
