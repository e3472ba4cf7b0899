"""Damaged files: what chance does to the bytes of a file, and what reading them must come to."""

import collections
import pickle
import random
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = (ValueError, FileNotFoundError)


def damages(content, count, seed):
    """`count` pairs (how, bytes), the same for the same seed; every one differs."""
    dice = random.Random(f"damage {seed}")
    yield from foreign(content)
    number = len(list(foreign(content)))
    while number < count:
        how, changed = dice.choice(KINDS)(content, dice)
        if changed != content:
            yield how, changed
            number += 1


def foreign(content):
    """What is at a path when it is not the file: nothing, half, another kind, an error page."""
    yield "empty", b""
    yield "one byte", content[:1]
    yield "half", content[: len(content) // 2]
    yield "last byte lost", content[:-1]
    yield "zeros", bytes(len(content))
    yield "text", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    yield "page", b"<!doctype html><html><title>404 Not Found</title></html>"
    yield "json", b'{"model": 1, "step": 2}'
    yield "pickle", pickle.dumps({"a": [1, 2, 3]}, protocol=2)
    yield "noise", random.Random(0).randbytes(2000)


def _truncated(content, dice):
    return "truncated", content[: dice.randrange(len(content))]


def _flipped(content, dice):
    changed = bytearray(content)
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return "flipped", bytes(changed)


def _flipped_head(content, dice):
    changed = bytearray(content)
    changed[dice.randrange(min(len(changed), 400))] ^= 1 << dice.randrange(8)
    return "flipped", bytes(changed)


def _overwritten(content, dice):
    changed, n = bytearray(content), min(dice.choice((1, 4, 64)), len(content))
    place = dice.randrange(len(changed) - n + 1)
    changed[place : place + n] = dice.randbytes(n)
    return "overwritten", bytes(changed)


def _zeroed(content, dice):
    n = min(512, len(content))
    place = dice.randrange(0, len(content), 512)
    return "zeroed", content[:place] + bytes(n) + content[place + n :]


def _lost(content, dice):
    a, b = sorted(dice.randrange(len(content) + 1) for _ in range(2))
    return "lost", content[:a] + content[b:]


def _twice(content, dice):
    place = dice.randrange(len(content))
    return "twice", content[:place] + content[max(0, place - 100) :]


KINDS = (_truncated, _flipped, _flipped_head, _overwritten, _zeroed, _lost, _twice)


def outcome(load, path, whole=None, same=None):
    """'loaded' or 'refused', each as it should be: the content of the whole file (by `same`), or
    one error of ours, raised by us, that names the file and says what to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got = load(path)
        except OURS as error:
            check_error(error, path)
            return "refused"
    if same is not None:
        assert same(got, whole), f"{path}: loaded something else without a word"
    return "loaded"


def check_error(error, path):
    message = str(error)
    assert str(path) in message or Path(path).name in message, f"{message!r} does not name the file"
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    assert last.is_relative_to(ROOT) and ".venv" not in last.parts, f"raised by {last}"
    assert "weights_only=False" not in message and len(message) < 2000, message
    assert any(w in message for w in ("expected", "cannot be", "not a ", "belongs to")), message


def run(load, path, content, count, same, *, exact=True, suffix=""):
    """Counts by (how, outcome) of reading `count` damages of `content`, written to `path`.

    Where a format has no checksum (`exact` False) a change of a number cannot be seen; that a file
    is cut off can.
    """
    counted = collections.Counter()
    path.write_bytes(content)
    whole = load(path)
    for number, (how, changed) in enumerate(damages(content, count, path.name)):
        target = path if suffix == "same" else path.with_name(f"{number}_{path.name}")
        target.write_bytes(changed)
        compared = same if exact or how in ("truncated", "half", "last byte lost") else None
        counted[how, outcome(load, target, whole, compared)] += 1
        if target != path:
            target.unlink()
    return counted
