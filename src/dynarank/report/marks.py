"""Changes of form and phases, drawn into the axes of a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynarank.records import Run
from dynarank.report.moments import Span, moments, spans
from dynarank.report.theme import NEUTRAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FORM_COLORS",
    "MOST_LABELS",
    "Mark",
    "change_marks",
    "mark_labels",
    "mark_lines",
    "shade",
    "strip",
]

# A form has one color wherever it is drawn.
FORM_COLORS = {"full-rank": "#e69f00", "low-rank": "#0072b2", "adapted": "#009e73"}
MOST_LABELS = 6
PALE = 0.28  # the opacity of a phase in which all layers have the form
_MOST_MARKS = 60


@dataclass(frozen=True)
class Mark:
    """A change of form at ``epoch``, in the color of the one schedule it belongs to."""

    epoch: float
    label: str
    color: str


def change_marks(runs: Sequence[Run], colors: dict[str, str]) -> list[Mark]:
    """Collect the changes of form of several runs, those that coincide made one mark.

    The plan applied before the first step is where a run starts, not a change, and gets no mark.
    A run that changes more than ``MOST_LABELS`` times has its marks left without labels, and one
    that changes at more than 60 moments has none: its phases tell.
    """
    found: dict[tuple[float, str], set[str]] = {}
    for run in runs:
        changes = [moment for moment in moments(run) if moment.step > 0]
        for moment in changes if len(changes) <= _MOST_MARKS else []:
            label = moment.label if len(changes) <= MOST_LABELS else ""
            found.setdefault((moment.epoch, label), set()).add(run.header.schedule)
    return [
        Mark(epoch, label, colors[min(names)] if len(names) == 1 else NEUTRAL)
        for (epoch, label), names in sorted(found.items())
    ]


def mark_lines(axes: Axes, marks: Sequence[Mark]) -> None:
    """Draw a dashed line for each mark, fainter for those that have no label."""
    for mark in marks:
        alpha = 0.9 if mark.label else 0.45
        axes.axvline(mark.epoch, color=mark.color, linestyle="--", linewidth=1, alpha=alpha)


def mark_labels(axes: Axes, marks: Sequence[Mark], end: float, width: float) -> float:
    """Write the marks' labels above axes ``width`` inches wide that run to epoch ``end``.

    Labels are raised where they would touch. Returns the points of height they take.
    """
    placed = _levels([mark for mark in marks if mark.label], end, width)
    for mark, level in placed:
        share = mark.epoch / end
        axes.annotate(
            mark.label,
            (mark.epoch, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3 + 10 * level),
            textcoords="offset points",
            ha="left" if share < 0.08 else "right" if share > 0.94 else "center",
            fontsize=8,
            color=mark.color,
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


def shade(axes: Axes, run: Run) -> None:
    """Shade the phases behind everything else: the deeper, the more layers have the form.

    A run that is full-rank throughout has no phases to tell apart and is left white.
    """
    stretches = _thinned(spans(run))
    if all(span.full_rank == 1 for span in stretches):
        return
    for span in stretches:
        for form, share in (("full-rank", span.full_rank), ("adapted", span.adapted)):
            if share > 0:
                axes.axvspan(
                    span.start, span.end,
                    color=FORM_COLORS[form], alpha=PALE * share, linewidth=0, zorder=0,
                )  # fmt: skip


def strip(axes: Axes, rows: Sequence[tuple[Run, str]]) -> None:
    """Draw a row a run in its color: the deeper, the more of its layers are full-rank."""
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
    """Join neighbors, by their means over time, until few enough are left to draw."""
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
