"""Rank metrics over time: lambda and effective rank of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dynarank.records import LayerSpectrum, Run, SpectrumRecord
from dynarank.report.annotations import change_markers, draw_markers, label_markers, shade_phases
from dynarank.report.legends import LegendEntry, depth_bar, legend_below, line, phase_entries
from dynarank.report.plotting import (
    depth_colors,
    display_name,
    display_names,
    new_figure,
    point_markers,
    styled,
)
from dynarank.report.theme import INK
from dynarank.report.thinning import evenly
from dynarank.report.transition_points import last_epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FEW_LAYERS", "MOST_LAYERS", "rank_metrics_figure", "watched_names"]

FEW_LAYERS = 4
MOST_LAYERS = 60
_MOST_READINGS = 120
_Value = Callable[[LayerSpectrum], float]
_MEASURES: tuple[tuple[str, _Value], ...] = (
    ("λ: share of Σ s within\nthe layer's low rank", lambda layer: layer.spectral_ratio),
    ("effective rank / full rank", lambda layer: layer.effective_rank / layer.full_rank),
)


@styled
def rank_metrics_figure(runs: Sequence[Run], stacked: bool = False) -> Figure:
    """Plot lambda and effective rank of each layer over time: one row per metric, a column per run.

    The effective rank is divided by the layer's full rank, so that layers share an axis. Up to
    four layers are named in a legend; more are colored by depth, with the median of all of them
    in black. At most 60 layers and 120 readings are drawn, evenly spaced.

    Args:
        runs: one per column.
        stacked: all panels one above the other, for a narrow screen.
    """
    width, height = (4.6, 2.3 * 2 * len(runs)) if stacked else (max(9.5, 2.4 * len(runs)), 5.6)
    figure = new_figure(width, height + 1.1 * stacked)
    shape = (2 * len(runs), 1) if stacked else (2, len(runs))
    grid = figure.subplots(*shape, sharex=True, squeeze=False)
    panels = [
        tuple(grid[2 * i : 2 * i + 2, 0] if stacked else grid[:, i]) for i in range(len(runs))
    ]
    names = watched_names(runs)
    _share_heights(panels)
    for (top, bottom), run in zip(panels, runs, strict=True):
        for axes, (label, value) in zip((top, bottom), _MEASURES, strict=True):
            _layer_lines(axes, run, names, value)
            if stacked or run is runs[0]:
                axes.set_ylabel(label)
    _dress(panels, runs, stacked)
    legend_below(figure, [*_layer_entries(names), *phase_entries(runs)])
    if len(names) > FEW_LAYERS:
        depth_bar(figure, [axes for column in panels for axes in column], len(names), stacked)
    return figure


def watched_names(runs: Sequence[Run]) -> list[str]:
    """List the monitored layers of all runs, in order of depth."""
    records = [record for run in runs for record in run.all(SpectrumRecord)]
    return list(dict.fromkeys(name for record in records for name in record.layers))


def _share_heights(panels: Sequence[tuple[Axes, ...]]) -> None:
    """Share the y axis of each metric across runs."""
    for column in panels[1:]:
        for axes, first in zip(column, panels[0], strict=True):
            axes.sharey(first)


def _layer_lines(axes: Axes, run: Run, names: Sequence[str], value: _Value) -> None:
    """Draw one line per layer; if there are many, also their median."""
    records = evenly(run.all(SpectrumRecord), _MOST_READINGS)
    epochs = [record.epoch for record in records]
    many, colors = len(names) > FEW_LAYERS, depth_colors(names)
    drawn = evenly(names, MOST_LAYERS)
    for name in drawn:
        layers = [record.layers.get(name) for record in records]
        values = [math.nan if layer is None else _finite(value(layer)) for layer in layers]
        axes.plot(
            epochs,
            values,
            color=colors[name],
            linewidth=max(0.6, 1.4 - len(drawn) / 60) if many else 1.6,
            alpha=0.75 if many else 1,
            **point_markers(values, few=0 if many else 12),
        )
    if many and records:
        medians = [_median([value(layer) for layer in r.layers.values()]) for r in records]
        axes.plot(epochs, medians, color=INK, linewidth=1.8, **point_markers(medians, few=0))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _median(values: Sequence[float]) -> float:
    """Find the upper median of the finite values."""
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else math.nan


def _dress(panels: Sequence[tuple[Axes, ...]], runs: Sequence[Run], stacked: bool) -> None:
    """Draw phases, markers and titles; titles are aligned above the markers' labels."""
    end = max(last_epoch(run) for run in runs) or 1
    rise, width = 0.0, 3.8 if stacked else max(8.5 / len(runs), 2)
    for (upper, lower), run in zip(panels, runs, strict=True):
        markers = change_markers([run], {run.header.schedule: INK})
        for axes in (upper, lower):
            shade_phases(axes, run)
            draw_markers(axes, markers)
        lower.set(xlim=(0, 1.01 * end), xlabel="epoch")
        rise = max(rise, label_markers(upper, markers, end, width))
    for (upper, _), run in zip(panels, runs, strict=True):
        upper.set_title(display_name(run.header.schedule), pad=6 + rise)


def _layer_entries(names: Sequence[str]) -> list[LegendEntry]:
    if len(names) > FEW_LAYERS:
        drawn = f", {MOST_LAYERS} drawn" if len(names) > MOST_LAYERS else ""
        return [(line(INK), f"median of {len(names)} layers{drawn}")]
    colors = depth_colors(names).values()
    return [(line(c), name) for c, name in zip(colors, display_names(names), strict=True)]
