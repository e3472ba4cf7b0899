"""The speed benchmarks: they run, they refuse to time what does not agree, and their tables say
what was measured. No time is asserted."""

import json
import sys

import pytest
import torch
import toys_benchmarks
from PIL import Image

from benchmarks import (
    contenders,
    data,
    harness,
    import_time,
    likelihood,
    model,
    peaks,
    peers,
    report,
    sample,
    scaling,
    tables,
    train,
)

TINY = ["--size=tiny", "--repeats=2", "--warmup=0", "--no-peaks"]


@pytest.fixture
def checkouts(tmp_path):
    folders = {
        "score_sde_pytorch": toys_benchmarks.score_sde(tmp_path / "score_sde"),
        "edm": toys_benchmarks.edm(tmp_path / "edm"),
    }
    return [f"--peer={name}={folder}" for name, folder in folders.items()]


def test_model_times_every_contender_in_both_passes_and_counts_what_it_does(checkouts, tmp_path):
    path = tmp_path / "r.json"
    made = model.main([*TINY[:3], *checkouts, "--dtype=fp32,bf16", f"--output={path}"])
    names = ["score_sde_pytorch", "edm", "edm bf16", "ours fp32", "ours bf16"]
    assert json.loads(path.read_text()) == made
    assert set(made["measurements"]) == {"forward", "forward and backward"}
    for factor, rows in zip((1, 3), made["measurements"].values(), strict=True):
        assert list(rows) == names
        for name, row in rows.items():
            assert len(row["seconds"]) == 2 and row["images"] == 2
            assert row["peak_bytes"] > 4 * made["parameters"][name]
            assert row["flops"] == factor * 2 * made["flops_forward"][name]
    assert made["agreement"]["difference"]["ours fp32"] < 1e-4
    assert 0 < made["agreement"]["difference"]["ours bf16"] < 0.2
    assert "edm" not in made["agreement"]["difference"] and "no weights" in made["notes"]["edm"]
    assert made["parameters"]["ours fp32"] == made["parameters"]["score_sde_pytorch"]
    assert all(made["peaks"][dtype][kind] > 1e6 for dtype in ("fp32", "bf16")
               for kind in ("matmul", "conv3x3"))  # fmt: skip


def test_outputs_that_do_not_agree_are_not_timed(checkouts, monkeypatch):
    load = contenders.Ours.load_from

    def disturbed(self, weights):
        load(self, weights)
        with torch.no_grad():
            next(p for p in self.network.parameters() if p.ndim == 4).mul_(1.01)

    monkeypatch.setattr(contenders.Ours, "load_from", disturbed)
    for benchmark in (model, train, sample):
        with pytest.raises(SystemExit, match=r"differ by .* > 1e-04"):
            benchmark.main([*TINY, checkouts[0]])


def test_drifts_that_do_not_agree_are_not_timed():
    class Shifted:
        precision = "fp32"

        def __init__(self, by):
            self.by = by

        def evaluation(self, batch):
            return lambda t: batch + self.by

    batch = torch.ones(2, 3)
    found, apart = likelihood.drifts({"a": Shifted(0.0), "b": Shifted(1e-6)}, batch)
    assert set(found) == {"a", "b"} and apart["b"] < 1e-5
    with pytest.raises(SystemExit, match=r"drift of b is 1\.0e-03"):
        likelihood.drifts({"a": Shifted(0.0), "b": Shifted(1e-3)}, batch)


def test_train_times_whole_steps_and_checkpointing_saves_memory(checkouts, capsys):
    made = train.main([*TINY, *checkouts, "--checkpointing", "--set=model.dropout=0.0"])
    rows = made["measurements"]["training step"]
    assert list(rows) == ["score_sde_pytorch", "edm", "ours fp32", "ours fp32, checkpointing"]
    saved = rows["ours fp32, checkpointing"]["peak_bytes"] / rows["ours fp32"]["peak_bytes"]
    assert saved < 0.9
    assert made["surroundings"]["options"]["set"] == [("model.dropout", 0.0)]
    assert "MALLOC_MMAP_THRESHOLD_" in made["surroundings"]["allocator"]
    printed = capsys.readouterr().out
    assert "| × score_sde_pytorch | × edm" in printed and "images/s" in printed


@pytest.mark.slow
def test_several_processes_share_a_batch():
    made = train.main([*TINY, "--only-processes", "--processes=2", "--threads=2"])
    row = made["processes"]["2 × 1 thread"]
    assert len(row["seconds"]) == row["images"] == 2 and "measurements" not in made
    assert made["tables"][0]["rows"][0][0] == "2 × 1 thread"


def test_sample_steps_whole_samplers_and_what_is_not_the_network(checkouts):
    made = sample.main([*TINY, *checkouts, "--steps=3"])
    steps = made["measurements"]["a step of the published sampler"]
    images = made["measurements"]["images from the prior to the end"]
    assert set(steps) == {"score_sde_pytorch", "ours fp32"}
    assert made["sampler"]["evaluations_per_step"] == 2
    assert made["sampler"]["agreement"]["ours fp32"] < 1e-4
    assert images["ours fp32, Heun"]["shown"]["evaluations"] == "35"
    assert images["edm, its Heun"]["shown"] == {"evaluations": "35", "measured": "whole"}
    published = images["ours fp32, published"]
    assert published["shown"] == {"evaluations": "2,000", "measured": "3 steps a run"}
    assert published["seconds"] == [1000 * tables.median(steps["ours fp32"])]
    assert 0 < made["overhead"]["ours fp32, a published step"]["fraction"] < 1


@pytest.mark.parametrize("few", sample.FEW)
def test_a_few_step_sampler_makes_the_evaluations_that_its_row_says(few):
    args = sample.parse([*TINY, "--model=ddpmpp"])
    config = contenders.configure(args, "fp32")
    known = contenders.line_up(args)["ours fp32"]

    class Counting(sample.Ready):
        calls = 0

        def forward(self, x, labels):
            self.calls += 1
            return super().forward(x, labels)

    network = Counting(contenders.images(config))
    assert sample.few_steps(known, network, config, few)().shape == (2, 3, 16, 16)
    assert network.calls == sample.FEW[few][-1]


def test_likelihood_times_an_evaluation_and_bits():
    made = likelihood.main([*TINY, "--images=2", "--rtol=1e-2", "--method=dopri5,RK45"])
    row = made["measurements"]["an evaluation: drift and divergence"]["ours fp32"]
    assert len(row["seconds"]) == 2 and row["flops"] == 4 * made["flops_forward"]["ours fp32"]
    bits = made["measurements"]["bits/dim, end to end"]
    assert list(bits) == ["ours dopri5", "ours RK45"]
    assert all(len(r["bits"]) == len(r["nfe"]) == 2 for r in bits.values())
    assert bits["ours RK45"]["disagreement"] < 0.1


def test_scaling_counts_and_plots(tmp_path):
    plot = tmp_path / "scaling.png"
    given = ["--sizes=16,32", "--batches=1,2", "--processes=", f"--plot={plot}", "--model=ddpmpp"]
    made = scaling.main([*TINY[:3], *given, "--repeats=1"])
    assert plot.read_bytes()[:4] == b"\x89PNG"
    plain, attention = list(made["size"].values())
    grown = plain["32"]["flops_forward"] / plain["16"]["flops_forward"]
    assert 3.9 < grown < 4.1  # convolutions: as the pixels
    assert attention["32"]["flops_forward"] / attention["16"]["flops_forward"] > grown
    assert made["batch"]["2"]["flops_forward"] == 2 * made["batch"]["1"]["flops_forward"]
    assert made["batch"]["1"]["training"]["peak_bytes"] > 2**18


def test_data_reads_from_every_source_and_edms_where_images_need_no_cutting(tmp_path):
    square = tmp_path / "square"
    for i in range(12):
        square.joinpath("ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i, i, i)).save(square / "ab"[i % 2] / f"{i}.jpg")
    peer = f"--peer=edm={toys_benchmarks.edm(tmp_path / 'edm')}"
    given = ["--size=16", "--batch-size=4", "--workers=0", "--seconds=0.02", "--repeats=1", peer]
    made = data.main([*given, f"--path={square}"])
    speeds = made["images_per_second"]
    assert {"memory, 0 workers", "folder, 0 workers", "edm, 0 workers"} <= set(speeds)
    assert all(speed > 0 for speed in speeds.values())
    assert all(0 <= share <= 1 for share in made["share_of_time_waiting"].values())
    oblong = data.synthetic(tmp_path / "oblong", 4, 16)
    assert data.fits(square, 16) and not data.fits(square, 32) and not data.fits(oblong, 16)


def test_import_time_names_the_heavy_packages(tmp_path):
    (tmp_path / "tensorflow.py").write_text("")
    assert import_time.heavy("import tensorflow", tmp_path) == ["tensorflow"]
    assert import_time.heavy("import sde_lib, sampling") == []
    assert import_time.heavy("import nothing_of_that_name") == ["failed"]


@pytest.mark.slow
def test_import_time_holds_every_process_against_torch_alone(monkeypatch):
    names = ("import torch", "import sde_lib, sampling")
    monkeypatch.setattr(import_time, "IMPORTS", {n: import_time.IMPORTS[n] for n in names})
    monkeypatch.setattr(import_time, "heavy", lambda code, folder=None: ["scipy"])
    made = import_time.main(["--repeats=1", "--warmup=0", "--no-first-step"])
    assert made["rows"]["import torch"]["above_torch"] == 0
    assert set(made["rows"]) == {*names, "main.py --help"}
    assert made["tables"][0]["rows"][1][-1] == "scipy"


@pytest.mark.slow
def test_the_first_training_step_of_the_digits_leaves_a_checkpoint(tmp_path):
    import_time.one_step("cpu", str(tmp_path), [0])()
    assert list((tmp_path / "1").rglob("*.pth"))


def test_a_process_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with 1: (.|\n)*no_such_module"):
        import_time.python("import no_such_module", tmp_path)()


# --- the parts --------------------------------------------------------------------------------


def test_contenders_take_turns_and_warm_up():
    seen = []
    works = {name: lambda name=name: seen.append(name) for name in "ab"}
    spent = harness.in_turn(works, torch.device("cpu"), repeats=2, warmup=1)
    assert seen == list("ababab") and [len(s) for s in spent.values()] == [2, 2]


def test_peak_memory_is_what_is_held_and_what_comes_on_top():
    held = [torch.zeros(2**20)]
    held.append(held[0][:10])  # the same storage counts once

    def work():
        for _ in range(3):
            torch.zeros(2**21).add_(1)

    peak = harness.peak_bytes(work, held, torch.device("cpu"))
    assert peak == pytest.approx(4 * (2**20 + 2**21), abs=2**10)


def test_flops_are_those_of_products_and_convolutions():
    a, w = torch.randn(8, 16), torch.randn(16, 4)
    assert harness.flops(lambda: a @ w) == 2 * 8 * 16 * 4


def test_others_on_the_processor_are_named():
    around = {"others_cores": 0.02, "load_average": 9.0, "cores": 2}
    assert harness.warning(around) == ""
    assert "1.50 cores" in harness.warning(around | {"others_cores": 1.5})
    assert "load average was 9.0" in harness.warning(around | {"others_cores": None})
    assert not harness.warning(around | {"others_cores": None, "load_average": None})


def test_a_run_that_others_disturb_says_so_first(monkeypatch, capsys):
    monkeypatch.setattr(harness.Watch, "others", 1.5)
    args = harness.parse(harness.parser("x", ""), [])
    harness.run("x", args, lambda args: {"measurements": {}})
    assert "WARNING: other processes used 1.50 cores" in capsys.readouterr().out


def test_convolution_shapes_are_those_of_the_network():
    body = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
        torch.nn.Conv2d(8, 8, 1),
        torch.nn.Conv2d(8, 8, 3, stride=2, padding=1),
        torch.nn.Conv2d(8, 8, 3, padding=1),
    )
    found = peaks.shapes_of(lambda: body(torch.zeros(2, 3, 8, 8)))
    assert found == {(2, 3, 8, 8, 8): 1, (2, 8, 8, 4, 4): 1}
    assert peaks.convolution_peak("fp32", torch.device("cpu"), found) > 1e6


@pytest.mark.parametrize(
    "given",
    ["--peer=ddpm=/x", "--peer=score_sde_pytorch", "--set=nf=3", "--dtype=fp8", "--device=cuda"],
)
def test_wrong_arguments_are_refused(given, capsys):
    if given == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        model.parse([given])
    said = capsys.readouterr().err
    assert "expected" in said or "finds no GPU" in said


@pytest.mark.parametrize("peer", [peers.ScoreSDE, peers.EDM])
def test_a_folder_that_is_no_checkout_is_refused(peer, tmp_path):
    with pytest.raises(ValueError, match="is no checkout of"):
        peer(tmp_path, None)


def test_a_peers_modules_are_imported_apart_and_ours_come_back(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "utils.py").write_text("import sde_lib; whose = sde_lib.whose")
    (tmp_path / "sde_lib.py").write_text("whose = 'theirs'")
    before = {name: sys.modules[name] for name in ("losses", "sde_lib", "models.utils")}
    with pytest.raises(KeyError), peers.modules_of(tmp_path):
        import models.utils

        assert models.utils.whose == "theirs"
        assert sys.modules["losses"] is before["losses"]  # the checkout has none
        raise KeyError
    assert all(sys.modules[name] is module for name, module in before.items())
    assert str(tmp_path) not in sys.path


def test_importing_under_no_extensions_compiles_nothing():
    name = "torch.utils.cpp_extension"
    before = sys.modules.get(name)
    with peers.no_extensions():
        from torch.utils.cpp_extension import load

        assert load("fused", sources=["missing.cu"]) is None
    assert sys.modules.get(name) is before


def test_edm_gets_the_options_of_the_configurations_network(tmp_path):
    args = model.parse(["--size=tiny", "--model=ncsnpp"])
    found = peers.EDM(toys_benchmarks.edm(tmp_path / "edm"), contenders.configure(args, "fp32"))
    options = found.network.options
    assert options["embedding_type"] == "fourier" and options["resample_filter"] == [1, 3, 3, 1]
    assert options["model_channels"] == 8 and options["channel_mult"] == [1, 2, 2, 2]
    args = model.parse(["--size=tiny", "--model=ddpmpp"])
    found = peers.EDM(tmp_path / "edm", contenders.configure(args, "fp32"))
    assert found.network.options["embedding_type"] == "positional"


def test_a_package_that_a_peer_imports_in_vain_need_not_be_installed():
    with peers.absent("no_such_package"), peers.absent("json"):
        import no_such_package

        assert no_such_package.option("--x", type=no_such_package.IntRange(min=1))
        assert sys.modules["json"] is json
    assert "no_such_package" not in sys.modules


# --- tables and the README --------------------------------------------------------------------


def test_a_table_holds_like_precision_against_like():
    rows = {
        "score_sde_pytorch": {"seconds": [4.0], "images": 8, "precision": "fp32"},
        "edm": {"seconds": [2.0], "images": 8, "precision": "fp32"},
        "edm bf16": {"seconds": [1.5], "images": 8, "precision": "bf16"},
        "ours fp32": {"seconds": [2.0], "images": 8, "precision": "fp32", "flops": 10**9},
        "ours bf16": {"seconds": [1.0], "images": 8, "precision": "bf16"},
    }
    head, body = tables.measured(rows, {"fp32": {"matmul": 1e9, "conv3x3": 2e9}})
    cells = {line[0]: dict(zip(head, line, strict=True)) for line in body}
    assert cells["ours fp32"]["× score_sde_pytorch"] == "2.00"
    assert cells["ours bf16"]["× score_sde_pytorch"] == "4.00"
    assert cells["ours fp32"]["× edm"] == "1.00" and cells["ours bf16"]["× edm"] == "1.50"
    assert cells["ours fp32"]["of matmul peak"] == "50%"
    assert cells["ours fp32"]["of 3×3 peak"] == "25%" and cells["edm"]["of 3×3 peak"] == ""


def test_the_readmes_tables_come_from_the_files(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    peer = toys_benchmarks.score_sde(tmp_path / "score_sde")
    given = [*TINY[:3], f"--peer=score_sde_pytorch={peer}", "--checkpointing"]
    made = train.main([*given, f"--output={results / 'train_ncsnpp_full.json'}"])
    readme = tmp_path / "README.md"
    readme.write_text(
        "# x\n<!-- begin: train -->\nold\n<!-- end: train -->\n"
        "between\n<!-- begin: summary --><!-- end: summary -->\nlast\n"
    )
    report.publish(report.load(results), readme)
    once = readme.read_text()
    assert "old" not in once and "between" in once and once.endswith("last\n")
    rows = made["measurements"]["training step"]
    speed = tables.speedup(rows["ours fp32"], rows["score_sde_pytorch"])
    assert f"{speed:.2f} (≥ 2" in once and "`python -m benchmarks.train" in once
    assert "--peer=score_sde_pytorch=/tmp/score_sde_pytorch" in once and "--output" not in once
    report.publish(report.load(results), readme)
    assert readme.read_text() == once
    readme.write_text("<!-- begin: train -->")
    with pytest.raises(ValueError, match="without '<!-- end: train -->'"):
        report.publish({}, readme)


def test_every_run_of_the_readme_has_options_that_parse():
    modules = {"model": model, "train": train, "sample": sample, "likelihood": likelihood}
    modules |= {"scaling": scaling, "import_time": import_time, "data": data}
    for module, options, _ in report.RUNS.values():
        modules[module].parse(options)
    known = {title for _, title in report.WORK.values()}
    assert {"forward", "training step"} <= known
    assert report.chosen("train")[0] == "train_ncsnpp_full"


@pytest.mark.parametrize(
    ("value", "goal", "most", "said"),
    [
        (1.6, 1.6, False, "1.60 (≥ 1.6 ✓)"),
        (1.5, 1.6, False, "1.50 (≥ 1.6)"),
        (0.9, 1.0, True, "0.90 (≤ 1 ✓)"),
        (1.2, 1.0, True, "1.20 (≤ 1)"),
        (None, 1.0, True, "–"),
    ],
)
def test_a_number_is_reached_from_a_twentieth_below_it(value, goal, most, said):
    assert report.reached(value, goal, most) == said
