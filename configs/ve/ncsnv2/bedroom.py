"""NCSNv2 on LSUN bedroom at 128 x 128 pixels."""

from configs.default_lsun_configs import get_default_configs
from configs.families import ncsnv2, techniques_124


def get_config():
    """Return the configuration of the experiment."""
    config = techniques_124(
        ncsnv2(get_default_configs()), sigma_max=190.0, num_scales=1086, snr=0.095
    )
    config.sampling.n_steps_each = 3
    config.training.batch_size = 128
    config.data.update(image_size=128, category="bedroom")
    config.model.update(name="ncsnv2_128", ema_rate=0.9999)
    return config
