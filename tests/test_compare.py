"""Pictures side by side under headings, with names of rows."""

import numpy as np
import pytest
import torch

from visualize_compare import NAMES, comparison

N, SIZE = 3, 8
IMAGES = torch.rand(N, 1, SIZE, SIZE)


def test_every_tile_stands_under_its_heading_pixel_by_pixel():
    colour = torch.rand(N, 3, SIZE, SIZE)
    found = np.asarray(comparison([("grey", IMAGES), ("colour", colour)], scale=12, padding=2))
    assert found.shape == (22 + N * (96 + 2), 96 + 2 + 96, 3)
    top = 22 + 2 + 98
    tile = found[top : top + 96 : 12, 98 : 98 + 96 : 12]
    assert np.abs(tile / 255 - colour[1].permute(1, 2, 0).numpy()).max() < 1 / 255


def test_names_of_rows_stand_to_the_left_and_long_ones_are_cut():
    bare = comparison([("a", IMAGES)])
    short = comparison([("a", IMAGES)], rows=["x", "y", "z"])
    names = ["a_very_long_name_of_a_photograph_with_a_number_0001", "b", "c"]
    long = comparison([("a", IMAGES)], rows=names)
    assert bare.width < short.width < bare.width + 30
    assert long.width == bare.width + 2 + NAMES
    assert np.array_equal(np.asarray(long)[:, -bare.width :], np.asarray(bare))
    left = np.asarray(long)[:, :NAMES]
    for k in range(N):  # ink in each row, none in the corner
        assert left[22 + k * 98 : 22 + (k + 1) * 98].min() < 128
    assert left[:22].min() == 255


def test_names_must_be_as_many_as_images():
    with pytest.raises(ValueError, match="each of 3 rows, got 2"):
        comparison([("a", IMAGES)], rows=["x", "y"])
    with pytest.raises(ValueError, match="at least one column"):
        comparison([])
