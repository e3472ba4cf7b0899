"""VE NCSN++ networks in 🤗 diffusers and back, by diffusers itself."""

import copy
import json
import os
import sys

import numpy as np
import pytest
import torch
from test_checkpoint_formats import ORIGINAL, make_state, published, same, small_config

import sampling
import sde_lib
from checkpoints import content_of, restore_checkpoint
from checkpoints_convert import convert
from checkpoints_diffusers import diffusers_names, unet_config
from checkpoints_export import export_checkpoint
from configs.validation import complete
from models.utils import create_model

diffusers = pytest.importorskip("diffusers")

FFHQ = "configs/ve/ffhq_ncsnpp_continuous.py"
EXPRESSIBLE = (
    "bedroom_ncsnpp_continuous",
    "celebahq_256_ncsnpp_continuous",
    "church_ncsnpp_continuous",
    "ffhq_256_ncsnpp_continuous",
    "celebahq_ncsnpp_continuous",
    "ffhq_ncsnpp_continuous",
)
# The families' networks, smaller: 256 attends on a middle level with two blocks, 1024 with one.
FAMILIES = {
    "256": {"model.num_res_blocks": 2, "model.ch_mult": (1, 4, 4), "model.attn_resolutions": (8,)},
    "1024": {"model.ch_mult": (1, 2, 4), "model.attn_resolutions": (4,)},
    "no attention": {"model.ch_mult": (1, 2), "model.attn_resolutions": ()},
    "attention everywhere": {
        "model.nf": 128,
        "model.ch_mult": (1, 1),
        "model.attn_resolutions": (16, 8),
    },
}


def family_config(name="1024", **options):
    values = {"data.image_size": 16, "model.nf": 32, "model.init_scale": 1.0}
    return small_config(FFHQ, **(values | FAMILIES[name] | options))


def family_state(config, steps=1):
    state = make_state(config, steps)
    with torch.no_grad():  # norms and biases away from their first values
        for p in state["model"].parameters():
            if p.ndim == 1 and p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    for _ in range(9):
        state["ema"].update(state["model"].parameters())
    return state


def averaged(state):
    network = copy.deepcopy(state["model"]).eval()
    state["ema"].copy_to(network.parameters())
    return network


@pytest.mark.parametrize("name", FAMILIES)
def test_both_networks_give_the_same_output(tmp_path, name):
    config = family_config(name)
    state = family_state(config)
    export_checkpoint(tmp_path / "out", state, "diffusers")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet").eval()
    x, sigma = 0.5 + 3 * torch.randn(3, 3, 16, 16), torch.tensor([0.02, 1.5, 300.0])
    with torch.no_grad():
        ours, theirs = averaged(state)(x, sigma), unet(x, sigma).sample
    scale = ours.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert ((ours - theirs) / scale).abs().max() < 1e-4


def test_the_pipeline_draws_our_samples(tmp_path):
    """The same seed gives the same images: scheduler, centring and clamping agree."""
    config = family_config(**{"model.num_scales": 6, "model.sigma_max": 30.0})
    state = family_state(config)
    export_checkpoint(tmp_path / "out", state, "diffusers")
    pipeline = diffusers.ScoreSdeVePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    sde = sde_lib.VESDE(config.model.sigma_min, config.model.sigma_max, config.model.num_scales)
    torch.testing.assert_close(pipeline.scheduler.discrete_sigmas, sde.discrete_sigmas.float())
    torch.manual_seed(3)
    theirs = pipeline(batch_size=2, num_inference_steps=6, output_type="np").images
    sampler = sampling.get_pc_sampler(
        sde,
        (2, 3, 16, 16),
        sampling.get_predictor("reverse_diffusion"),
        sampling.get_corrector("langevin"),
        lambda x: x,
        config.sampling.snr,
        n_steps=config.sampling.n_steps_each,
        continuous=True,
        denoise=True,
        eps=1e-5,
        device="cpu",
    )
    torch.manual_seed(3)
    ours, _ = sampler(averaged(state))
    ours = ours.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert theirs.std() > 0.05
    np.testing.assert_allclose(theirs, ours, atol=1e-3)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_published_256_and_1024_networks_have_diffusers_names_and_shapes(name):
    config = published(f"configs/ve/{name}.py")
    config.device = "meta"
    with torch.device("meta"):
        network = create_model(config)
        unet = diffusers.UNet2DModel(**unet_config(config))
    names = diffusers_names(network)
    own = {names[key]: p.shape for key, p in network.named_parameters()}
    assert own == {key: value.shape for key, value in unet.state_dict().items()}


def test_round_trip_is_equal_to_the_bit(tmp_path):
    config = family_config()
    state = family_state(config, steps=2)
    export_checkpoint(tmp_path / "out", state, "diffusers")
    fresh = restore_checkpoint(tmp_path / "out", make_state(config))
    network = averaged(state)
    assert same(fresh["model"].state_dict(), network.state_dict()) and fresh["step"] == 2
    assert same(fresh["ema"].shadow_params, state["ema"].shadow_params)
    with pytest.raises(ValueError, match="remove it, or name another"):
        export_checkpoint(tmp_path / "out", state, "diffusers")
    assert os.listdir(tmp_path) == ["out"]
    bare = restore_checkpoint(tmp_path / "out" / "unet", {"model": create_model(config), "step": 1})
    assert same(bare["model"].state_dict(), network.state_dict()) and bare["step"] == 0


def test_attention_under_its_older_names_is_read(tmp_path):
    """The published google/ncsnpp-* folders have these."""
    safetensors = pytest.importorskip("safetensors.torch")
    config = family_config()
    state = family_state(config)
    export_checkpoint(tmp_path / "out", state, "diffusers")
    path = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in safetensors.load_file(path).items():
        for new, old in older.items():
            key = key.replace(f".{new}.", f".{old}.")
        tensors[key] = value
    assert any("proj_attn" in key for key in tensors)
    safetensors.save_file(tensors, path, {"format": "pt"})
    fresh = restore_checkpoint(tmp_path / "out", make_state(config))
    assert same(fresh["model"].state_dict(), averaged(state).state_dict())


def test_convert_there_and_back(tmp_path):
    config = family_config()
    state = family_state(config)
    export_checkpoint(tmp_path / "a.pth", state, "score_sde")
    summary = convert(tmp_path / "a.pth", tmp_path / "b", "diffusers", config)
    assert "format diffusers, with the weights (the averaged ones)" in summary
    summary = convert(tmp_path / "b", tmp_path / "c.pth", "native", config)
    assert "diffusers, step 1" in summary and "ema: none" in summary
    fresh = restore_checkpoint(tmp_path / "c.pth", make_state(config))
    assert same(content_of(fresh)["model"], averaged(state).state_dict())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.progressive", "none"),
        ("model.progressive_input", "residual"),
        ("model.progressive_combine", "cat"),
        ("model.resblock_type", "ddpm"),
        ("model.fir", False),
        ("model.fir_kernel", (1, 2, 1)),
        ("model.skip_rescale", False),
        ("model.embedding_type", "positional"),
        ("model.scale_by_sigma", False),
        ("model.nonlinearity", "elu"),
        ("model.num_classes", 10),
        ("data.num_channels", 1),
        ("data.centered", True),
        ("training.sde", "vpsde"),
    ],
)
def test_options_that_diffusers_lacks_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"need {option}="):
        unet_config(family_config(**{option: value}))


def test_networks_that_diffusers_lacks_are_refused():
    with pytest.raises(ValueError, match=r"at least 128 channels.*got 32 on level 0"):
        unet_config(family_config(**{"model.attn_resolutions": (16,)}))
    with pytest.raises(ValueError, match=r"divisible by min\(channels / 4, 32\), got 30"):
        unet_config(family_config("no attention", **{"model.nf": 30}))
    with pytest.raises(ValueError, match=r"ch_mult to begin with 1, got \(2, 4\)"):
        unet_config(family_config("no attention", **{"model.ch_mult": (2, 4)}))
    with pytest.raises(ValueError, match=r"need model\.name 'ncsnpp', got 'ddpm'"):
        unet_config(complete(published("configs/vp/ddpm/cifar10.py")))
    for path in ("ve/cifar10_ncsnpp_continuous", "vp/cifar10_ddpmpp_continuous"):
        with pytest.raises(ValueError, match="--format safetensors or score_sde"):
            unet_config(complete(published(f"configs/{path}.py")))


def test_folders_of_another_network_are_refused(tmp_path):
    export_checkpoint(tmp_path / "out", family_state(family_config()), "diffusers")
    other = make_state(family_config(**{"model.num_res_blocks": 2}))
    with pytest.raises(ValueError, match="another network: layers_per_block: 1 instead of 2"):
        restore_checkpoint(tmp_path / "out", other)
    with pytest.raises(ValueError, match="belongs to another network"):
        restore_checkpoint(ORIGINAL, other)
    (tmp_path / "out" / "unet" / "config.json").write_text(json.dumps({"sample_size": 3}))
    with pytest.raises(ValueError, match=r"another network: .*time_embedding_type: positional"):
        restore_checkpoint(tmp_path / "out", other)


def test_diffusers_missing_is_said_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'score-sde\[diffusers\]'"):
        export_checkpoint(tmp_path / "out", family_state(family_config()), "diffusers")
    assert os.listdir(tmp_path) == []
