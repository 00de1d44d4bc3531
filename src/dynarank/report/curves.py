"""The figure of learning curves: test score and losses against epochs, phases shaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from dynarank.records import EpochRecord, PhaseRecord, Run
from dynarank.report.drawing import new_figure, palette, plain_tick, score_axis, styled
from dynarank.report.keys import Key, counted, legend_below, line, phase_keys
from dynarank.report.marks import Mark, change_marks, mark_labels, mark_lines, shade, strip
from dynarank.report.moments import by_schedule, first_of_each, last_epoch
from dynarank.report.theme import NEUTRAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

__all__ = ["curves_figure"]

_Value = Callable[[EpochRecord], float | None]
_PANEL = 4.2  # inches of axes in one panel
_MOST_LABELED = 8


@styled
def curves_figure(runs: Sequence[Run], columns: Literal[1, 2] = 2) -> Figure:
    """Test score, and training and test loss, against epochs: one color a schedule.

    A schedule of several runs is drawn as their mean, with each run behind it. Dashed vertical
    lines mark changes of form. The phases of one schedule are shaded, the deeper the more layers
    are full-rank; those of several lie below the curves, a strip each.

    Args:
        runs: of one metric.
        columns: the panels beside each other (2) or one above the other (1).
    """
    grouped = by_schedule(runs)
    colors = palette(list(grouped))
    metric = runs[0].header.metric
    strips = _strips(grouped, colors)
    height = 3.6 + 0.12 * len(strips)
    figure = new_figure(9.5 if columns == 2 else 4.6, height * (3 - columns))
    score, loss = _panels(figure, columns, strips)
    for name, group in grouped.items():
        _draw(score, group, lambda epoch: epoch.test_score, colors[name], "-")
        _draw(score, group, lambda epoch: epoch.train_score, colors[name], ":")
        _draw(loss, group, lambda epoch: epoch.test_loss, colors[name], "-")
        _draw(loss, group, lambda epoch: epoch.train_loss, colors[name], ":")
    score_axis(score, metric)
    _maybe_log(loss)
    _dress(score, f"Test {metric.name}", runs, colors)
    _dress(loss, "Loss", runs, colors)
    legend_below(figure, _keys(grouped, colors, strips))
    return figure


def _strips(grouped: dict[str, list[Run]], colors: dict[str, str]) -> list[tuple[Run, str]]:
    """One strip a schedule where several have phases; of one alone the plot itself is shaded."""
    chosen = [group[0] for group in grouped.values()]
    phased = [run for run in chosen if run.all(PhaseRecord)]
    return [(run, colors[run.header.schedule]) for run in phased] if len(chosen) > 1 else []


def _panels(figure: Figure, columns: int, strips: Sequence[tuple[Run, str]]) -> tuple[Axes, Axes]:
    rows, low = 2 // columns, 0.13 * len(strips) / 3
    ratios = [1, low] * rows if strips else [1] * rows
    grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
    return _panel(figure, grid, 0, columns, strips), _panel(figure, grid, 1, columns, strips)


def _panel(
    figure: Figure, grid: GridSpec, index: int, columns: int, strips: Sequence[tuple[Run, str]]
) -> Axes:
    """One panel of curves, with the strips of phases below it."""
    row, column = divmod(index, columns)
    row *= 2 if strips else 1
    axes = figure.add_subplot(grid[row, column])
    if strips:
        below = figure.add_subplot(grid[row + 1, column], sharex=axes)
        strip(below, strips)
        below.set_xlabel("share of layers that are full-rank", fontsize=8)
    return axes


def _draw(
    axes: Axes, group: Sequence[Run], value: _Value, color: str, style: Literal["-", ":"]
) -> None:
    """One run's curve; of several their mean, and each run thinly behind."""
    curves = [_curve(run, value) for run in group]
    for curve in curves if len(curves) > 1 and style == "-" else []:
        axes.plot(*_axes_of(curve), color=color, linewidth=0.6, alpha=0.4)
    mean = curves[0] if len(curves) == 1 else _mean(curves)
    if mean:
        axes.plot(
            *_axes_of(mean),
            color=color,
            linestyle=style,
            linewidth=1.6 if style == "-" else 1.2,
            alpha=0.9,
            marker="o" if len(mean) <= 12 and style == "-" else None,
            markersize=3,
        )


def _curve(run: Run, value: _Value) -> dict[float, float]:
    """Values by epoch; nan, which leaves a gap, where one is not finite."""
    found = {epoch.epoch: value(epoch) for epoch in run.all(EpochRecord)}
    return {
        epoch: score if math.isfinite(score) else math.nan
        for epoch, score in found.items()
        if score is not None
    }


def _axes_of(curve: dict[float, float]) -> tuple[list[float], list[float]]:
    return list(curve), list(curve.values())


def _mean(curves: Sequence[dict[float, float]]) -> dict[float, float]:
    """The mean at the epochs that all runs reached; it ends where one of them is not finite."""
    common = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
    return {epoch: fmean(curve[epoch] for curve in curves) for epoch in common}


def _maybe_log(axes: Axes) -> None:
    """Make the axis logarithmic where the curves span more than a factor of thirty."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [float(y) for line in axes.get_lines() for y in line.get_ydata()]  # type: ignore[union-attr]
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _dress(axes: Axes, title: str, runs: Sequence[Run], colors: dict[str, str]) -> None:
    end = max((last_epoch(run) for run in runs), default=0) or 1
    marks = _readable(change_marks(first_of_each(runs), colors), len(colors) > 1)
    if len(colors) == 1:
        shade(axes, runs[0])
    axes.set_xlim(0, end)
    axes.set_xlabel("epoch")
    mark_lines(axes, marks)
    axes.set_title(title, pad=6 + mark_labels(axes, marks, end, _PANEL))


def _readable(marks: list[Mark], several: bool) -> list[Mark]:
    """Take labels off where they would pile up; of several schedules, leave unlabeled marks out.

    A schedule that changes often would cover the others' curves; its strip below tells.
    """
    labeled = [mark for mark in marks if mark.label]
    if several:
        marks = labeled
    if len(labeled) <= _MOST_LABELED:
        return marks
    return [Mark(mark.epoch, "", mark.color) for mark in marks]


def _keys(
    grouped: dict[str, list[Run]], colors: dict[str, str], strips: Sequence[tuple[Run, str]]
) -> list[Key]:
    keys = [(line(color), counted(name, grouped[name])) for name, color in colors.items()]
    keys += [(line(NEUTRAL), "test"), (line(NEUTRAL, ":"), "training")]
    return keys if strips else [*keys, *phase_keys([run for g in grouped.values() for run in g])]
