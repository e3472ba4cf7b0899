"""NCSN++ with the VE SDE on LSUN bedrooms at 256 x 256 pixels."""

from configs.default_lsun_configs import get_default_configs
from configs.families import ncsnpp_256


def get_config():
    """Return the configuration of the experiment."""
    config = ncsnpp_256(get_default_configs())
    config.data.category = "bedroom"
    return config
