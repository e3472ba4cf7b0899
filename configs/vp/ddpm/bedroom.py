"""DDPM with the discrete VP SDE on LSUN bedroom at 256 x 256 pixels."""

from configs.default_lsun_configs import get_default_configs
from configs.families import ddpm_256


def get_config():
    """Return the configuration of the experiment."""
    config = ddpm_256(get_default_configs())
    config.data.category = "bedroom"
    return config
