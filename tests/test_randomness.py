"""Random numbers that belong to one image of one step."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import randomness
from randomness import Draws, seed_for


def test_a_seed_depends_on_its_words_alone():
    assert seed_for(1, "a", 2) == seed_for(1, "a", 2)
    assert len({seed_for(1, "a", 2), seed_for(1, "a", 3), seed_for(2, "a", 2)}) == 3


@pytest.mark.parametrize("kind", ["rand", "randn"])
def test_a_row_depends_on_seed_step_and_index_alone(kind):
    def numbers(first, count, step=4):
        return getattr(Draws(7, step, first, count), kind)("z", (3, 5))

    whole = numbers(0, 8)
    assert torch.equal(numbers(5, 3), whole[5:])
    assert torch.equal(Draws(7, 4, 0, 8).rows(2, 6).randn("z", (2,)), numbers_of(2, 4))
    assert not torch.equal(numbers(0, 8, step=5), whole)


def numbers_of(first, count):
    return Draws(7, 4, first, count, total=8).randn("z", (2,))


def test_streams_and_rows_are_independent_and_standard():
    d = Draws(0, 0, 0, 20000)
    u, z = d.rand("u"), d.randn("z")
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.003
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.02
    assert abs(torch.corrcoef(torch.stack([z[1:], z[:-1]]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([d.rand("t"), u]))[0, 1]) < 0.03


def test_integers_cover_their_range_and_shared_numbers_are_shared():
    d = Draws(0, 0, 0, 1000)
    assert sorted(d.randint("i", 5).unique().tolist()) == [0, 1, 2, 3, 4]
    assert d.shared("s") == d.rows(3, 4).shared("s")
    assert 0 <= d.shared("s") < 1


def test_rows_outside_the_batch_are_refused():
    with pytest.raises(ValueError, match="start"):
        Draws(0, 0, 0, 4).rows(2, 5)


# --- the generator -------------------------------------------------------------------------------


def splitmix(z: int, key: int = 0) -> int:
    """SplitMix64's finaliser by Python's integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64 ^ key
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_words_are_splitmix64_of_counter_and_keys_in_unbounded_integers():
    found = Draws(3, ("a", 1), 5, 4)._words("z", 6)
    golden = 0x9E3779B97F4A7C15
    for i, row in enumerate(found.tolist(), start=5):
        keys = [
            splitmix(((i + 1) * golden + seed_for(3, ("a", 1), "z", name)) % 2**64) for name in "ab"
        ]
        for j, word in enumerate(row, start=1):
            assert word % 2**64 == splitmix((keys[0] + j * golden) % 2**64, keys[1])


def test_the_numbers_of_this_version_are_these():
    # A change of these is a change of every training that goes on from a checkpoint.
    d = Draws(42, 7, 0, 3)
    words = d._words("z", 4).numpy().tobytes()
    assert hashlib.sha256(words).hexdigest()[:16] == "fe0d2c9434e48fff"
    torch.testing.assert_close(
        d.randn("z", (2,)),
        torch.tensor([[-1.1566379, 0.6939648], [-0.8854684, -0.7050625], [0.0995859, -0.0988986]]),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("n", [1, 2, 7, 64, 3071])
@pytest.mark.parametrize("kind", ["rand", "randn"])
def test_any_rows_of_a_batch_are_bit_equal_to_the_whole(kind, n):
    whole = getattr(Draws(0, 0, 0, 37), kind)("z", (n,))
    for first, count in ((0, 1), (3, 5), (36, 1), (11, 26)):
        part = getattr(Draws(0, 0, first, count), kind)("z", (n,))
        assert torch.equal(part, whole[first : first + count])
    assert getattr(Draws(0, 0, 0, 0), kind)("z", (n,)).shape == (0, n)


ROWS, NUMBERS = 400, 1000


@pytest.mark.parametrize("across", ["rows", "steps", "seeds", "streams"])
def test_numbers_are_uniform_and_normal_along_and_across(across):
    makers = {
        "rows": lambda i: Draws(0, 0, i, 1),
        "steps": lambda i: Draws(0, i, 0, 1),
        "seeds": lambda i: Draws(i, 0, 0, 1),
        "streams": lambda i: Draws(0, 0, 0, 1),
    }
    if across == "rows":
        u = Draws(0, 0, 0, ROWS).rand("u", (NUMBERS,), torch.float64)
        z = Draws(0, 0, 0, ROWS).randn("z", (NUMBERS,))
    else:
        streams = [f"{i}" if across == "streams" else "" for i in range(ROWS)]
        of = [makers[across](i) for i in range(ROWS)]
        u = torch.cat([d.rand(f"u{s}", (NUMBERS,), torch.float64) for d, s in zip(of, streams)])
        z = torch.cat([d.randn(f"z{s}", (NUMBERS,)) for d, s in zip(of, streams)]).double()
    assert u.min() >= 0 and u.max() < 1
    for values in (u, torch.special.ndtr(z.double())):
        v = values.numpy()
        # By row and by column, and then whether the p-values of these are uniform themselves.
        for lines in (v[:100], v.T[:100]):
            p = [stats.kstest(line, "uniform").pvalue for line in lines]
            assert stats.kstest(p, "uniform").pvalue > 1e-4
        # Neighbours in pairs, along and across, in 16 × 16 cells.
        for a, b in ((v[:, 1:], v[:, :-1]), (v[1:], v[:-1]), (v[:, 500:], v[:, :500])):
            cells = np.histogram2d(a.ravel(), b.ravel(), bins=16, range=[[0, 1], [0, 1]])[0]
            assert stats.chisquare(cells.ravel()).pvalue > 1e-4
    x = z.double()
    n = x.numel()
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((x**power).mean().item() - mean) < 4 * (variance / n) ** 0.5
    correlation = np.corrcoef(x.numpy())[np.triu_indices(ROWS, 1)] * NUMBERS**0.5
    assert abs(correlation).max() < 5.5
    assert abs(correlation.var() - 1) < 0.03


def test_every_bit_of_a_word_is_balanced_and_changes_with_every_bit_of_the_keys():
    words = Draws(0, 0, 0, 64)._words("z", 4096)
    bits = (words.unsqueeze(-1) >> torch.arange(64)) & 1
    z = (bits.double().mean(dim=(0, 1)) - 0.5) / (0.25 / words.numel()) ** 0.5
    assert z.abs().max() < 5
    flat = (bits.double() - 0.5).reshape(-1, 64)
    pairs = (flat.T @ flat) / (0.25 * len(flat) ** 0.5) - torch.eye(64) * len(flat) ** 0.5
    assert pairs.abs().max() < 5.5
    z, key = torch.randint(-(2**62), 2**62, (2, 2000))
    for by in range(64):
        one = torch.tensor(1) << by
        for other in ((z ^ one, key), (z, key ^ one)):
            changed = randomness._mixed(z.clone(), key) ^ randomness._mixed(
                other[0].clone(), other[1]
            )
            flips = ((changed.unsqueeze(-1) >> torch.arange(64)) & 1).double().mean(dim=0)
            # Half way only one multiplication is left, which carries upwards alone.
            assert 0.3 < flips.mean() < 0.7 or other[1] is not key


def test_normal_numbers_have_their_tails_and_are_always_finite():
    z = Draws(0, 0, 0, 4000).randn("z", (1000,))
    for at in (3.0, 4.0, 4.5):
        expected = z.numel() * math.erfc(at / 2**0.5)
        assert abs((z.abs() > at).sum().item() - expected) < 5 * expected**0.5
    assert (z == 0).sum() < 5

    extremes = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1, 2**32, -(2**32), 2**31, -(2**31)])
    d = Draws(0, 0, 0, 1)
    d._words = lambda stream, n: extremes.unsqueeze(0)  # type: ignore[method-assign]
    z = d.randn("z", (18,))
    assert torch.isfinite(z).all() and z.abs().max() < 6.8
    u = d.rand("u", (18,))
    assert u.min() >= 0 and u.max() < 1
    u = d.rand("u", (9,), torch.float64)
    assert u.min() >= 0 and u.max() < 1


class NoCopies(TorchDispatchMode):
    """Fails where a tensor comes from the host; a meta tensor that is asked for a value does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.device.type == "meta", func
        return out


def test_numbers_are_made_on_the_device_without_asking_or_feeding_it():
    d = Draws(1, 2, 3, 128, device="meta")
    with NoCopies():
        assert d.randn("z", (3, 32, 32)).shape == (128, 3, 32, 32)
        assert d.rand("u", (5,), torch.float64).dtype == torch.float64
        assert d.rand("t").shape == d.randint("i", 7).shape == (128,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniform_numbers_of_16_bits_are_rounded_ones_of_float32_below_one(dtype):
    draws = Draws(0, 0, 0, 100_000)
    u, exact = draws.rand("u", (), dtype), draws.rand("u")
    assert u.dtype == dtype and u.min() >= 0 and u.max() < 1
    assert (u.double() - exact.double()).abs().max() <= torch.finfo(dtype).eps / 2


def test_no_integer_is_below_zero():
    with pytest.raises(ValueError, match="below high ≥ 1, got high=0"):
        Draws(0, 0, 0, 3).randint("label", 0)


def test_noise_is_torchs_or_the_images_own_in_the_dtype_of_the_data():
    x = torch.zeros(3, 2, dtype=torch.float64)
    torch.manual_seed(4)
    z = randomness.normal(x, None, "z")
    torch.manual_seed(4)
    assert torch.equal(z, torch.randn(3, 2, dtype=torch.float64))
    draws = Draws(0, 0, 5, 3)
    assert torch.equal(randomness.normal(x, draws, "z"), draws.randn("z", (2,)).double())


def test_noise_of_one_image_is_not_shared_among_others():
    for x in (torch.zeros(4, 2), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"draws for 4 images, got 1; use draws\.rows"):
            randomness.normal(x, Draws(0, 0, 0, 1), "z")
