"""A dequantizer for the VP SDE's DDPM++ on MNIST.

First train `configs/vp/mnist_ddpmpp_continuous.py`; then this, with
`--config.training.score_checkpoint` the workdir of that; then evaluate that with
`--config.eval.dequantization=variational --config.eval.dequantizer` the workdir of this.
"""

from configs.families import dequantizer
from configs.vp import mnist_ddpmpp_continuous


def get_config():
    """Return the configuration of the experiment."""
    config = dequantizer(mnist_ddpmpp_continuous.get_config())
    config.training.n_iters = 2000
    config.model.update(nf=32, couplings=4, ema_rate=0.99)
    config.optim.update(lr=1e-3, warmup=100, schedule="cosine")
    return config
