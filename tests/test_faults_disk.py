"""Full disks and folders that are read-only: a message that names the file and what it takes,
everything that was there as it was, and with room the same command ends as on an empty disk."""

import os
import shutil
from pathlib import Path

import pytest
from toys_faults import (
    MODES,
    Disk,
    check,
    configuration,
    contents,
    convert,
    files_of,
    left,
    same,
)
from toys_processes import Child

import files
import run_lib
import run_lib_journal

TOOK = r"cannot be written: No space left on device.*\d [MK]iB are free\. Make room"

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run_lib.train(configuration(workdir), workdir)
    MODES["stats"](workdir)
    return workdir


@pytest.fixture(scope="module")
def expected(trained, tmp_path_factory):
    """What each mode leaves where nothing is wrong, from `trained` on."""
    found = {}

    def of(mode):
        if mode not in found:
            workdir = tmp_path_factory.mktemp("whole") / "run"
            prepare(mode, trained, workdir)
            MODES[mode](workdir)
            found[mode] = contents(workdir)
        return found[mode]

    return of


def prepare(mode, trained, workdir):
    """What a mode begins with; a training, with its first checkpoint saved."""
    shutil.copytree(trained, workdir)
    if mode == "train":
        shutil.rmtree(workdir)
        workdir.mkdir()
        run_lib.train(configuration(workdir, training__n_iters=4), workdir)
    if mode == "stats":
        (workdir / "stats.npz").unlink()


EVAL = r"(ckpt_1\w*\.(json|npz|png|webp)|\d{9}\.npz|tensorboard|report\.html)"
#: (mode, KiB left free, the file that the message names)
FULL = [
    ("train", 150, r"checkpoint\w*\.pth"),
    ("train", 0, r"(config\.json|history\.jsonl|tensorboard)"),
    ("eval", 0, EVAL),
    ("eval", 16, EVAL),
    ("eval", 60, EVAL),
    ("stats", 16, r"stats\.npz"),
    ("sample", 0, r"000000\.png"),
    ("sample npz", 0, r"drawn\.npz"),
    ("sample png", 0, r"drawn\.png"),
    ("control", 4, r"\.(png|webp|json)"),
    ("convert", 100, r"out\.pth"),
    ("convert score_sde", 100, r"original\.pth"),
    ("convert safetensors", 100, r"out\.safetensors"),
]
QUICK = {0, 5, 6, 12}


@pytest.mark.parametrize(
    ("mode", "free", "name"),
    [
        case if i in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for i, case in enumerate(FULL)
    ],
)
def test_a_full_disk_is_said_and_costs_nothing(mode, free, name, trained, expected, tmp_path):
    with Disk(tmp_path / "disk", 8 * 1024) as disk:
        workdir = disk.folder / "run"
        prepare(mode, trained, workdir)
        before = files_of(workdir)
        disk.fill(free)
        with pytest.raises(OSError, match=f"{name} {TOOK}"):
            MODES[mode](workdir)
        check(workdir, before)
        assert left(workdir) == []
        disk.room()
        MODES[mode](workdir)
        same(workdir, expected(mode))


def test_full_disks_are_counted():
    print(len(FULL), "full disks")
    assert len(FULL) >= 13
    assert {mode.split()[0] for mode, _, _ in FULL} == {
        "train", "eval", "stats", "sample", "control", "convert"
    }  # fmt: skip


def test_the_log_of_training_fills_no_terminal_and_names_its_files(tmp_path, capsys):
    with Disk(tmp_path / "disk", 256) as disk:
        folder = disk.folder
        with run_lib_journal.logging_to(folder / "log.txt"):
            disk.fill(0)
            for _ in range(3):
                run_lib_journal.log.info("x" * 5000)
        assert "Traceback" not in capsys.readouterr().err
        told = pytest.raises(OSError, match=r"grows cannot be written: No space left on device")
        with told, files.appending(folder / "grows"), open(folder / "grows", "w") as file:
            file.write("x" * 100_000)


def test_what_a_file_takes_is_said(tmp_path):
    with Disk(tmp_path / "disk", 64) as disk:
        path = disk.folder / "x.bin"
        path.write_bytes(b"old")
        with pytest.raises(OSError, match=r"as it was\. It takes 2\.0 MiB, 60\.0 KiB are free"):
            files.write_atomically(path, lambda file: file.write(bytes(2**21)))
        with pytest.raises(OSError, match=r"It takes 5\.0 MiB"):
            files.write_atomically(path, lambda file: file.write(bytes(2**21)), size=5 * 2**20)
        assert path.read_bytes() == b"old"
        assert [p.name for p in disk.folder.iterdir()] == ["x.bin"]


# --- read-only ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "sample", "control", "stats", "convert"])
def test_a_read_only_folder_is_refused_at_once(mode, trained, tmp_path):
    with Disk(tmp_path / "disk", 8 * 1024) as disk:
        workdir = disk.folder / "run"
        shutil.copytree(trained, workdir)
        before = files_of(workdir)
        disk.set("ro")
        with pytest.raises(OSError, match=r"Read-only file system.*") as refused:
            MODES[mode](workdir)
        assert str(workdir) in str(refused.value)
        assert files_of(workdir) == before
        disk.set("rw")


def test_what_only_reads_a_run_needs_no_writing_in_it(trained, tmp_path):
    with Disk(tmp_path / "disk", 8 * 1024) as disk:
        workdir = disk.folder / "run"
        shutil.copytree(trained, workdir)
        disk.set("ro")
        config = configuration(workdir)
        run_lib.sample(config, workdir, tmp_path / "drawn", num=2)
        assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
        convert(workdir, tmp_path / "out.pth", "native")
        disk.set("rw")


def train_in(workdir, path, home):
    assert not os.access(home, os.W_OK) or os.geteuid() == 0
    changes = {"data__dataset": "folder", "data__path": str(path), "data__levels": 256}
    config = configuration(workdir, **changes, data__memory_gib=0.0, data__workers=1)
    config.eval.metrics = ()
    run_lib.train(config, workdir)
    run_lib.evaluate(config, workdir)


def test_data_home_and_cache_may_be_read_only(tmp_path, monkeypatch):
    from long_run import write_images

    monkeypatch.setattr("data_lib_index.KEEP_FROM", 1)
    with Disk(tmp_path / "disk", 8 * 1024) as disk:
        write_images(disk.folder / "images", 60)
        home = disk.folder / "home"
        home.mkdir()
        disk.set("ro")
        where = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "MPLCONFIGDIR": ""}
        child = Child(train_in, tmp_path / "run", disk.folder / "images", home, environment=where)
        code, said, text = child.end(300)
        assert code == 0, (said, text)
        assert Path(tmp_path / "run" / "report.html").exists()
        disk.set("rw")
