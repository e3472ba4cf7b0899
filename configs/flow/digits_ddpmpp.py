"""DDPM++ trained as a rectified flow on scikit-learn's 8 x 8 digits: minutes on a CPU."""

from configs import defaults
from configs.families import ddpmpp, digits, flow, on_best_device


def get_config():
    """Return the configuration of the experiment."""
    return digits(flow(ddpmpp(on_best_device(defaults.get_default_configs()))))
