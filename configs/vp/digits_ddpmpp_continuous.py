"""DDPM++ with the VP SDE on scikit-learn's 8 x 8 digits: a first run of minutes on a CPU."""

from configs import defaults
from configs.families import ddpmpp, on_best_device, vp


def get_config():
    """Return the configuration of the experiment."""
    config = vp(ddpmpp(on_best_device(defaults.get_default_configs())))
    config.training.update(
        batch_size=64,
        n_iters=3600,
        snapshot_freq=3600,
        snapshot_freq_for_preemption=600,
        snapshot_sampling=False,
        eval_freq=200,
    )
    config.data.update(
        dataset="digits",
        image_size=8,
        num_channels=1,
        levels=17,
        random_flip=False,
        uniform_dequantization=True,
    )
    config.model.update(
        nf=32,
        ch_mult=(1, 2),
        num_res_blocks=2,
        attn_resolutions=(4,),
        dropout=0.0,
        ema_rate=0.998,
    )
    config.optim.update(lr=2e-3, warmup=200)
    config.sampling.steps = 300
    config.eval.update(
        begin_ckpt=-1,
        end_ckpt=-1,
        batch_size=300,
        enable_loss=True,
        enable_sampling=True,
        enable_bpd=True,
        num_samples=300,
        bpd_repeats=1,
        rtol=1e-4,
        atol=1e-4,
    )
    return config
