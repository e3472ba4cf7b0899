"""Checkpoints that are whole and wrong: other shapes, types, missing and further parts, NaN."""

import copy
import math

import numpy as np
import pytest
import torch
import toys_damage as toys
from test_damage_files import content_of, state, tree_equal

import checkpoints
import files_reading
from models import ema_posthoc

NAN, INF = math.nan, math.inf
JUNK = ("text", 3, None, [1], {"a": 1}, NAN, -1, 1.5, torch.ones(2), True, (), b"x", 2**70, {1, 2})


def put(tree, path, value):
    """`tree` with `value` at the place `path` names."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def places(tree, path=()):
    """Every place in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key), value
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def without(tree, path):
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return tree


def tensors_like(value):
    """What is not this tensor: shapes, kinds of numbers, numbers that are none."""
    yield value.flatten()[:-1]
    yield value[None]
    yield value.long()
    yield value.to(torch.complex64)
    yield value.bool()
    yield torch.full_like(value, NAN)
    one = value.clone()
    one.flatten()[-1] = INF
    yield one
    yield value.to_sparse()


def wrong_trees(saved):
    """(place, tree): each place of the tree gone, or something else, or NaN."""
    for path, value in places(saved):
        yield path, without(saved, path)
        for junk in JUNK:
            yield path, put(saved, path, junk)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
            for other in tensors_like(value):
                yield path, put(saved, path, other)
    for name in ("model", "ema", "optimizer"):
        yield (name, "further"), put(saved, (name, "further"), torch.ones(3))


def restores(path, now, before):
    """'restored', or 'refused' by an error of ours that left the state as it was."""
    try:
        checkpoints.restore_checkpoint(path, now)
    except ValueError as error:
        toys.check_error(error, path)
        assert tree_equal(content_of(now), before), f"{error}: the state was changed all the same"
        return "refused"
    for value in (*now["model"].state_dict().values(), *now["ema"].shadow_params):
        assert value.dtype == torch.float32 and value.isfinite().all()
    moments = now["optimizer"].state_dict()["state"].values()
    assert all(m["exp_avg"].isfinite().all() for m in moments)
    return "restored"


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_with_one_wrong_part_is_refused_and_changes_nothing_or_trains_on(
    tmp_path, every
):
    saved = {"version": 1, **content_of(state())}
    now, other = state(step=5), state(step=5)
    before = content_of(now)
    counted = {"refused": 0, "restored": 0}
    for number, (place, tree) in enumerate(wrong_trees(saved)):
        if number % every:
            continue
        path = tmp_path / f"wrong_{number}.pth"
        try:
            torch.save(tree, path)
        except Exception:
            continue
        what = restores(path, now, before)
        counted[what] += 1
        path.unlink()
        if what == "restored":
            assert place[0] != "model", f"{place} was restored"
            other = state(step=5)
            now = other
            before = content_of(now)
    print(f"checkpoints with one wrong part: {counted}")
    assert counted["refused"] > 1000 // every


@pytest.mark.parametrize("key", ["layout", "unet"])
@pytest.mark.parametrize("value", ["flax", "diffusers", 3, {}])
def test_a_checkpoint_cannot_say_of_which_library_it_is(tmp_path, key, value):
    torch.save({**content_of(state()), key: value}, tmp_path / "c.pth")
    now = state(step=5)
    checkpoints.restore_checkpoint(tmp_path / "c.pth", now)
    assert now["step"] == 3


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    torch.save({**content_of(state()), "version": 99}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c\.pth: expected a checkpoint of version 1.*update"):
        checkpoints.load_file(tmp_path / "c.pth")


def test_a_tree_that_holds_itself_is_read(tmp_path):
    loop = {"model": {}, "step": 1}
    loop["extra"] = [loop]
    assert list(files_reading._leaves(loop)) == [1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"t": [3, 4]}, {"t": ["3"]}, {"gamma": [NAN]}, {"gamma": []},
        {"tensors": [[torch.ones(2) / 0]]},
        {"tensors": 3}, {"tensors": [[torch.ones(2).long()]]}, {"step": "x"},
    ],
)  # fmt: skip
def test_a_snapshot_of_an_average_is_checked(tmp_path, wrong):
    good = {"step": 3, "t": [3], "gamma": [6.9], "tensors": [[torch.ones(2)]]}
    path = tmp_path / "ema_000000003.pt"
    torch.save(good, path)
    assert len(ema_posthoc.posthoc_ema(tmp_path, 0.1)) == 1
    torch.save(good | wrong, path)
    with pytest.raises(ValueError, match=r"ema_000000003\.pt: expected a snapshot"):
        ema_posthoc.posthoc_ema(tmp_path, 0.1)


def test_a_flipped_bit_in_a_snapshot_is_found(tmp_path):
    """It was read without a checksum, because torch.load compares none."""
    path = ema_posthoc.write(
        tmp_path, 3, [ema_posthoc.Snapshot(3, 6.9, [torch.ones(64)])], torch.float32
    )
    data = bytearray(path.read_bytes())
    data[data.index(np.ones(64, np.float32).tobytes()) + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        ema_posthoc.posthoc_ema(tmp_path, 0.1)
