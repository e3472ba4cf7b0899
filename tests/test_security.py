"""Hostile files and hostile names: nothing of theirs is run, nothing fills the memory or leaves its
folder, nothing is fetched that was not asked for."""

import ast
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data_lib
import data_lib_files
import evaluation_features
import evaluation_stats
import run_lib_control
import visualize_report
from configs.defaults import get_default_configs
from models import ema_posthoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *ROOT.glob("*.py"), *(ROOT / "models").glob("*.py"), *(ROOT / "configs").rglob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
]  # fmt: skip


class Trap:
    """An object whose loading makes the folder `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# --- pickles --------------------------------------------------------------------------------


def hostile(folder, trap):
    """Files that run code when a pickle in them is loaded, by name, and what reads each."""
    bad = Trap(trap)
    saved = {"model": {"w": torch.zeros(2)}, "step": 1, "extra": bad}
    load, stats = checkpoints.load_file, evaluation_stats.read_statistics

    def made(name, content):
        path = folder / name
        if callable(content):
            with open(path, "wb") as file:
                content(file)
        else:
            path.write_bytes(content)
        return path

    def npz(**arrays):
        return lambda f: np.savez(f, **arrays)

    objects = np.array([bad, None], dtype=object)
    yield made("zip.pth", lambda f: torch.save(saved, f)), load
    yield (
        made("old.pth", lambda f: torch.save(saved, f, _use_new_zipfile_serialization=False)),
        load,
    )
    for protocol in range(6):
        yield made(f"plain{protocol}.pth", pickle.dumps(saved, protocol)), load
    yield made("list.pth", lambda f: torch.save([bad, bad], f)), load
    yield made("config.pth", lambda f: torch.save({**saved, "config": bad}, f)), load
    yield made("array.npy", lambda f: np.save(f, objects)), load
    yield made("array_as.npz", lambda f: np.save(f, objects)), stats
    yield made("objects.npz", npz(mu=objects, sigma=objects)), stats
    yield made("features.npz", npz(pool_3=objects)), stats
    yield made("protocol.npz", npz(mu=np.zeros(2), sigma=np.eye(2), n=2, protocol=objects)), stats
    yield made("statistics.pkl", pickle.dumps({"mu": bad, "sigma": bad})), stats
    yield made("statistics.pt", lambda f: torch.save({"mu": bad}, f)), stats
    yield made("statistics_as.npz", pickle.dumps({"mu": bad})), stats
    yield made("ema_000000001.pt", lambda f: torch.save(bad, f)), lambda p: ema_posthoc._read(p)
    yield (
        made("inception.pth", lambda f: torch.save({"fc.weight": bad}, f)),
        lambda p: evaluation_features.get_extractor("clean", str(p)),
    )
    msgpack = pytest.importorskip("msgpack")
    array = msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678")))
    pickled = msgpack.ExtType(1, msgpack.packb(((1,), "O", pickle.dumps(bad))))
    for name, ext in (("o.msgpack", array), ("p.msgpack", pickled)):
        tree = {"optimizer": ext, "step": 1, "params_ema": ext}
        yield made(name, msgpack.packb(tree)), load
    (folder / "pipe" / "unet").mkdir(parents=True)
    (folder / "pipe" / "unet" / "config.json").write_text("{}")
    made("pipe/unet/diffusion_pytorch_model.bin", lambda f: torch.save({"w": bad}, f))
    yield folder / "pipe", load


def test_no_pickle_runs_code_whatever_the_file(tmp_path):
    trap = tmp_path / "executed"
    tried = 0
    for path, load in hostile(tmp_path, trap):
        with pytest.raises(ValueError) as caught:
            load(path)
        assert path.name in str(caught.value) or "pipe" in str(caught.value)
        assert "weights_only=False" not in str(caught.value)
        assert not trap.exists(), path
        tried += 1
    assert tried >= 22


def test_the_pickles_of_cifar10_are_loaded_only_with_their_authors_digest(tmp_path):
    """torchvision unpickles them, after it compared their MD5."""
    folder, trap = tmp_path / "cifar-10-batches-py", tmp_path / "executed"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
    config = get_default_configs()
    config.data.update(dataset="CIFAR10", root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="CIFAR10: expected"):
        data_lib.get_image_sets(config)
    assert not trap.exists()


def test_what_a_checkpoint_holds_besides_tensors_is_named(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"model": {}, "step": 1, "extra": Trap(tmp_path / "x")}, path)
    with pytest.raises(
        ValueError, match=r"c\.pth .*an object of (posix|nt)\.mkdir.*tensors, numbers"
    ):
        checkpoints.load_file(path)


def test_a_checkpoint_cannot_ask_for_memory_by_calling_what_torch_allows(tmp_path):
    """torch's weights_only allows bytearray(10^11) and torch.Tensor(10^11)."""
    for name in ("builtins bytearray", "torch FloatTensor", "torch Tensor"):
        code = (
            b"\x80\x02c"
            + name.replace(" ", "\n").encode()
            + b"\n"
            + b"\x8a\x05\x00\xe8\x76\x48\x17"
        )
        path = tmp_path / "c.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("c/data.pkl", code + b"\x85R.")
            archive.writestr("c/version", "3\n")
        with pytest.raises(ValueError, match=r"c\.pth is not a checkpoint.*an object of"):
            checkpoints.load_file(path)


def test_a_torchscript_program_is_run_only_where_it_is_nvidias(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match="another program, which is not run"):
        evaluation_features.get_extractor("clean", str(tmp_path / "net.pt"))
    with pytest.raises(ValueError, match="TorchScript program"):
        checkpoints.load_file(tmp_path / "net.pt")


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node


def test_the_source_loads_no_pickle_and_runs_no_text():
    """torch.load with weights_only=True, np.load never with allow_pickle=True (False is NumPy's
    default, and its .npz members are then refused), TorchScript once, processes twice."""
    found = set()
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        for function, options, _ in calls(ast.parse(path.read_text())):
            if function == "torch.load":
                assert options.get("weights_only") == "True", name
            if function in ("np.load", "numpy.load"):
                assert options.get("allow_pickle", "False") == "False", name
            if function in ("eval", "exec", "compile", "os.system", "os.popen", "__import__"):
                raise AssertionError(f"{name} calls {function}")
            own = name == "data_lib_batches.py"  # messages between processes of this program
            if re.match(r"(pickle\.(l|U)|marshal|shelve|yaml|joblib|dill)", function) and not own:
                raise AssertionError(f"{name} calls {function}")
            if re.fullmatch(r"subprocess\.\w+|torch\.(jit|hub)\.load\w*", function):
                found.add((name, function))
            assert options.get("shell", "False") == "False", name
    allowed = {
        ("data_lib_lmdb.py", "subprocess.run"),
        ("evaluation_inception.py", "torch.jit.load"),
    }
    assert {f for f in found if not f[0].startswith("benchmarks/")} <= allowed


# --- bombs ----------------------------------------------------------------------------------

BOUNDED = """
import resource, sys
sys.path.insert(0, {root!r})
import torch, numpy, PIL.Image, checkpoints, evaluation_stats, data_lib_files, data_lib_sources
import files_reading, msgpack, safetensors
from pathlib import Path
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
data_lib_sources.MOST_BYTES, files_reading.FREE_EXPANSION = 2**25, 2**22  # bombs made in a second
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
refused = 0
for path in sorted(Path({folder!r}).iterdir()):
    try:
        if path.suffix == ".npz":
            evaluation_stats.read_statistics(path)
        elif path.suffix == ".zip" or path.is_dir():
            data_lib_files.list_images(path).with_shape((3, 8, 8)).read([0])
        else:
            checkpoints.load_file(path)
    except ValueError as error:
        assert path.name in str(error), error
        refused += 1
        print("refused:", str(error)[:300])
    else:
        print("LOADED", path)
print("refused", refused, "peak MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def png_bomb():
    """60000 x 60000 pixels in some bytes."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def npy_header(shape, dtype="<f8"):
    file = io.BytesIO()
    about = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def write_bombs(folder):
    """Small files that ask for much memory; how many there are."""
    for name, content in (("png", png_bomb()), ("gif", b"GIF89a\xff\xff\xff\xff" + bytes(50))):
        (folder / name).mkdir()
        (folder / name / f"bomb.{name}").write_bytes(content)
    with zipfile.ZipFile(folder / "claims.npz", "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", npy_header((10**12,)) + bytes(80))
    for name, method in (("d", zipfile.ZIP_DEFLATED), ("b", zipfile.ZIP_BZIP2)):
        with zipfile.ZipFile(folder / f"{name}.npz", "w", method) as archive:
            archive.writestr("pool_3.npy", npy_header((2**16, 64), "<f4") + bytes(2**24))
        with zipfile.ZipFile(folder / f"{name}.zip", "w", method) as archive:
            archive.writestr("bomb.bmp", bytes(2**25 + 1))
    with zipfile.ZipFile(folder / "small.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("bomb.bmp", bytes(2**28))
    lying = bytearray((folder / "small.zip").read_bytes())  # says 100 bytes, holds 256 MiB
    for place in [m.start() for m in re.finditer(b"PK\x01\x02", lying)]:
        lying[place + 24 : place + 28] = struct.pack("<I", 100)
    (folder / "lying.zip").write_bytes(lying)
    (folder / "small.zip").unlink()
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", 10 * 2**30) + b"{" + bytes(100))
    about = json.dumps({"model.w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 8]}})
    (folder / "shape.safetensors").write_bytes(
        struct.pack("<Q", len(about)) + about.encode() + bytes(8)
    )
    import msgpack

    claims = b"\x83" + msgpack.packb("step") + b"\xc9" + struct.pack(">I", 2**32 - 1) + b"\x01" * 9
    (folder / "claims.msgpack").write_bytes(claims)
    (folder / "map.msgpack").write_bytes(b"\xdf\xff\xff\xff\xff" + bytes(20))
    (folder / "deep.msgpack").write_bytes(b"\x81\xa1a" * 100_000)
    big = msgpack.ExtType(1, msgpack.packb(((10**6, 10**6), "float32", b"1234")))
    (folder / "shape.msgpack").write_bytes(
        msgpack.packb({"optimizer": big, "params_ema": big, "step": 1})
    )
    torch.save({"model": {"w": torch.zeros(1000)}, "step": 1}, folder / "t.pth")
    with (
        zipfile.ZipFile(folder / "t.pth") as old,
        zipfile.ZipFile(folder / "packed.pth", "w") as new,
    ):
        for entry in old.infolist():  # compressed records, which torch would unpack
            new.writestr(entry.filename, old.read(entry) + bytes(10**6), zipfile.ZIP_DEFLATED)
    (folder / "t.pth").unlink()
    return len(list(folder.iterdir()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as in Linux")
def test_bombs_are_refused_in_little_memory(tmp_path):
    pytest.importorskip("msgpack"), pytest.importorskip("safetensors")
    number = write_bombs(tmp_path)
    code = BOUNDED.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"refused {number} " in done.stdout, done.stdout


def test_records_of_a_checkpoint_that_overlap_are_refused(tmp_path):
    """A zip whose entries share their bytes would be checked for ever."""
    path = tmp_path / "c.pth"
    torch.save({"model": {"w": torch.zeros(20_000)}, "step": 1}, path)
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    place, size = struct.unpack("<I", data[end + 16 : end + 20])[0], 0
    size = struct.unpack("<I", data[end + 12 : end + 16])[0]
    directory = data[place : place + size] * 20
    tail = bytearray(data[end : end + 22])
    count = struct.unpack("<H", tail[10:12])[0] * 20
    tail[8:12] = struct.pack("<HH", count, count)
    tail[12:20] = struct.pack("<II", len(directory), place)
    path.write_bytes(data[:place] + directory + tail)
    with pytest.raises(ValueError, match=r"c\.pth is not a checkpoint"):
        checkpoints.load_file(path)


# --- names ----------------------------------------------------------------------------------


def picture(value=7):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def test_names_in_a_zip_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "in" / "images.zip"
    path.parent.mkdir()
    names = [
        "../../out.png", "/abs.png", "a/../../b.png", "C:\\c.png", "..\\d.png",
        "x" * 60_000 + ".png",         "e.png", "e.png", "nul\0.png", "\x1b[2J.png", "ä\u202e.png",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, picture(i))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    files = data_lib_files.list_images(path).with_shape((3, 4, 4))
    assert len(files.read(range(len(files)))) == len(files) == 7
    assert not any("link" in name or name.startswith("..") for name in files.names)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["images.zip", "in"]


def test_pipes_and_devices_in_a_folder_are_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    assert data_lib_files.list_images(tmp_path).names == ("a.png",)


def test_a_name_that_commands_a_terminal_is_printed_harmlessly(tmp_path):
    (tmp_path / "a\x1b[2J\n.png").write_bytes(b"no picture")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
    files = data_lib_files.list_images(tmp_path)
    with pytest.raises(ValueError) as caught:
        files.read(range(2))
    message = str(caught.value)
    assert "\x1b" not in message and "\n" not in message.split(": expected")[0]
    message.encode("utf-8")  # log.txt can hold it


def test_only_formats_of_pictures_are_decoded(tmp_path):
    """Pillow gives a PostScript file, whatever its name, to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    with pytest.raises(ValueError, match=r"a\.png: expected an image.*cannot identify"):
        data_lib_files.list_images(tmp_path).read([0])
    for path in SOURCES:
        for function, options, _ in calls(ast.parse(path.read_text())):
            if function == "Image.open" and path.parent.name != "benchmarks":
                known = path.name == "visualize_report.py"  # of pictures made here
                assert known or options.get("formats") == "FORMATS", path.name


def test_a_results_file_cannot_have_others_removed(tmp_path):
    folder, outside = tmp_path / "control", tmp_path / "precious.png"
    folder.mkdir()
    outside.write_bytes(b"x")
    (folder / "old.png").write_bytes(b"x")
    names = ["../precious.png", str(outside), "old.png", 3]
    (folder / "results.json").write_text(json.dumps({"files": names}))
    run_lib_control.remove_earlier(folder, [])
    assert outside.exists() and not (folder / "old.png").exists()


# --- the report -----------------------------------------------------------------------------

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&lt;${{7*7}}</pre></title>"


def test_the_report_escapes_all_that_it_shows(tmp_path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.set_title(EVIL.replace("$", ""))
    visualize_report.write_report(
        tmp_path / "report.html",
        title=EVIL,
        subtitle=EVIL,
        config_text=json.dumps({EVIL: EVIL}),
        metrics={EVIL: 1.0, "notes": [EVIL]},
        rows=[(EVIL, EVIL, None, EVIL)],
        bpd={EVIL: (np.array([1.0, 2.0]), EVIL)},
        gaps={
            "images": EVIL,
            "reference": {"mean": 1.0, "standard_error": 0.1},
            "rows": [{"label": "a", "value": 1.0, "standard_error": 0.1, "note": EVIL}],
        },
        pictures=[(figure, EVIL)],
        protocol=[(EVIL, EVIL)],
    )
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    tags = set(re.findall(r"<([a-z][a-z0-9]*)", page))
    assert tags <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "p"),
        *("div", "table", "caption", "thead", "tbody", "tr", "th", "td", "span", "figure", "img"),
        *("figcaption", "details", "summary", "pre"),
    }
    assert page.count("<img") == page.count('src="data:image/')
    assert "default-src 'none'" in page


# --- the network ----------------------------------------------------------------------------

OFFLINE = """
import socket, sys
sys.path.insert(0, {root!r})
class Refused(socket.socket):
    def connect(self, address): raise AssertionError(f"connects to {{address}}")
    connect_ex = connect
socket.socket = Refused
socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(AssertionError(f"looks up {{a}}"))
import run_lib
from configs.validation import complete
config = {{
    "data": {{"dataset": "folder", "path": {images!r}, "image_size": 8, "num_channels": 1}},
    "model": {{"name": "ddpm", "nf": 8, "ch_mult": (1,), "num_res_blocks": 1,
              "attn_resolutions": (), "num_scales": 4}},
    "training": {{"sde": "vpsde", "n_iters": 1, "batch_size": 2, "snapshot_freq": 1, "eval_freq": 1,
                 "eval_images": 2, "snapshot_sampling": False, "log_freq": 1}},
    "eval": {{"extractor": "pixels", "stats": {stats!r}, "batch_size": 4, "enable_loss": True,
             "begin_ckpt": -1, "end_ckpt": -1}},
    "device": "cpu",
}}
run_lib.train(complete(config), {workdir!r})
run_lib.evaluate(complete(config), {workdir!r})
print("done")
"""


@pytest.mark.slow
def test_training_and_evaluation_of_local_data_make_no_connection(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        (images / f"{i}.png").write_bytes(picture(i * 20))
    code = OFFLINE.format(
        root=str(ROOT),
        images=str(images),
        workdir=str(tmp_path / "run"),
        stats=str(tmp_path / "s.npz"),
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


_ASKED = ("data.download", "True", "download", "False", "config.eval.download_inception")


def test_downloads_are_asked_for_and_certificates_checked():
    """Nothing in the source fetches but torchvision under data.download and clean-fid under
    eval.download_inception; no certificate check is switched off; no plain http."""
    for path in SOURCES:
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        for function, options, _ in calls(ast.parse(text)):
            assert not re.match(r"(urllib|requests|http|ftplib|urlopen|urlretrieve)", function), (
                name
            )
            assert options.get("verify", "True") == "True", name
            if "download" in options:
                assert options["download"] in _ASKED, name
        assert "_create_unverified_context" not in text, name
        assert not re.search(r"http://(?!localhost|127\.)", text), name


def test_a_downloaded_inception_is_kept_only_with_nvidias_hash(tmp_path, monkeypatch):
    from cleanfid import downloads_helper

    import evaluation_inception

    def fetch(fpath):
        path = Path(fpath) / "inception-2015-12-05.pt"
        path.write_bytes(b"half a file")
        return path

    monkeypatch.setattr(downloads_helper, "check_download_inception", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"expected NVIDIA's TorchScript.*f58cb9b6"):
        evaluation_inception.find_weights("", download=True)
    assert not list((tmp_path / "checkpoints").iterdir())
