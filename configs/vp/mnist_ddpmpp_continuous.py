"""DDPM++ with the VP SDE on MNIST at its own 28 x 28 pixels."""

import ml_collections

from configs import defaults
from configs.families import ddpmpp, on_best_device, vp


def get_config() -> ml_collections.ConfigDict:
    """Return the configuration of the experiment."""
    config = vp(ddpmpp(on_best_device(defaults.get_default_configs())))
    config.training.update(
        batch_size=64, n_iters=20000, snapshot_freq=5000, snapshot_freq_for_preemption=1000
    )
    config.data.update(dataset="MNIST", image_size=28, num_channels=1, random_flip=False)
    config.model.update(
        nf=32,
        ch_mult=(1, 2, 2),
        num_res_blocks=2,
        attn_resolutions=(14,),
        dropout=0.1,
        ema_rate=0.999,
    )
    config.optim.update(lr=5e-4, warmup=500)
    config.eval.update(
        begin_ckpt=-1,
        end_ckpt=-1,
        batch_size=250,
        enable_loss=True,
        enable_sampling=True,
        enable_bpd=True,
        num_samples=1000,
        bpd_num_images=1000,
        bpd_repeats=1,
    )
    return config
