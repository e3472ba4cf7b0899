"""A noise-conditional classifier of MNIST at its own 28 x 28 pixels, on the VP SDE."""

from configs.families import classifier
from configs.vp import mnist_ddpmpp_continuous


def get_config():
    """Return the configuration of the experiment."""
    config = classifier(mnist_ddpmpp_continuous.get_config())
    config.model.update(ch_mult=(1, 2, 2), dropout=0.1)
    return config
