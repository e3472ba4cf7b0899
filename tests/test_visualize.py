"""Pictures have the right pixels and sizes; the report is one safe, self-contained file."""

import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
import visualize_report


def images(n=6, channels=1, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator)


def png():
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


# Images


def test_to_uint8_clips_and_rounds_half_up():
    x = torch.tensor([-1.0, 0, 0.49 / 255, 0.5 / 255, 0.51 / 255, 254.5 / 255, 1, 2])
    got = visualize.to_uint8(x.reshape(1, 1, 2, 4)).flatten().tolist()
    assert got == [0, 0, 0, 1, 1, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_division_by_255(dtype):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(visualize.to_uint8(levels.to(dtype) / 255), levels)
    assert torch.equal(visualize.to_uint8(levels), levels)


def test_to_uint8_refuses_other_shapes_types_and_nan():
    with pytest.raises(ValueError, match=r"x\[None\]"):
        visualize.to_uint8(torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="float in"):
        visualize.to_uint8(torch.zeros(1, 1, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite"):
        visualize.to_uint8(torch.full((1, 1, 8, 8), torch.nan))


def test_no_images_are_refused_by_their_shape():
    none = images(0)
    for picture in (visualize.image_grid, lambda x: visualize.side_by_side(x, x)):
        with pytest.raises(ValueError, match="none of them 0"):
            picture(none)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_image_grid_places_every_image(channels, mode):
    x = images(5, channels, 4)
    grid = visualize.image_grid(x, ncols=3, padding=2, scale=2)
    assert grid.mode == mode and grid.size == (3 * 8 + 2 * 2, 2 * 8 + 2)
    pixels = np.asarray(grid).reshape(18, 28, channels)
    want = visualize.to_uint8(x).permute(0, 2, 3, 1).numpy()
    for i in range(5):
        y, left = 10 * (i // 3), 10 * (i % 3)
        for corner in (0, 1):
            np.testing.assert_array_equal(
                pixels[y + corner : y + 8 : 2, left + corner : left + 8 : 2], want[i]
            )


def test_image_grid_enlarges_small_images_and_leaves_large_ones():
    assert 400 <= visualize.image_grid(images(4)).width < 450
    assert visualize.image_grid(images(1, 3, 512)).size == (512, 512)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        visualize.image_grid(images(2, 2))


def test_save_grid_writes_the_grid(tmp_path):
    x = images(4)
    visualize.save_grid(x, tmp_path / "new" / "grid.png", scale=1)
    with Image.open(tmp_path / "new" / "grid.png") as saved:
        np.testing.assert_array_equal(saved, visualize.image_grid(x, scale=1))
    with pytest.raises(ValueError, match=r"use \.png"):
        visualize.save_grid(x, tmp_path / "grid")


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_saved_pixel_by_pixel(tmp_path, channels):
    x = visualize.to_uint8(images(1, channels))[0]
    visualize.save_image(x, tmp_path / "new" / "x.png")
    with Image.open(tmp_path / "new" / "x.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), x.permute(1, 2, 0).squeeze(-1))


def test_side_by_side_pairs_images_with_their_distances():
    left, right = images(6), images(6, seed=1)
    plain = visualize.side_by_side(left, right, ncols=3, scale=4)
    assert plain.size == (3 * (64 + 2) + 2 * 10, 2 * 32 + 10)
    np.testing.assert_array_equal(np.asarray(plain)[:32:4, :32:4], visualize.to_uint8(left)[0, 0])
    np.testing.assert_array_equal(
        np.asarray(plain)[:32:4, 34:66:4], visualize.to_uint8(right)[0, 0]
    )
    captioned = visualize.side_by_side(left, right, torch.rand(6, 1), ncols=3, scale=4)
    assert captioned.width == plain.width and captioned.height > plain.height
    with pytest.raises(ValueError, match="one number per pair"):
        visualize.side_by_side(left, right, torch.rand(5))


@pytest.mark.parametrize("extension", ["gif", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_animation_holds_every_frame_and_the_last_one_longer(tmp_path, extension, channels):
    frames = [(1 - i / 5, images(4, channels, seed=i)) for i in range(5)]
    data = visualize.animation(frames, tmp_path / f"a.{extension}", fps=10, scale=4)
    assert (tmp_path / f"a.{extension}").read_bytes() == data
    with Image.open(tmp_path / f"a.{extension}") as saved:
        assert getattr(saved, "n_frames", 1) == 5 and saved.width == 2 * 32 + 2 < saved.height
        durations = []
        for i in range(5):
            saved.seek(i)
            saved.load()
            durations.append(saved.info["duration"])
        assert durations == [100] * 4 + [1500]


def test_grey_gif_frames_keep_their_pixels():
    frames = [images(4, seed=i) for i in range(3)]
    with Image.open(io.BytesIO(visualize.animation(frames))) as saved:
        for i, x in enumerate(frames):
            saved.seek(i)
            np.testing.assert_array_equal(saved.convert("L"), visualize.image_grid(x))


def test_animation_refuses_no_frames_and_other_formats(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        visualize.animation([])
    with pytest.raises(ValueError, match=r"\.gif or \.webp"):
        visualize.animation([images()], tmp_path / "a.mp4")


# Plots


def test_loss_curve_is_logarithmic_only_over_a_wide_positive_range():
    steps = np.arange(500)
    wide = visualize.loss_curve(steps, np.exp(-steps / 100), [0, 499], [1.0, 0.01]).axes[0]
    assert wide.get_yscale() == "log" and len(wide.lines) == 3
    assert wide.get_xlabel() and wide.get_ylabel()
    assert visualize.loss_curve(steps, 2 + np.cos(steps)).axes[0].get_yscale() == "linear"
    assert visualize.loss_curve(steps, np.cos(steps)).axes[0].get_yscale() == "linear"


def test_loss_curve_smooths_by_the_mean_of_neighbours_and_drops_nan():
    losses = torch.arange(300.0)
    line = visualize.loss_curve(range(300), losses).axes[0].lines[1]
    np.testing.assert_allclose(line.get_ydata()[3:-3], losses[3:-3])  # pyright: ignore
    losses[7] = torch.nan
    assert len(visualize.loss_curve(range(300), losses).axes[0].lines[0].get_xdata()) == 299  # pyright: ignore
    with pytest.raises(ValueError, match="at least one finite"):
        visualize.loss_curve([1, 2], [np.nan, np.inf])
    with pytest.raises(ValueError, match="as many as their steps"):
        visualize.loss_curve([1, 2, 3], [1.0, 2.0])


def test_numbers_of_a_list_keep_their_digits():
    x = [0.1, 1 / 3, 1e300, 7]
    assert visualize.vector(x, "x").tolist() == x
    assert visualize.vector(np.float32(x[:2]), "x").dtype == np.float64


def test_histogram_marks_the_mean_and_counts_finite_values():
    axes = visualize.histogram([1.0, 2, 2, 3, np.inf], "bits/dim", mark=2).axes[0]
    assert sum(patch.get_height() for patch in axes.patches) == 4  # pyright: ignore
    assert len(axes.lines) == 1 and axes.get_xlabel() == "bits/dim"


def test_score_curve_has_a_point_and_an_error_bar_per_checkpoint():
    axes = visualize.score_curve([1, 2, 3], [9.0, np.nan, 4.0], [0.5, 0.1, 0.0], "FID").axes[0]
    assert axes.get_ylabel() == "FID"
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 3])  # pyright: ignore
    with pytest.raises(ValueError, match="as many as"):
        visualize.score_curve([1, 2], [1.0, 2.0], [0.1], "FID")


def test_an_error_that_is_not_finite_is_not_drawn():
    errors = [np.inf, np.nan, 0.5]
    for figure in (
        visualize.score_curve([1, 2, 3], [9.0, 5.0, 4.0], errors, "FID"),
        visualize.bar_chart(["a", "b", "c"], [9.0, 5.0, 4.0], errors, "change"),
    ):
        bars = figure.axes[0].containers[-1].lines[2][0].get_segments()  # pyright: ignore
        lengths = [float(np.abs(end - start).max()) for start, end in bars]
        assert lengths == [0.0, 0.0, 1.0]


# Report


def full_report(path, **changes):
    parts = {
        "title": "Digits",
        "subtitle": "8x8",
        "config_text": "model.nf = 32",
        "samples": images(9),
        "real": images(9, seed=1),
        "train_neighbors": (images(9, seed=2), torch.rand(9, 1)),
        "loss_history": {"steps": [1, 2, 3], "losses": [3.0, 2.0, 1.0]},
        "frames": [(1 - i / 60, images(4, seed=i)) for i in range(60)],
        "bpd": torch.rand(20),
        "rows": [("Evaluations", 100, None, "per sample")],
        "metrics": {
            "one_nn_accuracy": 0.5123,
            "one_nn_accuracy_se": 0.0214,
            "num_samples": 9,
            "mine": 2.5,
            "notes": ["One <note>."],
        },
    }
    visualize_report.write_report(path, **{**parts, **changes})
    return path.read_text(encoding="utf-8")


def test_report_is_self_contained_and_has_every_part(tmp_path):
    page = full_report(tmp_path / "report.html")
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^">)]*)', page)
    assert len(sources) == 6 and all(source.startswith("data:image/") for source in sources)
    assert "http:" not in page and "https:" not in page and "<script" not in page
    assert str(tmp_path) not in page
    for part in (
        "Digits",
        "8x8",
        "model.nf = 32",
        "1-NN accuracy",
        "mine",
        "Evaluations",
        "One &lt;note&gt;.",
        "data:image/webp",
        "prefers-color-scheme",
        "viewport",
    ):
        assert part in page
    assert '0.512 <span class="error">± 0.021</span>' in page


def test_report_shows_scores_over_checkpoints_and_the_protocol(tmp_path):
    page = full_report(
        tmp_path / "report.html",
        curves={"FID": ([1, 2], [9.0, 4.0], [0.5, 0.0])},
        protocol=[("seeds", "one <per> sample")],
        metrics={"fid": 4.0, "fid_se": 0.5, "fid_num_samples": 50, "kid_std": 1.5},
    )
    for part in (
        "<h2>Over checkpoints",
        "<h2>Protocol",
        "one &lt;per&gt; sample",
        "not comparable",
    ):
        assert part in page
    assert "fid_num_samples" not in page and "kid_std" not in page


@pytest.mark.parametrize(
    ("absent", "heading"),
    [
        ("config_text", "<details>"),
        ("frames", "<h2>Sampling"),
        ("metrics", "1-NN accuracy"),
        ("train_neighbors", "<h2>Nearest"),
        ("bpd", "Bits per dimension"),
        ("loss_history", "Loss over"),
        ("real", "real images, not"),
        ("samples", "samples of the model"),
    ],
)
def test_report_leaves_out_what_is_none(tmp_path, absent, heading):
    if absent == "config_text":
        assert heading in full_report(tmp_path / "full.html")
    assert heading not in full_report(tmp_path / "report.html", **{absent: None})


def test_report_of_a_title_alone_is_a_page(tmp_path):
    visualize_report.write_report(tmp_path / "report.html", title="Nothing")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Nothing</h1>" in page and "<h2>" not in page


def test_report_escapes_everything_from_outside():
    bad = '"><script>alert(1)</script>'
    report = visualize_report.Report(bad, bad)
    report.numbers([(bad, bad, None, bad)], section=bad)
    report.figure(png(), bad, bad)
    report.table([bad], [[bad]], bad, bad)
    report.text(bad, bad)
    report.details(bad, bad, bad)
    page = report.html()
    assert "<script" not in page and page.count("&lt;script&gt;") == 15
    assert page.count('"><img') == 0


def test_report_numbers_have_two_digits_of_their_error():
    report = visualize_report.Report("t")
    report.numbers(
        [
            ("a", 1234.5678, 12.3, ""),
            ("b", torch.tensor(0.123456), 0.00123, ""),
            ("c", np.float32(2), None, ""),
            ("d", 1234567, None, ""),
            ("e", "-", None, ""),
        ]
    )
    page = re.sub("<[^>]*>", " ", report.html())
    for shown in ("1235  ± 12", "0.1235  ± 0.0012", "2.000", "1,234,567"):
        assert shown in page


def test_report_takes_bytes_pillow_images_and_figures_and_refuses_others():
    report = visualize_report.Report("t")
    report.figure(png())
    report.figure(Image.new("RGB", (3, 3)))
    report.figure(visualize.histogram([1.0, 2.0], "x"))
    assert report.html().count("data:image/png;base64,") == 3
    with pytest.raises(ValueError, match="image file"):
        report.figure(b"/tmp/picture.png")


def test_report_is_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    visualize_report.Report("old").save(path)

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        visualize_report.Report("new").save(path)
    assert "old" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_report_of_wrong_parts_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="one distance per sample"):
        full_report(tmp_path / "report.html", train_neighbors=(images(9), torch.rand(8)))
    assert not list(tmp_path.iterdir())


def test_visualize_leaves_matplotlibs_state_alone():
    import subprocess
    import sys

    code = (
        "import sys, visualize; assert 'matplotlib' not in sys.modules and 'PIL' not in "
        "sys.modules; visualize.histogram([1., 2.], 'x'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = os.path.dirname(os.path.abspath(visualize.__file__))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
