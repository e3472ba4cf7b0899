"""Two moons on EDM's process, by Heun's method."""

from configs import defaults
from configs.families import edm, on_best_device, points


def get_config():
    """Return the configuration of the experiment."""
    return points(edm(on_best_device(defaults.get_default_configs())), "moons")
