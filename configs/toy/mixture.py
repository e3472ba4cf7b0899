"""A mixture of five Gaussians by flow matching: the straight path, its velocity, Heun's method."""

from configs import defaults
from configs.families import flow, on_best_device, points


def get_config():
    """Return the configuration of the experiment."""
    config = points(flow(on_best_device(defaults.get_default_configs())), "mixture")
    config.sampling.steps = 40
    config.training.update(weighting="velocity", time_sampler="uniform")
    config.model.update(parametrization="velocity", time_input="t*999", embedding_type="positional")
    return config
