"""The heat-map of a sweep shows each cell's mean, marks the best and leaves the rest empty."""

from __future__ import annotations

import math

import pytest

from dynarank.records import Metric
from dynarank.report.sweep import best_cell, best_cells, sweep_figure

LOSS = Metric(name="perplexity", higher_is_better=False, percent=False)
GRID = {
    (x, y): [0.9 - 0.001 * (x - 40) ** 2 / 100 - 0.002 * (y - 120) ** 2 / 400] * 2
    for x in (20.0, 40.0, 60.0, 80.0)
    for y in (60.0, 80.0, 120.0)
    if x < y
}


def cells(figure):
    """The texts of the cells by (column, row)."""
    return {text.get_position(): text.get_text() for text in figure.axes[0].texts}


def patches(figure, label):
    return [p.get_xy() for p in figure.axes[0].patches if p.get_label() == label]


def test_every_schedule_has_its_mean_and_only_those():
    figure = sweep_figure(GRID)
    written = cells(figure)
    assert len(written) == len(GRID) == 2 + 3 + 4
    assert (2, 0) not in written  # inflate 60, deflate 60
    assert written[1, 2] == "90.00%\nn = 2"
    (image,) = figure.axes[0].images
    shown = image.get_array()
    assert shown.mask[0, 2] and shown[2, 1] == pytest.approx(0.9)


def test_the_best_is_framed_whichever_way_is_better():
    assert best_cell(GRID, Metric()) == (40.0, 120.0)
    assert patches(sweep_figure(GRID), "best") == [(pytest.approx(0.54), pytest.approx(1.54))]
    worst = min(GRID, key=lambda cell: GRID[cell][0])
    assert best_cell(GRID, LOSS) == worst
    column, row = (20.0, 40.0, 60.0, 80.0).index(worst[0]), (60.0, 80.0, 120.0).index(worst[1])
    framed = patches(sweep_figure(GRID, LOSS), "best")
    assert framed == [(pytest.approx(column - 0.46), pytest.approx(row - 0.46))]


def test_all_of_the_best_are_framed():
    tied = {(1.0, 3.0): [0.9], (2.0, 3.0): [0.90001], (1.0, 2.0): [0.8]}  # 90.00% both
    assert best_cells(tied, Metric()) == [(1.0, 3.0), (2.0, 3.0)]
    assert len(patches(sweep_figure(tied), "best")) == 2
    assert best_cells(tied, LOSS) == [(1.0, 2.0)]
    assert best_cells({(1.0, 2.0): [math.nan]}, LOSS) == []


def test_what_has_not_run_or_is_not_finite_is_shown_as_such():
    grid = {(1.0, 3.0): [0.5], (2.0, 3.0): [], (1.0, 2.0): [math.nan], (0.0, 2.0): [0.4]}
    figure = sweep_figure(grid)
    assert sorted(patches(figure, "not run")) == [(-0.5, 0.5), (1.5, 0.5)]
    assert "not\nfinite" in cells(figure).values()
    assert best_cell(grid, Metric()) == (1.0, 3.0)
    assert best_cell({(1.0, 2.0): [math.inf]}, Metric()) is None
    sweep_figure({(1.0, 2.0): [math.inf]})


def test_a_metric_that_is_no_share_is_written_as_it_is(tmp_path):
    figure = sweep_figure({(1.0, 2.0): [12.345]}, LOSS, title="$text")
    assert cells(figure)[0, 0] == "12.35" or cells(figure)[0, 0] == "12.34"
    assert "\\$text" in figure.axes[0].get_title(loc="left")
    for ending in ("png", "svg"):
        figure.savefig(tmp_path / f"sweep.{ending}")


def test_a_sweep_of_nothing():
    with pytest.raises(ValueError, match="empty"):
        sweep_figure({})
