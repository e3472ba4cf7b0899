"""The gallery: every figure of the page is made, the table says what the JSON says."""

import argparse
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import gallery

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def figures_of(page):
    return re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_figure_of_a_page_is_there_and_says_what_it_shows(page):
    text = page.read_text()
    assert not re.findall(r"!\[\]", text)
    for figure in figures_of(page):
        assert (page.parent / figure).is_file(), figure


def test_the_gallery_makes_every_figure_of_the_page_of_toys_and_no_other():
    made = {f"{name}_{figure}.webp" for name, all_ in gallery.TOYS.items() for figure in all_}
    made |= {"overview.webp", "face_sampling.webp"}
    assert {Path(p).name for p in figures_of(gallery.PAGE)} == made


def test_the_figures_of_the_page_are_small_and_wide_enough():
    paths = list((gallery.ASSETS / "toys").glob("*.webp"))
    assert sum(p.stat().st_size for p in paths) < 3e6
    for path in paths:
        with Image.open(path) as picture:
            assert 400 <= picture.width <= gallery.WIDTH


def test_every_toy_of_the_configs_is_in_the_gallery():
    there = {p.stem for p in (ROOT / "configs" / "toy").glob("[!_]*.py")}
    assert set(gallery.TOYS) == there


def a_run(folder, number=1, *, likelihood=True, wasserstein=0.05):
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    nats = {"mean": 0.0125, "standard_error": 0.004}
    results = {
        "metrics": {
            "sliced_wasserstein": wasserstein, "sliced_wasserstein_se": 0.001,
            "sliced_wasserstein_true": 0.04, "sliced_wasserstein_true_se": 0.002,
            "sliced_wasserstein_ratio": wasserstein / 0.04,
        }
    }  # fmt: skip
    if likelihood:
        results["likelihood"] = {"kl": nats, "elbo_gap": nats}
    (folder / "eval" / f"ckpt_{number}.json").write_text(json.dumps(results))
    seconds = {"train": {"cpu": 31.4, "wall": 20.0}, "eval": {"cpu": 12.6, "wall": 9.0}}
    (folder / "seconds.json").write_text(json.dumps(seconds))


def test_the_table_says_what_the_newest_json_says(tmp_path):
    a_run(tmp_path / "ring", 2, wasserstein=0.9)
    a_run(tmp_path / "ring", 10)
    a_run(tmp_path / "ring_langevin", likelihood=False)
    lines = gallery.table(tmp_path, ["ring", "ring_langevin"]).splitlines()
    value, truth, ratio, *nats, train, evaluation = lines[2].split(" | ")[1:]
    assert (value, truth, ratio) == ("0.0500 ± 0.0010", "0.0400 ± 0.0020", "1.25")
    assert nats == ["0.013 ± 0.004"] * 2 and (train, evaluation) == ("31", "13 |")
    assert "| – | – |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_the_table_stands_between_its_marks_and_the_rest_of_the_page_stays(tmp_path):
    a_run(tmp_path / "ring")
    page = tmp_path / "toys.md"
    page.write_text(f"before\n{gallery.BEGIN}\nold\n{gallery.END}\nafter\n")
    args = argparse.Namespace(page=page, runs=tmp_path)
    for _ in range(2):
        gallery.write_table(args, ["ring"])
        text = page.read_text()
        assert text.startswith(f"before\n{gallery.BEGIN}\n| toy |") and "old" not in text
        assert text.endswith(f"{gallery.END}\nafter\n") and text.count("1.25") == 1
    page.write_text("no marks")
    with pytest.raises(ValueError, match="put them back"):
        gallery.write_table(args, ["ring"])


def test_a_toy_is_trained_once_and_its_first_evaluation_timed(tmp_path, monkeypatch):
    calls = []

    def run(*words):
        calls.append(words[-1])
        a = tmp_path / "moons"
        (a / "eval").mkdir(parents=True, exist_ok=True)
        (a / "eval" / "ckpt_1.json").write_text("{}")
        for figure in gallery.TOYS["moons"]:
            Image.new("RGB", (2000, 1000)).save(a / "eval" / f"ckpt_1_{figure}.png")
        return {"wall": 1.0, "cpu": float(len(calls))}

    monkeypatch.setattr(gallery, "run", run)
    args = ["--only", "moons", "--runs", str(tmp_path), "--assets", str(tmp_path / "assets")]
    gallery.main(args)
    gallery.main(args)
    assert calls == ["train", "eval", "eval"]
    seconds = json.loads((tmp_path / "moons" / "seconds.json").read_text())
    assert seconds["train"]["cpu"] == 1 and seconds["eval"]["cpu"] == 2
    with Image.open(tmp_path / "assets" / "toys" / "moons_family.webp") as picture:
        assert picture.size == (gallery.WIDTH, gallery.WIDTH // 2)
    gallery.main([*args, "--fresh"])
    assert calls[3:] == ["train", "eval"]


def test_a_command_that_fails_ends_the_gallery_with_its_name():
    with pytest.raises(SystemExit, match=r"-c raise SystemExit\(3\): ended with status 3"):
        gallery.run("-c", "raise SystemExit(3)")


def test_unknown_names_are_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        gallery.main(["--only", "ring,cube"])
    assert "expected names of ring, bird" in capsys.readouterr().err
    gallery.main(["--list"])
    assert "solvers" in capsys.readouterr().out


def test_the_overview_draws_all_toys_that_were_evaluated(tmp_path, monkeypatch):
    import numpy as np

    for name in ("moons", "mixture"):
        a_run(tmp_path / name)
        np.savez(tmp_path / name / "eval" / "ckpt_1_samples.npz", samples=np.zeros((9, 2), "f4"))
    page = tmp_path / "toys.md"
    page.write_text(f"{gallery.BEGIN}\n{gallery.END}\n")
    monkeypatch.setattr(gallery, "CELLS", 10)
    args = ["--runs", str(tmp_path), "--assets", str(tmp_path / "assets"), "--page", str(page)]
    gallery.main(["--only", "overview", *args])
    assert (tmp_path / "assets" / "toys" / "overview.webp").exists()
    assert page.read_text().count("configs/toy/") == 2
