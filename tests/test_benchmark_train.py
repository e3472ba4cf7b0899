"""The training benchmark: it runs, and a peer's modules do not stay in the place of ours."""

import json
import sys

import pytest

import losses
from benchmarks import peers, train


def test_the_smallest_run_reports_speed_memory_and_surroundings(tmp_path, capsys):
    given = ["--size=tiny", "--steps=2", "--warmup=0", "--dtype=fp32,bf16"]
    report = train.main([*given, "--set=model.dropout=0.0", f"--output={tmp_path / 'r.json'}"])
    assert set(report["contenders"]) == {"ours fp32", "ours bf16"}
    for row in report["contenders"].values():
        assert row["images_per_second"] > 0 and len(row["seconds"]) == 2
        assert 2**20 < row["peak_bytes"] < 2**26
    around = report["surroundings"]
    assert around["changes"] == {"model.dropout": 0.0}
    assert "MALLOC_MMAP_THRESHOLD_" in around["allocator"] and around["device"]
    assert json.loads((tmp_path / "r.json").read_text())["batch"] == 2
    assert "images/s" in capsys.readouterr().out


def test_a_peers_modules_are_imported_apart_and_ours_come_back(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "utils.py").write_text("import sde_lib; whose = sde_lib.whose")
    (tmp_path / "sde_lib.py").write_text("whose = 'theirs'")
    before = {name: sys.modules[name] for name in ("losses", "sde_lib", "models.utils")}
    with pytest.raises(KeyError), peers.modules_of(tmp_path):
        import models.utils

        assert models.utils.whose == "theirs"
        assert sys.modules["losses"] is losses  # the checkout has none
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


@pytest.mark.parametrize("given", ["--peer=edm=/x", "--peer=score_sde_pytorch", "--set=nf=3"])
def test_wrong_arguments_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        train.parse([given])
    assert "expected" in capsys.readouterr().err


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkout of score_sde_pytorch"):
        peers.ScoreSDE(tmp_path, None)
