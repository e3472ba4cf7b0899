"""NCSN++ with the VE SDE on CelebA-HQ at 1024 x 1024 pixels."""

from configs.default_lsun_configs import get_default_configs
from configs.families import ncsnpp_1024


def get_config():
    """Return the configuration of the experiment."""
    config = ncsnpp_1024(get_default_configs())
    config.data.dataset = "CelebAHQ"
    config.data.tfrecords_path = "/atlas/u/yangsong/celeba_hq/-r10.tfrecords"
    return config
