"""The rank timeline: one horizontal bar per layer, colored by form and rank over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynarank.records import Run
from dynarank.report.colors import FORM_COLORS, FORM_HATCHES
from dynarank.report.layer_forms import FormSpan, layer_forms
from dynarank.report.legends import LegendEntry, form_patch, legend_below
from dynarank.report.plotting import display_name, display_names, new_figure, styled
from dynarank.report.theme import INK, NEUTRAL
from dynarank.report.thinning import evenly
from dynarank.report.transition_points import last_epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["rank_opacity", "rank_timeline_figure"]

_Box = tuple[float, float, float, float]  # left, right, low, high
MOST_PIECES = 3000  # over all bars of a run; beyond that, layers are left out at even intervals
_MOST_NAMES = 32


@styled
def rank_timeline_figure(runs: Sequence[Run], stacked: bool = False) -> Figure:
    """Draw the form and rank of each layer over time, first layer at the top.

    The color is the form; its opacity is the rank as a share of the layer's full rank. One panel
    per run.

    Args:
        runs: one per panel.
        stacked: panels one above the other, for a narrow screen.
    """
    bands = {id(run): _thinned(layer_forms(run)) for run in runs}
    tallest = max((len(layers) for layers in bands.values()), default=1)
    height = 1.0 + min(6.0, max(1.2, 0.16 * tallest))
    rows, columns = (len(runs), 1) if stacked else (1, len(runs))
    figure = new_figure(4.6 if stacked else max(9.5, 2.4 * columns), height * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    end = max((last_epoch(run) for run in runs), default=0) or 1
    for index, (axes, run) in enumerate(zip(grid.flat, runs, strict=True)):
        names = list(bands[id(run)])
        first = index == 0 or stacked or names != list(bands[id(runs[0])])
        _band_panel(axes, bands[id(run)], names_at_left=first)
        axes.set(xlim=(0, end), xlabel="epoch" if not stacked or run is runs[-1] else "")
        axes.set_title(f"{display_name(run.header.schedule)}{_left_out(run, bands[id(run)])}")
    legend_below(
        figure, _legend_entries([span for b in bands.values() for s in b.values() for span in s])
    )
    return figure


def rank_opacity(share: float | None) -> float:
    """The opacity of a bar: 0.25 at rank zero, 1 at full rank.

    Example:
        >>> rank_opacity(1.0), rank_opacity(0.0)
        (1.0, 0.25)
    """
    return 0.6 if share is None else 0.25 + 0.75 * share


def _thinned(layers: Mapping[str, list[FormSpan]]) -> dict[str, list[FormSpan]]:
    pieces = sum(len(spans) for spans in layers.values())
    if pieces <= MOST_PIECES:
        return dict(layers)
    kept = evenly(list(layers), max(1, len(layers) * MOST_PIECES // pieces))
    return {name: layers[name] for name in kept}


def _left_out(run: Run, kept: Mapping[str, list[FormSpan]]) -> str:
    total = len(layer_forms(run))
    return f": {len(kept)} of {total} layers" if len(kept) < total else ""


def _band_panel(axes: Axes, layers: Mapping[str, list[FormSpan]], names_at_left: bool) -> None:
    gap = 0.08 if len(layers) <= 60 else 0
    boxes: dict[tuple[str, float | None], list[_Box]] = {}
    for row, spans in enumerate(layers.values()):
        for span in spans:
            box = (span.start, span.end, row - 0.5 + gap, row + 0.5 - gap)
            boxes.setdefault((span.form, span.share), []).append(box)
    for (form, share), same in boxes.items():
        _boxes(axes, same, form, rank_opacity(share))
    axes.set_xlim(0, max((box[1] for same in boxes.values() for box in same), default=1))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)
    names = [(row, name) for row, name in enumerate(layers)] if names_at_left else []
    named = evenly(names, _MOST_NAMES)
    shown = display_names([name for _, name in named], 22)
    axes.set_yticks([row for row, _ in named], shown, fontsize=7)


def _boxes(axes: Axes, boxes: Sequence[_Box], form: str, opacity: float) -> None:
    """Boxes of one form and rank as a single path: a patch per box is slow with many layers."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = [
        corner
        for left, right, low, high in boxes
        for corner in ((left, low), (right, low), (right, high), (left, high), (left, low))
    ]
    codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY] * len(boxes)
    color = FORM_COLORS[form][0] if form in FORM_COLORS else NEUTRAL
    hatch = FORM_HATCHES.get(form)
    shape = PathPatch(Path(corners, codes), facecolor=color, alpha=opacity, linewidth=0)
    shape.set(hatch=hatch, edgecolor=INK)
    axes.add_patch(shape)


def _legend_entries(spans: Sequence[FormSpan]) -> list[LegendEntry]:
    """One entry for full-rank, and one each for the smallest and largest rank of other forms."""
    entries: list[LegendEntry] = []
    for form in FORM_COLORS:
        shares = sorted({s.share for s in spans if s.form == form and s.share is not None})
        if form == "full-rank" and shares:
            entries.append((form_patch(form), form))
            continue
        for share in dict.fromkeys([*shares[:1], *shares[-1:]]):
            entries.append(
                (form_patch(form, rank_opacity(share)), f"{form}, {share:.0%} of full rank")
            )
        if not shares and any(span.form == form for span in spans):
            entries.append((form_patch(form, rank_opacity(None)), form))
    if any(span.form not in FORM_COLORS for span in spans):
        entries.append((form_patch("unknown", rank_opacity(None)), "not recorded"))
    return entries
