"""DDPM++ with the VP SDE on scikit-learn's 8 x 8 digits: a first run of minutes on a CPU."""

from configs import defaults
from configs.families import ddpmpp, digits, on_best_device, vp


def get_config():
    """Return the configuration of the experiment."""
    config = digits(vp(ddpmpp(on_best_device(defaults.get_default_configs()))))
    config.sampling.steps = 300
    return config
