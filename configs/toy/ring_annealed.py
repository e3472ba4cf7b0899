"""The ring as NCSN would do it: sixteen noise levels, and annealed Langevin dynamics."""

from configs import defaults
from configs.families import on_best_device, points, ve


def get_config():
    """Return the configuration of the experiment."""
    config = points(ve(on_best_device(defaults.get_default_configs())), "image_density")
    config.data.image = "assets/ring.png"
    config.training.update(
        objective="annealed", weighting="", time_sampler="uniform", stratified=False
    )
    config.model.update(num_scales=16, sigma_min=0.02, sigma_max=4.0)
    config.sampling.update(predictor="none", corrector="ald", snr=0.4, n_steps_each=10)
    return config
