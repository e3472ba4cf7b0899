"""NCSNv2 on CelebA at 64 x 64 pixels."""

from configs.default_celeba_configs import get_default_configs
from configs.families import ncsnv2, techniques_124


def get_config():
    """Return the configuration of the experiment."""
    return techniques_124(ncsnv2(get_default_configs()), sigma_max=90.0, num_scales=500, snr=0.128)
