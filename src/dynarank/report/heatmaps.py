"""Heat-maps of weights: one row per layer, one column per epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynarank.records import HeatmapRecord, Run
from dynarank.report.formats import number
from dynarank.report.plotting import display_name, display_names, new_figure, styled
from dynarank.report.thinning import evenly

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["heatmap_names", "heatmaps_figure"]

Rows = tuple[tuple[float, ...], ...]


@styled
def heatmaps_figure(run: Run, layers: int = 4, readings: int = 5) -> Figure:
    """Draw the mean absolute weights of blocks, each layer on its own color scale.

    Args:
        run: with heat-map records.
        layers: at most this many, evenly spaced in depth.
        readings: at most this many, evenly spaced in time.

    Raises:
        ValueError: the run has no heat-map.
    """
    records = evenly(run.all(HeatmapRecord), readings)
    names = evenly(heatmap_names(run), layers)
    if not names:
        raise ValueError(f"{run.header.schedule} has no heat-map records to draw")
    figure = new_figure(max(4.6, 1.9 * len(records) + 0.4), 1.75 * len(names) + 0.5)
    grid = figure.subplots(len(names), len(records), squeeze=False)
    for name, shown, row in zip(names, display_names(names, 22), grid, strict=True):
        pictures = [record.layers.get(name) for record in records]
        top = _largest([picture for picture in pictures if picture])
        for record, picture, axes in zip(records, pictures, row, strict=True):
            _picture(axes, picture, top)
            if name == names[0]:
                axes.set_title(f"epoch {number(record.epoch)}")
        row[0].set_ylabel(shown, fontsize=8)
    figure.suptitle(
        f"{display_name(run.header.schedule)}: mean |w| of blocks, outputs down, inputs across",
        fontsize=9,
    )
    return figure


def heatmap_names(run: Run) -> list[str]:
    """The layers that have a heat-map, in order."""
    return list(dict.fromkeys(name for r in run.all(HeatmapRecord) for name in r.layers))


def _largest(pictures: Sequence[Rows]) -> float:
    values = [abs(v) for picture in pictures for row in picture for v in row if math.isfinite(v)]
    return max(values, default=0) or 1


def _picture(axes: Axes, picture: Rows | None, top: float) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if not picture:
        axes.text(0.5, 0.5, "not read", ha="center", va="center", transform=axes.transAxes)
        return
    finite = [[value if math.isfinite(value) else math.nan for value in row] for row in picture]
    axes.imshow(finite, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
