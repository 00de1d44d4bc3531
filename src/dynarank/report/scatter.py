"""The figure of cost: accuracy against FLOPs, memory and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from dynarank.records import Run, SummaryRecord
from dynarank.report.drawing import INK, NEUTRAL, new_figure, palette, percent_tick, shown, styled
from dynarank.report.moments import by_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cost_figure"]

_Value = Callable[[SummaryRecord], float]


@dataclass(frozen=True)
class _Point:
    """A schedule's mean over its runs, and its runs."""

    name: str
    colour: str
    x: float
    y: float
    runs: tuple[tuple[float, float], ...]


@styled
def cost_figure(runs: Sequence[Run]) -> Figure:
    """Test accuracy against relative training FLOPs, peak memory and training time.

    A labelled point is a schedule; where it has several runs the point is their mean and each run
    a small dot. Runs that did not finish have no cost and are left out.
    """
    memory, memory_unit = _memory_unit(runs)
    seconds, seconds_unit = _time_unit(runs)
    figure = new_figure(9.5, 3.5)
    panels = figure.subplots(1, 3, sharey=True)
    _panel(panels[0], runs, lambda end: end.relative_flops, "training FLOPs / full-rank")
    _panel(panels[1], runs, lambda end: end.memory_bytes / memory, f"peak memory ({memory_unit})")
    _panel(panels[2], runs, lambda end: end.train_seconds / seconds, f"training ({seconds_unit})")
    panels[0].set_ylabel("test accuracy")
    return figure


def _points(runs: Sequence[Run], value: _Value) -> list[_Point]:
    colours = palette(list(by_schedule(runs)))
    found: list[_Point] = []
    for name, group in by_schedule(runs).items():
        ends = [run.summary for run in group if run.summary is not None]
        if ends:
            pairs = tuple((value(end), end.test_accuracy) for end in ends)
            x, y = (fmean(axis) for axis in zip(*pairs, strict=True))
            found.append(_Point(name, colours[name], x, y, pairs))
    return found


def _panel(axes: Axes, runs: Sequence[Run], value: _Value, label: str) -> None:
    from matplotlib.ticker import FuncFormatter

    points = _points(runs, value)
    for point in points:
        if len(point.runs) > 1:
            axes.scatter(*zip(*point.runs, strict=True), color=point.colour, s=9, alpha=0.5)
        axes.scatter([point.x], [point.y], color=point.colour, s=42, zorder=3)
    axes.yaxis.set_major_formatter(FuncFormatter(percent_tick))
    axes.set_xlabel(label)
    if points:
        _limit(axes, [pair for point in points for pair in point.runs])
        _label(axes, points)


def _limit(axes: Axes, pairs: Sequence[tuple[float, float]]) -> None:
    """Cost from zero, so that a factor looks like one; accuracy from the worst to the best."""
    xs, ys = zip(*pairs, strict=True)
    pad = max(0.18 * (max(ys) - min(ys)), 0.005)
    axes.set_xlim(0, 1.12 * max(xs) or 1)
    axes.set_ylim(min(ys) - pad, max(ys) + pad)


def _label(axes: Axes, points: Sequence[_Point]) -> None:
    """Name each point beside it, names spread upwards until none touches the one below."""
    (_, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    last = -1.0
    for point in sorted(points, key=lambda point: point.y):
        across, up = point.x / right, (point.y - low) / (high - low)
        last = max(up - 0.015, last + 0.085)
        on_right = across < 0.5
        axes.annotate(
            shown(point.name, 24),
            (point.x, point.y),
            xytext=(across + (0.05 if on_right else -0.05), last),
            textcoords="axes fraction",
            ha="left" if on_right else "right",
            fontsize=8,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": NEUTRAL, "linewidth": 0.5, "shrinkB": 4},
        )


def _memory_unit(runs: Sequence[Run]) -> tuple[float, str]:
    most = max((run.summary.memory_bytes for run in runs if run.summary), default=0)
    return (1024**3, "GiB") if most >= 1024**3 else (1024**2, "MiB")


def _time_unit(runs: Sequence[Run]) -> tuple[float, str]:
    most = max((run.summary.train_seconds for run in runs if run.summary), default=0)
    if most >= 7200:
        return 3600, "hours"
    return (60, "minutes") if most >= 180 else (1, "seconds")
