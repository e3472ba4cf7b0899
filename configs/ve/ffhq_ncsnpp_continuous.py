"""NCSN++ with the VE SDE on FFHQ at 1024 x 1024 pixels."""

from configs.default_lsun_configs import get_default_configs
from configs.families import ncsnpp_1024


def get_config():
    """Return the configuration of the experiment."""
    config = ncsnpp_1024(get_default_configs())
    config.training.reduce_mean = True
    config.data.dataset = "FFHQ"
    config.data.tfrecords_path = "/raid/song/ffhq-dataset/ffhq/ffhq-r10.tfrecords"
    return config
