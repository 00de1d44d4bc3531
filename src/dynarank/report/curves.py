"""Learning curves: test score and losses against epochs, with the phases shaded.

The panels and lines are those for which there is something recorded: a loop of one's own may log
losses only, or only those of its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from dynarank.records import EpochRecord, PhaseRecord, Run, StepRecord
from dynarank.report.annotations import (
    ChangeMarker,
    change_markers,
    draw_markers,
    draw_phase_strips,
    label_markers,
    shade_phases,
)
from dynarank.report.colors import schedule_colors
from dynarank.report.grouping import by_schedule, first_of_each
from dynarank.report.legends import (
    LegendEntry,
    labels_with_counts,
    legend_below,
    line,
    phase_entries,
)
from dynarank.report.plotting import (
    display_name,
    new_figure,
    plain_tick,
    point_markers,
    score_axis,
    styled,
)
from dynarank.report.theme import NEUTRAL
from dynarank.report.thinning import evenly
from dynarank.report.transition_points import last_epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

__all__ = ["curves_figure", "has_curves"]

_Value = Callable[[EpochRecord], float | None]
_Style = Literal["-", ":"]  # test, training
_SCORES: dict[_Style, _Value] = {"-": lambda e: e.test_score, ":": lambda e: e.train_score}
_LOSSES: dict[_Style, _Value] = {"-": lambda e: e.test_loss, ":": lambda e: e.train_loss}
_NAMES: dict[_Style, str] = {"-": "test", ":": "training"}
_PANEL = 4.2  # inches of axes in one panel
_MOST_LABELED = 8
_MOST_STEPS = 600  # losses of single steps, over a schedule's runs


@styled
def curves_figure(runs: Sequence[Run], columns: Literal[1, 2] = 2) -> Figure:
    """Draw scores, and training and test losses, against epochs: one color per schedule.

    A schedule with several runs is drawn as their mean, with thin lines for each run. Losses of
    single steps are faint, at most 600 of them, evenly spaced. Dashed vertical lines mark
    transition points. With one schedule its phases are shaded, darker the more layers are
    full-rank; with several, each has a strip below the curves.

    Args:
        runs: all with the same metric.
        columns: panels side by side (2) or one above the other (1).
    """
    grouped = by_schedule(runs)
    colors = schedule_colors(grouped)
    metric = runs[0].header.metric
    strips = _strips(grouped, colors)
    kinds = [kind for kind in (_SCORES, _LOSSES) if _has(runs, kind)]
    across = min(columns, len(kinds))
    height = (3.6 + 0.12 * len(strips)) * len(kinds) / across
    figure = new_figure(9.5 if columns == 2 else 4.6, height)
    for kind, axes in zip(kinds, _panels(figure, len(kinds), across, strips), strict=True):
        for name, group in grouped.items():
            for style, value in kind.items():
                _draw(axes, group, value, colors[name], style)
            if kind is _LOSSES:
                _draw_steps(axes, group, colors[name])
        if kind is _SCORES:
            score_axis(axes, metric)
        else:
            _maybe_log(axes)
        title = f"Test {display_name(metric.name)}" if kind is _SCORES else "Loss"
        _dress(axes, title, runs, colors)
    legend_below(figure, _legend_entries(grouped, colors, strips))
    return figure


def has_curves(runs: Sequence[Run]) -> bool:
    """Tell whether there is a score or a loss to draw."""
    return _has(runs, _SCORES) or _has(runs, _LOSSES)


def _has(runs: Sequence[Run], kind: dict[_Style, _Value]) -> bool:
    epochs = [epoch for run in runs for epoch in run.all(EpochRecord)]
    if any(value(epoch) is not None for value in kind.values() for epoch in epochs):
        return True
    return kind is _LOSSES and any(_step_losses(run) for run in runs)


def _strips(grouped: dict[str, list[Run]], colors: Mapping[str, str]) -> list[tuple[Run, str]]:
    """One strip per schedule when there are several; a single schedule shades the plot instead."""
    chosen = [group[0] for group in grouped.values()]
    phased = [run for run in chosen if run.all(PhaseRecord)]
    return [(run, colors[run.header.schedule]) for run in phased] if len(chosen) > 1 else []


def _panels(
    figure: Figure, panels: int, columns: int, strips: Sequence[tuple[Run, str]]
) -> Iterator[Axes]:
    rows, low = panels // columns, 0.13 * len(strips) / 3
    ratios = [1, low] * rows if strips else [1] * rows
    grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
    for index in range(panels):
        yield _panel(figure, grid, index, columns, strips)


def _panel(
    figure: Figure, grid: GridSpec, index: int, columns: int, strips: Sequence[tuple[Run, str]]
) -> Axes:
    """One panel of curves, with the phase strips below it."""
    row, column = divmod(index, columns)
    row *= 2 if strips else 1
    axes = figure.add_subplot(grid[row, column])
    if strips:
        below = figure.add_subplot(grid[row + 1, column], sharex=axes)
        draw_phase_strips(below, strips)
        below.set_xlabel("share of scheduled layers at full rank", fontsize=8)
    return axes


def _draw(axes: Axes, group: Sequence[Run], value: _Value, color: str, style: _Style) -> None:
    """One run's curve; for several runs, their mean and a thin line each."""
    curves = [_curve(run, value) for run in group]
    few = 12 if style == "-" else 0
    for curve in curves if len(curves) > 1 and style == "-" else []:
        marks = point_markers(list(curve.values()), few=0)
        axes.plot(*_axes_of(curve), color=color, linewidth=0.6, alpha=0.4, **marks)
    mean = curves[0] if len(curves) == 1 else _mean(curves)
    if mean:
        axes.plot(
            *_axes_of(mean),
            color=color,
            linestyle=style,
            linewidth=1.6 if style == "-" else 1.2,
            alpha=0.9,
            markerfacecolor=color if style == "-" else "#ffffff",
            **point_markers(list(mean.values()), few),
        )


def _draw_steps(axes: Axes, group: Sequence[Run], color: str) -> None:
    for run in group:
        steps = evenly(_step_losses(run), max(_MOST_STEPS // len(group), 2))
        losses = [loss if math.isfinite(loss) else math.nan for _, loss in steps]
        if losses:
            marks = point_markers(losses)
            epochs = [epoch for epoch, _ in steps]
            axes.plot(epochs, losses, color=color, linewidth=0.9, alpha=0.6, zorder=1.5, **marks)


def _step_losses(run: Run) -> list[tuple[float, float]]:
    logged = [(step.epoch, step.train_loss) for step in run.all(StepRecord)]
    return [(epoch, loss) for epoch, loss in logged if loss is not None]


def _curve(run: Run, value: _Value) -> dict[float, float]:
    """Values by epoch; nan, which leaves a gap, where a value is not finite."""
    found = {epoch.epoch: value(epoch) for epoch in run.all(EpochRecord)}
    return {
        epoch: score if math.isfinite(score) else math.nan
        for epoch, score in found.items()
        if score is not None
    }


def _axes_of(curve: dict[float, float]) -> tuple[list[float], list[float]]:
    return list(curve), list(curve.values())


def _mean(curves: Sequence[dict[float, float]]) -> dict[float, float]:
    """The mean at the epochs that all runs reached; nan where one of them is not finite."""
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


def _dress(axes: Axes, title: str, runs: Sequence[Run], colors: Mapping[str, str]) -> None:
    end = max((last_epoch(run) for run in runs), default=0) or 1
    markers = _readable(change_markers(first_of_each(runs), colors), len(colors) > 1)
    if len(colors) == 1:
        shade_phases(axes, runs[0])
    axes.set_xlim(0, 1.01 * end)  # the last point whole
    axes.set_xlabel("epoch")
    draw_markers(axes, markers)
    axes.set_title(title, pad=6 + label_markers(axes, markers, end, _PANEL))


def _readable(markers: list[ChangeMarker], several: bool) -> list[ChangeMarker]:
    """Drop labels where they would pile up and, with several schedules, unlabeled markers.

    A schedule that changes often would cover the others' curves; its strip shows it instead.
    """
    labeled = [marker for marker in markers if marker.label]
    if several:
        markers = labeled
    if len(labeled) <= _MOST_LABELED:
        return markers
    return [ChangeMarker(marker.epoch, "", marker.color) for marker in markers]


def _legend_entries(
    grouped: dict[str, list[Run]], colors: Mapping[str, str], strips: Sequence[tuple[Run, str]]
) -> list[LegendEntry]:
    shown = zip(grouped, labels_with_counts(grouped), strict=True)
    entries = [(line(colors[name]), label) for name, label in shown]
    runs = [run for group in grouped.values() for run in group]
    for style, name in _NAMES.items():
        if any(_has(runs, {style: kind[style]}) for kind in (_SCORES, _LOSSES)):
            entries.append((line(NEUTRAL, style), name))
    if any(_step_losses(run) for run in runs):
        entries.append((line(NEUTRAL, width=0.9), "training, step by step"))
    return entries if strips else [*entries, *phase_entries(runs)]
