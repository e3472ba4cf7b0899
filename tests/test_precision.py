"""Precision and memory: each option changes the loss by no more than its arithmetic explains."""

import contextlib

import pytest
import torch

import losses
import sde_lib
from configs.validation import complete
from losses_step import float32_precision
from models import layers, layerspp, utils

SMALL = {"nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "init_scale": 1.0, "num_scales": 20}
VE = {"sde": "vesde", "continuous": True}
VP = {"sde": "vpsde", "continuous": True}
DISCRETE = {"sde": "vesde", "continuous": False}
NCSN = {"scale_by_sigma": False, "normalization": "InstanceNorm++"}
NETWORKS = {
    "ncsnpp": (VE, {"name": "ncsnpp", "attn_resolutions": (8,)}),
    "ncsnpp pyramids": (
        VE,
        {
            "name": "ncsnpp",
            "attn_resolutions": (8,),
            "progressive": "output_skip",
            "progressive_input": "input_skip",
        },
    ),
    "ddpmpp": (VP, {"name": "ncsnpp", "attn_resolutions": (8,), "embedding_type": "positional"}),
    "ddpm": (VP, {"name": "ddpm", "attn_resolutions": (8,)}),
    "ncsn": (DISCRETE, {"name": "ncsn", **NCSN}),
    "ncsnv2_64": (DISCRETE, {"name": "ncsnv2_64", "normalization": "InstanceNorm++"}),
    "ncsnv2_128": (DISCRETE, {"name": "ncsnv2_128", "normalization": "VarianceNorm"}),
    "ncsnv2_256": (DISCRETE, {"name": "ncsnv2_256", "normalization": "GroupNorm"}),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def make(name, dropout=0.1, **training):
    process, model = NETWORKS[name]
    config = complete(
        {
            "training": {**process, **training},
            "model": {**SMALL, "dropout": dropout, **model},
            "data": {"image_size": 16, "centered": True},
            "device": "cpu",
        }
    )
    torch.manual_seed(0)
    model = utils.create_model(config)
    return config, utils.prepare_for_training(model, config)


def loss_and_gradients(name, context=contextlib.nullcontext, batch=4, **training):
    """One training step's, always of the same weights and, for one memory format, dropout."""
    config, model = make(name, **training)
    loss_fn = losses.get_loss_fn(
        sde_lib.get_sde(config), True, True, config.training.continuous, False, 1e-5
    )
    x = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.manual_seed(2)
    with context():
        loss = loss_fn(model, x)
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def distance(some, others):
    """‖g − h‖/‖h‖ over all gradients together."""
    square = sum((g - h).square().sum() for g, h in zip(some, others, strict=True))
    return (square / sum(h.square().sum() for h in others)).sqrt().item()


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


# --- bfloat16 -------------------------------------------------------------------------------

EPS = torch.finfo(torch.bfloat16).eps


@every_network
def test_bf16_changes_loss_and_gradient_by_what_its_roundings_explain(name):
    """Some forty roundings in a row, each ε/√12 of the output in the root mean square, independent:
    √40 ε/√12 ≈ 1.8ε of the error whose square the loss is, at most twice that of the loss (and far
    less, since over 3,072 numbers they average out). The backward pass rounds as often again, and
    both factors of each product."""
    loss, gradients = loss_and_gradients(name)
    low, low_gradients = loss_and_gradients(name, bf16)
    assert low.dtype == torch.float32
    assert abs(low - loss) / loss < 3.7 * EPS
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in low_gradients)
    assert 0 < distance(low_gradients, gradients) < 12 * EPS


@every_network
def test_output_under_autocast_is_float32(name):
    _, model = make(name)
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
    with bf16():
        assert model(x, labels).dtype == torch.float32


def recorded(model, kind, call):
    """The types and values that modules of a kind return during call()."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, output: seen.append(output))
        for module in model.modules()
        if isinstance(module, kind)
    ]
    call()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["ncsnpp", "ddpmpp", "ddpm"])
def test_the_time_embedding_is_float32_under_autocast(name):
    _, model = make(name)
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([3.4, 17.8])
    exact = model.embedding(labels)

    def under_autocast():
        with bf16():
            model(x, labels)

    (embedding,) = recorded(model, type(model.embedding), under_autocast)
    assert torch.equal(embedding, exact) and exact.dtype == torch.float32
    for features in recorded(model, layerspp.GaussianFourierProjection, under_autocast):
        assert features.dtype == torch.float32


def far_from_zero(shape):
    """Numbers whose mean is 64 standard deviations: their moments do not survive 8 bits."""
    return (8 + torch.randn(shape) / 8).bfloat16()


@pytest.mark.parametrize(
    "name", ["BatchNorm", "InstanceNorm", "InstanceNorm++", "VarianceNorm", "GroupNorm"]
)
@pytest.mark.parametrize("conditional", [False, True])
def test_normalisations_take_their_moments_in_float32(name, conditional):
    if conditional and name == "GroupNorm":
        return  # there is none
    from models.normalization import get_normalization

    config = complete({"model": {"normalization": name, "num_scales": 5}})
    norm = get_normalization(config, conditional)
    norm = layers.group_norm(8) if name == "GroupNorm" else norm(8)
    x = far_from_zero((4, 8, 8, 8))
    labels = (torch.tensor([0, 1, 2, 3]),) if conditional else ()
    want = norm(x.float(), *labels)
    with bf16():
        got = norm(x, *labels)
    # only the result is rounded
    torch.testing.assert_close(got.float(), want, rtol=EPS, atol=EPS * want.abs().max().item())


def test_the_division_by_sigma_is_float32():
    """The network's last product has 8 bits; dividing it by σ loses none of them."""
    model = make("ncsnpp")[1].eval()
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([0.01, 37.3])
    with torch.no_grad(), bf16():
        divided = model(x, labels)
        model.scale_by_sigma = False
        whole = model(x, labels)
    assert torch.equal(whole, whole.bfloat16().float())
    assert torch.equal(divided, whole / labels.reshape(2, 1, 1, 1))


def test_fir_filters_in_bf16_are_rounded_once():
    from models.up_or_down_sampling import downsample_2d, upsample_2d

    x = torch.randn(2, 8, 16, 16).bfloat16()
    for resample in (upsample_2d, downsample_2d):
        want = resample(x.float(), (1, 3, 3, 1))
        with bf16():
            got = resample(x, (1, 3, 3, 1))
        assert torch.equal(got, want.bfloat16())


# --- channels_last, tf32, compile -----------------------------------------------------------


@every_network
def test_channels_last_changes_nothing_but_the_order_of_sums(name):
    loss, gradients = loss_and_gradients(name, dropout=0.0, channels_last=True)
    other, other_gradients = loss_and_gradients(name, dropout=0.0, channels_last=False)
    assert abs(loss - other) / loss < 1e-6
    assert distance(gradients, other_gradients) < 1e-5


def test_channels_last_is_a_switch():
    for last in (True, False):
        _, model = make("ncsnpp", channels_last=last)
        weight = model.get_parameter("middle.block_in.Conv_0.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) == last
        assert weight.is_contiguous() != last


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a GPU's")
def test_tf32_changes_the_loss_by_what_its_roundings_explain():
    results = []
    for precision in ("fp32", "tf32"):
        config, model = make("ddpmpp")
        loss_fn = losses.loss_fn_from_config(config, sde_lib.get_sde(config), train=False)
        torch.manual_seed(2)
        with float32_precision(precision, torch.device("cuda")):
            results.append(loss_fn(model.cuda(), torch.rand(4, 3, 16, 16).cuda()).item())
    assert abs(results[1] / results[0] - 1) < 3.7 * 2**-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsnpp", "ncsnv2_64"])
def test_compiling_changes_loss_and_gradient_by_rounding(name):
    torch.compiler.reset()
    loss, gradients = loss_and_gradients(name, dropout=0.0, compile=True)
    other, other_gradients = loss_and_gradients(name, dropout=0.0)
    assert abs(loss - other) / other < 1e-5
    assert distance(gradients, other_gradients) < 1e-4


def compiled_in_place(monkeypatch, name, **training):
    """A network compiled by a back end that only records what it is given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m: compile_(m, backend=backend, fullgraph=True)
    )
    torch.compiler.reset()
    return (*make(name, compile=True, **training), graphs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiling_takes_one_graph_and_leaves_the_names(monkeypatch, checkpointing):
    _, bare = make("ncsnpp")
    _, model, graphs = compiled_in_place(
        monkeypatch, "ncsnpp", activation_checkpointing=checkpointing
    )
    assert list(model.state_dict()) == list(bare.state_dict())
    assert utils.unwrap(model) is model
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([0.1, 9.0])
    model.train()(x, labels).sum().backward()
    assert len(graphs) == 1
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, labels), bare.eval()(x, labels))


# --- activation checkpointing ---------------------------------------------------------------


@every_network
@pytest.mark.parametrize("context", [contextlib.nullcontext, bf16])
def test_recomputing_gives_the_same_bits_with_dropout(name, context):
    loss, gradients = loss_and_gradients(name, context)
    other, other_gradients = loss_and_gradients(name, context, activation_checkpointing=True)
    assert torch.equal(loss, other)
    assert all(map(torch.equal, gradients, other_gradients))


def peak_bytes(name, **training):
    """The most that is allocated at once during one forward and backward pass, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss_and_gradients(name, batch=16, **training)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def saved_bytes(name, **training):
    """What the forward pass keeps for the backward pass, of 16 images."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    _, model = make(name, **training)
    labels = torch.arange(16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model.train()(torch.rand(16, 3, 16, 16), labels)
    assert result.requires_grad
    return sum(storages.values())


@every_network
def test_recomputing_saves_more_than_half_of_the_activations(name):
    plain, recomputed = saved_bytes(name), saved_bytes(name, activation_checkpointing=True)
    assert recomputed < plain / 2


def test_recomputing_lowers_the_peak_of_a_step():
    plain, recomputed = peak_bytes("ddpmpp"), peak_bytes("ddpmpp", activation_checkpointing=True)
    assert recomputed < 0.6 * plain


def test_evaluation_does_not_recompute():
    _, model = make("ddpmpp", activation_checkpointing=True)
    calls = []
    block = model.get_submodule("middle.block_in")
    block.register_forward_pre_hook(lambda *args: calls.append(1))
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    model.eval()(x, torch.tensor([3.0])).sum().backward()
    assert len(calls) == 1
    model.train()(x, torch.tensor([3.0])).sum().backward()
    assert len(calls) == 3


def test_second_derivatives_exist_through_recomputed_blocks():
    """Score matching without a known score differentiates the network's derivative."""
    results = []
    for recompute in (False, True):
        _, model = make("ddpmpp", activation_checkpointing=recompute)
        x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(3)
        y = model.train()(x, torch.tensor([3.0]))
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert torch.equal(*results)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)


def test_networks_that_cannot_recompute_are_refused():
    asked = complete({"training": {"activation_checkpointing": True}})
    with pytest.raises(ValueError, match=r"cannot serve Plain, which calls no block"):
        utils.prepare_for_training(Plain(), asked)
    NETWORKS["batch norm"] = (DISCRETE, {**NETWORKS["ncsn"][1], "normalization": "BatchNorm"})
    try:
        with pytest.raises(ValueError, match="has a BatchNorm"):
            make("batch norm", activation_checkpointing=True)
    finally:
        del NETWORKS["batch norm"]
    model = Plain()
    assert utils.prepare_for_training(model, complete({})) is model
