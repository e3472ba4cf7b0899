"""The ring by denoising score matching at one noise level, and Langevin dynamics there from points
that are uniform on the canvas: the samples are the drawing blurred by that noise."""

from configs import defaults
from configs.families import on_best_device, points, ve


def get_config():
    """Return the configuration of the experiment."""
    config = points(ve(on_best_device(defaults.get_default_configs())), "image_density")
    config.data.image = "assets/ring.png"
    config.training.update(
        objective="denoising", sigma=0.1, weighting="", time_sampler="uniform", stratified=False
    )
    config.sampling.update(method="langevin", corrector="ald", snr=0.2, steps=200)
    config.eval.enable_bpd = False
    return config
