"""NCSN++ with the discrete VE SDE (SMLD) on CelebA at 64 x 64 pixels."""

from configs.default_celeba_configs import get_default_configs
from configs.families import ncsnpp, ve


def get_config():
    """Return the configuration of the experiment."""
    config = ve(ncsnpp(get_default_configs()))
    config.training.continuous = False
    config.model.embedding_type = "positional"
    config.model.sigma_begin = 90  # published and never read
    return config
