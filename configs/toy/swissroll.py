"""The Swiss roll on the VP process, by ancestral sampling."""

from configs import defaults
from configs.families import on_best_device, points, vp


def get_config():
    """Return the configuration of the experiment."""
    config = points(vp(on_best_device(defaults.get_default_configs())), "swissroll")
    config.sampling.update(predictor="ancestral_sampling", steps=64, schedule="logsnr")
    return config
