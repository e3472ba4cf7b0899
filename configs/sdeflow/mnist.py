"""A diffusion as a variational flow on MNIST, at uniform times.

As published (github.com/CW-Huang/sdeflow-light, train_img.py, whose settings are one for both data
sets): VP with beta 0.1 to 20, a = g s, logits of pixels with alpha 0.05, Adam with lr 1e-4 and
nothing else, batch 64, 10 thousand steps, channels 32 x (1, 2, 2), 2 blocks, 1000 Euler-Maruyama
steps. Chosen here: the network is told 999 t, not t; times from 1e-5, not 0; the ELBO from many
times of an image in its score form, not one in its implicit form.
"""

from configs import defaults
from configs.families import on_best_device, sdeflow_mnist


def get_config():
    """Return the configuration of the experiment."""
    return sdeflow_mnist(on_best_device(defaults.get_default_configs()))
