"""Cost-quality plots: test score against FLOPs, memory and time, one point per schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

from dynarank.records import Metric, Run, SummaryRecord
from dynarank.report.colors import schedule_colors
from dynarank.report.grouping import by_schedule
from dynarank.report.legends import legend_below, line
from dynarank.report.plotting import display_name, display_names, new_figure, score_axis, styled
from dynarank.report.theme import INK, NEUTRAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_quality_figure"]

_MOST_LABELED = 8
_Value = Callable[[SummaryRecord], float]
_Box = tuple[float, float, float, float]  # left, right, low, high, in fractions of the axes


@dataclass(frozen=True)
class _Point:
    """A schedule's mean over its runs, and its runs."""

    name: str
    color: str
    x: float
    y: float
    runs: tuple[tuple[float, float], ...]

    def spread(self, axis: Literal[0, 1]) -> float:
        """The standard deviation over the runs; the schedule has several."""
        return stdev(run[axis] for run in self.runs)


@styled
def cost_quality_figure(runs: Sequence[Run], columns: Literal[1, 3] = 3) -> Figure:
    """Plot test score against relative training FLOPs, peak memory and training time.

    A point is a schedule, labeled or, if there are more than eight, in the legend; with several
    runs it is their mean, with error bars of one standard deviation and a small dot per run.
    Unfinished runs have no cost and runs whose score is not finite have no position: both are left
    out.

    Args:
        runs: all with the same metric.
        columns: plots side by side (3) or one above the other (1).
    """
    metric = runs[0].header.metric
    colors = schedule_colors(by_schedule(runs))
    memory, memory_unit = _memory_unit(runs)
    seconds, seconds_unit = _time_unit(runs)
    figure = new_figure(9.5 if columns == 3 else 4.6, 3.5 if columns == 3 else 9.0)
    panels = list(figure.subplots(3 // columns, columns, sharey=True, squeeze=False).flat)
    measures: tuple[tuple[str, _Value], ...] = (
        ("training FLOPs / full-rank", lambda end: end.relative_flops),
        (f"peak memory ({memory_unit})", lambda end: end.memory_bytes / memory),
        (f"training ({seconds_unit})", lambda end: end.train_seconds / seconds),
    )
    shown = list(by_schedule(runs))
    names = dict(zip(shown, display_names(shown, 24), strict=True))
    for axes, (label, value) in zip(panels, measures, strict=True):
        points = _panel(axes, runs, colors, value, label)
        if len(names) <= _MOST_LABELED:
            _label(axes, points, names)
    if len(names) > _MOST_LABELED:
        legend_below(figure, [(line(colors[name]), label) for name, label in names.items()])
    for axes in panels[:1] if columns == 3 else panels:
        axes.set_ylabel(f"test {display_name(metric.name)}")
    for axes in panels:
        _better(axes, metric)
    return figure


def _points(runs: Sequence[Run], colors: Mapping[str, str], value: _Value) -> list[_Point]:
    found: list[_Point] = []
    for name, group in by_schedule(runs).items():
        ends = [run.summary for run in group if run.summary is not None]
        scored = [(value(end), end.test_score) for end in ends if end.test_score is not None]
        pairs = tuple(pair for pair in scored if all(map(math.isfinite, pair)))
        if pairs:
            x, y = (fmean(axis) for axis in zip(*pairs, strict=True))
            found.append(_Point(name, colors[name], x, y, pairs))
    return found


def _panel(
    axes: Axes, runs: Sequence[Run], colors: Mapping[str, str], value: _Value, label: str
) -> list[_Point]:
    points = _points(runs, colors, value)
    for point in points:
        if len(point.runs) > 1:
            axes.scatter(*zip(*point.runs, strict=True), color=point.color, s=9, alpha=0.5)
            axes.errorbar(
                [point.x], [point.y], xerr=[point.spread(0)], yerr=[point.spread(1)],
                color=point.color, linewidth=1, capsize=2,
            )  # fmt: skip
        axes.scatter([point.x], [point.y], color=point.color, s=42, zorder=3)
    score_axis(axes, runs[0].header.metric)
    axes.set_xlabel(label)
    if points:
        _limit(axes, points)
    return points


def _limit(axes: Axes, points: Sequence[_Point]) -> None:
    """Start the cost axis at zero, so that ratios can be read; fit the score axis to the data."""
    xs, ys = zip(*[pair for point in points for pair in point.runs], strict=True)
    several = [point for point in points if len(point.runs) > 1]
    tops = [*ys, *(point.y + point.spread(1) for point in several)]
    lows = [*ys, *(point.y - point.spread(1) for point in several)]
    pad = max(0.18 * (max(tops) - min(lows)), 0.005 * max(map(abs, ys)), 1e-6)
    axes.set_xlim(0, 1.12 * max(xs) or 1)
    axes.set_ylim(min(lows) - pad, max(tops) + pad)


def _better(axes: Axes, metric: Metric) -> None:
    """Say which corner is better, since not every metric is better when higher."""
    axes.set_title(
        "better: up, left" if metric.higher_is_better else "better: down, left",
        fontsize=8, fontweight="normal", color=NEUTRAL,
    )  # fmt: skip


def _label(axes: Axes, points: Sequence[_Point], names: Mapping[str, str]) -> None:
    """Label each point where the label covers no other point and no other label."""
    (_, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    spots = {point: (point.x / right, (point.y - low) / (high - low)) for point in points}
    taken = [(x - 0.03, x + 0.03, y - 0.02, y + 0.02) for x, y in spots.values()]
    for point, (x, y) in spots.items():
        text = names[point.name]
        box = next((b for b in _places(x, y, text) if not _meets(b, taken)), None)
        box = box or next(_places(x, y, text))
        taken.append(box)
        on_right = box[0] > x
        axes.annotate(
            text,
            (point.x, point.y),
            xytext=(box[0] if on_right else box[1], (box[2] + box[3]) / 2),
            textcoords="axes fraction",
            ha="left" if on_right else "right",
            va="center",
            fontsize=8,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": NEUTRAL, "linewidth": 0.5, "shrinkB": 4},
        )


def _places(x: float, y: float, text: str) -> Iterator[_Box]:
    """Boxes for a label beside ``(x, y)``, nearest first, that stay inside the axes."""
    width = 0.023 * len(text)  # of panels 2.7 inches wide, in letters of .06 inches
    for step in range(12):
        for up in sorted({y + 0.08 * step, y - 0.08 * step}, reverse=True):
            for left in (x - 0.05 - width, x + 0.05):
                if step == 0 or (left >= 0 and left + width <= 1 and 0.04 <= up <= 0.96):
                    yield left, left + width, up - 0.035, up + 0.035


def _meets(box: _Box, others: Sequence[_Box]) -> bool:
    """Tell whether a box overlaps any other, or leaves the axes."""
    if box[0] < 0 or box[1] > 1:
        return True
    return any(
        box[0] < other[1] and other[0] < box[1] and box[2] < other[3] and other[2] < box[3]
        for other in others
    )


def _memory_unit(runs: Sequence[Run]) -> tuple[float, str]:
    most = max((run.summary.memory_bytes for run in runs if run.summary), default=0)
    return (1024**3, "GiB") if most >= 1024**3 else (1024**2, "MiB")


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    most = max((run.summary.train_seconds for run in runs if run.summary), default=0)
    if most >= 7200:
        return 3600, "hours"
    return (60, "minutes") if most >= 180 else (1, "seconds")
