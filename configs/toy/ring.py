"""The dark pixels of a drawing of a ring on the VE process, by predictor and corrector."""

from configs import defaults
from configs.families import on_best_device, points, ve


def get_config():
    """Return the configuration of the experiment."""
    config = points(ve(on_best_device(defaults.get_default_configs())), "image_density")
    config.data.image = "assets/ring.png"
    config.sampling.update(corrector="ald", snr=0.2, steps=40, schedule="logsnr")
    return config
