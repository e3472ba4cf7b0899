"""The dequantizer that a configuration names, and the objective that trains one."""

from __future__ import annotations

import data_lib
import losses
from likelihood_dequantization import (
    UniformDequantizer,
    VariationalDequantizer,
    bits_loss,
    get_differentiable_elbo_fn,
    levels_of,
)
from run_lib_checks import NO_SCORE
from run_lib_state import weights_hash
from run_lib_trained import check_agreement, load_trained

#: What a dequantizer and a score model must agree on, and also to be trained on each other.
_IMAGES = ("data.dataset", "data.image_size", "data.num_channels", "data.levels")
_PROCESS = (
    "data.centered",
    "data.logit_alpha",
    "training.sde",
    "model.beta_min",
    "model.beta_max",
    "model.sigma_min",
    "model.sigma_max",
    "model.rho",
    "model.theta",
    "model.num_classes",
)


def get_dequantizer(config, device=None) -> UniformDequantizer | VariationalDequantizer:
    """The dequantizer of `config.eval.dequantization`: 'uniform', or 'variational', the averaged
    weights of `config.eval.dequantizer` (a workdir, for its newest checkpoint, or a checkpoint).

    Raises: ValueError, FileNotFoundError where there is none, or one for other images.
    """
    if config.eval.dequantization == "uniform":
        return UniformDequantizer()
    key = "eval.dequantizer"
    trained = load_trained(config.eval.dequantizer, key, str(device or config.device))
    if trained.config.training.objective != "dequantization":
        raise ValueError(
            f"config.{key}={config.eval.dequantizer!r}: expected a dequantizer, got a "
            f"{trained.config.model.name!r}; train one with --config.training.objective="
            "dequantization"
        )
    check_agreement(config, trained, key, _IMAGES)
    about = {"dequantizer": str(trained.path), "dequantizer_step": trained.step}
    return VariationalDequantizer(
        trained.model, {**about, "dequantizer_weights": weights_hash(trained.model)}
    )


@losses.register_objective(name="dequantization")
def dequantization_objective(config, sde, train: bool) -> losses.Objective:
    """Bits/dim of the ELBO under a dequantizer, to be trained on a frozen score model.

    The score model is that of `config.training.score_checkpoint`, with its averaged weights. Its
    ELBO is taken at one time of each image, drawn uniformly in log-SNR, and the gradient goes
    through the frozen network into the dequantizer. Batches are images of discrete values,
    x = scaler(k/(L − 1)).

    Raises: ValueError, FileNotFoundError for a score model that is not there, or does not fit.
    """
    key, data = "training.score_checkpoint", config.data
    if data.uniform_dequantization:
        raise ValueError(
            "training.objective='dequantization' learns the noise of dequantisation and got images "
            "with noise; use --config.data.uniform_dequantization=False"
        )
    score = load_trained(config.training.score_checkpoint, key, str(config.device))
    if score.config.training.objective in NO_SCORE:
        name = score.config.model.name
        raise ValueError(f"config.{key}: expected a score model, got a {name!r}, {score.path}")
    check_agreement(config, score, key, (*_IMAGES, *_PROCESS))
    scalers = {
        "scaler": data_lib.get_data_scaler(config),
        "inverse_scaler": data_lib.get_data_inverse_scaler(config),
        "levels": data.levels,
    }
    elbo = get_differentiable_elbo_fn(
        sde, eps=config.training.eps, continuous=score.config.training.continuous
    )

    def per_image(model, batch, *, draws=None, **conditions):
        if model.training != train:
            model.train(train)
        times = []

        def log_density(x, draws):
            logp, t = elbo(score.model, x, draws=draws, **conditions)
            times.append(t)
            return logp

        images = levels_of(batch, scalers["inverse_scaler"], data.levels)
        bits = bits_loss(model, images, log_density, draws=draws, **scalers)
        return bits, times[0]

    return losses.Objective(per_image)
