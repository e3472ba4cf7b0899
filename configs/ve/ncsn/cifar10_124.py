"""NCSN with NCSNv2's techniques 1, 2 and 4 on CIFAR-10."""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ncsn, techniques_124


def get_config():
    """Return the configuration of the experiment."""
    return techniques_124(ncsn(get_default_configs()), sigma_max=50.0, num_scales=232, snr=0.176)
