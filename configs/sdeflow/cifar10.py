"""A diffusion as a variational flow on CIFAR-10, at uniform times.

As published (github.com/CW-Huang/sdeflow-light, train_img.py and README): VP with beta 0.1 to 20,
a = g s, logits of pixels with alpha 0.05, Adam with lr 1e-4 and nothing else, batch 128, 100
thousand steps, flips, channels 128 x (1, 2, 2, 2), 2 blocks, attention at 16, 1000 Euler-Maruyama
steps. Chosen here: the network is told 999 t, not t; times from 1e-5, not 0; the ELBO from many
times of an image in its score form, not one in its implicit form.
"""

from configs import defaults
from configs.families import on_best_device, sdeflow_cifar10


def get_config():
    """Return the configuration of the experiment."""
    return sdeflow_cifar10(on_best_device(defaults.get_default_configs()))
