"""Sampling and evaluation with a faster network: low precision, and a compiled one."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import run_lib
import run_lib_samples
import run_lib_state
import sde_lib
from configs.validation import complete
from configs.vp import digits_ddpmpp_continuous
from models.utils import get_score_fn


def tiny(**changes):
    config = digits_ddpmpp_continuous.get_config()
    small = {"model.nf": 8, "model.num_res_blocks": 1, "model.num_scales": 12, "model.dropout": 0.0}
    small |= {"training.batch_size": 12, "training.n_iters": 3, "training.snapshot_freq": 3}
    small |= {
        "training.snapshot_sampling": False,
        "sampling.steps": 12,
        "sampling.predictor": "ddim",
    }
    small |= {"sampling.corrector": "none", "eval.batch_size": 4, "eval.begin_ckpt": -1}
    small |= {"eval.end_ckpt": -1, "eval.rtol": 1e-5, "eval.atol": 1e-5, "model.init_scale": 1.0}
    for key, value in {**small, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        section, name = key.split(".")
        config[section][name] = value
    return complete(config)


def sampler(**changes):
    config = tiny(**changes)
    config.device = torch.device("cpu")
    model = run_lib_state.create_state(config)["model"]
    return run_lib_samples.Sampler(config, sde_lib.get_sde(config), model), model


class Casts(TorchDispatchMode):
    """Counts casts of a network's weights."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.count = {p.data_ptr() for p in model.parameters()}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._to_copy:
            self.count += args[0].data_ptr() in self.weights
        return func(*args, **(kwargs or {}))


def test_low_precision_casts_each_weight_once_a_batch_and_not_at_every_step():
    counts = []
    for steps in (4, 12):
        draw, model = sampler(sampling__precision="bf16", sampling__steps=steps)
        with Casts(model) as casts:
            draw(range(4))
        counts.append(casts.count)
    # All but those that the network hands over as views, which autocast does not keep.
    each_step = (counts[1] - counts[0]) / 8
    assert 20 * each_step < counts[0] < 2 * len(list(model.parameters()))


def test_samples_in_bf16_are_those_of_float32_to_its_rounding_with_a_state_in_float32():
    exact, model = sampler()
    low, other = sampler(sampling__precision="bf16")
    other.load_state_dict(model.state_dict())
    found = []
    for draw in (exact, low):
        states = []
        draw._keep_frames = lambda states=states: lambda i, t, x, x_mean: states.append(x_mean)
        draw(range(4))
        found.append(torch.stack(states))
    a, b = found
    assert a.dtype == b.dtype == torch.float32
    assert 0 < (a - b).norm() < 0.02 * a.norm()


def test_time_labels_are_not_rounded_in_bf16(monkeypatch):
    draw, model = sampler(sampling__precision="bf16", sampling__steps=5)
    labels, before = [], type(model).forward

    def forward(network, x, t, *args, **kwargs):
        labels.append(t.clone())
        return before(network, x, t, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    draw(range(2))
    assert all(t.dtype == torch.float32 for t in labels)
    assert any((t != t.bfloat16().float()).any() for t in labels)


def test_precision_is_a_part_of_what_samples_are_made_by():
    names = {p: sampler(sampling__precision=p)[0].made_by("w") for p in ("", "bf16")}
    assert names[""] != names["bf16"]
    with pytest.raises(ValueError, match=r"sampling\.precision"):
        tiny(sampling__precision="fp8")


# --- a compiled network --------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    noted = {"modes": [], "outputs": []}

    def compile(module, mode=None):
        noted["modes"].append(mode)

        def run(*args, **kwargs):
            noted["outputs"].append(module._call_impl(*args, **kwargs))
            return noted["outputs"][-1]

        module._compiled_call_impl = run

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    return noted


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_one_key_compiles_the_network_of_samples_loss_and_bits_once(compiler, mode, tmp_path):
    run_lib.train(tiny(), tmp_path)
    assert compiler["modes"] == []
    run_lib.sample(tiny(eval__compile=mode), tmp_path, tmp_path / "a.npz", num=4)
    assert compiler["modes"] == [mode] and len(compiler["outputs"]) == 12
    changes = {"eval__compile": mode, "eval__enable_bpd": True, "eval__bpd_num_images": 1}
    run_lib.evaluate(tiny(**changes, eval__rtol=1e-2, eval__atol=1e-2), tmp_path)
    assert compiler["modes"] == [mode, mode]


def test_outputs_of_cuda_graphs_are_copied_before_the_next_call_overwrites_them(compiler):
    for mode, copied in (("default", False), ("reduce-overhead", True)):
        network = torch.nn.Linear(2, 2)
        run_lib_state.compile_once(network, mode)
        run_lib_state.compile_once(network, mode)  # it is
        out = network(torch.ones(1, 2))
        assert (out.data_ptr() != compiler["outputs"][-1].data_ptr()) is copied
    assert compiler["modes"] == ["default", "reduce-overhead"]
    run_lib_state.compile_once(torch.nn.Linear(2, 2), "")
    assert len(compiler["modes"]) == 2
    run_lib_state.compile_once(network, "default")  # another mode than before
    network.compile()  # as training.compile does
    run_lib_state.compile_once(network, "default")
    assert compiler["modes"][2:] == ["default", None, "default"]
    with pytest.raises(ValueError, match=r"eval\.compile"):
        tiny(eval__compile="fast")


@pytest.mark.slow
def test_a_compiled_network_gives_the_samples_and_bits_of_an_eager_one(tmp_path):
    run_lib.train(tiny(), tmp_path)
    found = {}
    for mode in ("", "default"):
        config = tiny(eval__compile=mode, eval__enable_bpd=True, eval__bpd_num_images=2)
        config.eval.enable_sampling = False
        config.eval.bpd_repeats, config.eval.likelihood = 1, "elbo"
        run_lib.sample(config, tmp_path, tmp_path / f"a{mode}.npz", num=4)
        results = run_lib.evaluate(config, tmp_path, f"eval{mode}")
        (content,) = results.values()
        samples = np.load(tmp_path / f"a{mode}.npz")["samples"]
        found[mode] = samples, [content[k]["mean"] for k in ("loss", "bpd_elbo")]
    assert np.abs(found[""][0].astype(int) - found["default"][0]).max() <= 1
    np.testing.assert_allclose(found[""][1], found["default"][1], rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_score_and_its_gradient_equal_the_eager_ones():
    config = tiny()
    model = run_lib_state.create_state(config)["model"]
    score_fn = get_score_fn(sde_lib.get_sde(config), model, continuous=True)
    x, t = torch.randn(4, 1, 8, 8), torch.rand(4) * 0.9 + 0.05

    def both():
        with torch.no_grad():
            value = score_fn(x, t)
        y = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((score_fn(y, t) * x).sum(), y)
        return value, slope

    eager = both()
    run_lib_state.compile_once(model, "default")
    for a, b in zip(eager, both(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item())
