"""A noise-conditional classifier of scikit-learn's 8 x 8 digits on the VP SDE: minutes on a CPU."""

from configs.families import classifier
from configs.vp import digits_ddpmpp_continuous


def get_config():
    """Return the configuration of the experiment."""
    config = classifier(digits_ddpmpp_continuous.get_config())
    config.training.update(n_iters=2000, snapshot_freq=2000)
    config.model.update(dropout=0.2)
    return config
