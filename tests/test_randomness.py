"""Random numbers that belong to one image of one step."""

import pytest
import torch

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
