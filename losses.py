"""Training: objectives, the optimizer, and one step that a non-finite number cannot spoil.

Denoising objectives are here; explicit, implicit, sliced and annealed ones in `losses_implicit.py`,
a classifier's in `losses_classifier.py`.
What their weights mean is written out in `losses_weights.py`; the optimizer is in
`losses_optim.py`, the step in `losses_step.py`. Their names are here too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import sde_lib
from losses_classifier import get_classifier_loss_fn
from losses_implicit import (
    get_annealed_loss_fn,
    get_explicit_loss_fn,
    get_implicit_loss_fn,
    times_from_config,
)
from losses_optim import get_optimizer, gradient_norm, optimization_manager
from losses_registry import get_objective, register_objective
from losses_step import EvaluationStep, Objective, TrainingStep
from losses_weights import check_weighting, own_error, relative_weight
from models.utils import get_model_fn, get_score_fn, unwrap
from parametrization import check_output
from randomness import normal
from sde_lib import expand

__all__ = [
    "EvaluationStep",
    "Objective",
    "TrainingStep",
    "get_annealed_loss_fn",
    "get_classifier_loss_fn",
    "get_ddpm_loss_fn",
    "get_explicit_loss_fn",
    "get_implicit_loss_fn",
    "get_loss_fn",
    "get_objective",
    "get_optimizer",
    "get_sde_loss_fn",
    "get_smld_loss_fn",
    "get_step_fn",
    "gradient_norm",
    "loss_fn_from_config",
    "optimization_manager",
    "register_objective",
    "step_fn_from_config",
]


def _reduce(losses: torch.Tensor, reduce_mean: bool) -> torch.Tensor:
    """Mean, or half the sum, over all axes but the first: (B, *) -> (B,)."""
    flat = losses.flatten(1)
    return flat.mean(dim=1) if reduce_mean else 0.5 * flat.sum(dim=1)


def _labels(batch: torch.Tensor, N: int, draws) -> torch.Tensor:
    """One of N discrete times for each image, (B,)."""
    if draws is None:
        return torch.randint(0, N, (batch.shape[0],), device=batch.device)
    return draws.randint("label", N).to(batch.device)


def get_sde_loss_fn(
    sde,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
    *,
    weighting: str = "",
    min_snr_gamma: float = 5.0,
    time_sampler=None,
) -> Objective:
    """loss_fn(model, batch, *, draws=None, **conditions): denoising score matching, any process.

        E_t E_z w(t) ‖s(x_t, t) + z/σ_t‖²,   t ~ U(eps, T)

    with w = σ² (Song et al. 2021, eq. 7), or w = g² which bounds the negative log-likelihood
    (Song, Durkan, Murray & Ermon 2021), or the weight that `weighting` names: the same error of
    the same network, whatever its parametrization, taken in the network's own output
    (`losses_weights.py`). `conditions`, such as class labels y, go to the network.

    Args:
      sde: the forward process.
      train: whether the network runs in training mode.
      reduce_mean: mean over a sample's numbers; else half their sum.
      continuous: whether the network takes continuous time.
      likelihood_weighting: use w = g². True is the original's default; False trains networks whose
        samples are better, as its configs do.
      eps: the smallest time.
      weighting: '' for the two above; 'dsm', 'likelihood', 'edm', 'min_snr', or an output's name
        such as 'noise', 'v' or 'velocity' (flow matching) for its unweighted squared error.
      min_snr_gamma: γ of 'min_snr'.
      time_sampler: other times than uniform ones on (eps, T) (`sde_lib.get_time_sampler`); where
        it is an importance sampler each loss is divided by its density over the uniform one's.

    Raises: ValueError for an eps outside [0, T), or an unknown weighting.
    """
    if weighting:
        check_weighting(weighting, min_snr_gamma)
    times = time_sampler or sde_lib.TimeSampler(sde, eps)
    named = weighting or ("likelihood" if likelihood_weighting else "dsm")

    def published(score_fn, x, z, std, t, conditions):
        std, score = expand(std, x), score_fn(x, t, **conditions)
        if not likelihood_weighting:
            return _reduce(torch.square(score * std + z), reduce_mean)
        g2 = sde.sde(torch.zeros_like(x), t)[1] ** 2
        return _reduce(torch.square(score + z / std), reduce_mean) * g2

    def in_own_output(score_fn, x_0, x, z, t, conditions):
        error, point = own_error(score_fn, x_0, z, x, t, conditions)
        weight = relative_weight(named, score_fn.parametrization.output, point, min_snr_gamma)
        return _reduce(torch.square(error), reduce_mean) * weight.to(error)

    def per_image(model, batch, *, draws=None, **conditions):
        score_fn = get_score_fn(sde, model, train=train, continuous=continuous)
        t = times(batch.shape[0], batch.device, draws)
        z = normal(batch, draws, "z")
        mean, std = sde.marginal_prob(batch, t)
        x = mean + expand(std, batch) * z
        if weighting or getattr(unwrap(model), "parametrization", None) is not None:
            losses = in_own_output(score_fn, batch, x, z, t, conditions)
        else:
            losses = published(score_fn, x, z, std, t, conditions)
        if times.importance:
            losses = losses / (times.density(t) * (times.T - times.eps)).to(losses)
        return losses, t

    return Objective(per_image)


def get_smld_loss_fn(vesde, train: bool, reduce_mean: bool = False) -> Objective:
    """loss_fn(model, batch, *, draws=None, **conditions): SMLD's loss over N noise levels
    (Song & Ermon 2019)."""
    if not isinstance(vesde, sde_lib.VESDE):
        raise ValueError(
            f"SMLD training needs a VESDE, got {type(vesde).__name__}; use continuous=True"
        )
    # Labels run from the largest σ down; their range is bound here, as the table is.
    sigmas, N = torch.flip(vesde.discrete_sigmas, dims=(0,)), vesde.N

    def per_image(model, batch, *, draws=None, **conditions):
        labels = _labels(batch, N, draws)
        sigma = expand(sde_lib.lookup(sigmas, labels), batch)
        noise = normal(batch, draws, "z") * sigma
        score = get_model_fn(model, train=train)(batch + noise, labels, **conditions)
        check_output(score, batch)
        losses = _reduce(torch.square(score * sigma + noise / sigma), reduce_mean)
        return losses, (N - 1 - labels) * (vesde.T / max(N - 1, 1))

    return Objective(per_image)


def get_ddpm_loss_fn(vpsde, train: bool, reduce_mean: bool = True) -> Objective:
    """loss_fn(model, batch, *, draws=None, **conditions): DDPM's loss over N times
    (Ho et al. 2020, eq. 14)."""
    if not isinstance(vpsde, sde_lib.VPSDE):
        raise ValueError(
            f"DDPM training needs a VPSDE, got {type(vpsde).__name__}; use continuous=True"
        )
    alpha, sigma, N = vpsde.sqrt_alphas_cumprod, vpsde.sqrt_1m_alphas_cumprod, vpsde.N

    def per_image(model, batch, *, draws=None, **conditions):
        labels = _labels(batch, N, draws)
        a, s = (expand(sde_lib.lookup(table, labels), batch) for table in (alpha, sigma))
        noise = normal(batch, draws, "z")
        x = a * batch + s * noise
        predicted = get_model_fn(model, train=train)(x, labels, **conditions)
        check_output(predicted, batch)
        losses = _reduce(torch.square(predicted - noise), reduce_mean)
        return losses, labels * (vpsde.T / max(N - 1, 1))

    return Objective(per_image)


def get_loss_fn(
    sde,
    train: bool,
    reduce_mean: bool,
    continuous: bool,
    likelihood_weighting: bool,
    eps: float,
    **options,
) -> Objective:
    """The loss that these settings name: continuous, or SMLD's or DDPM's for VE or VP.

    `options` are the keyword arguments of `get_sde_loss_fn`, for continuous times only.
    """
    if continuous:
        return get_sde_loss_fn(sde, train, reduce_mean, True, likelihood_weighting, eps, **options)
    if likelihood_weighting:
        raise ValueError("likelihood_weighting needs continuous=True; SMLD and DDPM have no g²")
    if options.get("weighting") or options.get("time_sampler"):
        raise ValueError(
            "a weighting or a time sampler needs continuous=True; SMLD and DDPM have their own"
        )
    if isinstance(sde, sde_lib.VESDE):
        return get_smld_loss_fn(sde, train, reduce_mean)
    if isinstance(sde, sde_lib.VPSDE):
        return get_ddpm_loss_fn(sde, train, reduce_mean)
    raise ValueError(
        f"discrete training needs VESDE or VPSDE, got {type(sde).__name__}; use continuous=True"
    )


@register_objective(name="denoising")
def _denoising(config, sde, train: bool) -> Objective:
    """Denoising score matching at the one noise level `training.sigma` (Vincent 2011)."""
    t = config.training
    if not t.sigma:
        raise ValueError(
            "training.objective='denoising' is at one noise level; set training.sigma, or leave "
            "the objective '' for all of them"
        )
    times, likelihood = times_from_config(config, sde), t.likelihood_weighting
    options = {"weighting": t.weighting, "min_snr_gamma": t.min_snr_gamma, "time_sampler": times}
    return get_sde_loss_fn(sde, train, t.reduce_mean, True, likelihood, t.eps, **options)


def loss_fn_from_config(config, sde, train: bool) -> Objective:
    """The objective that `config.training` describes.

    Raises: ValueError for settings that contradict each other, and an unknown objective.
    """
    t, m = config.training, config.model
    if t.objective:
        return get_objective(t.objective)(config, sde, train)
    if t.sigma:
        raise ValueError(
            f"training.sigma={t.sigma} is read by the objectives 'denoising', 'explicit', "
            "'implicit' and 'sliced'; set training.objective, or leave sigma 0.0"
        )
    if t.likelihood_weighting and t.weighting not in ("", "likelihood"):
        raise ValueError(
            f"training.likelihood_weighting=True and training.weighting={t.weighting!r} both "
            "choose the weight; set one of them"
        )
    if not t.continuous and m.parametrization:
        raise ValueError(
            f"model.parametrization={m.parametrization!r} needs training.continuous=True: SMLD's "
            "networks predict scores and DDPM's noise; leave it '' for them"
        )
    if not t.continuous and (t.time_sampler.lower() != "uniform" or t.stratified):
        raise ValueError(
            f"training.time_sampler={t.time_sampler!r} and stratified={t.stratified} need "
            "training.continuous=True: SMLD and DDPM draw one of N discrete times"
        )
    options = {"weighting": t.weighting, "min_snr_gamma": t.min_snr_gamma}
    options["time_sampler"] = sde_lib.get_time_sampler(config, sde) if t.continuous else None
    return get_loss_fn(
        sde, train, t.reduce_mean, t.continuous, t.likelihood_weighting, t.eps, **options
    )


def get_step_fn(
    sde,
    train: bool,
    optimize_fn: Callable | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
    *,
    eps: float = 1e-5,
    max_nonfinite: int = 100,
    loss_fn: Objective | None = None,
    precision: str = "",
    accumulate: int = 1,
) -> TrainingStep | EvaluationStep:
    """step_fn(state, batch, *, draws=None, **conditions) -> loss: one training step, or the EMA
    weights' loss.

    `state` has `model`, `optimizer`, `ema` and `step`. A loss or gradient that is not finite, in
    any process, leaves weights, optimizer and average as they were in all; it is counted in
    state['nonfinite'], and `max_nonfinite` of them in a row end the run. Training returns the mean
    over all processes, evaluation this process's. `step_fn.info` tells about the last step:
    losses, t and lambda of its images, grad_norm, lr.

    Args:
      sde, reduce_mean, continuous, likelihood_weighting, eps: as `get_sde_loss_fn`.
      train: training or evaluation.
      optimize_fn: of `optimization_manager`, or one's own.
      loss_fn: another objective, in place of the one that these arguments describe.
      precision: 'fp32', 'tf32', 'bf16', or '' for torch's own settings (`losses_step.py`).
      accumulate: micro-batches that the batch is cut into. With `draws` the gradient is that of
        the whole batch to rounding, and DistributedDataParallel reduces it once.

    Raises: FloatingPointError when non-finite steps persist.
    """
    if loss_fn is None:
        loss_fn = get_loss_fn(sde, train, reduce_mean, continuous, likelihood_weighting, eps)
    if not train:
        return EvaluationStep(sde, loss_fn, precision)
    return TrainingStep(
        sde,
        loss_fn,
        optimize_fn,
        max_nonfinite=max_nonfinite,
        precision=precision,
        accumulate=accumulate,
    )


def step_fn_from_config(config, sde, train: bool) -> TrainingStep | EvaluationStep:
    """The step that `config` describes: objective, times, optimizer, precision, micro-batches."""
    t = config.training
    return get_step_fn(
        sde,
        train,
        optimization_manager(config) if train else None,
        max_nonfinite=max(t.max_nonfinite, 1),
        loss_fn=loss_fn_from_config(config, sde, train),
        precision=t.precision,
        accumulate=t.grad_accumulation,
    )
