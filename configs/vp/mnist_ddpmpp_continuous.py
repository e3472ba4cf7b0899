"""DDPM++ with the VP SDE on MNIST at its own 28 x 28 pixels."""

from configs import defaults
from configs.families import ddpmpp, on_best_device, vp


def get_config():
    """Return the configuration of the experiment."""
    config = vp(ddpmpp(on_best_device(defaults.get_default_configs())))
    config.training.update(
        batch_size=64,
        n_iters=4000,
        snapshot_freq=2000,
        snapshot_freq_for_preemption=250,
        num_snapshot_samples=16,
    )
    config.data.update(
        dataset="MNIST",
        image_size=28,
        num_channels=1,
        random_flip=False,
        uniform_dequantization=True,
    )
    config.model.update(
        nf=32,
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        attn_resolutions=(7,),
        dropout=0.0,
        ema_rate=0.999,
    )
    config.optim.update(lr=1e-3, warmup=300)
    config.sampling.steps = 300
    config.eval.update(
        begin_ckpt=-1,
        end_ckpt=-1,
        batch_size=128,
        enable_sampling=True,
        num_samples=256,
        bpd_num_images=512,
        bpd_repeats=1,
        rtol=1e-4,
        atol=1e-4,
    )
    return config
