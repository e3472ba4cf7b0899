"""DDPM++ trained as EDM on scikit-learn's 8 x 8 digits: minutes on a CPU."""

from configs import defaults
from configs.families import ddpmpp, digits, edm, on_best_device


def get_config():
    """Return the configuration of the experiment."""
    config = digits(edm(ddpmpp(on_best_device(defaults.get_default_configs()))))
    config.model.sigma_data = 0.75  # the pixels' standard deviation
    return config
