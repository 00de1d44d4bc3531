"""Legends of figures: lines, patches, and the block of them below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dynarank.records import Run
from dynarank.report.drawing import depth_colormap, shown
from dynarank.report.marks import FORM_COLORS, PALE
from dynarank.report.moments import spans

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Key", "counted", "depth_bar", "legend_below", "line", "patch", "phase_keys"]

Key = tuple["Artist", str]


def line(color: str, style: Literal["-", ":", "--"] = "-") -> Artist:
    """A line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=style, linewidth=1.8)


def patch(color: str, alpha: float = 1) -> Artist:
    """A filled box for a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=color, alpha=alpha)


def counted(name: str, runs: Sequence[Run]) -> str:
    """A schedule's name, with the number of its runs if it has several."""
    return shown(name) if len(runs) == 1 else f"{shown(name)} ({len(runs)} runs)"


def phase_keys(runs: Sequence[Run]) -> list[Key]:
    """The shades that the runs' phases have."""
    stretches = [span for run in runs if len(spans(run)) > 1 for span in spans(run)]
    keys: list[Key] = []
    if any(span.full_rank for span in stretches):
        keys.append((patch(FORM_COLORS["full-rank"], PALE), "share of layers full-rank"))
    if any(span.adapted for span in stretches):
        keys.append((patch(FORM_COLORS["adapted"], PALE), "share of layers adapted"))
    return keys


def legend_below(figure: Figure, keys: Sequence[Key]) -> None:
    """Lay the keys out below the figure, in as many columns as its width has room for."""
    if not keys:
        return
    handles, labels = zip(*keys, strict=True)
    widest = max(len(label) for label in labels) * 0.068 + 0.55  # inches
    fitting = max(1, int(figure.get_figwidth() / widest))
    rows = math.ceil(len(keys) / fitting)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(keys) / rows))


def depth_bar(figure: Figure, panels: Sequence[Axes], layers: int, above: bool = False) -> None:
    """Beside the panels, or above them, say which color is which depth."""
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
