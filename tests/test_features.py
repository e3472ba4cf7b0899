"""Feature extractors: resizes against independent references, weights, and your own by name."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys_inception import pictures, write_weights

import evaluation_features as features
import evaluation_inception as inception
import evaluation_metrics as metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:::torchvision"),
]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of random weights for the published architecture, in pytorch-fid's form."""
    return write_weights(tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    """A small stand-in with the members that NVIDIA's TorchScript has."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 9, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(16), nn.Flatten()
            )
            self.output = nn.Linear(2048, 1008)

        def forward(self, x):
            return self.output(self.layers((x - 128) / 128))

    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("scripted") / "inception-2015-12-05.pt"
    torch.jit.script(Net()).save(file)
    known = inception.TORCHSCRIPT_SHA256  # no other program is run
    inception.TORCHSCRIPT_SHA256 = (*known, inception.file_hash(file))
    yield file
    inception.TORCHSCRIPT_SHA256 = known


# Resizing


def tensorflow_bilinear(image, size):
    """TensorFlow 1's resize_bilinear of one (H, W) array, pixel by pixel, in its own float32."""
    f = np.float32
    height, width = image.shape
    out = np.empty((size, size), dtype=f)
    for i in range(size):
        y = f(i) * (f(height) / f(size))
        for j in range(size):
            x = f(j) * (f(width) / f(size))
            t, left = int(y), int(x)
            b, right = min(t + 1, height - 1), min(left + 1, width - 1)
            top = image[t, left] + (image[t, right] - image[t, left]) * (x - f(left))
            bottom = image[b, left] + (image[b, right] - image[b, left]) * (x - f(left))
            out[i, j] = top + (bottom - top) * (y - f(t))
    return out


@pytest.mark.parametrize(("height", "width", "size"), [(7, 5, 23), (32, 32, 299), (60, 41, 17)])
def test_resize_is_tensorflow_1s_to_1e_5(height, width, size):
    x = pictures(1, 1, height, width).float()
    want = tensorflow_bilinear(x[0, 0].numpy(), size)
    got = inception.resize_tensorflow(x, size)[0, 0].numpy()
    assert np.abs(got - want).max() <= 1e-5


def test_resize_has_no_half_pixel_shift_and_leaves_its_own_size_alone():
    x = pictures(2, 3, 299, 299).float()
    assert torch.equal(inception.resize_tensorflow(x), x)
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    want = [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert inception.resize_tensorflow(ramp, 8)[0, 0, 0].tolist() == want


@pytest.mark.parametrize(
    ("mode", "resize"), [("clean", "resize_clean"), ("legacy_pytorch", "resize_pytorch")]
)
def test_resize_is_clean_fids(mode, resize):
    from cleanfid.resize import build_resizer

    x = pictures(2, 3, 20, 33)
    peer = build_resizer(mode)
    want = np.stack([peer(image.permute(1, 2, 0).numpy()) for image in x]).transpose(0, 3, 1, 2)
    got = getattr(inception, resize)(x.float()).numpy()
    assert np.abs(got - want).max() <= 1e-4


# Inception


def test_features_and_logits_do_not_depend_on_the_batch(weights):
    x = pictures(3)
    small = features.get_extractor(path=str(weights), batch_size=2)(x)
    assert small.pool.shape == (3, 2048) and small.logits.shape == (3, 1008)
    one = features.get_extractor(path=str(weights), batch_size=1)(x)
    torch.testing.assert_close(small.pool, one.pool, rtol=1e-4, atol=1e-4)
    bare = torch.load(weights, weights_only=True)["fc.weight"]
    torch.testing.assert_close(small.logits, small.pool @ bare.T)


@pytest.mark.slow
def test_inception_under_random_weights_tells_two_sets_apart_and_a_set_from_itself_not(weights):
    generator = torch.Generator().manual_seed(5)
    flat = torch.randint(0, 256, (6, 3, 1, 1), generator=generator).byte().expand(-1, -1, 8, 8)
    extractor = features.get_extractor(path=str(weights))
    seen, other = extractor(pictures(6, seed=5)), extractor(flat)
    assert float(seen.pool.std(0).mean()) > 0.05
    assert metrics.inception_score(other.logits, 2)["is"] > 1.1
    moments, others = metrics.Moments.of(seen.pool), metrics.grouped_moments(other.pool, 2)
    apart = metrics.frechet_inception_distance(others, moments.mu, moments.sigma)["fid"]
    itself = metrics.frechet_inception_distance([moments], moments.mu, moments.sigma)["fid"]
    assert apart > 1
    assert itself < 1e-3


def test_the_three_conventions_give_three_kinds_of_features(scripted):
    x = pictures(2)
    names = ("legacy_tensorflow", "clean", "legacy_pytorch")
    pools = [features.get_extractor(name, str(scripted))(x).pool for name in names]
    gaps = [float((pools[i] - pools[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(gaps) > 1e-3


def test_a_torchscript_file_gives_clean_fids_features(scripted):
    from cleanfid.inception_torchscript import InceptionV3W

    peer = InceptionV3W(str(scripted.parent), download=False)
    x = pictures(2)
    with torch.no_grad():
        want = peer(inception.resize_clean(x.float()))
    got = features.get_extractor("clean", str(scripted))(x)
    torch.testing.assert_close(got.pool, want)
    assert got.logits.shape == (2, 1008)


def test_pytorch_fids_network_gives_the_same_features(weights, monkeypatch):
    from cleanfid import inception_pytorch

    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: state)
    peer = inception_pytorch.InceptionV3([3], resize_input=False).eval()
    x = pictures(1)
    want = peer(inception.resize_pytorch(x.float()) / 255)[0].flatten(1)
    got = features.get_extractor("legacy_pytorch", str(weights))(x).pool
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_grey_images_are_repeated_to_three_channels(scripted):
    extractor = features.get_extractor("clean", str(scripted))
    grey = pictures(2, 1)
    torch.testing.assert_close(extractor(grey).pool, extractor(grey.expand(-1, 3, -1, -1)).pool)
    assert "repeated" in extractor.protocol()["channels"]
    with pytest.raises(ValueError, match="1 or 3 channels"):
        extractor(pictures(2, 4))


@pytest.mark.parametrize(
    "images", [torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(0, 3, 8, 8).byte()]
)
def test_only_batches_of_uint8_images_are_accepted(images):
    with pytest.raises(ValueError, match=r"uint8 images \(B, C, H, W\).*quantize"):
        features.get_extractor("pixels")(images)


# Weights


def test_missing_weights_are_refused_with_the_remedy_and_nothing_is_fetched(monkeypatch, tmp_path):
    from cleanfid import downloads_helper

    monkeypatch.setattr(downloads_helper, "check_download_inception", lambda **k: pytest.fail())
    with pytest.raises(FileNotFoundError, match=r"eval\.inception_path"):
        features.get_extractor("legacy_tensorflow")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        features.get_extractor("clean", str(tmp_path / "nowhere.pt"), download=True)


def test_the_download_is_clean_fids_and_kept(monkeypatch, tmp_path, scripted):
    from cleanfid import downloads_helper

    calls = []

    def fetch(fpath):
        calls.append(fpath)
        return shutil.copy(scripted, fpath)

    monkeypatch.setattr(downloads_helper, "check_download_inception", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for _ in range(2):
        features.get_extractor("clean", download=True)
    assert len(calls) == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [scripted.name]


def test_a_file_is_held_to_the_hash_in_its_name(weights, tmp_path):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    named = tmp_path / f"weights-{digest[:8]}.pth"
    named.symlink_to(weights)
    protocol = features.get_extractor("clean", str(named)).protocol()
    assert protocol["weights_sha256"] == digest and not protocol["weights_published"]
    wrong = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    wrong.symlink_to(weights)
    with pytest.raises(ValueError, match=f"begins with 6726825d.*got {digest[:8]}"):
        features.get_extractor("clean", str(wrong))


def test_other_weights_are_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not the weights of pytorch-fid's Inception"):
        features.get_extractor("clean", str(tmp_path / "x.pth"))
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "y.pt")
    with pytest.raises(ValueError, match="expected NVIDIA's TorchScript"):
        features.get_extractor("clean", str(tmp_path / "y.pt"))


# Extractors by name


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(features, "_EXTRACTORS", dict(features._EXTRACTORS))


def test_pixels_are_flattened_images():
    x = pictures(2, 1)
    got = features.get_extractor("Pixels")(x)
    assert torch.equal(got.pool, x.flatten(1).float() / 255) and got.logits is None


def test_a_function_a_module_and_a_class_are_extractors_by_name(registry, tmp_path):
    @features.register_extractor(name="mean")
    def mean_colour(images):
        return images.float().mean((2, 3))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 4))

    class Cast(nn.Module):
        def __init__(self, path=""):
            super().__init__()
            self.net = net
            if path:
                self.net.load_state_dict(torch.load(path, weights_only=True))

        def forward(self, images):
            out = self.net(images.float())
            return out, out[:, :2]

    features.register_extractor(Cast(), name="module")
    features.register_extractor(Cast)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    x = pictures(3, 3, 2, 2)
    assert features.get_extractor("mean")(x).pool.shape == (3, 3)
    module = features.get_extractor("module")
    assert torch.equal(module(x).pool, module(x).pool)  # dropout is off
    assert module(x).logits.shape == (3, 2)
    loaded = features.get_extractor("cast", str(tmp_path / "net.pth"))
    assert loaded.weights_hash == inception.file_hash(tmp_path / "net.pth")
    before = features.state_hash(net)
    assert before == features.state_hash(net) and len(before) == 64
    with torch.no_grad():
        net[2].bias += 1
    assert features.state_hash(net) != before


def test_names_that_are_unknown_or_taken_are_refused(registry):
    with pytest.raises(ValueError, match="unknown; known: clean, legacy_pytorch, legacy_tens"):
        features.get_extractor("incption")
    with pytest.raises(ValueError, match="already registered"):
        features.register_extractor(lambda x: x, name="pixels")
    features.register_extractor(lambda x: x, name="function")
    with pytest.raises(ValueError, match=r"takes no eval\.inception_path"):
        features.get_extractor("function", "weights.pth")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: x.float(), "must return features"),
        (lambda x: x.float().mean(), "must return features"),
        (lambda x: x.float().flatten(1) / 0, "NaN or infinite"),
    ],
)
def test_features_of_the_wrong_shape_or_not_finite_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        features.Extractor("mine", network)(torch.zeros(2, 1, 2, 2).byte())


def test_the_examples_of_the_protocol_page_run(registry, tmp_path, monkeypatch, recwarn):
    import re

    page = Path(__file__).resolve().parent.parent / "docs" / "evaluation.md"
    first, second = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(first, str(page), "exec"), names)
    assert names["notes"] == [] and names["reference"].n == len(names["train_set"])
    features._EXTRACTORS.pop("mean_colour", None)  # test_docs.py runs the page too
    exec(compile(second, str(page), "exec"), names)
    assert features.get_extractor("mean_colour")(pictures(2)).pool.shape == (2, 3)


def test_features_are_the_same_under_the_callers_autocast():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    extractor = features.Extractor("mine", lambda images: network(images.float()))
    images = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        low = extractor(images).pool
    assert torch.equal(low, extractor(images).pool)


def test_levels_are_spread_over_a_byte():
    x = torch.arange(17).byte()
    assert features.as_bytes(x, 17).tolist()[::8] == [0, 128, 255]
    assert torch.equal(features.as_bytes(x), x)
