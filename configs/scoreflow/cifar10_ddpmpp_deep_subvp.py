"""Deep DDPM++ with the sub-VP SDE on CIFAR-10 by maximum likelihood (ScoreFlow, Song et al. 2021).

As published (github.com/yang-song/score_flow, configs and README; likelihood_weighting and
importance weighting on): batch 128, 950 thousand steps, Adam with lr 2e-4 that rises over 5000,
gradients clipped to 1, dropout 0.1, average of decay 0.9999, smallest time 1e-2, flips, training
images as they are, evaluation of the last checkpoint on five uniform dequantisations. Their best
likelihoods are without flips: --config.data.random_flip=False.
"""

from configs.default_cifar10_configs import get_default_configs
from configs.families import ddpmpp, deep, maximum_likelihood, subvp


def get_config():
    """Return the configuration of the experiment."""
    config = maximum_likelihood(deep(subvp(ddpmpp(get_default_configs()))), eps=1e-2)
    config.eval.update(begin_ckpt=19, end_ckpt=19)
    return config
