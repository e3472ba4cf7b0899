"""DDPM++ that predicts v on the cosine VP process, on 8 x 8 digits: minutes on a CPU."""

from configs import defaults
from configs.families import cosine_v, ddpmpp, digits, on_best_device


def get_config():
    """Return the configuration of the experiment."""
    return digits(cosine_v(ddpmpp(on_best_device(defaults.get_default_configs()))))
