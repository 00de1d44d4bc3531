"""Annotations of a figure's axes: markers of transition points, shading of phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dynarank.records import Run
from dynarank.report.colors import FORM_COLORS, FORM_HATCHES
from dynarank.report.theme import INK, NEUTRAL
from dynarank.report.transition_points import Span, spans, transition_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "MOST_LABELS",
    "ChangeMarker",
    "change_markers",
    "draw_markers",
    "draw_phase_strips",
    "label_markers",
    "shade_phases",
]

MOST_LABELS = 6
PALE = 0.28  # the opacity of a phase in which all layers have the form
_MOST_MARKERS = 60


@dataclass(frozen=True)
class ChangeMarker:
    """A vertical line where layers change form, in the color of its schedule."""

    epoch: float
    label: str
    color: str


def change_markers(runs: Sequence[Run], colors: Mapping[str, str]) -> list[ChangeMarker]:
    """Collect the transition points of several runs; those that coincide become one marker.

    The plan applied before the first step is where a run starts, not a change, and gets no marker.
    A run with more than ``MOST_LABELS`` transition points gets markers without labels, and one
    with more than 60 gets none: its shaded phases show the same.
    """
    found: dict[tuple[float, str], set[str]] = {}
    for run in runs:
        changes = [point for point in transition_points(run) if point.step > 0]
        for point in changes if len(changes) <= _MOST_MARKERS else []:
            label = point.label if len(changes) <= MOST_LABELS else ""
            found.setdefault((point.epoch, label), set()).add(run.header.schedule)
    return [
        ChangeMarker(epoch, label, colors[min(names)] if len(names) == 1 else NEUTRAL)
        for (epoch, label), names in sorted(found.items())
    ]


def draw_markers(axes: Axes, markers: Sequence[ChangeMarker]) -> None:
    """Draw a dashed line for each marker, fainter for those that have no label."""
    for marker in markers:
        alpha = 0.9 if marker.label else 0.45
        axes.axvline(marker.epoch, color=marker.color, linestyle="--", linewidth=1, alpha=alpha)


def label_markers(axes: Axes, markers: Sequence[ChangeMarker], end: float, width: float) -> float:
    """Write the markers' labels above axes ``width`` inches wide that run to epoch ``end``.

    Labels are raised where they would touch. Returns the points of height they take.
    """
    placed = _levels([marker for marker in markers if marker.label], end, width)
    for marker, level in placed:
        axes.annotate(
            marker.label,
            (marker.epoch, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3 + 10 * level),
            textcoords="offset points",
            ha=_side(marker, end),
            fontsize=8,
            color=marker.color,
        )
    return 10 + 10 * max(level for _, level in placed) if placed else 0


def _side(marker: ChangeMarker, end: float) -> Literal["left", "center", "right"]:
    """How a label lies on its marker, so that it stays within the axes."""
    share = marker.epoch / end
    return "left" if share < 0.08 else "right" if share > 0.94 else "center"


def _levels(
    markers: Sequence[ChangeMarker], end: float, width: float
) -> list[tuple[ChangeMarker, int]]:
    """Give each marker the lowest level at which its label touches no other's."""
    free: list[float] = []
    placed: list[tuple[ChangeMarker, int]] = []
    for marker in markers:
        half = 0.5 * end * len(marker.label) * 0.065 / width  # a letter is about .065 inches wide
        shift = {"left": half, "center": 0, "right": -half}[_side(marker, end)]
        left = marker.epoch + shift - half
        level = next((i for i, right in enumerate(free) if right <= left), len(free))
        free[level:] = [left + 2 * half, *free[level + 1 :]]
        placed.append((marker, level))
    return placed


def shade_phases(axes: Axes, run: Run) -> None:
    """Shade the phases behind everything else: the darker, the more layers have the form.

    A run of one phase is left white: there is no other to mark it off from.
    """
    stretches = _thinned(spans(run))
    if len(stretches) < 2:
        return
    for span in stretches:
        for form, share in (("full-rank", span.full_rank), ("adapted", span.adapted)):
            if share > 0:
                axes.axvspan(
                    span.start, span.end,
                    facecolor=FORM_COLORS[form][0], alpha=PALE * share, linewidth=0, zorder=0,
                    hatch=FORM_HATCHES.get(form), edgecolor=INK,
                )  # fmt: skip


def draw_phase_strips(axes: Axes, rows: Sequence[tuple[Run, str]]) -> None:
    """Draw one row per run in its color: the darker, the more of its layers are full-rank."""
    for row, (run, color) in enumerate(rows):
        for span in _thinned(spans(run)):
            axes.broken_barh(
                [(span.start, span.end - span.start)], (row - 0.38, 0.76),
                color=color, alpha=0.12 + 0.88 * span.full_rank, linewidth=0,
            )  # fmt: skip
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelbottom=False)


def _thinned(stretches: Sequence[Span], most: int = 200) -> list[Span]:
    """Merge adjacent spans, averaged over time, until few enough are left to draw."""
    if len(stretches) <= most:
        return list(stretches)
    size = -(-len(stretches) // most)
    groups = [stretches[i : i + size] for i in range(0, len(stretches), size)]
    return [_mean(group) for group in groups]


def _mean(group: Sequence[Span]) -> Span:
    length = sum(span.end - span.start for span in group)
    full, adapted = (
        sum((span.end - span.start) * share for span, share in zip(group, shares, strict=True))
        / length
        for shares in ([s.full_rank for s in group], [s.adapted for s in group])
    )
    return Span(group[0].start, group[-1].end, full, adapted)
