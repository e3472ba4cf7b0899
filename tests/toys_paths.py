"""The processes that score_sde lacks, and every process's coefficients by hand."""

import math

import torch
import toys

import sde_lib

A, B = 0.002 ** (1 / 7), 80 ** (1 / 7)  # EDM's a and b
L, THETA = math.log(10), 1.5  # OUVE's ln(σ_max/σ_min) and stiffness
C = 0.05**2 * L / (L + THETA)


def new_sdes(N=1000):
    """The processes of sde_lib_paths, by name."""
    return {
        "cosine": sde_lib.CosineVP(N),
        "edm": sde_lib.EDM(0.002, 80, 7, N),
        "linear_ve": sde_lib.LinearVE(0.01, 50, N),
        "rectified_flow": sde_lib.RectifiedFlow(N),
        "ot_path": sde_lib.RectifiedFlow(N, sigma_min=0.01),
        "ouve": sde_lib.OUVE(THETA, 0.05, 0.5, N),
    }


def every_sde(N=1000):
    """Built-in processes, old and new, and a user's."""
    return toys.all_sdes(N) | new_sdes(N) | {"user": toys.UserSDE(N=N)}


def by_hand(name, t):
    """α, σ, α', σ' and g of a process at times t: numerics.md 2.0."""
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    if name == "cosine":
        k = math.pi / 2
        a, s = torch.cos(k * t), torch.sin(k * t)
        return a, s, -k * s, k * a, torch.sqrt(2 * k * s / a)
    if name == "edm":
        root = A + t * (B - A)
        s, ds = root**7, 7 * (B - A) * root**6
        return one, s, zero, ds, torch.sqrt(2 * s * ds)
    if name == "linear_ve":
        s = 0.01 + 49.99 * t
        return one, s, zero, 49.99 * one, torch.sqrt(2 * 49.99 * s)
    if name in ("rectified_flow", "ot_path"):
        low = 0.01 if name == "ot_path" else 0.0
        s = low + (1 - low) * t
        return 1 - t, s, -one, (1 - low) * one, torch.sqrt(2 * s / (1 - t))
    if name == "ouve":
        a = torch.exp(-THETA * t)
        s = torch.sqrt(C * (torch.exp(2 * L * t) - a**2))
        ds = C * (L * torch.exp(2 * L * t) + THETA * a**2) / s
        return a, s, -THETA * a, ds, math.sqrt(2 * L) * 0.05 * torch.exp(L * t)
    if name == "ve":
        s = 0.01 * 5000**t
        return one, s, zero, s * math.log(5000), s * math.sqrt(2 * math.log(5000))
    if name == "user":
        a, s = torch.exp(-4 * t), torch.sqrt(-torch.expm1(-8 * t))
        return a, s, -4 * a, 4 * a**2 / s, math.sqrt(8) * one
    integral, beta = 0.1 * t + 9.95 * t**2, 0.1 + 19.9 * t
    a, e = torch.exp(-integral / 2), -torch.expm1(-integral)
    if name == "vp":
        return a, e.sqrt(), -a * beta / 2, beta * a**2 / (2 * e.sqrt()), beta.sqrt()
    return a, e, -a * beta / 2, beta * a**2, torch.sqrt(beta * -torch.expm1(-2 * integral))
