"""The figures of the report say what the records say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from report_pages import Page, runs_of
from report_runs import write_run

from dynarank.records import ChangeRecord, read_run
from dynarank.report.drawing import INK, inline_svg, palette
from dynarank.report.marks import MOST_LABELS, change_marks
from dynarank.report.page import build_page
from dynarank.report.plots import cost_figure, curves_figure, ranks_figure, spectrum_figure


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for schedule in ("full-rank", "low-rank", "dynamic-rank"):
        write_run(folder, schedule)
    return folder


def dashed(axes) -> list[float]:
    """Where the axes have dashed vertical lines."""
    lines = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    return [float(line.get_xdata()[0]) for line in lines]


def test_curves_draw_each_run_and_mark_changes_at_their_epochs(three):
    runs = runs_of(three)
    recorded = sorted({change.epoch for run in runs for change in run.all(ChangeRecord)})
    accuracy, loss = curves_figure(runs).axes
    assert recorded == [4.4, 9.6] == dashed(accuracy) == dashed(loss)
    assert [text.get_text() for text in accuracy.texts] == ["inflate", "deflate"]
    assert len(accuracy.get_lines()) == 3 + 2
    assert len(loss.get_lines()) == 2 * 3 + 2
    colours = palette(["full-rank", "low-rank", "dynamic-rank"])
    assert [line.get_color() for line in accuracy.get_lines()[:3]] == list(colours.values())
    assert accuracy.get_lines()[2].get_ydata()[-1] == pytest.approx(0.97 * (1 - math.exp(-4)))


def test_curves_shade_only_the_full_rank_phase_between_changes(three):
    accuracy, _ = curves_figure(runs_of(three)).axes
    (patch,) = accuracy.patches
    assert (patch.get_x(), patch.get_width()) == (4.4, pytest.approx(9.6 - 4.4))


def test_curves_leave_a_gap_where_the_loss_is_not_finite(tmp_path):
    run = read_run(write_run(tmp_path, diverged=True))
    _, loss = curves_figure([run]).axes
    values = loss.get_lines()[0].get_ydata()
    assert math.isfinite(values[2]) and math.isnan(values[3])


@pytest.mark.parametrize("layers", [3, 300])
def test_ranks_draw_each_layer_in_each_run(tmp_path, layers):
    for schedule in ("full-rank", "dynamic-rank"):
        write_run(tmp_path, schedule, layers=layers)
    figure = ranks_figure(runs_of(tmp_path))
    panels, bars = figure.axes[:4], figure.axes[4:]
    median = layers > 4
    assert len(bars) == median
    changes = [[], [4.4, 9.6], [], [4.4, 9.6]]
    assert [dashed(axes) for axes in panels] == changes
    for axes, marked in zip(panels, changes, strict=True):
        assert len(axes.get_lines()) == layers + median + len(marked)
    assert [axes.get_title(loc="left") for axes in panels[:2]] == ["full-rank", "dynamic-rank"]
    effective = panels[2].get_lines()[0].get_ydata()
    assert all(0 < share <= 1 for share in effective)


def test_a_schedule_that_changes_often_has_marks_without_labels(tmp_path):
    run = read_run(write_run(tmp_path, "relora"))
    marks = change_marks([run], {"relora": INK})
    assert len(marks) == 11 > MOST_LABELS
    assert not any(mark.label for mark in marks)


def test_the_plan_at_the_start_is_no_mark(tmp_path):
    run = read_run(write_run(tmp_path))
    first = run.all(ChangeRecord)[0].model_copy(update={"epoch": 0.0, "step": 0})
    run.records.append(first)
    assert [mark.epoch for mark in change_marks([run], {"dynamic-rank": INK})] == [4.4, 9.6]
    assert "start inflate" in Page(build_page([run])).text


def test_cost_has_a_labelled_point_a_schedule(three, tmp_path):
    write_run(tmp_path, finished=False)
    panels = cost_figure([*runs_of(three), *runs_of(tmp_path)]).axes
    assert len(panels) == 3
    for axes in panels:
        labels = {text.get_text() for text in axes.texts}
        assert labels == {"full-rank", "low-rank", "dynamic-rank"}
        assert len(axes.collections) == 3
    (x, _), *_ = panels[0].collections[1].get_offsets()
    assert x == pytest.approx(0.567)


def test_spectrum_shows_ranks_as_shares_of_full_rank():
    left, right = spectrum_figure({"flat": [2.0] * 8, "one": [3.0, 0, 0, 0]}).axes
    assert list(left.get_lines()[0].get_ydata()) == [1.0] * 8
    effective, stable = ([bar.get_width() for bar in container] for container in right.containers)
    assert effective == pytest.approx([1, 1 / 4]) and stable == pytest.approx([1, 1 / 4])


def test_spectrum_of_many_layers_keeps_the_lowest_and_says_so():
    spectra = {f"layer.{i}": [1.0] * (i + 1) + [0.0] * (99 - i) for i in range(100)}
    figure = spectrum_figure(spectra, limit=40)
    right = figure.axes[-1]
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names == [f"layer.{i}" for i in range(40)]
    assert "lowest 40 of 100 layers" in right.get_title(loc="left")


def test_spectrum_names_broken_layers():
    right = spectrum_figure({"zero": [0.0, 0.0], "bad": [math.nan], "good": [1.0]}).axes[1]
    assert [text.get_text() for text in right.texts] == ["zero or not finite"] * 2


@pytest.mark.parametrize("spectra", [{}, {"empty": []}])
def test_spectrum_of_nothing(spectra):
    with pytest.raises(ValueError, match=r"empty"):
        spectrum_figure(spectra)


def test_svg_ids_of_two_figures_differ(three):
    figure = curves_figure(runs_of(three))
    ids = [set(Page(inline_svg(figure, prefix)).ids) for prefix in ("a", "b")]
    assert not ids[0] & ids[1]


def test_names_in_the_cost_figure_cover_neither_names_nor_points(tmp_path):
    from matplotlib.text import Text

    for schedule in ("full-rank", "low-rank", "dynamic-rank", "dynamic-rank-low", "relora"):
        write_run(tmp_path, schedule, accuracy=0.96)
    for axes in cost_figure(runs_of(tmp_path)).axes:
        figure = axes.figure
        figure.draw_without_rendering()
        names = [Text.get_window_extent(text) for text in axes.texts]  # without the leader line
        points = [axes.transData.transform(dots.get_offsets()[0]) for dots in axes.collections]
        assert not any(name.contains(x, y) for name in names for x, y in points)
        assert not any(a.overlaps(b) for i, a in enumerate(names) for b in names[:i])
