"""The faster ways of the networks' layers give the numbers of torch's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn

from models.layers import Dropout, activated, group_norm, linear_of_pixels


def _layer(channels=12, dtype=torch.float64):
    torch.manual_seed(0)
    norm = group_norm(channels).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(3, channels, 5, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return norm, x


def _plain(norm, x):
    return F.silu(torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


#: An image's tensor in torch's two layouts, and in none of them.
_LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "slice": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def _gradients(fn, norm, x, v):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((fn(x) * v).sum(), (x, norm.weight, norm.bias))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_silu_after_a_norm_has_the_value_and_the_gradients_of_the_two_operations(dtype, tolerance):
    norm, x = _layer(dtype=dtype)
    act, v = nn.SiLU(), torch.randn_like(x)
    wanted = _gradients(lambda y: _plain(norm, y), norm, x, v)
    got = _gradients(lambda y: activated(norm, act, y), norm, x, v)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(activated(norm, act, x), _plain(norm, x))


@pytest.mark.parametrize("of_x", [*_LAYOUTS], ids=str)
@pytest.mark.parametrize("of_slope", [*_LAYOUTS], ids=str)
def test_silu_after_a_norm_takes_any_layout_of_its_input_and_of_the_slopes(of_x, of_slope):
    norm, x = _layer()
    v, x = _LAYOUTS[of_slope](torch.randn_like(x)), _LAYOUTS[of_x](x)
    found = []
    for fn in (lambda y: _plain(norm, y), lambda y: activated(norm, nn.SiLU(), y)):
        y = x.detach().requires_grad_()
        found.append(torch.autograd.grad(fn(y), (y, norm.weight, norm.bias), v))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_silu_after_a_norm_calls_the_hooks_and_the_subclasses_of_the_two():
    norm, x = _layer()
    seen = []
    hook = norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        activated(norm, nn.SiLU(), x)
    activated(norm, nn.SiLU(), x.clone().requires_grad_())
    hook.remove()
    assert len(seen) == 2
    for output in seen:
        torch.testing.assert_close(output, norm(x))

    class Doubled(nn.SiLU):
        def forward(self, input):
            return 2 * super().forward(input)

    torch.testing.assert_close(activated(_layer()[0], Doubled(), x), 2 * _plain(norm, x))


def test_silu_after_a_norm_has_a_derivative_in_forward_mode_by_its_weight_alone():
    norm, x = _layer()
    with forward_ad.dual_level():
        weight = norm.weight.detach()
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        del norm.weight
        norm.weight = dual  # type: ignore[assignment]
        y = activated(norm, nn.SiLU(), x.clone().requires_grad_())
        assert forward_ad.unpack_dual(y).tangent is not None


def test_silu_after_a_norm_has_a_second_derivative():
    norm, x = _layer(channels=4)
    act = nn.SiLU()
    x = x[:1, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: activated(norm, act, y), (x,))


def test_products_of_many_vectors_and_forward_mode_agree_with_single_ones():
    norm, x = _layer()
    act, vectors = nn.SiLU(), torch.randn(3, *x.shape, dtype=x.dtype)
    x = x.requires_grad_()
    y = activated(norm, act, x)
    single = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in vectors]
    (many,) = torch.autograd.grad(y, x, vectors, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(many, torch.stack(single))
    _, slope = torch.func.jvp(lambda z: activated(norm, act, z), (x.detach(),), (vectors[0],))
    left, right = (slope * vectors[1]).sum(), (single[1] * vectors[0]).sum()
    torch.testing.assert_close(left, right)


def test_silu_after_a_norm_keeps_one_tensor_less():
    norm, x = _layer(dtype=torch.float32)
    act, kept = nn.SiLU(), []

    def bytes_kept(fn):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            fn(x.clone().requires_grad_())
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in kept}.values())

    less = bytes_kept(lambda y: _plain(norm, y)) - bytes_kept(lambda y: activated(norm, act, y))
    bias = norm.bias.numel() * norm.bias.element_size()  # which a second derivative needs
    assert less == x.numel() * x.element_size() - bias


def test_other_activations_and_norms_are_called_as_they_are():
    norm, x = _layer()
    torch.testing.assert_close(activated(norm, nn.ELU(), x), F.elu(norm(x)))
    batch = nn.BatchNorm2d(12).double()
    torch.testing.assert_close(activated(batch.eval(), nn.SiLU(), x), F.silu(batch(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_linear_map_of_pixels_is_the_matrix_product(dtype):
    torch.manual_seed(0)
    x, W, b = (torch.randn(s, dtype=dtype) for s in ((2, 6, 3, 4), (6, 5), (5,)))
    wanted = torch.einsum("bihw,io->bohw", x, W) + b.reshape(-1, 1, 1)
    tolerance = {torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(linear_of_pixels(x, W, b), wanted, rtol=tolerance, atol=tolerance)


def test_a_block_of_them_is_the_same_in_training_without_dropout():
    norm, x = _layer(dtype=torch.float32)
    dropout = Dropout(0.0).train()
    torch.testing.assert_close(dropout(activated(norm, nn.SiLU(), x)), _plain(norm, x))
