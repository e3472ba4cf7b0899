"""NCSN++ trained as EDM on scikit-learn's 8 x 8 digits: minutes on a CPU."""

from configs import defaults
from configs.families import digits, edm, ncsnpp, on_best_device, with_sigma_features


def get_config():
    """Return the configuration of the experiment."""
    config = digits(
        with_sigma_features(edm(ncsnpp(on_best_device(defaults.get_default_configs()))))
    )
    config.model.sigma_data = 0.75  # the pixels' standard deviation
    return config
