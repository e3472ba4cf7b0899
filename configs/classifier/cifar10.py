"""A noise-conditional classifier of CIFAR-10, on the VP SDE; on other processes of the same noise
levels too."""

from configs.families import classifier
from configs.vp import cifar10_ddpmpp_continuous


def get_config():
    """Return the configuration of the experiment."""
    config = classifier(cifar10_ddpmpp_continuous.get_config())
    config.training.update(n_iters=150000, snapshot_freq=50000)
    config.model.update(nf=64, num_res_blocks=2, attn_resolutions=(16, 8))
    # Dhariwal & Nichol 2021, Table 12
    config.optim.update(optimizer="AdamW", lr=3e-4, weight_decay=0.05, warmup=1000)
    config.eval.update(begin_ckpt=-1, end_ckpt=-1)
    return config
