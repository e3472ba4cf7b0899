"""NCSN on CelebA at 64 x 64 pixels."""

from configs.default_celeba_configs import get_default_configs
from configs.families import ncsn


def get_config():
    """Return the configuration of the experiment."""
    return ncsn(get_default_configs())
