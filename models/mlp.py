"""A perceptron for points, told of the time: a plain field, or the gradient of a potential."""

from __future__ import annotations

import math

import torch
from torch import nn

from .layers import Dropout, dense, get_act, get_timestep_embedding
from .layerspp import GaussianFourierProjection
from .utils import register_model


class _Time(nn.Module):
    """Labels (B,) -> (B, width): 'fourier' features of ln label, or 'positional' ones of it."""

    def __init__(self, config, width: int):
        super().__init__()
        m = config.model
        if m.embedding_type not in ("fourier", "positional"):
            raise ValueError(
                f"model.embedding_type: expected 'fourier' or 'positional', got "
                f"{m.embedding_type!r}"
            )
        self.width = width
        self.fourier = None
        if m.embedding_type == "fourier":
            self.fourier = GaussianFourierProjection(width // 2, m.fourier_scale)
        self.first, self.act = dense(2 * (width // 2), width), get_act(config)
        self.second = dense(width, width)

    def forward(self, labels):
        if self.fourier is not None:
            features = self.fourier(torch.log(labels))
        else:
            features = get_timestep_embedding(labels, 2 * (self.width // 2))
        return self.second(self.act(self.first(features.to(self.first.weight.dtype))))


class _Block(nn.Module):
    """h + W₂ act(W₁ act(h) + U temb); W₂ begins at zero, so that the block begins as nothing."""

    def __init__(self, config, width: int):
        super().__init__()
        self.act = get_act(config)
        self.first, self.second = dense(width, width), dense(width, width, 0.0)
        self.time = dense(width, width) if config.model.conditional else None
        self.dropout = Dropout(config.model.dropout)

    def forward(self, h, temb):
        y = self.first(self.act(h))
        if self.time is not None:
            y = y + self.time(temb)
        return h + self.second(self.dropout(self.act(y)))


class _Coordinates(nn.Module):
    """x (B, dim) -> [x, sin(2π W x), cos(2π W x)] with `count` random frequencies W ~ N(0, scale²),
    never trained, which let a small network be sharp (Tancik et al. 2020)."""

    def __init__(self, dim: int, count: int, scale: float):
        super().__init__()
        self.W = nn.Parameter(torch.randn(count, dim) * scale, requires_grad=False)

    def forward(self, x):
        phases = 2 * math.pi * x @ self.W.T
        return torch.cat([x, phases.sin(), phases.cos()], dim=1)


class _Network(nn.Module):
    """Points (B, dim), labels (B,) -> (B, out)."""

    def __init__(self, config, dim: int, out: int, bias: bool):
        super().__init__()
        m = config.model
        self.time = _Time(config, m.nf) if m.conditional else None
        self.coordinates = None
        if m.coordinate_scale:
            self.coordinates = _Coordinates(dim, m.nf // 2, m.coordinate_scale)
        self.first = dense(dim + (2 * (m.nf // 2) if m.coordinate_scale else 0), m.nf)
        self.blocks = nn.ModuleList(_Block(config, m.nf) for _ in range(m.num_res_blocks))
        self.act = get_act(config)
        self.last = dense(m.nf, out, m.init_scale)
        if not bias:
            self.last.register_parameter("bias", None)

    def forward(self, x, labels):
        temb = None if self.time is None else self.time(labels)
        h = self.first(x if self.coordinates is None else self.coordinates(x))
        for block in self.blocks:
            h = block(h, temb)
        return self.last(self.act(h))


@register_model(name="mlp")
class MLP(nn.Module):
    """A residual perceptron: x (B, *), labels (B,) -> x's shape and type, also under autocast.

    Of `config.model` it reads `nf` (width), `num_res_blocks` (depth), `nonlinearity`, `dropout`,
    `embedding_type` and `fourier_scale` (of the labels), `coordinate_scale` (of random frequencies
    of x; 0 = none), `conditional` (False: it is not told the time), `scale_by_sigma` (divide by the
    labels, which are σ), `init_scale` and `energy`; the dimension of the data is
    `data.num_channels` × `data.image_size`².

    With `energy` the output is the gradient ∇φ(x, t) of a potential, a network of one output, so
    that the field has no curl. Whatever the output means, the score is a part of x plus a part of
    the output, with factors of t alone, and has none either: s = −∇E(x, t). Gradients of the
    weights, divergences, and no_grad work as for any network.

    Raises: ValueError, when called, where x or the labels do not have these shapes.
    """

    def __init__(self, config):
        super().__init__()
        m, data = config.model, config.data
        self.dim = dim = data.num_channels * data.image_size**2
        self.config = config
        self.scale_by_sigma, self.energy = m.scale_by_sigma, m.energy
        # The gradient of a potential does not see a constant.
        self.net = _Network(config, dim, 1 if self.energy else dim, bias=not self.energy)

    def forward(self, x, labels):
        if math.prod(x.shape[1:]) != self.dim or labels.shape != x.shape[:1]:
            raise ValueError(
                f"MLP needs samples of {self.dim} numbers and one label each, got x of shape "
                f"{tuple(x.shape)} and labels of shape {tuple(labels.shape)}; set "
                "data.num_channels and data.image_size, or use labels.expand(len(x))"
            )
        output = (self._gradient if self.energy else self.net)(x.flatten(1), labels)
        output = output.reshape(x.shape).to(x.dtype)
        if self.scale_by_sigma:
            output = output / labels.to(output).reshape(-1, *(1,) * (x.ndim - 1))
        return output

    def potential(self, x, labels):
        """φ(x, t), (B,), whose gradient the output is, but for `scale_by_sigma`.

        Raises: ValueError for a network that has none.
        """
        if not self.energy:
            raise ValueError("a plain field has no potential; train with model.energy=True")
        return self.net(x.flatten(1), labels)[:, 0]

    def _gradient(self, x, labels):
        """∇φ of each point (B, d); also under no_grad, and inside the transforms of torch.func."""
        weights: dict[str, torch.Tensor] = dict(self.net.named_parameters())
        if not torch.is_grad_enabled():  # torch.func records none the less: of each step a graph
            weights = {name: weight.detach() for name, weight in weights.items()}

        def potential(points):
            return torch.func.functional_call(self.net, weights, (points, labels)).sum()

        with torch.inference_mode(False):
            return torch.func.grad(potential)(x.clone() if x.is_inference() else x)
