"""NCSN++ with the VE SDE on CelebA-HQ at 256 x 256 pixels."""

from configs.default_lsun_configs import get_default_configs
from configs.families import ncsnpp_256


def get_config():
    """Return the configuration of the experiment."""
    config = ncsnpp_256(get_default_configs())
    config.data.dataset = "CelebAHQ"
    config.data.tfrecords_path = "/home/yangsong/ncsc/celebahq/r08.tfrecords"
    config.model.sigma_max = 348.0
    return config
