"""NCSN++ and DDPM++ against the original's numbers, and what their docstrings promise."""

import itertools
import json
import zlib
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import torch

from models import layers, layerspp, normalization, utils
from models.ncsnpp import NCSNpp

DATA = Path(__file__).parent / "data"
ALL_NETWORKS = json.loads((DATA / "parity_models.json").read_text())
NETWORKS = [n for n in ALL_NETWORKS if n["config"]["model.name"] == "ncsnpp"]
LAYOUTS = json.loads((DATA / "parity_layouts.json").read_text())

TINY = {
    "data.image_size": 8,
    "data.num_channels": 3,
    "data.centered": False,
    "training.continuous": True,
    "model.name": "ncsnpp",
    "model.nf": 8,
    "model.ch_mult": (1, 2),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (4,),
    "model.dropout": 0.0,
    "model.sigma_min": 0.01,
    "model.sigma_max": 50.0,
    "model.num_scales": 20,
    "model.init_scale": 1.0,
}


def make_config(values):
    sections: dict[str, dict] = {"data": {}, "model": {}, "training": {}}
    for key, value in values.items():
        section, name = key.split(".")
        sections[section][name] = tuple(value) if isinstance(value, list) else value
    return ml_collections.ConfigDict(sections)


def tiny(**model):
    data = {f"data.{key}": model.pop(key) for key in ("image_size", "num_channels") if key in model}
    return make_config({**TINY, **data, **{f"model.{key}": v for key, v in model.items()}})


def published_weight(key, shape):
    """The weights rule of the parity files: a function of the original's key and shape."""
    n = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    if len(shape) > 1:
        n = n / np.sqrt(np.prod(shape) / shape[0])
    else:
        n = 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
    return torch.tensor(n, dtype=torch.float32)


def load_by_order(net, keys_and_shapes):
    for parameter, (key, shape) in zip(net.parameters(), keys_and_shapes, strict=True):
        assert list(parameter.shape) == shape, key
        parameter.data.copy_(published_weight(key, shape))


def parity_network(network):
    net = utils.get_model(network["config"]["model.name"])(make_config(network["config"])).eval()
    load_by_order(net, network["parameters"])
    arrays = np.load(DATA / "parity_models.npz")
    return net, *(torch.tensor(arrays[f"{network['name']}/{k}"]) for k in ("x", "labels", "output"))


def batch(config, n=2, size=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    size = size or (config.data.image_size,) * 2
    x = torch.rand(n, config.data.num_channels, *size, generator=g)
    return x, 0.1 + 9 * torch.rand(n, generator=g)


# Against the original


@pytest.mark.parametrize("network", ALL_NETWORKS, ids=lambda n: n["name"])
def test_outputs_equal_the_originals_and_weights_load_by_order(network):
    net, x, labels, output = parity_network(network)
    with torch.no_grad():
        error = (net(x, labels) - output).abs().max() / output.abs().max()
        last = (net.to(memory_format=torch.channels_last)(x, labels) - output).abs().max()
    assert error < 1e-5
    assert last / output.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("path", "values", "shapes"),
    [(path, values, g["shapes"]) for g in LAYOUTS for path, values in g["configs"].items()],
    ids=[path for g in LAYOUTS for path in g["configs"]],
)
def test_every_published_network_has_the_originals_parameters_in_order(path, values, shapes):
    with torch.device("meta"):
        net = utils.get_model(values["model.name"])(make_config(values))
    assert [list(v.shape) for v in net.state_dict().values()] == shapes
    assert next(iter(net.state_dict())) == "sigmas"
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    names = values["model.name"], values["model.embedding_type"]
    fourier = names == ("ncsnpp", "fourier")
    assert frozen == (["embedding.fourier.W"] if fourier else [])


def test_sigmas_are_a_descending_float32_buffer():
    net = NCSNpp(tiny())
    assert net.sigmas.dtype == torch.float32
    assert net.sigmas.shape == (20,)
    assert net.sigmas[0] == 50
    assert (net.sigmas.diff() < 0).all()


def test_ncsnpp_is_registered():
    assert utils.get_model("ncsnpp") is NCSNpp


def test_init_scale_zero_starts_near_zero_and_not_at_it():
    config = tiny(init_scale=0.0)
    x, labels = batch(config)
    y = NCSNpp(config)(x, labels)
    assert 0 < y.abs().max() < 1e-3


# Every combination


COMBINATIONS = list(
    itertools.product(
        ("biggan", "ddpm"),
        ("none", "output_skip", "residual"),
        (("none", "sum"), ("input_skip", "sum"), ("input_skip", "cat"), ("residual", "sum")),
        (True, False),
    )
)


@pytest.mark.parametrize(("resblock", "progressive", "input_", "fir"), COMBINATIONS, ids=str)
def test_every_combination_runs_with_a_gradient_in_every_parameter(
    resblock, progressive, input_, fir
):
    config = tiny(
        resblock_type=resblock,
        progressive=progressive,
        progressive_input=input_[0],
        progressive_combine=input_[1],
        fir=fir,
        embedding_type="fourier" if fir else "positional",
        scale_by_sigma=fir,
    )
    torch.manual_seed(0)
    net = NCSNpp(config)
    x, labels = batch(config)
    y = net(x, labels)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    y.square().sum().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # a constant added to all keys does not change softmax
            assert parameter.grad.abs().max() > 0 or name.endswith("NIN_1.b"), name


@pytest.mark.parametrize("resamp_with_conv", [True, False])
@pytest.mark.parametrize("fir", [True, False])
def test_ddpm_blocks_resample_with_and_without_convolution(fir, resamp_with_conv):
    config = tiny(resblock_type="ddpm", fir=fir, resamp_with_conv=resamp_with_conv)
    x, labels = batch(config)
    assert NCSNpp(config)(x, labels).shape == x.shape


def test_an_unconditional_network_ignores_its_labels():
    config = tiny(conditional=False)
    net = NCSNpp(config)
    x, labels = batch(config)
    assert torch.equal(net(x, labels), net(x, labels + 1))
    assert net.embedding.Dense_0 is None
    assert net.get_parameter("middle.block_in.Dense_0.weight").shape == (16, 32)


@pytest.mark.parametrize("size", [(8, 16), (16, 4), (12, 12)])
@pytest.mark.parametrize("progressive", ["output_skip", "residual"])
def test_images_of_any_size_that_halves_go_through_the_same_layers(size, progressive):
    config = tiny(progressive=progressive, progressive_input="residual", fir=True)
    x, labels = batch(config, size=size)
    assert NCSNpp(config)(x, labels).shape == x.shape


def test_grey_images_of_28_pixels_and_34_features_work():
    config = tiny(image_size=28, num_channels=1, ch_mult=(1, 2, 2), attn_resolutions=(14,), nf=34)
    net = NCSNpp(config)
    x, labels = batch(config)
    assert net(x, labels).shape == (2, 1, 28, 28)
    attending = {
        name.split(".attention")[0] for name, _ in net.named_parameters() if "NIN_3" in name
    }
    assert attending == {"down.1.blocks.0", "middle", "up.1"}


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(128, 32), (256, 32), (16, 4), (34, 2), (68, 17), (3, 1), (130, 26), (97, 1)],
)
def test_groups_are_the_largest_divisor_up_to_the_originals(channels, groups):
    assert layers.num_groups(channels) == groups


# Labels, types, independence


def test_few_scales_need_no_table_unless_the_output_is_scaled():
    config = tiny(embedding_type="positional", num_scales=5)
    x, _ = batch(config)
    labels = torch.tensor([998.5, 3.25])
    assert NCSNpp(config)(x, labels).isfinite().all()


def test_positional_labels_index_the_noise_levels_that_divide_the_output():
    torch.manual_seed(0)
    config = tiny(embedding_type="positional", scale_by_sigma=True)
    with pytest.raises(ValueError, match=r"needs training.continuous=False .*'fourier'"):
        NCSNpp(config)
    config.training.continuous = False
    net = NCSNpp(config)
    x, _ = batch(config)
    labels = torch.tensor([0, 7])
    scaled = net(x, labels)
    net.scale_by_sigma = False
    sigmas = utils.get_sigmas(config)
    want = net(x, labels) / torch.tensor(sigmas[[0, 7]]).float().reshape(2, 1, 1, 1)
    torch.testing.assert_close(scaled, want)


def test_a_float32_input_gives_a_float32_output_whatever_the_labels_are():
    for embedding in ("fourier", "positional"):
        config = tiny(embedding_type=embedding, scale_by_sigma=True)
        config.training.continuous = embedding == "fourier"
        net = NCSNpp(config)
        x, _ = batch(config)
        for dtype in (torch.int64, torch.float32, torch.float64):
            assert net(x, torch.tensor([1, 3], dtype=dtype)).dtype == torch.float32
        assert net.double()(x.double(), torch.tensor([1, 3])).dtype == torch.float64


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n["name"])
def test_bfloat16_autocast_is_finite_close_and_returns_float32(network):
    net, x, labels, output = parity_network(network)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, labels)
        y.square().mean().backward()
    assert y.dtype == torch.float32
    error = (y - output).square().mean().sqrt() / output.square().mean().sqrt()
    assert error < 0.03
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_a_whole_network_in_bfloat16_is_close():
    net, x, labels, output = parity_network(NETWORKS[1])
    y = net.bfloat16()(x.bfloat16(), labels)
    assert y.dtype == torch.bfloat16
    assert (y - output).square().mean().sqrt() < 0.05 * output.square().mean().sqrt()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n["name"])
def test_an_image_does_not_depend_on_the_batch_around_it(network):
    net, x, labels, output = parity_network(network)
    with torch.no_grad():
        alone = torch.cat([net(x[i : i + 1], labels[i : i + 1]) for i in range(2)])
    assert (alone - net(x, labels)).abs().max() < 1e-5 * output.abs().max()


def test_forward_mode_and_second_derivatives_exist():
    config = tiny(progressive_input="residual", progressive="residual", fir=True)
    net = NCSNpp(config).double()
    x, labels = batch(config, n=1)
    x, v = x.double().requires_grad_(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    y, jv = torch.func.jvp(lambda x: net(x, labels), (x,), (v,))[:2]
    g = torch.randn_like(y)
    (vjp,) = torch.autograd.grad(net(x, labels), x, g, create_graph=True)
    torch.testing.assert_close((g * jv).sum(), (vjp * v).sum())
    (second,) = torch.autograd.grad(vjp.square().sum(), x)
    assert second.isfinite().all()


def test_the_network_compiles_into_one_graph():
    config = tiny(progressive_input="residual", fir=True, embedding_type="fourier")
    net = NCSNpp(config).eval()
    x, labels = batch(config)
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager", fullgraph=True)(x, labels)
        torch.testing.assert_close(compiled, net(x, labels))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resblock_type": "resnet"}, r"model.resblock_type needs one of \['biggan', 'ddpm'\]"),
        ({"progressive": "skip"}, "model.progressive needs one of .*got 'skip'"),
        ({"progressive_input": "output_skip"}, "model.progressive_input needs one of"),
        ({"progressive_combine": "mean"}, "model.progressive_combine needs one of"),
        ({"embedding_type": "sinus"}, "model.embedding_type needs one of"),
        ({"nonlinearity": "gelu"}, "model.nonlinearity needs one of"),
        ({"normalization": "InstanceNorm"}, "model.normalization 'GroupNorm'"),
        ({"image_size": 9}, "divisible by 2, got 9"),
        ({"ch_mult": ()}, "non-empty ch_mult"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_when_building(options, message):
    with pytest.raises(ValueError, match=message):
        NCSNpp(tiny(**options))


def test_fourier_features_are_refused_for_discrete_training():
    config = make_config({**TINY, "model.embedding_type": "fourier", "training.continuous": False})
    with pytest.raises(ValueError, match=r"'fourier' needs training.continuous=True"):
        NCSNpp(config)


def test_images_that_do_not_fit_are_refused_when_calling():
    net = NCSNpp(tiny(ch_mult=(1, 1, 1)))
    labels = torch.ones(2)
    with pytest.raises(ValueError, match="divisible by 4, got \\(8, 6\\)"):
        net(torch.rand(2, 3, 8, 6), labels)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(2, 1, 8, 8\)"):
        net(torch.rand(2, 1, 8, 8), labels)
    with pytest.raises(ValueError, match="one label per image"):
        net(torch.rand(2, 3, 8, 8), torch.ones(2, 1))


# Layers


def test_positional_embedding_is_sines_then_cosines():
    t = torch.tensor([0.0, 3.5, 998.0])
    for size in (2, 3, 8, 9):
        got = layers.get_timestep_embedding(t, size)
        half = size // 2
        omega = 10000.0 ** (-np.arange(half) / max(half - 1, 1))
        phases = t.numpy()[:, None] * omega
        want = np.concatenate([np.sin(phases), np.cos(phases), np.zeros((3, size % 2))], axis=1)
        np.testing.assert_allclose(got, want, atol=1e-4)
    with pytest.raises(ValueError, match="shape \\(B,\\)"):
        layers.get_timestep_embedding(t[:, None], 8)


def test_default_init_is_uniform_with_the_average_fan():
    torch.manual_seed(0)
    for scale in (1.0, 0.1):
        w = layers.default_init(scale)((64, 32, 3, 3))
        bound = np.sqrt(3 * scale / (9 * (64 + 32) / 2))
        assert 0.99 * bound < w.abs().max() <= bound
        assert w.std().item() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert 0 < layers.default_init(0.0)((8, 8)).abs().max() < 1e-5
    assert torch.equal(layers.ddpm_conv3x3(2, 4).get_parameter("bias"), torch.zeros(4))
    assert layers.ddpm_conv1x1(2, 4, bias=False).bias is None


def test_nin_is_a_matrix_at_every_pixel():
    nin = layers.NIN(3, 5)
    nin.b.data.normal_()
    x = torch.randn(2, 3, 4, 6)
    want = torch.einsum("bihw,io->bohw", x, nin.W) + nin.b.reshape(5, 1, 1)
    torch.testing.assert_close(nin(x), want)


@pytest.mark.parametrize("tokens", [16, 1100])
def test_attention_is_softmax_attention(tokens):
    q, k, v = torch.randn(3, 2, tokens, 8)
    want = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(layers.attention(q, k, v), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [16, 1100])
def test_attention_has_every_derivative_at_any_number_of_tokens(tokens):
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, tokens, 4, dtype=torch.float64))
    u = torch.randn(2, tokens, 4, dtype=torch.float64)

    def exact(q, k, v):
        return (q @ k.mT / 2).softmax(-1) @ v

    def derivatives(fn):
        value = fn(q, k, v)
        first = torch.autograd.grad((value * u).sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
        plain = torch.autograd.grad((fn(q, k, v.detach()) * u).sum(), (q, k))
        again = torch.utils.checkpoint.checkpoint(fn, q, k, v, use_reentrant=False)
        plain += torch.autograd.grad((again * u).sum(), (q, k, v))
        batch = torch.autograd.grad(fn(q, k, v), q, torch.stack([u, -u]), is_grads_batched=True)
        forward = torch.func.jvp(lambda q: fn(q, k, v), (q,), (u,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, u)
            tangent = torch.autograd.forward_ad.unpack_dual(fn(dual, k, v)).tangent
        return [value, *first, *second, *plain, *batch, forward, tangent]

    for got, want in zip(derivatives(layers.attention), derivatives(exact), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("cls", [layerspp.ResnetBlockDDPMpp, layerspp.ResnetBlockBigGANpp])
def test_residual_blocks_work_without_an_embedding(cls):
    block = cls(torch.nn.SiLU(), 8, 12, init_scale=1.0)
    assert block(torch.randn(2, 8, 4, 4)).shape == (2, 12, 4, 4)
    assert not any("Dense" in name for name, _ in block.named_parameters())


def test_the_convolution_shortcut_is_used():
    block = layerspp.ResnetBlockDDPMpp(torch.nn.SiLU(), 8, 12, conv_shortcut=True)
    assert block.Conv_2.weight.shape == (12, 8, 3, 3)
    assert block(torch.randn(2, 8, 4, 4)).shape == (2, 12, 4, 4)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Combine needs method"):
        layerspp.Combine(2, 2, method="mean")
    assert normalization.get_normalization(tiny()) is torch.nn.GroupNorm
    with pytest.raises(ValueError, match=r"one of .*GroupNorm.*got 'LayerNorm'"):
        normalization.get_normalization(tiny(normalization="LayerNorm"))
    with pytest.raises(ValueError, match="conditional"):
        normalization.get_normalization(tiny(), conditional=True)  # there is no such GroupNorm


def test_dropout_keeps_mean_and_drops_the_rate():
    x = torch.full((8, 16, 33, 3), 2.0, requires_grad=True)
    for p in (0.1, 0.5):
        layer = layers.Dropout(p)
        y = layer(x)
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.02)
        assert y.unique().tolist() == pytest.approx([0, 2 / (1 - p)])
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0] == 0, y == 0)
        assert torch.equal(layer.eval()(x), x)
    torch.manual_seed(1)
    first = layer.train()(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert layers.Dropout(0.1)(x.bfloat16()).dtype == torch.bfloat16


def test_group_norm_in_bfloat16_is_as_good_as_rounding():
    norm = layers.group_norm(32)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 32, 4, 4).bfloat16()
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16())
    assert norm.bfloat16()(x).dtype == torch.bfloat16
