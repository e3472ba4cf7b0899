"""The dark pixels of a drawing of a bird on EDM's process, by Heun's method."""

from configs import defaults
from configs.families import edm, on_best_device, points


def get_config():
    """Return the configuration of the experiment."""
    config = points(edm(on_best_device(defaults.get_default_configs())), "image_density")
    config.data.image = "assets/bird.png"
    return config
