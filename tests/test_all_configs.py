"""Every shipped configuration, scaled down: it builds, trains, samples and scores."""

import importlib
import json
from pathlib import Path

import ml_collections
import pytest
import torch

import checkpoints
import checkpoints_export
import data_lib
import likelihood
import losses
import sampling
import sde_lib
from configs import defaults
from configs.validation import NEVER_READ, complete, flatten
from controllable_generation import guided_from_config
from models import ema, utils
from parametrization import as_score_function
from run_lib_checks import NO_SCORE
from run_lib_samples import sampling_precision

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = sorted(json.loads((ROOT / "tests/data/published_configs.json").read_text())["configs"])
SHIPPED = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config(" in path.read_text()
)


def load(path):
    return importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config()


# The others train networks that draw nothing, on a score model or its noise.
SCORES = [path for path in SHIPPED if load(path).training.get("objective") not in NO_SCORE]


def scaled_down(path):
    """The configuration with the smallest images that halve as often, few features and scales."""
    config = load(path)
    model, published_size = config.model, config.data.image_size
    has_levels = model.name in ("ncsnpp", "ddpm")
    size = max(8, 2 ** (len(model.ch_mult) - 1)) if has_levels else 8
    attention = tuple(r * size // published_size for r in model.attn_resolutions)
    config.data.image_size = size
    model.update(nf=4, num_res_blocks=1, attn_resolutions=attention, num_scales=12, beta_max=5.0)
    config.sampling.update(steps=3, n_steps_each=min(config.sampling.n_steps_each, 2))
    config.device = torch.device("cpu")
    return complete(config)


def create_state(config):
    model = utils.create_model(config)
    averages = ema.from_config(config, model.parameters())
    optimizer = losses.get_optimizer(config, model.parameters())
    return {"model": model, "optimizer": optimizer, "ema": averages, "step": 0}


def images(config, count=2):
    size, channels = config.data.image_size, config.data.num_channels
    return data_lib.get_data_scaler(config)(torch.rand(count, channels, size, size))


def step_fn(config, train):
    return losses.step_fn_from_config(config, sde_lib.get_sde(config), train)


def get_sampler(config):
    sde = sde_lib.sampling_process(config, sde_lib.get_sde(config))
    size, channels = config.data.image_size, config.data.num_channels
    unscale = data_lib.get_data_inverse_scaler(config)
    eps = config.sampling.eps or sde.sampling_eps
    return sampling.get_sampling_fn(config, sde, (2, channels, size, size), unscale, eps)


@pytest.mark.parametrize("path", SCORES)
def test_config_builds_trains_samples_and_scores(path):
    config = scaled_down(path)
    state = create_state(config)
    before = [p.detach().clone() for p in state["model"].parameters()]

    train = step_fn(config, train=True)
    found = [train(state, images(config)) for _ in range(2)]
    found.append(step_fn(config, train=False)(state, images(config)))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in found), found
    assert state["step"] == 2 and not state.get("nonfinite")
    moved = [not torch.equal(p, q) for p, q in zip(before, state["model"].parameters())]
    assert any(moved)

    samples, nfe = get_sampler(config)(state["model"])
    assert samples.dtype == torch.float32 and samples.isfinite().all()
    assert samples.shape == images(config).shape
    assert nfe >= 3 or config.sampling.predictor == "none"

    if config.training.continuous:
        sde, unscale = sde_lib.get_sde(config), data_lib.get_data_inverse_scaler(config)
        score = likelihood.get_likelihood_fn(sde, unscale, rtol=1e-2, atol=1e-2, eps=1e-3)
        bpd, z, _ = score(state["model"], images(config, 1))
        assert bpd.shape == (1,) and bpd.isfinite() and z.isfinite().all()


class Recording:
    """A configuration that notes the keys that are read."""

    def __init__(self, config, seen, prefix=""):
        self.__dict__.update(_config=config, _seen=seen, _prefix=prefix)

    def __contains__(self, key):
        return key in self._config

    def __getitem__(self, key):
        value = self._config[key]
        if isinstance(value, ml_collections.ConfigDict):
            return Recording(value, self._seen, f"{key}.")
        self._seen.add(self._prefix + key)
        return value

    def __getattr__(self, key):
        if key not in self._config:
            raise AttributeError(key)
        return self[key]

    def get(self, key, default=None):
        return self[key] if key in self._config else default

    def keys(self):
        return self._config.keys()


def test_networks_optimizer_and_samplers_read_every_key_of_theirs():
    seen: set = set()
    for path in SHIPPED:
        config = Recording(scaled_down(path), seen)
        state = create_state(config)
        if path in SCORES:
            with sampling_precision(config):
                get_sampler(config)(state["model"])
            step_fn(config, train=True)
        sde_lib.OUVE.from_config(config)  # no configuration's process
    guided = scaled_down(SHIPPED[0])
    guided.sampling.guidance = "autoguidance"  # of no configuration
    score_fn = as_score_function(lambda x, t: x, sde_lib.VPSDE())
    guided_from_config(Recording(guided, seen), score_fn, None, lambda where, key: score_fn)
    kept = ("model.", "optim.", "sampling.")
    known = {key for key, _ in flatten(defaults.get_default_configs()) if key.startswith(kept)}
    used = {key for path in SHIPPED for key, _ in flatten(load(path)) if key.startswith(kept)}
    assert (known | used) - seen <= set(NEVER_READ)


@pytest.mark.parametrize("path", PUBLISHED)
def test_a_checkpoint_goes_to_the_originals_layout_and_back_equal_to_the_bit(path, tmp_path):
    config = scaled_down(path)
    state, fresh = create_state(config), create_state(config)
    step_fn(config, True)(state, images(config))
    checkpoints_export.export_checkpoint(tmp_path / "theirs.pth", state, "score_sde")
    checkpoints.restore_checkpoint(tmp_path / "theirs.pth", fresh)
    ours, back = (s["model"].state_dict() for s in (state, fresh))
    assert all(torch.equal(ours[key], back[key]) for key in ours)
    averages = zip(state["ema"].shadow_params, fresh["ema"].shadow_params, strict=True)
    assert all(torch.equal(a, b) for a, b in averages)
    assert fresh["step"] == 1
