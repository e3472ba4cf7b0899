"""DDPM++ trained as a rectified flow on CIFAR-10 (Liu et al. 2023; Lipman et al. 2023).

The settings are those that flow matching is commonly run with on CIFAR-10 (Tong et al. 2024): Adam
with lr 2e-4 that rises over 5000 steps, batch 128, 400 thousand steps, gradients clipped to 1,
dropout 0.1, average of decay 0.9999, uniform times. Their network is another U-Net, of about half
the size; noise and images are paired at random here, not by optimal transport.
"""

from configs import defaults
from configs.families import ddpmpp, flow, on_best_device


def get_config():
    """Return the configuration of the experiment."""
    config = flow(ddpmpp(on_best_device(defaults.get_default_configs())))
    config.training.n_iters = 400000
    config.model.update(dropout=0.1, ema_rate=0.9999)
    config.optim.update(lr=2e-4, warmup=5000, grad_clip=1.0)
    config.eval.update(begin_ckpt=1, end_ckpt=8)
    return config
