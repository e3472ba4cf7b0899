"""Defaults of the CelebA experiments at 64 x 64 pixels."""

from configs.families import published


def get_default_configs():
    """Return every key, with the values that the CelebA experiments share."""
    config = published()
    config.data.update(dataset="CELEBA", image_size=64)
    config.model.sigma_max = 90.0
    config.sampling.snr = 0.17
    config.eval.update(begin_ckpt=1, enable_sampling=True)
    return config
