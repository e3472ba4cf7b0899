"""Layers shared by all score networks: activations, initialisers, convolutions, embeddings."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

_ACTIVATIONS = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "lrelu": lambda: nn.LeakyReLU(negative_slope=0.2),
    "swish": nn.SiLU,
}

# Above this many tokens the attention matrix of one head (4 MiB) is no longer worth storing.
_EXPLICIT_ATTENTION_TOKENS = 1024


def get_act(config) -> nn.Module:
    """The activation named by `config.model.nonlinearity`: elu, relu, lrelu or swish (default).

    Raises:
      ValueError: the name is unknown.
    """
    name = config.model.get("nonlinearity", "swish")
    if str(name).lower() not in _ACTIVATIONS:
        raise ValueError(
            f"model.nonlinearity needs one of {sorted(_ACTIVATIONS)}, got {name!r}; use 'swish'"
        )
    return _ACTIVATIONS[name.lower()]()


def expand_to(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """View `v` of shape (B,) or (B, C) with trailing ones, so that it broadcasts over `x`."""
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x`, in float32 where it has 16 bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(device: torch.device):
    """A context in which operations on `device` keep the types of their inputs."""
    if device.type == "meta":  # has none; to ask torch would end a compiled graph before 2.7
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_images(network: nn.Module, x, labels, channels: int, stride: int = 1) -> None:
    """Refuse what is not images (B, channels, H, W), H and W divisible by `stride`, with a label
    each, (B,): ValueError, which names the network."""
    name = type(network).__name__
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{name} needs images of shape (B, {channels}, H, W), got {tuple(x.shape)}; "
            "set data.num_channels"
        )
    if x.shape[2] % stride or x.shape[3] % stride:
        raise ValueError(
            f"{name} needs a height and width divisible by {stride}, got "
            f"{tuple(x.shape[2:])}; pad the images or shorten model.ch_mult"
        )
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name} needs one label per image, shape {tuple(x.shape[:1])}, got "
            f"{tuple(labels.shape)}; use labels.expand(len(x))"
        )


def run_block(owner: nn.Module, block, *args):
    """block(*args), of which the backward pass finds only `args` where `owner.recompute`.

    It then computes the block again, with the same random numbers: loss and gradients are the
    same to the bit (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    if not (owner.recompute and owner.training and torch.is_grad_enabled()):
        return block(*args)
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)


def num_groups(channels: int, preferred: int = 0) -> int:
    """The number of groups of a GroupNorm of C channels, at least 1.

    `preferred` where it divides C; else the largest divisor of C that is at most min(C/4, 32),
    equal to NCSN++'s min(C // 4, 32) wherever that divides C.
    """
    if preferred and channels % preferred == 0:
        return preferred
    most = max(1, min(channels // 4, 32))
    return next(g for g in range(most, 0, -1) if channels % g == 0)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018), in float32 where the input has 16 bits.

    The sums of squares need it; on a CPU torch's mixed kernel is also two to five times slower
    than the two conversions. A single image of one pixel is normalised over a group's channels,
    which torch's own layer refuses.
    """

    def forward(self, input):
        x, weight, bias = (at_least_float32(v) for v in (input, self.weight, self.bias))
        if forward_ad._current_level >= 0:  # torch 2.6 has this derivative in one layout only
            x = x.contiguous()
        h = torch.group_norm(x, self.num_groups, weight, bias, self.eps)
        return h.to(input.dtype)


class _NormalizedSiLU(torch.autograd.Function):
    """SiLU(GroupNorm(x)), of which the backward pass finds x and its moments, and normalises again.

    Torch's own two operations keep one more tensor of x's size.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        h, mean, rstd = _normalized(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(h, inplace=True)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        again = torch.is_grad_enabled()  # a second derivative will be asked for
        if again or _is_batch_of_products(grad):
            with torch.enable_grad():
                z = x.contiguous()  # of batches torch 2.6 knows no other layout
                y = F.silu(torch.group_norm(z, ctx.groups, weight, bias, ctx.eps))
            given = [v for v, due in zip((x, weight, bias), wanted, strict=True) if due]
            found = iter(torch.autograd.grad(y, given, grad, create_graph=again))
            return *(next(found) if due else None for due in wanted), None, None
        h = _normalized(x, weight, bias, ctx.groups, ctx.eps)[0]
        slope = torch.ops.aten.silu_backward(grad, h)
        del h
        slope = slope.contiguous(memory_format=_layout(x))
        grads = torch.ops.aten.native_group_norm_backward(
            slope, x, mean, rstd, weight, *_sizes(x), ctx.groups, list(wanted)
        )
        return *grads, None, None


def _is_batch_of_products(grad) -> bool:
    """Whether this is a tensor of torch.func.vmap or of `is_grads_batched`, whose layout is torch's
    affair."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


def _sizes(x):
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _layout(x):
    """Channels last, or contiguous: what torch's kernels know. Those of 2.6 read whatever they are
    given as if it lay so."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _normalized(x, weight, bias, groups, eps):
    """The normalised x, and of every group the mean and 1/std."""
    return torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)


def activated(norm: nn.Module, act: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """act(norm(x)).

    Of SiLU after GroupNorm on a CPU, where fresh memory is what costs, the normalised x is neither
    kept nor copied. In 16 bits it is not worth the conversions.
    """
    fusible = isinstance(norm, GroupNorm) and _only_forward(norm, GroupNorm)
    fusible = fusible and _only_forward(act, nn.SiLU)
    wide = x.device.type == "cpu" and at_least_float32(x) is x
    if not (fusible and wide) or _other_derivatives():
        return act(norm(x))
    weight, bias = (at_least_float32(v) for v in (norm.weight, norm.bias))  # type: ignore
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        x = x.contiguous(memory_format=_layout(x))
        return _NormalizedSiLU.apply(x, weight, bias, norm.num_groups, norm.eps)
    return F.silu(norm(x), inplace=True)


def _only_forward(module: nn.Module, kind: type) -> bool:
    """Whether calling `module` runs `kind.forward` and no more: no subclass's, no hooks."""
    hooks = (
        *(module._forward_pre_hooks, module._forward_hooks),
        *(module._backward_pre_hooks, module._backward_hooks),
    )
    return type(module) is kind and not any(hooks)


def _other_derivatives() -> bool:
    """Whether a compiler, a transform of torch.func or forward mode looks at single operations."""
    looked_at = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return looked_at or forward_ad._current_level >= 0


def group_norm(channels: int, preferred: int = 0) -> GroupNorm:
    """Group normalisation with `num_groups(channels, preferred)` groups and eps = 1e-6."""
    return GroupNorm(num_groups=num_groups(channels, preferred), num_channels=channels, eps=1e-6)


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014) with masks of 16 bits an element on a CPU.

    One random word decides four elements, three times as fast as torch's; p is rounded to a
    multiple of 2^-16.
    """

    def forward(self, input):
        x = input
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        if not (self.training and x.device.type == "cpu" and dense and 0 < self.p < 1):
            return super().forward(x)
        if torch.compiler.is_compiling():
            return super().forward(x)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].as_strided(x.shape, x.stride())
        keep = (bits >= round(self.p * 2**16) - 2**15).to(x.dtype)
        return x * keep.mul_(1 / (1 - self.p))


def _init_weight_(weight: torch.Tensor, scale: float) -> torch.Tensor:
    # A scale of exactly 0 would stop the gradient of everything below; DDPM takes 1e-10 instead.
    gain = math.sqrt(scale if scale != 0 else 1e-10)
    return nn.init.xavier_uniform_(weight, gain=gain)


def default_init(scale: float = 1.0):
    """DDPM's initialiser, a function of a shape (Ho et al. 2020).

    U(−a, a) with a² = 3·scale / ((fan_in + fan_out) / 2); scale 0 stands for 1e-10. The shape
    has at least two dimensions, of which the first two are the fans' and the rest a window.
    """

    def init(shape, dtype=torch.float32, device=None) -> torch.Tensor:
        return _init_weight_(torch.empty(tuple(shape), dtype=dtype, device=device), scale)

    return init


def init_like_ddpm(layer, scale: float = 1.0):
    """Give a convolution or linear layer DDPM's weights and a zero bias, and return it."""
    _init_weight_(layer.weight, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def ddpm_conv1x1(
    in_planes, out_planes, stride=1, bias=True, init_scale=1.0, padding=0
) -> nn.Conv2d:
    """A 1x1 convolution (B, in, H, W) -> (B, out, H, W) with DDPM's initialisation."""
    conv = nn.Conv2d(in_planes, out_planes, 1, stride=stride, padding=padding, bias=bias)
    return init_like_ddpm(conv, init_scale)


def ddpm_conv3x3(
    in_planes, out_planes, stride=1, bias=True, dilation=1, init_scale=1.0, padding=1
) -> nn.Conv2d:
    """A 3x3 convolution (B, in, H, W) -> (B, out, H, W) with DDPM's initialisation."""
    conv = nn.Conv2d(
        in_planes, out_planes, 3, stride=stride, padding=padding, dilation=dilation, bias=bias
    )
    return init_like_ddpm(conv, init_scale)


conv1x1 = ddpm_conv1x1
conv3x3 = ddpm_conv3x3


def dense(in_features: int, out_features: int, init_scale: float = 1.0) -> nn.Linear:
    """A linear layer with DDPM's initialisation."""
    return init_like_ddpm(nn.Linear(in_features, out_features), init_scale)


def linear_of_pixels(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Wᵀx + b at every pixel, (B, in, H, W) -> (B, out, H, W).

    On a CPU in float32 and float64 by a convolution, more than twice as fast as the matrix
    product there; in 16 bits and on GPUs by the product.
    """
    wide = x.device.type == "cpu" and at_least_float32(x) is x
    if wide and not torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, W.t().unflatten(1, (-1, 1, 1)), b)
    return F.linear(x.permute(0, 2, 3, 1), W.t(), b).permute(0, 3, 1, 2)


class NIN(nn.Module):
    """Network in network: y = Wᵀx + b at every pixel, (B, in, H, W) -> (B, out, H, W).

    Parameters `W` (in, out) and `b` (out,), as in DDPM (Ho et al. 2020).
    """

    def __init__(self, in_dim, num_units, init_scale=0.1):
        super().__init__()
        self.W = nn.Parameter(default_init(init_scale)((in_dim, num_units)))
        self.b = nn.Parameter(torch.zeros(num_units))

    def forward(self, x):
        return F.conv2d(x, self.W.t().unflatten(1, (-1, 1, 1)), self.b)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / √C) v of one head, each of shape (B, tokens, C).

    By fused kernels, which have first derivatives in reverse mode only; where others are asked for,
    and for few tokens on a CPU, by two products.
    """
    if q.device.type == "cpu" and q.shape[1] <= _EXPLICIT_ATTENTION_TOKENS:
        return _explicit_attention(q, k, v)  # as fast in float32, three times as fast in bfloat16
    if torch.compiler.is_compiling():
        return _fused_attention(q, k, v)
    if _other_derivatives():
        return _explicit_attention(q, k, v)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return _FusedAttention.apply(q, k, v) if recorded else _fused_attention(q, k, v)


def _explicit_attention(q, k, v):
    weights = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(weights.to(v.dtype), v)


def _fused_attention(q, k, v):
    q, k, v = (t.unsqueeze(1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).squeeze(1)


class _FusedAttention(torch.autograd.Function):
    """Fused attention whose backward pass finds q, k and v, and attends again: by what has a second
    derivative where that will be asked for."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return _fused_attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        again, wanted, inputs = torch.is_grad_enabled(), ctx.needs_input_grad, ctx.saved_tensors
        with torch.enable_grad():
            h = (_explicit_attention if again else _fused_attention)(*inputs)
            given = [t for t, due in zip(inputs, wanted, strict=True) if due]
            found = iter(torch.autograd.grad(h, given, grad, create_graph=again))
        return tuple(next(found) if due else None for due in wanted)


def get_timestep_embedding(timesteps, embedding_dim: int, max_positions: float = 10000):
    """Sinusoidal embedding of labels (B,), whole or not -> (B, embedding_dim).

    [sin(t ω_i), cos(t ω_i)] with ω_i = max_positions^(−i / (half − 1)), i = 0 … half − 1,
    half = embedding_dim // 2; an odd last column is zero. Float32, or float64 where the labels
    are (Vaswani et al. 2017, with DDPM's half − 1).

    Raises:
      ValueError: the labels are not one-dimensional.
    """
    if timesteps.ndim != 1:
        raise ValueError(
            f"get_timestep_embedding needs labels of shape (B,), got {tuple(timesteps.shape)}; "
            "use labels.reshape(-1)"
        )
    t = timesteps if timesteps.dtype == torch.float64 else timesteps.float()
    half = embedding_dim // 2
    step = -math.log(max_positions) / max(half - 1, 1)
    frequencies = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * step)
    phases = torch.outer(t, frequencies)
    embedding = torch.cat([phases.sin(), phases.cos()], dim=1)
    return F.pad(embedding, (0, embedding_dim % 2))


class LabelEmbedding(nn.Module):
    """Class labels (B,) in 0 … num_classes -> vectors (B, dim); the last is the absent label's.

    The absent label's vector stays zero, and the others begin so: an untrained label has no
    effect. In training each label is dropped with probability `dropout`, so that the network
    also learns the unconditional score (classifier-free guidance, Ho & Salimans 2022).

    Raises:
      ValueError: the labels are not integers, or on a CPU are out of range.
    """

    def __init__(self, num_classes: int, dim: int, dropout: float):
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.table = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes)
        nn.init.zeros_(self.table.weight)

    def forward(self, y):
        if y.is_floating_point():
            raise ValueError(f"class labels y are integers, got {y.dtype}; use y.long()")
        y = y.long()  # of any integers
        on_host = y.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and ((y < 0) | (y > self.num_classes)).any():  # a GPU would have to wait
            raise ValueError(
                f"expected class labels in 0 … {self.num_classes} (the last stands for none), got "
                f"{y.min().item()} … {y.max().item()}; set model.num_classes"
            )
        if self.training and self.dropout > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout
            y = torch.where(dropped, self.num_classes, y)
        return self.table(y)


def __getattr__(name: str):
    """score_sde's other names, which live in `layers_legacy` (it needs this module first).

    `from models.layers import *` asks for `__all__`: every public name of both modules.
    """
    if name.startswith("_") and name != "__all__":
        raise AttributeError(name)
    from . import layers_legacy

    if name == "__all__":
        return [key for key in globals() if not key.startswith("_")] + layers_legacy.__all__
    return getattr(layers_legacy, name)
