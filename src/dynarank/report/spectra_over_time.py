"""Spectra over time: the singular values of several layers at several epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynarank.records import LayerSpectrum, Run, SpectrumRecord
from dynarank.report.formats import number
from dynarank.report.legends import legend_below, line
from dynarank.report.plotting import (
    depth_colors,
    display_name,
    display_names,
    new_figure,
    plain_tick,
    point_markers,
    styled,
)
from dynarank.report.theme import NEUTRAL
from dynarank.report.thinning import evenly

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["spectra_over_time_figure", "spectrum_names"]

FLOOR = 1e-4  # of the largest singular value of the layer: below, nothing is drawn


@styled
def spectra_over_time_figure(run: Run, layers: int = 6, readings: int = 6) -> Figure:
    """Plot singular values ``s_i / s_1`` against ``i / n``: a panel per layer, a line per epoch.

    Args:
        run: with singular values in its spectrum records.
        layers: at most this many, evenly spaced in depth.
        readings: at most this many, evenly spaced in time.

    Raises:
        ValueError: the run kept no singular values.
    """
    names = evenly(spectrum_names(run), layers)
    if not names:
        raise ValueError(f"{run.header.schedule} has no singular values to draw")
    records = evenly([r for r in run.all(SpectrumRecord) if _kept(r)], readings)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(max(4.6, 3.1 * columns), 2.5 * rows + 0.4)
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).flat)
    colors = list(depth_colors([str(index) for index in range(len(records))]).values())
    for axes, name, shown in zip(grid, names, display_names(names, 28), strict=False):
        _panel(axes, name, records, colors)
        axes.set_title(shown)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    _label(grid, columns, len(names))
    epochs = [f"epoch {number(record.epoch)}" for record in records]
    legend_below(figure, [(line(c), at) for c, at in zip(colors, epochs, strict=True)])
    figure.suptitle(display_name(run.header.schedule), fontsize=9)
    return figure


def spectrum_names(run: Run) -> list[str]:
    """The layers whose singular values were recorded, in order."""
    records = run.all(SpectrumRecord)
    return list(dict.fromkeys(n for r in records for n, layer in r.layers.items() if layer.values))


def _kept(record: SpectrumRecord) -> bool:
    return any(layer.values for layer in record.layers.values())


def _panel(axes: Axes, name: str, records: Sequence[SpectrumRecord], colors: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter

    for record, color in zip(records, colors, strict=True):
        layer = record.layers.get(name)
        if layer is not None and _sound(layer):
            last = max(len(layer.values) - 1, 1)
            shares = [i / last for i in range(len(layer.values))]
            heights = [value / layer.values[0] or math.nan for value in layer.values]
            axes.plot(shares, heights, color=color, linewidth=1.3, **point_markers(heights))
    known = next((r.layers[name] for r in records if name in r.layers), None)
    if known is not None and known.rank < known.full_rank:
        axes.axvline(known.rank / known.full_rank, color=NEUTRAL, linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set(xlim=(0, 1), ylim=(FLOOR, 1.4))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))


def _sound(layer: LayerSpectrum) -> bool:
    values = layer.values
    return bool(values) and all(map(math.isfinite, values)) and values[0] > 0


def _label(grid: Sequence[Axes], columns: int, panels: int) -> None:
    for index, axes in enumerate(grid[:panels]):
        if index % columns == 0:
            axes.set_ylabel("sᵢ / s₁")
        if index + columns >= panels:
            axes.set_xlabel("i / n (dotted: low rank)")
            axes.tick_params(labelbottom=True)
