"""Pictures of points: the panels they claim, what they show, and what they refuse."""

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import evaluation_points
import visualize_plane as plane
from data_lib_densities import EqualGaussians, Gaussians

SIZE = 12
GRID = evaluation_points.grid(2.5, SIZE)[0]
TWO = EqualGaussians([[-1.0, 0.5], [1.0, 0.5]], 0.3)


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def drawn(figure):
    """The figure, rendered, so that what only fails there fails here."""
    FigureCanvasAgg(figure).draw()
    return figure


def test_a_density_has_a_panel_each_with_its_largest_value_where_the_density_has_it():
    log_p = TWO.log_density(GRID)
    figure = drawn(plane.density_panels({"a": log_p, "b": log_p.reshape(SIZE, SIZE)}))
    assert titles(figure) == ["a", "b"]
    for ax in figure.axes:
        values = ax.images[0].get_array()
        assert values.max() == 1
        row, column = np.unravel_index(values.argmax(), values.shape)
        x, y = GRID[row * SIZE + column]
        assert abs(abs(x) - 1) < 0.25 and abs(y - 0.5) < 0.25
        assert ax.images[0].origin == "lower"  # y upwards


def test_log_densities_share_one_scale_and_minus_infinity_is_its_floor():
    log_p = torch.full((SIZE**2,), -math.inf)
    log_p[0] = 1.0
    figure = drawn(plane.density_panels({"a": log_p, "b": log_p + 2}, log=True, floor=-5))
    limits = {ax.images[0].get_clim() for ax in figure.axes if ax.images}
    assert limits == {(-2.0, 3.0)}
    assert figure.axes[0].images[0].get_array().min() == -2.0


def test_rows_and_columns_have_their_names_and_as_many_panels():
    log_p = TWO.log_density(GRID)
    figure = drawn(plane.density_rows({"up": [log_p] * 3, "down": [log_p] * 3}, ["1", "2", "3"]))
    assert titles(figure) == ["1", "2", "3"] and len(figure.axes) == 6
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["up", "down"]
    with pytest.raises(ValueError, match=r"expected 3 densities in each row, got .*down.*2"):
        plane.density_rows({"up": [log_p] * 3, "down": [log_p] * 2}, ["1", "2", "3"])


def test_the_difference_of_log_densities_is_shown_where_there_are_data_only():
    truth = torch.where(torch.arange(SIZE**2) < 10, 0.0, -100.0)
    figure = drawn(plane.log_density_panels(truth, truth + 0.5))
    assert titles(figure)[-1] == "model − truth"
    gap = np.ma.filled(figure.axes[2].images[0].get_array(), np.nan).reshape(-1)
    assert np.allclose(gap[:10], 0.5) and np.isnan(gap[10:]).all()
    low, high = figure.axes[2].images[0].get_clim()
    assert low == -high  # 0 is the middle colour


def test_arrows_point_along_the_field_on_one_scale_for_all_panels():
    places = evaluation_points.grid(2.5, 5)[0]
    small = torch.tensor([[3.0, 4.0]]).expand(25, 2)
    figure = drawn(plane.field_panels(TWO.log_density(GRID), places, {"a": small, "b": 10 * small}))
    a, b = (np.stack([q.U, q.V]) for q in (ax.collections[0] for ax in figure.axes))
    assert np.allclose(a[0] / a[1], 0.75) and np.allclose(b[0] / b[1], 0.75)
    assert (b > a).all()
    unit = (5 + 50) / 2 / 4  # a quarter of the median
    assert np.hypot(*a) == pytest.approx(0.25 * 1.0 * math.asinh(5 / unit))


def test_a_field_that_is_zero_has_no_arrows_and_no_nan():
    places = evaluation_points.grid(2.5, 5)[0]
    figure = drawn(plane.field_panels(TWO.log_density(GRID), places, {"a": torch.zeros(25, 2)}))
    assert (figure.axes[0].collections[0].U == 0).all()


def test_paths_run_from_circles_to_dots_and_over_the_axis_in_their_order():
    x = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]], [[2.0, 1.5]]])
    over = {"a": ([10.0, 1.0, 0.1], torch.ones(3, 7))}
    figure = drawn(plane.path_panels({"a": x}, log_density=TWO.log_density(GRID), over=over))
    assert len(figure.axes) == 2
    line, start, end = figure.axes[0].lines
    assert np.allclose(line.get_xydata(), x[:, 0])
    assert np.allclose(start.get_xydata(), [[0, 0]]) and np.allclose(end.get_xydata(), [[2, 1.5]])
    assert start.get_markerfacecolor() == "white" != end.get_markerfacecolor()
    below = figure.axes[1]
    assert np.allclose(below.lines[0].get_xydata(), [[10, 0], [1, 1], [0.1, 2]])
    assert below.get_xlim() == (10.0, 0.1) and below.get_xscale() == "log"


def test_points_outside_of_the_square_leave_its_limits_as_they_are():
    far = torch.tensor([[[0.0, 0.0]], [[99.0, 0.0]]])
    figure = drawn(plane.path_panels({"a": far}))
    assert figure.axes[0].get_xlim() == (-2.5, 2.5)
    figure = drawn(plane.points_panels({"a": far[:, 0]}))
    assert figure.axes[0].get_xlim() == (-2.5, 2.5)


def test_truth_and_points_stand_in_columns():
    log_p = TWO.log_density(GRID)
    points = [TWO.sample(50, 0), TWO.sample(60, 1)]
    figure = drawn(plane.truth_and_points([log_p] * 2, points, ["a", "b"]))
    assert titles(figure) == ["a", "b"]
    assert [len(ax.collections[0].get_offsets()) for ax in figure.axes[2:]] == [50, 60]
    assert not figure.axes[2].images
    with pytest.raises(ValueError, match="got 1, 2 and 2"):
        plane.truth_and_points([log_p], points, ["a", "b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plane.density_panels({}), "at least one panel"),
        (lambda: plane.density_panels({"a": torch.zeros(7)}), "square grid, got 7"),
        (lambda: plane.path_panels({"a": torch.zeros(4, 2)}), r"a: expected paths .*\(4, 2\)"),
        (lambda: plane.path_panels({"a": torch.zeros(4, 3, 3)}), "a: expected paths"),
        (
            lambda: plane.path_panels({"a": torch.zeros(4, 3, 2)}, over={"a": ([1.0], GRID)}),
            "a place and a density for each of 4 states, got 1",
        ),
        (lambda: plane.points_panels({"a": torch.zeros(4, 3)}), r"shape \(n, 2\), got \(4, 3\)"),
        (
            lambda: plane.field_panels(GRID[:, 0], GRID, {"learned": torch.zeros(3, 2)}),
            r"learned: expected shape \(144, 2\), got \(3, 2\)",
        ),
    ],
)
def test_wrong_shapes_are_refused_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_and_panels_do_not_overlap():
    log_p = Gaussians([[0.0, 0.0]], torch.eye(2)[None]).log_density(GRID)
    figure = drawn(plane.density_panels({f"σ/α = {i}, a long name": log_p for i in range(4)}))
    renderer = figure.canvas.get_renderer()
    boxes = [ax.get_tightbbox(renderer) for ax in figure.axes]
    whole = figure.bbox
    for a, b in itertools.pairwise(boxes):
        assert a.x1 <= b.x0 + 1
    assert all(b.y1 <= whole.y1 and b.y0 >= 0 and b.x0 >= 0 and b.x1 <= whole.x1 for b in boxes)
