"""A diffusion as a variational flow on the Swiss roll, at uniform times.

As in the experiments on images: VP with beta 0.1 to 20, a = g s, Adam with lr 1e-4. Chosen here:
the perceptron, which is told ln(sigma), batches and steps.
"""

from configs import defaults
from configs.families import on_best_device, points, sdeflow


def get_config():
    """Return the configuration of the experiment."""
    config = sdeflow(points(on_best_device(defaults.get_default_configs()), "swissroll"))
    config.model.embedding_type = "fourier"
    return config
