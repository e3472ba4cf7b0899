"""Killed, stopped or out of disk at any moment: the run goes on to the same end."""

import hashlib
import json
import os
import random
import signal
import subprocess
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from toys_processes import Child, tiny

import checkpoints
import data_lib
import run_lib
import run_lib_train
from models.ema import ExponentialMovingAverage


def resume_file(workdir) -> Path:
    return Path(workdir) / "checkpoints-meta" / "checkpoint.pth"


def content(path):
    return torch.load(path, weights_only=True)


def equal(a, b) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def rows(workdir):
    """The history, without what depends on the machine."""
    lines = (Path(workdir) / "history.jsonl").read_text().splitlines()
    timings = ("images_per_second", "memory_gib")
    return [{k: v for k, v in json.loads(x).items() if k not in timings} for x in lines]


def small_state(step=0):
    torch.manual_seed(step)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.Adam(model.parameters())
    ema = ExponentialMovingAverage(model.parameters(), 0.9)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "ema": ema, "step": step}


# --- files ----------------------------------------------------------------------------------


def test_the_checkpoint_before_the_last_is_kept(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for step in (1, 2, 3):
        checkpoints.save_checkpoint(path, small_state(step), keep_previous=True)
    assert [content(p)["step"] for p in (path, checkpoints.previous(path))] == [3, 2]
    assert len(list(tmp_path.iterdir())) == 2


def test_every_flipped_bit_is_found(tmp_path):
    """torch.load notices about half of them only: those in the structure of the file."""
    path, damaged = tmp_path / "checkpoint.pth", tmp_path / "damaged.pth"
    checkpoints.save_checkpoint(path, small_state(1))
    whole, bytes_ = checkpoints.load_file(path), path.read_bytes()
    dice, found = random.Random(0), 0
    for place in dice.sample(range(len(bytes_)), 1000):
        flipped = bytearray(bytes_)
        flipped[place] ^= 1 << dice.randrange(8)
        damaged.write_bytes(flipped)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = checkpoints.load_file(damaged)
        except ValueError as error:
            assert "damaged.pth" in str(error)
            found += 1
        else:
            assert equal(loaded, whole), place
    assert found > 500


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, how):
    path = tmp_path / "checkpoint.pth"
    for step in (1, 2):
        checkpoints.save_checkpoint(path, small_state(step), keep_previous=True)
    damage(path, how)
    state = small_state(7)
    with pytest.warns(UserWarning, match=r"checkpoint\.pth .*checkpoint_previous\.pth, is used"):
        assert checkpoints.restore_newest(path, state) == checkpoints.previous(path)
    assert state["step"] == 1
    assert torch.equal(state["model"].weight, small_state(1)["model"].weight)
    damage(checkpoints.previous(path), how)
    with pytest.raises(ValueError, match=r"checkpoint_previous\.pth is not a checkpoint"):
        checkpoints.restore_newest(path, state)


def damage(path, how):
    bytes_ = bytearray(path.read_bytes())
    if how == "flipped":  # a bit of a weight: a file that torch.load reads without a word
        with zipfile.ZipFile(path) as archive:
            entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
            place = bytes_.index(archive.read(entry))
        bytes_[place + 1] ^= 1
        torch.load(path, weights_only=True)
    path.write_bytes({"truncated": bytes_[: len(bytes_) // 2], "empty": b""}.get(how, bytes_))


def test_a_lost_checkpoint_is_replaced_by_the_one_before_it(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for step in (1, 2):
        checkpoints.save_checkpoint(path, small_state(step), keep_previous=True)
    path.unlink()
    state = small_state(7)
    checkpoints.restore_newest(path, state)
    assert state["step"] == 1
    assert checkpoints.restore_newest(tmp_path / "none.pth", state) is None


def test_files_without_a_checksum_are_read_as_ever(tmp_path):
    state = small_state(3)
    saved = checkpoints.content_of(state)
    torch.save(saved, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(checkpoints.load_file(tmp_path / "old.pth"), saved)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(saved, tmp_path / "without.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(checkpoints.load_file(tmp_path / "without.pth"), saved)


def test_the_counts_of_steps_that_were_not_finite_are_kept(tmp_path):
    state = {**small_state(3), "nonfinite": 5, "nonfinite_in_a_row": 2}
    checkpoints.save_checkpoint(tmp_path / "c.pth", state)
    other = checkpoints.restore_checkpoint(tmp_path / "c.pth", small_state())
    assert (other["nonfinite"], other["nonfinite_in_a_row"]) == (5, 2)


def test_a_full_disk_is_said_and_leaves_the_last_good_checkpoint(tmp_path):
    with SmallDisk(tmp_path) as folder:
        path = folder / "checkpoint.pth"
        state = small_state(1)
        checkpoints.save_checkpoint(path, state, keep_previous=True)
        big = {**small_state(2), "model": torch.nn.Linear(1000, 1000)}
        with pytest.raises(OSError, match=r"checkpoint\.pth cannot be written: .*No space left"):
            checkpoints.save_checkpoint(path, big, keep_previous=True)
        assert [p.name for p in folder.iterdir()] == ["checkpoint.pth"]
        assert content(path)["step"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full device")
def test_a_full_disk_found_when_closing_is_said_too(tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"as it was")
    (tmp_path / f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint\.pth cannot be written: No space left"):
        checkpoints.write_atomically(path, lambda file: file.write(b"in the buffer until closing"))
    assert path.read_bytes() == b"as it was"


class SmallDisk:
    """A folder on a file system of 1 MiB, where one can be mounted; else the test is skipped."""

    def __init__(self, folder):
        self.folder = Path(folder) / "disk"

    def __enter__(self):
        self.folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(self.folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        return self.folder

    def __exit__(self, *_):
        subprocess.run(["umount", str(self.folder)], check=True)


@pytest.mark.parametrize("after", [0, 100, 5000])
def test_a_write_that_fails_midway_leaves_nothing_behind(tmp_path, after):
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_checkpoint(path, small_state(1))
    before = path.read_bytes()

    def write(file):
        torch.save({"x": torch.zeros(after)}, Failing(file, after))

    with pytest.raises(OSError, match=r"the file that was there is as it was"):
        checkpoints.write_atomically(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert path.read_bytes() == before


class Failing:
    """A file that takes so many bytes and no more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            # As the system does: through the file that is being written.
            self.file.file = FullDisk()
        return self.file.write(data)

    def flush(self):
        self.file.flush()


class FullDisk:
    def write(self, data):
        raise OSError(28, os.strerror(28))

    def flush(self):
        pass


# --- runs -----------------------------------------------------------------------------------

RUN = {
    "training__n_iters": 60,
    "training__snapshot_freq": 30,
    "training__snapshot_freq_for_preemption": 10,
    "training__log_freq": 5,
    "training__eval_freq": 15,
    "training__eval_images": 40,
    "model__dropout": 0.1,
    "data__random_flip": True,
    "data__uniform_dequantization": True,
}


def train(workdir, **changes):
    return run_lib.train(tiny(**{**RUN, **changes}), workdir)


def stopping_at(step, *numbers):
    """Training steps that send this process signals after one of them."""
    step_of = run_lib_train.Steps.train

    def steps(self, state):
        loss = step_of(self, state)
        if state["step"] == step:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(1.1 if len(numbers) > 1 else 0)
        return loss

    return steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_code(tmp_path, monkeypatch, number):
    monkeypatch.setattr(run_lib_train.Steps, "train", stopping_at(7, number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        train(tmp_path)
    assert end.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert content(resume_file(tmp_path))["step"] == 7
    said = f"stopped by {signal.Signals(number).name} at step 7"
    assert said in (tmp_path / "log.txt").read_text()


def test_a_second_interrupt_leaves_at_once(tmp_path, monkeypatch):
    steps = stopping_at(7, signal.SIGINT, signal.SIGINT)
    monkeypatch.setattr(run_lib_train.Steps, "train", steps)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert not resume_file(tmp_path).exists()


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    for step in (15, 30, 60):  # where losses, checkpoints and samples are due
        with monkeypatch.context() as patch:
            patch.setattr(run_lib_train.Steps, "train", stopping_at(step, signal.SIGTERM))
            with pytest.raises(SystemExit):
                train(tmp_path / "parts")
    train(tmp_path / "parts")
    a, b = (content(resume_file(tmp_path / name)) for name in ("whole", "parts"))
    assert equal(a, b)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    for number in (1, 2):
        name = f"checkpoints/checkpoint_{number}.pth"
        assert equal(content(tmp_path / "whole" / name), content(tmp_path / "parts" / name))


def test_sampling_gives_way_to_a_signal_and_is_done_on_return(tmp_path, monkeypatch):
    sampled = {"training__snapshot_sampling": True, "training__num_snapshot_samples": 2}
    sampled["training__n_iters"] = 30
    draw = run_lib_train.Run._draw_samples

    def interrupted(self, state, journal, folder, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        draw(self, state, journal, folder, stop)

    with monkeypatch.context() as patch:
        patch.setattr(run_lib_train.Run, "_draw_samples", interrupted)
        with pytest.raises(SystemExit):
            train(tmp_path, **sampled)
    picture = tmp_path / "samples" / "iter_30" / "sample.png"
    assert not picture.exists()
    train(tmp_path, **sampled)
    assert picture.exists()


def test_a_run_whose_last_checkpoint_is_damaged_ends_the_same(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "parts", training__n_iters=45)
    damage(resume_file(tmp_path / "parts"), "truncated")
    train(tmp_path / "parts")
    assert equal(*(content(resume_file(tmp_path / name)) for name in ("whole", "parts")))
    assert [r for r in rows(tmp_path / "parts") if r["step"] > 45] == [
        r for r in rows(tmp_path / "whole") if r["step"] > 45
    ]
    log = (tmp_path / "parts" / "log.txt").read_text()
    assert "checkpoint.pth is not a checkpoint that can be read" in log
    assert "going on from step 40" in log


def test_a_damaged_numbered_checkpoint_is_an_error_in_evaluation(tmp_path):
    train(tmp_path, training__n_iters=3)
    damage(tmp_path / "checkpoints" / "checkpoint_1.pth", "flipped")
    with pytest.raises(ValueError, match=r"checkpoint_1\.pth is not .* the checksum of .* fit"):
        run_lib.evaluate(tiny(**RUN), tmp_path)


def test_unfinished_files_of_killed_runs_are_removed(tmp_path):
    left = tmp_path / "checkpoints-meta" / ".checkpoint.pth.123.tmp"
    left.parent.mkdir()
    left.touch()
    train(tmp_path, training__n_iters=1)
    assert not left.exists()


def test_tensorboard_shows_every_step_of_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, training__n_iters=20)
    train(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(5, 61, 5))
    assert [e.step for e in events.Scalars("eval_loss")] == [15, 20, 30, 45, 60]
    assert "loss_by_lambda/-2..0" in events.Tags()["scalars"]
    assert (
        "batch_size" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    )


# --- killed ---------------------------------------------------------------------------------


def watched_run(workdir, slow_save):
    """Train, noting where it is in `workdir/now` and each step's images in `workdir/order`."""
    workdir = Path(workdir)
    workdir.mkdir(exist_ok=True)
    now = open(workdir / "now", "w")  # noqa: SIM115
    order = open(workdir / "order", "a")  # noqa: SIM115

    def note(text):
        os.pwrite(now.fileno(), text.ljust(20).encode(), 0)

    train_step, prepare, save = run_lib_train.Steps.train, data_lib.prepare, torch.save

    def step(self, state):
        note(f"step {state['step']}")
        return train_step(self, state)

    def hashed(images, *args, draws, **options):
        batch = prepare(images, *args, draws=draws, **options)
        if draws.step != "eval":
            digest = hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:12]
            order.write(f"{draws.step} {digest}\n")
            order.flush()
        return batch

    def slowly(saved, file):
        note("save")
        save(saved, Slow(file) if slow_save else file)
        note("saved")

    run_lib_train.Steps.train, data_lib.prepare, torch.save = step, hashed, slowly
    train(workdir, **KILLED)


class Slow:
    """A file on a slow disk."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        time.sleep(1e-3)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


KILLED = {
    "training__n_iters": 200,
    "training__snapshot_freq": 100,
    "training__snapshot_freq_for_preemption": 20,
    "training__log_freq": 10,
    "training__eval_freq": 40,
}


def place(workdir) -> str:
    """What a run is doing."""
    path = Path(workdir) / "now"
    return path.read_text().strip() if path.exists() else ""


def kill(workdir, delay, when=lambda text: True, slow_save=False) -> str:
    """Start the run, kill it `delay` seconds after `when` holds, and say what it was doing."""
    (Path(workdir) / "now").unlink(missing_ok=True)
    child = Child(watched_run, workdir, slow_save)
    while child.process.is_alive() and not (place(workdir) and when(place(workdir))):
        time.sleep(5e-4)
    child.process.join(delay)
    alive = child.process.is_alive()
    os.kill(child.pid, signal.SIGKILL) if alive else None
    child.process.join()
    return place(workdir) if alive else "over"


@pytest.mark.slow
def test_a_run_killed_inside_a_save_ends_as_one_that_was_not(tmp_path):
    assert Child(watched_run, tmp_path / "whole", False).end()[0] == 0
    where = kill(tmp_path / "killed", 0.02, lambda text: text == "save", slow_save=True)
    assert where == "save"
    assert Child(watched_run, tmp_path / "killed", False).end()[0] == 0
    assert equal(*(content(resume_file(tmp_path / name)) for name in ("whole", "killed")))
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_one_that_was_not(tmp_path):
    begun = time.monotonic()
    assert Child(watched_run, tmp_path / "whole", False).end()[0] == 0
    length = time.monotonic() - begun
    whole = content(resume_file(tmp_path / "whole"))
    images = dict(line.split() for line in (tmp_path / "whole" / "order").open())
    assert images.keys() == {str(step) for step in range(200)}

    dice, killed = random.Random(17), []
    for life in range(3):
        workdir, here = tmp_path / f"life_{life}", []
        if life < 2:
            first = kill(workdir, dice.uniform(0, 0.02), lambda text: text == "step 0")
            here.append(first)
        while len(here) < 8:
            if len(here) % 3 == 1:
                delay = dice.uniform(0, 0.05)
                here.append(kill(workdir, delay, lambda text: text == "save", slow_save=True))
            else:
                here.append(kill(workdir, dice.uniform(0, length / 4)))
        killed += here
        code, _, text = Child(watched_run, workdir, False).end()
        assert code == 0, text
        assert equal(content(resume_file(workdir)), whole)
        assert rows(workdir) == rows(tmp_path / "whole")
        for number in (1, 2):
            name = f"checkpoints/checkpoint_{number}.pth"
            assert equal(content(workdir / name), content(tmp_path / "whole" / name))
        seen = [line.split() for line in (workdir / "order").open()]
        assert {step for step, _ in seen} == images.keys()
        assert all(images[step] == digest for step, digest in seen)
        assert not list(workdir.glob("checkpoints*/.*"))
    print(killed)
    died = [where for where in killed if where != "over"]
    assert len(died) >= 20
    assert died.count("save") >= 5
    assert died.count("step 0") >= 2
