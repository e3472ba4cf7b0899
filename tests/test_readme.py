"""The README's examples run, and its commands name files and keys that exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def example(title: str) -> dict:
    """The names that the example under a heading defines."""
    section = re.search(rf"## {title}\n(.*?)\n## ", README, re.DOTALL)
    assert section is not None
    code = re.search(r"```python\n(.*?)```", section[1], re.DOTALL)
    assert code is not None
    names: dict = {}
    exec(compile(code[1], f"README.md: {title}", "exec"), names)
    return names


def test_the_example_of_an_sde_trains_samples_and_scores():
    from toys import AsModel, gaussian_score

    import likelihood
    import losses
    import sampling

    sde = example("Your own SDE")["sde"]
    model = AsModel(sde, gaussian_score(sde, 0.5, 0.3))
    assert torch.isfinite(losses.get_sde_loss_fn(sde, train=False)(model, torch.randn(8, 2)))
    sampler = sampling.get_pc_sampler(
        sde,
        (500, 2),
        sampling.get_predictor("ancestral_sampling"),
        sampling.get_corrector("ald"),
        lambda x: x,
        0.1,
        continuous=True,
        steps=50,
    )
    samples, evaluations = sampler(model)
    assert evaluations == 100
    assert abs(samples.mean() - 0.5) < 0.1
    assert 0.2 < samples.std() < 0.4
    logp = likelihood.get_log_likelihood_fn(sde, eps=1e-3)(model, torch.full((1, 2), 0.5))[0]
    truth = torch.distributions.Normal(0.5, 0.3).log_prob(torch.tensor(0.5)) * 2
    assert abs(logp - truth) < 0.1


def test_the_example_of_predictor_and_corrector_samples():
    names = example("Your own predictor and corrector")
    assert names["evaluations"] == 19 * 3 + 2
    assert torch.isfinite(names["samples"]).all()


def test_the_example_of_a_model_trains(tmp_path):
    import run_lib
    from configs.vp import digits_ddpmpp_continuous

    example("Your own model")
    config = digits_ddpmpp_continuous.get_config()
    config.model.name = "my_mlp"
    config.training.update(n_iters=3, snapshot_sampling=False)
    assert run_lib.train(config, tmp_path)["step"] == 3


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/[a-z][\w/]+\.py", README))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("key", sorted(set(re.findall(r"--config\.([\w.]+)", README))))
def test_named_keys_exist(key):
    from configs.defaults import get_default_configs

    config = get_default_configs()
    for name in key.split("."):
        config = config[name]


def test_named_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists()
