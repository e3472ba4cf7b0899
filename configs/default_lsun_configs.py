"""Defaults of the LSUN, FFHQ and CelebA-HQ experiments at 256 x 256 pixels."""

from configs.families import published


def get_default_configs():
    """Return every key, with the values that the LSUN experiments share."""
    config = published()
    config.training.update(batch_size=64, n_iters=2400001, snapshot_freq_for_preemption=5000)
    config.data.update(dataset="LSUN", image_size=256)
    config.model.update(sigma_max=378.0, num_scales=2000, dropout=0.0)
    config.sampling.snr = 0.075
    config.eval.update(begin_ckpt=50, end_ckpt=96, batch_size=512, enable_sampling=True)
    return config
