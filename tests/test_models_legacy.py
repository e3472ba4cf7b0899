"""DDPM, NCSN and NCSNv2, their layers and normalisations; parity with the originals' numbers is in
test_models.py."""

import importlib
import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_models import ALL_NETWORKS, make_config, parity_network
from torch import nn

from models import layers, layers_refinenet, normalization, utils

ROOT = Path(__file__).resolve().parent.parent
REFINENETS = ("ncsn", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256")
NORMS = ("BatchNorm", "InstanceNorm", "InstanceNorm++", "NoneNorm", "VarianceNorm")

TINY = {
    "data.image_size": 16,
    "data.num_channels": 1,
    "training.continuous": False,
    "model.nf": 4,
    "model.ch_mult": (1, 2),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (8,),
    "model.sigma_min": 0.01,
    "model.sigma_max": 10.0,
    "model.num_scales": 5,
    "model.normalization": "InstanceNorm++",
    "model.nonlinearity": "elu",
}


def tiny(name, **options):
    values = {**TINY, "model.name": name}
    if name == "ddpm":
        values["model.normalization"] = "GroupNorm"
    for key, value in options.items():
        section = "data" if f"data.{key}" in TINY else "model"
        values["training.continuous" if key == "continuous" else f"{section}.{key}"] = value
    return make_config(values)


def build(name, **options):
    return utils.get_model(name)(tiny(name, **options))


def batch(size=(16, 16), n=2):
    return torch.rand(n, 1, *size), torch.arange(n)


# Every network


@pytest.mark.parametrize("name", ["ddpm", *REFINENETS])
def test_networks_are_registered_under_the_originals_names(name):
    module = importlib.import_module("models.ddpm" if name == "ddpm" else "models.ncsnv2")
    assert utils.get_model(name).__module__ == module.__name__


@pytest.mark.parametrize("name", ["ddpm", *REFINENETS])
def test_every_parameter_has_a_gradient_and_float32_stays(name):
    net = build(name, scale_by_sigma=True)
    x, labels = batch()
    for dtype in (torch.int64, torch.float32, torch.float64):
        y = net(x, labels.to(dtype))
        assert y.dtype == torch.float32 and y.shape == x.shape
    y.square().sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["ddpm", *REFINENETS])
def test_labels_choose_the_noise_level_that_divides_the_output(name):
    net = build(name, scale_by_sigma=True, init_scale=1.0).eval()
    x, _ = batch()
    labels = torch.tensor([0, 3])
    scaled = net(x, labels)
    net.scale_by_sigma = False
    sigmas = torch.tensor(utils.get_sigmas(net.config)[[0, 3]]).float().reshape(2, 1, 1, 1)
    torch.testing.assert_close(scaled * sigmas, net(x, labels))


@pytest.mark.parametrize("name", ["ddpm", *REFINENETS])
def test_bfloat16_autocast_returns_float32(name):
    net = build(name)
    x, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, labels)
    assert y.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.parametrize("name", ["ddpm", *REFINENETS])
def test_images_of_28_pixels_work(name):
    net = build(name, image_size=28, ch_mult=(1, 1, 2))
    x, labels = batch((28, 28))
    assert net(x, labels).shape == x.shape


def test_ddpm_refuses_28_pixels_that_do_not_halve():
    with pytest.raises(ValueError, match=r"ddpm halves the images 3 times .* by 8, got 28"):
        build("ddpm", image_size=28, ch_mult=(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ncsn", {"continuous": True}, "ncsn needs training.continuous=False"),
        ("ncsnv2_64", {"continuous": True}, "ncsnv2_64 needs training.continuous=False"),
        ("ncsnv2_64", {"num_classes": 3}, "takes no class labels"),
        ("ncsnv2_64", {"nf": 1}, "nf >= 2, got 1"),
        ("ncsnv2_256", {"image_size": 8}, "more than 8 pixels high or wide, got 8 x 8"),
        ("ncsn", {"normalization": "GroupNorm"}, "name of a conditional normalisation"),
        ("ncsnv2_128", {"normalization": "LayerNorm"}, "name of a normalisation"),
        ("ncsn", {"nonlinearity": "gelu"}, "nonlinearity"),
        ("ddpm", {"normalization": "InstanceNorm++"}, "ddpm needs model.normalization 'GroupNorm'"),
        ("ddpm", {"continuous": True, "scale_by_sigma": True}, "needs training.continuous=False"),
        ("ddpm", {"ch_mult": ()}, "non-empty ch_mult"),
        ("ddpm", {"conditional": False, "num_classes": 3}, "model.conditional=False"),
    ],
)
def test_impossible_options_are_refused_when_building(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", ["ddpm", "ncsn", "ncsnv2_64"])
def test_images_and_labels_that_do_not_fit_are_refused_when_calling(name):
    net = build(name)
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\), got \(2, 3, 8, 8\)"):
        net(torch.rand(2, 3, 8, 8), torch.arange(2))
    with pytest.raises(ValueError, match="one label per image"):
        net(torch.rand(2, 1, 8, 8), torch.tensor(1))


def test_images_too_small_to_halve_are_refused_when_calling():
    net = build("ncsnv2_128")
    assert net(*batch((5, 4))).shape == (2, 1, 5, 4)
    with pytest.raises(ValueError, match="more than 4 pixels high or wide, got 4 x 3"):
        net(*batch((4, 3)))


# DDPM


def test_an_unconditional_ddpm_ignores_its_labels_and_keeps_the_blocks_parameters():
    net = build("ddpm", conditional=False).eval()
    x, labels = batch()
    assert torch.equal(net(x, labels), net(x, labels + 1))
    with_time = build("ddpm").state_dict()
    missing = [key for key in with_time if key not in net.state_dict()]
    assert len(missing) == 4 and all(key.startswith("embedding.Dense_") for key in missing)


def test_ddpm_never_reads_the_embedding_type():
    keys = list(build("ddpm", embedding_type="positional").state_dict())
    assert list(build("ddpm", embedding_type="fourier").state_dict()) == keys


@pytest.mark.parametrize(("nf", "groups"), [(32, 32), (64, 32), (48, 12), (6, 1)])
def test_ddpm_normalises_in_32_groups_or_as_many_as_ncsnpp(nf, groups):
    net = build("ddpm", nf=nf, ch_mult=(1,))
    assert net.get_submodule("down.0.blocks.0.block.GroupNorm_0").num_groups == groups


def test_ddpm_attends_on_the_levels_of_its_config_whatever_the_image():
    net = build("ddpm", attn_resolutions=(8,))
    attending = {
        key.split(".attention")[0] for key, _ in net.named_parameters() if ".NIN_3." in key
    }
    assert attending == {"down.1.blocks.0", "middle", "up.0"}
    x, labels = batch((8, 16))
    assert net(x, labels).shape == x.shape


@pytest.mark.parametrize("resamp_with_conv", [True, False])
def test_ddpm_resamples_with_and_without_convolution(resamp_with_conv):
    net = build("ddpm", resamp_with_conv=resamp_with_conv)
    x, labels = batch()
    assert net(x, labels).shape == x.shape
    assert any("downsample" in key for key in net.state_dict()) == resamp_with_conv


# NCSN and NCSNv2


@pytest.mark.parametrize("network", ALL_NETWORKS[-2:], ids=lambda n: n["name"])
def test_refinenets_keep_the_authors_names(network):
    net, *_ = parity_network(network)
    names = [key for key, _ in network["parameters"]]
    assert [key for key, _ in net.named_parameters()] == names
    buffers = ["sigmas"] if network["name"] == "ncsnv2" else []
    assert [key for key in net.state_dict() if key not in names] == buffers


@pytest.mark.parametrize("name", REFINENETS)
@pytest.mark.parametrize("size", [(9, 14), (16, 8), (11, 11)])
def test_refinenets_take_images_of_any_size(name, size):
    x, labels = batch(size)
    assert build(name)(x, labels).shape == x.shape


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ncsnv2_64", "refine1 refine2 refine3 refine4"),
        ("ncsnv2_256", "refine1 refine2 refine3 refine31 refine4 refine5"),
    ],
)
def test_refinement_blocks_are_registered_in_the_originals_order(name, order):
    net = build(name)
    assert [key for key, _ in net.named_children() if "refine" in key] == order.split()


def test_the_deepest_network_refines_stage_by_stage():
    net = build("ncsnv2_256")
    ran = []
    for key, block in net.named_children():
        if "refine" in key or "res" in key:
            first = block[0] if isinstance(block, nn.ModuleList) else block
            first.register_forward_hook(lambda *_, key=key: ran.append(key))
    net(*batch())
    down = "res1 res2 res3 res31 res4 res5"
    up = "refine1 refine2 refine31 refine3 refine4 refine5"
    assert ran == f"{down} {up}".split()


def test_ncsn_is_conditioned_on_the_noise_level_by_its_normalisations_only():
    net = build("ncsn").eval()
    x, _ = batch()
    assert not torch.equal(net(x, torch.tensor([0, 0])), net(x, torch.tensor([1, 1])))
    net = build("ncsnv2_64", scale_by_sigma=False).eval()
    assert torch.equal(net(x, torch.tensor([0, 0])), net(x, torch.tensor([1, 1])))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["ncsn", "ncsnv2_64"])
def test_every_normalisation_works_in_its_network(name, norm):
    x, labels = batch()
    assert build(name, normalization=norm)(x, labels).isfinite().all()


def test_ncsnv2_works_with_group_normalisation():
    net = build("ncsnv2_64", normalization="GroupNorm", nf=8)
    assert isinstance(net.normalizer, nn.GroupNorm)
    assert net(*batch()).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("size", [(6, 6), (7, 7)])
def test_mean_pooling_pads_odd_sizes_as_the_original_does_for_28_pixels(kernel_size, size):
    layer = layers_refinenet.ConvMeanPool(2, 3, kernel_size)
    x = torch.randn(2, 2, *size)
    h = layer.conv(nn.ZeroPad2d((1, 0, 1, 0))(x) if size[0] % 2 else x)
    want = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=1e-5)


def test_a_residual_block_refuses_another_resampling():
    with pytest.raises(ValueError, match="resample None or 'down', got 'up'"):
        layers_refinenet.ResidualBlock(2, 2, resample="up")


# Normalisations


def features():
    return 1 + 2 * torch.randn(3, 4, 5, 6)


def test_instance_norm_plus_adds_the_normalised_means():
    x, norm = features(), normalization.InstanceNorm2dPlus(4)
    alpha, gamma, beta = (nn.init.normal_(p).data for p in norm.parameters())
    mean, var = x.mean((2, 3)), x.var((2, 3), unbiased=False)
    h = (x - mean[..., None, None]) / (var[..., None, None] + 1e-5).sqrt()
    m = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, keepdim=True) + 1e-5).sqrt()
    want = gamma[:, None, None] * (h + (alpha * m)[..., None, None]) + beta[:, None, None]
    torch.testing.assert_close(norm(x), want)
    assert len(list(normalization.InstanceNorm2dPlus(4, bias=False).parameters())) == 2


def test_variance_norm_keeps_the_mean():
    x, norm = features(), normalization.VarianceNorm2d(4)
    want = norm.alpha[:, None, None] * x / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), want)


def test_none_norm_is_the_identity():
    x = features()
    assert normalization.NoneNorm2d(4)(x) is x


UNCONDITIONAL = {
    "BatchNorm": lambda x: F.batch_norm(x, None, None, training=True),
    "InstanceNorm": F.instance_norm,
    "NoneNorm": lambda x: x,
    "VarianceNorm": lambda x: x / (x.var((2, 3), keepdim=True) + 1e-5).sqrt(),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_conditional_norms_scale_and_shift_by_label(name, bias):
    config = tiny("ncsn", normalization=name)
    norm = normalization.get_normalization(config, conditional=True)(4, bias=bias)
    bias = bias and name != "VarianceNorm"
    assert norm.embed.weight.shape == (5, 8 if bias else 4)
    nn.init.normal_(norm.embed.weight)
    x, y = features(), torch.tensor([0, 4, 4])
    gamma, beta = norm.embed.weight[y][:, :4], norm.embed.weight[y][:, 4:]
    want = gamma[..., None, None] * UNCONDITIONAL[name](x)
    torch.testing.assert_close(norm(x, y), want + beta[..., None, None] if bias else want)


@pytest.mark.parametrize("bias", [True, False])
def test_conditional_instance_norm_plus_equals_the_plain_one_of_each_label(bias):
    norm = normalization.ConditionalInstanceNorm2dPlus(4, 5, bias=bias)
    plain = normalization.InstanceNorm2dPlus(4, bias=bias)
    nn.init.normal_(norm.embed.weight)
    x, y = features(), torch.tensor([0, 4, 4])
    for i in range(3):
        gamma, alpha, *beta = norm.embed.weight[y[i]].detach().split(4)
        plain.gamma.data, plain.alpha.data = gamma, alpha
        if bias:
            plain.get_parameter("beta").data = beta[0]
        torch.testing.assert_close(norm(x, y)[i], plain(x)[i])


@pytest.mark.parametrize("name", NORMS)
def test_conditional_norms_start_with_no_shift(name):
    config = tiny("ncsn", normalization=name)
    weight = normalization.get_normalization(config, conditional=True)(4).embed.weight
    shift = weight[:, -4:] if name != "VarianceNorm" else torch.zeros(1)
    assert (shift == 0).all() and (weight[:, :4] != 0).all()


def test_conditional_norms_have_a_label_per_class_or_else_per_noise_level():
    for classes, labels in ((0, 5), (7, 7)):
        config = tiny("ncsn", num_classes=classes)
        norm = normalization.get_normalization(config, conditional=True)(4)
        assert norm.embed.num_embeddings == labels


# Code written against score_sde


def test_a_users_network_finds_the_originals_layers():
    from models.layers import AttnBlock, Downsample, ResnetBlockDDPM, Upsample  # type: ignore

    act = layers.get_act(tiny("ddpm"))
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    block = ResnetBlockDDPM(act=act, in_ch=32, out_ch=64, temb_dim=8, dropout=0.1)
    assert block.GroupNorm_0.num_groups == 32
    h = AttnBlock(channels=64)(block(x, temb))
    for with_conv in (True, False):
        small = Downsample(channels=64, with_conv=with_conv)(h)
        assert small.shape == (2, 64, 2, 2)
        assert Upsample(channels=64, with_conv=with_conv)(small).shape == h.shape
    for name in ("RefineBlock", "ResidualBlock", "CondRefineBlock", "ConditionalResidualBlock"):
        assert hasattr(layers, name)
    assert not hasattr(layers, "NoSuchBlock")


class UsersNetwork(nn.Module):
    """A RefineNet of two stages that calls the original's NCSNv2 layers as its networks do."""

    def __init__(self, config):
        super().__init__()
        nf, act = config.model.nf, layers.get_act(config)
        norm = normalization.get_normalization(config)
        block = partial(layers.ResidualBlock, act=act, normalization=norm)
        self.begin = layers.ncsn_conv1x1(1, nf, 1, True, 1, 0.5)
        self.res1 = nn.ModuleList([block(nf, nf, resample=None), block(nf, 2 * nf, None)])
        self.res2 = block(2 * nf, 2 * nf, resample="down", adjust_padding=True)
        self.res3 = layers.ResidualBlock(2 * nf, 2 * nf, "down", act, norm, False, 2)
        self.refine1 = layers.RefineBlock([2 * nf], 2 * nf, act=act, start=True)
        self.refine2 = layers.RefineBlock([2 * nf, 2 * nf], nf, act, False, True, False)
        self.end = layers.ncsn_conv3x3(nf, 1, stride=1, init_scale=0.0)

    def forward(self, x, y):
        h = self.begin(x)
        for block in self.res1:
            h = block(h)
        below = self.res3(self.res2(h))
        below = self.refine1([below], below.shape[2:])
        return self.end(self.refine2([h, below], h.shape[2:]))


def test_a_users_refinenet_has_the_originals_parameters_in_their_order():
    net = UsersNetwork(tiny("ncsnv2_64"))
    x, labels = batch((15, 15))
    assert net(x, labels).shape == x.shape
    assert net.begin.weight.shape == (4, 1, 1, 1) and net.end.weight.abs().max() < 1e-9
    names = [key for key, _ in net.res2.named_parameters() if "normalize" not in key]
    order = "conv1 conv2.conv.1 shortcut.conv.1"  # 1: the convolution follows the padding
    assert names == [f"{key}.{p}" for key in order.split() for p in ("weight", "bias")]
    refine = [key.rsplit(".", 1)[0] for key, _ in net.refine2.named_parameters()]
    units = [f"adapt_convs.{i}.{j}_{k}_conv" for i in (0, 1) for j in (1, 2) for k in (1, 2)]
    units += [f"output_convs.{j}_{k}_conv" for j in (1, 2, 3) for k in (1, 2)]
    fusion = ["msf.convs.0", "msf.convs.0", "msf.convs.1", "msf.convs.1"]
    assert refine == [*units, *fusion, "crp.convs.0", "crp.convs.1"]
    assert isinstance(net.refine2.crp.pool, nn.AvgPool2d)
    assert isinstance(net.refine1.crp.pool, nn.MaxPool2d) and net.refine1.msf is None


@pytest.mark.parametrize("bound", [False, True])
def test_a_users_conditional_blocks_take_a_normaliser_and_a_number_of_labels(bound):
    norm, act = normalization.ConditionalInstanceNorm2dPlus, nn.ELU()
    norm = partial(norm, num_classes=5) if bound else norm
    x, y, small = torch.randn(2, 4, 8, 8), torch.tensor([0, 4]), torch.randn(2, 6, 4, 4)
    block = layers.ConditionalResidualBlock(4, 6, 5, "down", act, norm, False, 2)
    assert block(x, y).shape == (2, 6, 8, 8)
    assert block.normalize1.embed.weight.shape == (5, 12)
    assert layers.ConditionalResidualBlock(4, 6, 5, normalization=norm)(x, y).shape[1] == 6
    refine = layers.CondRefineBlock([4, 6], 5, 5, norm, act=act, start=False, end=True)
    assert refine([x, small], y, x.shape[2:]).shape == (2, 5, 8, 8)
    assert layers.CondRefineBlock([4], 4, 5, norm, start=True)([x], y, (8, 8)).shape == x.shape
    for unit in (layers.CondCRPBlock(4, 2, 5, norm, act), layers.CondRCUBlock(4, 2, 2, 5, norm)):
        assert unit(x, y).shape == x.shape
    fused = layers.CondMSFBlock([4, 6], 3, 5, norm)([x, small], y, shape=(8, 8))
    assert fused.shape == (2, 3, 8, 8)


def test_a_users_plain_blocks_take_no_labels():
    x, small = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    for unit in (layers.CRPBlock(4, 2, maxpool=False), layers.RCUBlock(4, 2, 2, nn.ELU())):
        assert unit(x).shape == x.shape
    assert layers.MSFBlock((4, 6), 3)([x, small], shape=(8, 8)).shape == (2, 3, 8, 8)
    unused = layers.RefineBlock([4], 4)  # without start=True it has a fusion all the same
    assert unused.msf is not None and unused([x], (8, 8)).shape == x.shape
    with pytest.raises(ValueError, match="start=True needs one map, got 2"):
        layers.RefineBlock([4, 6], 4, start=True)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_ncsn_convolutions_keep_the_size_unless_they_are_given_a_padding(dilation):
    x = torch.randn(1, 2, 12, 12)
    assert layers.ncsn_conv3x3(2, 3, dilation=dilation)(x).shape[2:] == (12, 12)
    side = 12 + 2 - 2 * dilation
    conv = layers.ncsn_conv3x3(2, 3, 1, False, dilation, 1.0, 1)
    assert conv.bias is None and conv(x).shape[2:] == (side, side)


def test_convolutions_that_resample():
    x = torch.randn(2, 3, 6, 6)
    mean = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    down = layers.MeanPoolConv(3, 5, 3, biases=False)
    assert down.conv.bias is None
    torch.testing.assert_close(down(x), down.conv(mean))
    up = layers.UpsampleConv(3, 5, kernel_size=1)
    shuffled = torch.empty(2, 3, 12, 12)
    for c, i, j in itertools.product(range(3), (0, 1), (0, 1)):
        shuffled[:, c, i::2, j::2] = x[:, (4 * c + 2 * i + j) % 3]
    torch.testing.assert_close(up(x), up.conv(shuffled))


def test_a_star_import_gives_the_names_of_both_modules_without_loading_them_before():
    code = (
        "import sys, models.layers; assert 'models.layers_legacy' not in sys.modules\n"
        "from models.layers import *\n"
        "print(CondRefineBlock.__name__, ncsn_conv1x1.__name__, NIN.__name__, nn.__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == ["CondRefineBlock", "ncsn_conv1x1", "NIN", "torch.nn"], ran.stderr
