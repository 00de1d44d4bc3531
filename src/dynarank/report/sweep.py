"""The heat-map of a sweep: mean test score over inflation and deflation epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from dynarank.records import Metric
from dynarank.report.formats import number, score_text
from dynarank.report.plotting import (
    INK,
    NEUTRAL,
    depth_colormap,
    display_name,
    new_figure,
    percent_tick,
    plain_tick,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["best_cell", "best_cells", "sweep_figure"]

Cell = tuple[float, float]
_DIGITS = 2


def best_cell(scores: Mapping[Cell, Sequence[float]], metric: Metric) -> Cell | None:
    """The first of the best cells; None where no cell's mean is finite."""
    return next(iter(best_cells(scores, metric)), None)


def best_cells(scores: Mapping[Cell, Sequence[float]], metric: Metric) -> list[Cell]:
    """Each (inflate, deflate) of the best mean score, as it is written; none if none is finite.

    Example:
        >>> best_cells({(1, 3): [0.5], (2, 3): [0.7, 0.8], (2, 4): [0.75]}, Metric())
        [(2, 3), (2, 4)]
    """
    means = {cell: mean for cell, mean in _means(scores).items() if math.isfinite(mean)}
    best = (max if metric.higher_is_better else min)(means.values(), default=math.nan)
    written = score_text(best, metric, _DIGITS)
    return [cell for cell, mean in means.items() if score_text(mean, metric, _DIGITS) == written]


@styled
def sweep_figure(
    scores: Mapping[Cell, Sequence[float]], metric: Metric | None = None, title: str | None = None
) -> Figure:
    """Draw the mean test score over the inflation epoch (x) and the deflation epoch (y).

    A cell that would deflate before it inflates is not a schedule and stays empty; one that has
    not run is hatched. Each cell shows its mean, and n if it is over several runs; the best cells
    are framed.

    Args:
        scores: the test scores of the runs of each (inflate, deflate), in epochs.
        metric: what the scores are, and which way is better.
        title: of the figure.

    Raises:
        ValueError: there is no cell.
    """
    if not scores:
        raise ValueError("there is no cell to draw: scores is empty")
    metric = Metric() if metric is None else metric
    across, up = (sorted({cell[axis] for cell in scores}) for axis in (0, 1))
    figure = new_figure(max(5.0, 1.8 + 0.95 * len(across)), max(3.4, 1.5 + 0.6 * len(up)))
    axes = figure.subplots()
    _cells(figure, axes, scores, metric, across, up)
    axes.set_xticks(range(len(across)), [number(epoch) for epoch in across])
    axes.set_yticks(range(len(up)), [number(epoch) for epoch in up])
    axes.set(xlabel="inflate at epoch", ylabel="deflate at epoch")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(display_name(title, 80) if title else f"Mean test {display_name(metric.name)}")
    return figure


def _means(scores: Mapping[Cell, Sequence[float]]) -> dict[Cell, float]:
    return {cell: fmean(values) for cell, values in scores.items() if len(values) > 0}


def _cells(
    figure: Figure,
    axes: Axes,
    scores: Mapping[Cell, Sequence[float]],
    metric: Metric,
    across: Sequence[float],
    up: Sequence[float],
) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter

    means = _means(scores)
    finite = [mean for mean in means.values() if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    norm, scale = Normalize(low, high if high > low else low + 1), depth_colormap()
    if not metric.higher_is_better:
        scale = scale.reversed()
    grid = [[means.get((x, y), math.nan) if x < y else math.nan for x in across] for y in up]
    image = axes.imshow(
        [[value if math.isfinite(value) else math.nan for value in row] for row in grid],
        origin="lower", aspect="auto", cmap=scale, norm=norm,
    )  # fmt: skip
    best = best_cells(scores, metric)
    for row, y in enumerate(up):
        for column, x in enumerate(across):
            if x < y:
                mean = means.get((x, y), math.nan)
                light = math.isfinite(mean) and _goodness(norm(mean), metric) > 0.6
                _cell(axes, (column, row), scores.get((x, y), ()), metric, light)
            if (x, y) in best:
                _frame(axes, column, row)
    bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.yaxis.set_major_formatter(FuncFormatter(percent_tick if metric.percent else plain_tick))


def _goodness(share: float, metric: Metric) -> float:
    return share if metric.higher_is_better else 1 - share


def _cell(
    axes: Axes, at: tuple[int, int], values: Sequence[float], metric: Metric, light: bool
) -> None:
    """Write a cell's mean, or hatch it if nothing has run."""
    from matplotlib.patches import Rectangle

    if not values:
        axes.add_patch(
            Rectangle(
                (at[0] - 0.5, at[1] - 0.5), 1, 1,
                fill=False, hatch="////", edgecolor="#d8dee4", linewidth=0, label="not run",
            )
        )  # fmt: skip
        axes.text(*at, "not run", ha="center", va="center", fontsize=8, color=NEUTRAL)
        return
    finite = all(map(math.isfinite, values))
    text = score_text(fmean(values), metric, _DIGITS) if finite else "not\nfinite"
    if len(values) > 1:
        text += f"\nn = {len(values)}"
    color = "white" if finite and not light else INK
    axes.text(*at, text, ha="center", va="center", fontsize=8, color=color)


def _frame(axes: Axes, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    inset = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, linewidth=2.2)
    inset.set(edgecolor="#D55E00", label="best")
    axes.add_patch(inset)
