"""Divergence of a vector field by random probes: ∇·f ≈ vᵀ (∂f/∂x) v (Hutchinson 1990)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sde_lib import sum_except_batch


def rademacher(x: torch.Tensor, draws=None) -> torch.Tensor:
    """A probe of ±1, of x's shape and dtype; zero variance where the Jacobian is diagonal."""
    if draws is None:
        return torch.randint_like(x, low=0, high=2) * 2 - 1
    return (draws.rand("probe", x.shape[1:]) < 0.5).to(x) * 2 - 1


def gaussian(x: torch.Tensor, draws=None) -> torch.Tensor:
    """A probe of standard normal numbers, of x's shape and dtype."""
    return torch.randn_like(x) if draws is None else draws.randn("probe", x.shape[1:]).to(x)


#: Probe distributions by name; each has mean 0 and covariance I. Called as probe(x, draws), with
#: a `randomness.Draws` of the images, or None for torch's own generator.
PROBES: dict[str, Callable] = {"rademacher": rademacher, "gaussian": gaussian}


def get_probe(name: str) -> Callable:
    """The probe distribution `name`, in any case of letters."""
    if name.lower() not in PROBES:
        raise ValueError(f"hutchinson_type {name!r} is unknown; known: {sorted(PROBES)}")
    return PROBES[name.lower()]


def value_and_divergence(fn: Callable, x: torch.Tensor, probe: torch.Tensor):
    """f(x) and vᵀ (∂f/∂x) v by one forward and one backward pass; no gradient of weights.

    Shapes: x, probe and f(x) are (B, *), the divergence is (B,).
    """
    # In inference mode autograd records nothing, and the divergence would be zero.
    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() if x.is_inference() else x).detach().requires_grad_(True)
        value = fn(x)
        if not value.requires_grad:
            return value, value.new_zeros(len(x))
        (vjp,) = torch.autograd.grad(value, x, probe, materialize_grads=True)
    return value.detach(), sum_except_batch(vjp * probe)
