"""Changes of form and phases, drawn into the axes of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynarank.records import Run
from dynarank.report.drawing import NEUTRAL
from dynarank.report.moments import Span, moments, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FORM_SHADES",
    "MOST_LABELS",
    "Mark",
    "change_marks",
    "full_rank_spans",
    "mark_labels",
    "mark_lines",
    "shade",
]

FORM_SHADES = {"full-rank": "#fdf0d5", "adapted": "#e0eef9"}
MOST_LABELS = 6


@dataclass(frozen=True)
class Mark:
    """A change of form at ``epoch``, in the colour of the one schedule it belongs to."""

    epoch: float
    label: str
    colour: str


def change_marks(runs: Sequence[Run], colours: dict[str, str]) -> list[Mark]:
    """Collect the changes of form of several runs, those that coincide made one mark.

    The plan applied before the first step is where a run starts, not a change, and gets no mark.
    A run that changes more than ``MOST_LABELS`` times has its marks left without labels.
    """
    found: dict[tuple[float, str], set[str]] = {}
    for run in runs:
        changes = [moment for moment in moments(run) if moment.step > 0]
        for moment in changes:
            label = moment.label if len(changes) <= MOST_LABELS else ""
            found.setdefault((moment.epoch, label), set()).add(run.header.schedule)
    return [
        Mark(epoch, label, colours[min(names)] if len(names) == 1 else NEUTRAL)
        for (epoch, label), names in sorted(found.items())
    ]


def mark_lines(axes: Axes, marks: Sequence[Mark]) -> None:
    """Draw a dashed line for each mark, fainter for those that have no label."""
    for mark in marks:
        alpha = 0.9 if mark.label else 0.45
        axes.axvline(mark.epoch, color=mark.colour, linestyle="--", linewidth=1, alpha=alpha)


def mark_labels(axes: Axes, marks: Sequence[Mark], end: float, width: float) -> float:
    """Write the marks' labels above axes ``width`` inches wide that run to epoch ``end``.

    Labels are raised where they would touch. Returns the points of height they take.
    """
    placed = _levels([mark for mark in marks if mark.label], end, width)
    for mark, level in placed:
        axes.annotate(
            mark.label,
            (mark.epoch, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3 + 10 * level),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=mark.colour,
        )
    return 10 + 10 * max(level for _, level in placed) if placed else 0


def _levels(marks: Sequence[Mark], end: float, width: float) -> list[tuple[Mark, int]]:
    """Give each mark the lowest level at which its label touches no other's."""
    free: list[float] = []
    placed: list[tuple[Mark, int]] = []
    for mark in marks:
        half = 0.5 * end * len(mark.label) * 0.065 / width  # a letter is about .065 inches wide
        left = mark.epoch - half
        level = next((i for i, right in enumerate(free) if right <= left), len(free))
        free[level:] = [mark.epoch + half, *free[level + 1 :]]
        placed.append((mark, level))
    return placed


def shade(axes: Axes, stretches: Sequence[Span], colours: dict[str, str], alpha: float = 1) -> None:
    """Fill the stretches whose form has a colour, behind everything else."""
    for stretch in stretches:
        if stretch.form in colours:
            axes.axvspan(
                stretch.start,
                stretch.end,
                color=colours[stretch.form],
                alpha=alpha,
                linewidth=0,
                zorder=0,
            )


def full_rank_spans(runs: Sequence[Run]) -> list[Span]:
    """List the distinct full-rank stretches of runs that are not full-rank throughout."""
    found = [
        span
        for run in runs
        if len(stretches := spans(run)) > 1
        for span in stretches
        if span.form == "full-rank"
    ]
    return sorted(set(found), key=lambda span: (span.start, span.end))
