"""Legends: line and patch handles, the legend below a figure, the depth color bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from dynarank.records import Run
from dynarank.report.annotations import PALE
from dynarank.report.colors import FORM_COLORS, FORM_HATCHES
from dynarank.report.plotting import depth_colormap, display_names
from dynarank.report.theme import INK, NEUTRAL
from dynarank.report.transition_points import spans

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LegendEntry",
    "depth_bar",
    "form_patch",
    "labels_with_counts",
    "legend_below",
    "line",
    "phase_entries",
]

LegendEntry = tuple["Artist", str]


def line(color: str, style: Literal["-", ":", "--"] = "-", width: float = 1.8) -> Artist:
    """A line handle for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=style, linewidth=width)


def form_patch(form: str, alpha: float = 1) -> Artist:
    """A filled-box handle for a legend, as a form is drawn; an unknown form is neutral."""
    from matplotlib.patches import Patch

    color = FORM_COLORS[form][0] if form in FORM_COLORS else NEUTRAL
    hatch = FORM_HATCHES.get(form)
    return Patch(facecolor=color, edgecolor=INK, alpha=alpha, hatch=hatch, linewidth=0)


def labels_with_counts(grouped: Mapping[str, Sequence[Run]]) -> list[str]:
    """The schedules' names, each followed by its number of runs if it has several."""
    shown = zip(display_names(list(grouped)), grouped.values(), strict=True)
    return [name if len(runs) == 1 else f"{name} ({len(runs)} runs)" for name, runs in shown]


def phase_entries(runs: Sequence[Run]) -> list[LegendEntry]:
    """Legend entries for the shading of the runs' phases."""
    stretches = [span for run in runs if len(spans(run)) > 1 for span in spans(run)]
    entries: list[LegendEntry] = []
    if any(span.full_rank for span in stretches):
        entries.append((form_patch("full-rank", PALE), "share of layers full-rank"))
    if any(span.adapted for span in stretches):
        entries.append((form_patch("adapted", PALE), "share of layers adapted"))
    return entries


def legend_below(figure: Figure, entries: Sequence[LegendEntry]) -> None:
    """Place the legend below the figure, in as many columns as fit; further rows add height."""
    if not entries:
        return
    handles, labels = zip(*entries, strict=True)
    widest = max(len(label) for label in labels) * 0.068 + 0.55  # inches
    fitting = max(1, int(figure.get_figwidth() / widest))
    rows = math.ceil(len(entries) / fitting)
    figure.set_figheight(figure.get_figheight() + 0.18 * (rows - 1))  # not taken from the axes
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(entries) / rows))


def depth_bar(figure: Figure, panels: Sequence[Axes], layers: int, above: bool = False) -> None:
    """Add a color bar of layer depth beside the panels, or above them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mapped = ScalarMappable(Normalize(1, layers), depth_colormap())
    bar = figure.colorbar(
        mapped, ax=panels, pad=0.015, aspect=40, location="top" if above else "right"
    )
    bar.set_label(f"depth: layer 1 (first) to {layers} (last)")
    bar.set_ticks(
        [1, layers] if layers < 8 else [1, layers // 4, layers // 2, 3 * layers // 4, layers]
    )
    bar.outline.set_visible(False)  # type: ignore[operator]
