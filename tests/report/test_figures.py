"""The figures of the report say what the records say."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
from matplotlib.figure import Figure
from report_pages import Page, runs_of
from report_runs import PERPLEXITY, write_run

from dynarank.records import ChangeRecord, EpochRecord, SpectrumRecord, read_run
from dynarank.report.annotations import (
    MOST_LABELS,
    ChangeMarker,
    change_markers,
    label_markers,
)
from dynarank.report.colors import schedule_colors
from dynarank.report.cost_quality import cost_quality_figure
from dynarank.report.curves import curves_figure
from dynarank.report.figures import write_figures
from dynarank.report.heatmaps import heatmaps_figure
from dynarank.report.page import build_page
from dynarank.report.plotting import inline_svg
from dynarank.report.rank_metrics import MOST_LAYERS, rank_metrics_figure
from dynarank.report.rank_timeline import rank_opacity, rank_timeline_figure
from dynarank.report.spectra import spectrum_figure
from dynarank.report.spectra_over_time import spectra_over_time_figure
from dynarank.report.theme import INK


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


def test_curves_draw_each_schedule_and_mark_changes_at_their_epochs(three):
    runs = runs_of(three)
    recorded = sorted({change.epoch for run in runs for change in run.all(ChangeRecord)})
    score, _, loss, _ = curves_figure(runs).axes
    assert recorded == [4.4, 9.6] == dashed(score) == dashed(loss)
    assert [text.get_text() for text in score.texts] == ["inflate", "deflate"]
    assert len(score.get_lines()) == len(loss.get_lines()) == 2 * 3 + 2  # test, training; marks
    colors = schedule_colors(["full-rank", "low-rank", "dynamic-rank"])
    tested = [line for line in score.get_lines() if line.get_linestyle() == "-"]
    assert [line.get_color() for line in tested] == list(colors.values())
    assert tested[2].get_ydata()[-1] == pytest.approx(0.97 * (1 - math.exp(-4)))


def test_curves_of_several_seeds_are_a_mean_with_the_runs_behind(tmp_path):
    for seed, accuracy in enumerate((0.90, 0.96)):
        write_run(tmp_path, "low-rank", seed=seed, accuracy=accuracy)
    score, _ = curves_figure(runs_of(tmp_path)).axes
    tested = [line for line in score.get_lines() if line.get_linestyle() == "-"]
    first, second, mean = (line.get_ydata()[-1] for line in tested)
    assert mean == pytest.approx((first + second) / 2) and first != second
    assert tested[0].get_linewidth() < tested[2].get_linewidth()


def test_one_schedule_is_shaded_by_the_share_of_its_layers(tmp_path):
    score, _ = curves_figure([read_run(write_run(tmp_path))]).axes
    full, adapted = score.patches
    assert (full.get_x(), full.get_width()) == (4.4, pytest.approx(9.6 - 4.4))
    assert (adapted.get_x(), adapted.get_width()) == (9.6, pytest.approx(12 - 9.6))
    mixed, _ = curves_figure([read_run(write_run(tmp_path, "rotating", layers=12))]).axes
    (only,) = mixed.patches
    assert only.get_alpha() == pytest.approx(full.get_alpha() / 12)


def test_several_schedules_have_a_strip_each_by_the_share_of_full_rank_layers(three):
    _, strip, *_ = curves_figure(runs_of(three)).axes
    depth = [(round(bars.get_paths()[0].get_extents().x0, 1), bars.get_alpha())
             for bars in strip.collections]  # fmt: skip
    assert depth == [(0, 1), (0, 0.12), (0, 0.12), (4.4, 1), (9.6, 0.12)]


@pytest.mark.parametrize("columns", [1, 2])
def test_curves_have_no_training_score_where_none_was_recorded(tmp_path, columns):
    run = read_run(write_run(tmp_path, "low-rank"))
    run.records = [
        r.model_copy(update={"train_score": None}) if isinstance(r, EpochRecord) else r
        for r in run.records
    ]
    score, loss = curves_figure([run], columns).axes
    assert (len(score.get_lines()), len(loss.get_lines())) == (1, 2)


def test_curves_leave_a_gap_where_the_loss_is_not_finite(tmp_path):
    run = read_run(write_run(tmp_path, diverged=True))
    _, loss = curves_figure([run]).axes
    values = loss.get_lines()[0].get_ydata()
    assert math.isfinite(values[2]) and math.isnan(values[3])


@pytest.mark.parametrize(("layers", "stacked"), [(3, False), (3, True), (300, False)])
def test_ranks_draw_each_layer_in_each_run(tmp_path, layers, stacked):
    for schedule in ("full-rank", "dynamic-rank"):
        write_run(tmp_path, schedule, layers=layers)
    figure = rank_metrics_figure(runs_of(tmp_path), stacked)
    panels, bars = figure.axes[:4], figure.axes[4:]
    median = layers > 4
    assert len(bars) == median
    if stacked:  # lambda and effective rank of the one, then of the other
        panels = [panels[i] for i in (0, 2, 1, 3)]
    changes = [[], [4.4, 9.6], [], [4.4, 9.6]]
    assert [dashed(axes) for axes in panels] == changes
    for axes, marked in zip(panels, changes, strict=True):
        assert len(axes.get_lines()) == min(layers, MOST_LAYERS) + median + len(marked)
    assert [axes.get_title(loc="left") for axes in panels[:2]] == ["full-rank", "dynamic-rank"]
    effective = panels[2].get_lines()[0].get_ydata()
    assert all(0 < share <= 1 for share in effective)


def boxes(axes) -> dict:
    """The corners of the bands' boxes, (left, right, row), by opacity."""
    found: dict = {}
    for patch in axes.patches:
        for box in patch.get_path().to_polygons():
            (left, low), (right, high) = box.min(axis=0), box.max(axis=0)
            place = (round(float(left), 1), round(float(right), 1), round(float(low + high) / 2))
            found.setdefault(round(patch.get_alpha(), 3), set()).add(place)
    return found


def test_bands_tell_each_layers_form_and_rank_over_time(tmp_path):
    (axes,) = rank_timeline_figure([read_run(write_run(tmp_path))]).axes
    low = {row: rank_opacity(8 / full) for row, full in enumerate((32, 32, 64))}
    found = boxes(axes)
    assert found[1.0] == {(4.4, 9.6, row) for row in range(3)}
    for row, opacity in low.items():
        assert {(0.0, 4.4, row), (9.6, 12.0, row)} <= found[round(opacity, 3)]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"blocks.{i}.conv" for i in range(3)
    ]


def test_bands_of_a_rotating_schedule_step_through_the_layers(tmp_path):
    (axes,) = rank_timeline_figure([read_run(write_run(tmp_path, "rotating", layers=12))]).axes
    full = boxes(axes)[1.0]
    assert {(epoch - 0.5, min(epoch + 0.5, 12), epoch - 1) for epoch in range(1, 13)} == full


def test_bands_of_a_layer_that_never_changes_have_the_form_of_the_start(tmp_path):
    for schedule in ("full-rank", "low-rank"):
        write_run(tmp_path, schedule)
    full, low = rank_timeline_figure(runs_of(tmp_path)).axes
    assert boxes(full) == {1.0: {(0.0, 12.0, row) for row in range(3)}}
    assert boxes(low) == {rank_opacity(0.5): {(0.0, 12.0, row) for row in range(3)}}


def test_bands_of_many_pieces_leave_layers_out_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("dynarank.report.rank_timeline.MOST_PIECES", 60)
    (axes,) = rank_timeline_figure([read_run(write_run(tmp_path, layers=40))]).axes
    assert axes.get_title(loc="left") == "dynamic-rank: 20 of 40 layers"


def test_spectra_over_time_are_a_line_a_moment(tmp_path):
    run = read_run(write_run(tmp_path, pictures=True))
    panels = spectra_over_time_figure(run, readings=4).axes
    assert [axes.get_title(loc="left") for axes in panels] == [f"blocks.{i}.conv" for i in range(3)]
    *curves, low_rank = panels[0].get_lines()
    assert len(curves) == 4 and low_rank.get_xdata()[0] == 0.5
    assert curves[-1].get_ydata()[-1] == pytest.approx(math.exp(-(2 + 6 + 1) * 31 / 32))
    with pytest.raises(ValueError, match="no singular values"):
        spectra_over_time_figure(read_run(write_run(tmp_path / "none", "low-rank")))


def test_spectra_read_twice_at_an_epoch_are_two_lines(tmp_path):
    run = read_run(write_run(tmp_path, pictures=True))
    run.records.append(run.all(SpectrumRecord)[-1])
    first = spectra_over_time_figure(run, readings=14).axes[0]
    assert len(first.get_lines()) == 14 + 1


def test_heatmaps_are_on_one_scale_a_layer(tmp_path):
    run = read_run(write_run(tmp_path, pictures=True))
    panels = heatmaps_figure(run, layers=2, readings=3).axes
    assert len(panels) == 2 * 3
    assert [axes.get_title(loc="left") for axes in panels[:3]] == ["epoch 0", "epoch 6", "epoch 12"]
    tops = [axes.images[0].get_clim()[1] for axes in panels]
    assert len(set(tops[:3])) == 1 and max(axes.images[0].get_array().max() for axes in panels[:3])
    with pytest.raises(ValueError, match="no heat-map"):
        heatmaps_figure(read_run(write_run(tmp_path / "none", "low-rank")))


def test_each_figure_is_a_file_for_papers(tmp_path):
    write_run(tmp_path / "runs", pictures=True, layers=2)
    files = write_figures(tmp_path / "runs", tmp_path / "out", ("png", "svg", "pdf"))
    assert {path.name for path in files} == {
        f"{name}.{ending}"
        for name in ("curves", "cost-quality", "rank-metrics", "rank-timeline",
                     "spectra-dynamic-rank", "heatmaps-dynamic-rank")
        for ending in ("png", "svg", "pdf")
    }  # fmt: skip
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for path in files:
        assert path.read_bytes().startswith(starts[path.suffix[1:]]), path
    assert "var(" not in (tmp_path / "out" / "curves.svg").read_text()
    with pytest.raises(ValueError, match="png, svg, pdf; asked for: gif"):
        write_figures(tmp_path / "runs", tmp_path / "out", ("png", "gif"))


def test_a_schedule_that_changes_often_has_marks_without_labels(tmp_path):
    run = read_run(write_run(tmp_path, "relora"))
    marks = change_markers([run], {"relora": INK})
    assert len(marks) == 11 > MOST_LABELS
    assert not any(mark.label for mark in marks)


@pytest.mark.parametrize("times", [(0.2, 0.4, 0.6, 1.2), (2.8, 3.5, 3.7, 3.95), (0.0, 0.3, 4.0)])
def test_labels_of_marks_do_not_touch(times):
    figure = Figure(figsize=(5, 3))
    axes = figure.add_subplot()
    axes.set_xlim(0, 4)
    width = axes.get_window_extent().width / figure.dpi
    label_markers(axes, [ChangeMarker(at, "resize", INK) for at in times], 4, width)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(times)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_plan_at_the_start_is_no_mark(tmp_path):
    run = read_run(write_run(tmp_path))
    first = run.all(ChangeRecord)[0].model_copy(update={"epoch": 0.0, "step": 0})
    run.records.append(first)
    assert [mark.epoch for mark in change_markers([run], {"dynamic-rank": INK})] == [4.4, 9.6]
    assert "start inflate" in Page(build_page([run])).text


def test_cost_has_a_labeled_point_a_schedule(three, tmp_path):
    write_run(tmp_path, finished=False)
    panels = cost_quality_figure([*runs_of(three), *runs_of(tmp_path)]).axes
    assert len(panels) == 3
    for axes in panels:
        labels = {text.get_text() for text in axes.texts}
        assert axes.get_title(loc="left") == "better: up, left"
        assert labels == {"full-rank", "low-rank", "dynamic-rank"}
        assert len(axes.collections) == 3
    (x, _), *_ = panels[0].collections[1].get_offsets()
    assert x == pytest.approx(0.567)


def test_cost_quality_plots_of_several_seeds_have_means_and_spreads(tmp_path):
    scores = (0.90, 0.92, 0.97)
    for seed, accuracy in enumerate(scores):
        write_run(tmp_path, "low-rank", seed=seed, accuracy=accuracy, metric=PERPLEXITY)
    axes = cost_quality_figure(runs_of(tmp_path), columns=1).axes[0]
    runs, *bars, mean = axes.collections
    reached = [0.98 * score for score in scores]
    assert [y for _, y in runs.get_offsets()] == pytest.approx(reached)
    assert mean.get_offsets()[0][1] == pytest.approx(fmean(reached))
    _, vertical = (bar.get_segments()[0] for bar in bars)
    ends = [y for _, y in vertical]
    assert ends == pytest.approx([fmean(reached) - stdev(reached), fmean(reached) + stdev(reached)])
    assert axes.get_title(loc="left") == "better: down, left"


def test_cost_quality_plots_leave_out_a_run_whose_score_is_not_finite(tmp_path):
    write_run(tmp_path, "low-rank")
    write_run(tmp_path, "full-rank", accuracy=math.nan)
    axes = cost_quality_figure(runs_of(tmp_path)).axes[0]
    assert [text.get_text() for text in axes.texts] == ["low-rank"]


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


@pytest.mark.parametrize("count", [2, 20])
def test_a_long_legend_takes_no_height_from_the_curves(tmp_path, count):
    from dynarank.records import Run

    run = read_run(write_run(tmp_path, "low-rank"))
    names = [f"own schedule {i}" for i in range(count)]
    runs = [
        Run(run.folder, {}, [run.header.model_copy(update={"schedule": n}), *run.records[1:]])
        for n in names
    ]
    for figure in (curves_figure(runs, columns=1), cost_quality_figure(runs, columns=1)):
        figure.draw_without_rendering()
        tall = max(axes.get_window_extent().height for axes in figure.axes)
        assert tall / figure.dpi > 1.8, "inches"


def test_names_in_the_cost_figure_cover_neither_names_nor_points(tmp_path):
    from matplotlib.text import Text

    for schedule in ("full-rank", "low-rank", "dynamic-rank", "dynamic-rank-low", "relora"):
        write_run(tmp_path, schedule, accuracy=0.96)
    for axes in cost_quality_figure(runs_of(tmp_path)).axes:
        figure = axes.figure
        figure.draw_without_rendering()
        names = [Text.get_window_extent(text) for text in axes.texts]  # without the leader line
        points = [axes.transData.transform(dots.get_offsets()[0]) for dots in axes.collections]
        assert not any(name.contains(x, y) for name in names for x, y in points)
        assert not any(a.overlaps(b) for i, a in enumerate(names) for b in names[:i])
