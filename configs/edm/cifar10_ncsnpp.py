"""NCSN++ trained as EDM on CIFAR-10 (Karras et al. 2022, Table 7, unconditional).

As published: 200 million images in batches of 512, Adam with lr 1e-3 that rises over 10 million,
ln(sigma) ~ N(-1.2, 1.2^2), channels 128 x (2, 2, 2), dropout 0.13, an average of half-life 0.5
million images, Heun on 18 times. Unlike published: horizontal flips in place of their non-leaking
augmentation, which is not here; noise levels are cut to [0.002, 80], where all but 2e-5 of them
lie; the average warms up as score_sde's does; gradients that are not finite skip the step.
"""

from configs import defaults
from configs.families import edm_cifar10, ncsnpp, on_best_device, with_sigma_features


def get_config():
    """Return the configuration of the experiment."""
    return with_sigma_features(edm_cifar10(ncsnpp(on_best_device(defaults.get_default_configs()))))
