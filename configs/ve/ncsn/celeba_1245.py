"""NCSN with NCSNv2's techniques 1, 2, 4 and 5 on CelebA at 64 x 64 pixels."""

from configs.default_celeba_configs import get_default_configs
from configs.families import ncsn, techniques_124


def get_config():
    """Return the configuration of the experiment."""
    config = techniques_124(ncsn(get_default_configs()), sigma_max=90.0, num_scales=500, snr=0.128)
    config.model.ema_rate = 0.999
    return config
