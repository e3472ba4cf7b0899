"""Objectives that are made of several rooms: the likelihood's bound, and exact scores of data."""

from __future__ import annotations

import data_lib_points
import losses
import losses_implicit
import sde_lib
from likelihood_objective import get_elbo_loss_fn


@losses.register_objective(name="explicit")
def explicit(config, sde, train: bool) -> losses.Objective:
    """Explicit score matching, of points whose score is known at every noise level.

    Raises: ValueError for data whose score is not known.
    """
    if not data_lib_points.is_points(config):
        raise ValueError(
            f"training.objective='explicit' needs data whose score is known, got "
            f"{config.data.dataset!r}; use 'implicit', 'sliced' or '' (denoising), or points, such "
            "as config.data.dataset='mixture'"
        )
    density = data_lib_points.get_density(config)
    options = losses_implicit.options_from_config(config, sde)
    return losses.get_explicit_loss_fn(sde, density.score, train, **options)


@losses.register_objective(name="elbo")
def elbo(config, sde, train: bool):
    """The variational bound (Huang et al. 2021; Song, Durkan, Murray & Ermon 2021).

    Raises: ValueError for a weight, which the bound does not leave open.
    """
    t = config.training
    if t.weighting or t.sigma:
        raise ValueError(
            f"training.objective='elbo' has a weight of its own and all times, got weighting="
            f"{t.weighting!r} and sigma={t.sigma}; leave them '' and 0.0"
        )
    return get_elbo_loss_fn(
        sde,
        train,
        eps=t.eps,
        form=t.elbo_form,
        time_sampler=sde_lib.get_time_sampler(config, sde),
        reduce_mean=t.reduce_mean,
        continuous=t.continuous,
    )
