"""Checkpoints of score_sde in JAX: flax's MessagePack, read without JAX.

`data/jax_*` were made once by score_sde's own flax networks (JAX 0.10, flax 0.12): a State written
by flax.serialization, an input, and the output under the averaged weights.
"""

import contextlib
import json

import numpy as np
import pytest
import torch
from test_checkpoint_formats import DATA, make_state, same, small_config
from test_models import make_config

from checkpoints import load_file, restore_checkpoint
from checkpoints_export import averaged_weights, export_checkpoint
from checkpoints_import import for_network
from checkpoints_names import flax_names
from models.utils import create_model

JAX_CONFIGS = json.loads((DATA / "jax_models.json").read_text())


def jax_network(name):
    config = make_config(JAX_CONFIGS[name])
    config.device = "cpu"
    return create_model(config).eval()


@pytest.mark.parametrize("name", sorted(JAX_CONFIGS))
def test_networks_of_score_sde_in_jax_give_their_own_outputs(name):
    """Files and outputs of score_sde's own flax networks: a State by flax.serialization."""
    pytest.importorskip("msgpack")
    net, truth = jax_network(name), np.load(DATA / "jax_models.npz")
    path = DATA / f"jax_ncsnpp_ve_{name}.msgpack"
    content = for_network(path, load_file(path), net)
    net.load_state_dict(averaged_weights(content, net))
    x, labels, output = (torch.tensor(truth[f"{name}/{k}"]) for k in ("x", "labels", "output"))
    with torch.no_grad():
        y = net(x.permute(0, 3, 1, 2), labels).permute(0, 2, 3, 1)
    assert (y - output).abs().max() < 1e-5 * output.abs().max()


def test_average_moments_and_step_of_a_jax_state_arrive():
    pytest.importorskip("msgpack")
    path, net = DATA / "jax_ncsnpp_ve_fir_residual.msgpack", jax_network("fir_residual")
    content = for_network(path, load_file(path), net)
    assert content["step"] == 120 and content["ema"]["decay"] == pytest.approx(0.999)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    for name, shadow in zip(trained, content["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(shadow, 0.9 * content["model"][name])  # as it was made
    numbers = {name: i for i, (name, _) in enumerate(net.named_parameters())}
    assert sorted(content["optimizer"]["state"]) == [numbers[name] for name in trained]
    for name in trained:
        moments, weight = content["optimizer"]["state"][numbers[name]], content["model"][name]
        assert moments["step"] == 119
        torch.testing.assert_close(moments["exp_avg"], 0.5 * weight)
        torch.testing.assert_close(moments["exp_avg_sq"], weight**2)
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-4)


def flax_bytes(tree, chunk=None):
    """flax.serialization.msgpack_serialize of a tree of tensors and numbers."""
    import msgpack

    def extension(value):
        array = np.asarray(value)
        packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
        return msgpack.ExtType(3 if isinstance(value, np.generic) else 1, packed)

    def encode(value):
        if isinstance(value, dict):
            return {key: encode(v) for key, v in value.items()}
        if torch.is_tensor(value):
            value = value.numpy()
        if isinstance(value, np.ndarray) and chunk and value.size > chunk:
            flat = value.reshape(-1)
            pieces = [flat[i : i + chunk] for i in range(0, flat.size, chunk)]
            return {
                "__msgpack_chunked_array__": True,
                "shape": {str(i): n for i, n in enumerate(value.shape)},
                "chunks": {str(i): extension(piece) for i, piece in enumerate(pieces)},
            }
        return extension(value) if isinstance(value, np.ndarray | np.generic) else value

    return msgpack.packb(encode(tree), strict_types=True)


def flax_state(net):
    """A State of score_sde with the weights of `net`, by the published structure."""

    def back(w, path):  # ours -> flax's layout
        if w.ndim == 4:
            return w.permute(2, 3, 1, 0).contiguous()
        return w.t().contiguous() if w.ndim == 2 and path.endswith("kernel") else w

    def nested(leaf):
        tree: dict = {}
        for ours, (path, _) in flax_names(net).items():
            *steps, last = path.split("/")
            place = tree
            for step in steps:
                place = place.setdefault(step, {})
            place[last] = leaf(back(net.state_dict()[ours], path))
        return tree

    moments = nested(lambda w: {"grad_ema": w * 0, "grad_sq_ema": w * 0})
    return {
        "step": np.int32(5),
        "optimizer": {
            "target": nested(lambda w: w),
            "state": {"step": np.int32(5), "param_states": moments},
        },
        "lr": 2e-4,
        "model_state": {},
        "ema_rate": 0.9999,
        "params_ema": nested(lambda w: w * 0.5),
        "rng": np.zeros(2, np.uint32),
    }


@pytest.mark.parametrize(
    "path", ["configs/vp/ddpm/cifar10_continuous.py", "configs/vp/cifar10_ddpmpp_continuous.py"]
)
@pytest.mark.parametrize("chunk", [None, 100])
def test_jax_states_of_other_families_load_chunked_or_not(tmp_path, path, chunk):
    pytest.importorskip("msgpack")
    config = small_config(path)
    net = create_model(config)
    (tmp_path / "checkpoint_1").write_bytes(flax_bytes(flax_state(net), chunk))
    state = restore_checkpoint(tmp_path / "checkpoint_1", make_state(config))
    assert same(state["model"].state_dict(), net.state_dict()) and state["step"] == 5
    for p, shadow in zip(net.parameters(), state["ema"].shadow_params, strict=True):
        assert torch.equal(shadow, p.detach() * 0.5)
    paths = {path for path, _ in flax_names(net).values()}
    block = "ResnetBlockDDPM_1" if config.model.name == "ddpm" else "ResnetBlockBigGANpp_1"
    assert f"{block}/GroupNorm_0/scale" in paths


def test_jax_states_that_do_not_fit_are_refused(tmp_path):
    pytest.importorskip("msgpack")
    path, config = tmp_path / "checkpoint_1", small_config()
    tree = flax_state(create_model(config))
    tree["optimizer"]["target"].pop("Conv_0")
    path.write_bytes(flax_bytes(tree))
    with pytest.raises(ValueError, match="2 missing: Conv_0/kernel, Conv_0/bias"):
        restore_checkpoint(path, make_state(config))
    path.write_bytes(flax_bytes({k: v for k, v in tree.items() if k != "params_ema"}))
    with pytest.raises(ValueError, match="expected a State of score_sde"):
        load_file(path)
    path.write_bytes(flax_bytes(tree)[:-100])
    with pytest.raises(ValueError, match="checkpoint_1 is not a checkpoint that can be read"):
        load_file(path)
    path.write_bytes(flax_bytes(tree))
    with pytest.raises(ValueError, match="'ncsnpp' and 'ddpm', got NCSN"):
        restore_checkpoint(path, make_state(small_config("configs/ve/ncsn/cifar10.py")))


def test_arrays_of_objects_in_a_jax_state_are_refused(tmp_path):
    msgpack = pytest.importorskip("msgpack")
    array = msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678"), use_bin_type=True))
    (tmp_path / "c").write_bytes(msgpack.packb({"optimizer": array, "step": 1, "params_ema": 2}))
    with pytest.raises(ValueError, match="c is not a checkpoint that can be read"):
        load_file(tmp_path / "c")


@pytest.mark.parametrize("kind", ["flax", "safetensors"])
def test_flipped_bytes_are_refused_or_harmless(tmp_path, kind):
    pytest.importorskip("msgpack" if kind == "flax" else "safetensors")
    net, path = jax_network("fir_residual"), tmp_path / "d"
    if kind == "flax":
        good = (DATA / "jax_ncsnpp_ve_fir_residual.msgpack").read_bytes()
    else:
        export_checkpoint(tmp_path / "c", {"model": net, "step": 3}, "safetensors")
        good = (tmp_path / "c").read_bytes()
    rng = np.random.default_rng(0)
    for end in [200] * 40 + [len(good) // 30] * 40 + [len(good)] * 40:
        damaged = bytearray(good)
        for where in rng.integers(0, end, 5):
            damaged[where] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            for_network(path, load_file(path), net)
