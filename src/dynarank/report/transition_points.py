"""The transition points of a run, and the phases between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynarank.records import (
    ChangeRecord,
    EpochRecord,
    PhaseRecord,
    Run,
    SpectrumRecord,
    StepRecord,
)
from dynarank.report.formats import number

__all__ = [
    "Span",
    "TransitionPoint",
    "change_kind",
    "last_epoch",
    "reached_text",
    "spans",
    "transition_points",
]


@dataclass(frozen=True)
class TransitionPoint:
    """A step at which layers change form, and the changes."""

    epoch: float
    step: int
    changes: tuple[ChangeRecord, ...]

    @property
    def label(self) -> str:
        """``inflate``, ``deflate``, or ``deflate + inflate`` where both happen at once."""
        return " + ".join(sorted({change_kind(change) for change in self.changes}))


@dataclass(frozen=True)
class Span:
    """A stretch of training, and the shares of its scheduled layers at full rank and adapted."""

    start: float
    end: float
    full_rank: float
    adapted: float


def change_kind(change: ChangeRecord) -> str:
    """Classify a change of form: inflate, deflate, restart (of an adapter), adapt or resize."""
    before, after = change.before.get("form"), change.after.get("form")
    if before == after:
        same = {**change.before, "restart": 0} == {**change.after, "restart": 0}
        return "restart" if same else "resize"
    if after == "full-rank":
        return "inflate"
    return "adapt" if (before, after) == ("low-rank", "adapted") else "deflate"


def transition_points(run: Run) -> list[TransitionPoint]:
    """List the run's transition points in order: its changes of form grouped by step."""
    grouped: dict[int, list[ChangeRecord]] = {}
    for change in run.all(ChangeRecord):
        grouped.setdefault(change.step, []).append(change)
    return [TransitionPoint(at[0].epoch, step, tuple(at)) for step, at in sorted(grouped.items())]


def last_epoch(run: Run) -> float:
    """The last epoch for which the run recorded anything."""
    kinds = (EpochRecord, SpectrumRecord, PhaseRecord, StepRecord)
    return max((record.epoch for kind in kinds for record in run.all(kind)), default=0.0)


def reached_text(run: Run) -> str:
    """How far a run came: ``epoch 6 of 12``; an own loop may not say how many there are."""
    of = f" of {run.header.epochs}" if run.header.epochs else ""
    return f"epoch {number(last_epoch(run))}{of}"


def spans(run: Run) -> list[Span]:
    """List the run's phases; adjacent ones with the same shares of forms are merged."""
    phases = [phase for phase in run.all(PhaseRecord) if sum(phase.forms.values())]
    fixed = _unscheduled(run, phases)
    ends = [*(phase.epoch for phase in phases[1:]), last_epoch(run)]
    found: list[Span] = []
    for phase, end in zip(phases, ends, strict=False):
        total, start = max(sum(phase.forms.values()) - fixed, 1), phase.epoch
        full, adapted = phase.forms.get("full-rank", 0) - fixed, phase.forms.get("adapted", 0)
        shares = full / total, adapted / total
        if found and (found[-1].full_rank, found[-1].adapted) == shares:
            start = found.pop().start
        found.append(Span(start, end, *shares))
    return [span for span in found if span.end > span.start]


def _unscheduled(run: Run, phases: Sequence[PhaseRecord]) -> int:
    """The number of layers that keep their weight: neither monitored nor ever changed."""
    known = {name for record in run.all(SpectrumRecord) for name in record.layers}
    known |= {change.path for change in run.all(ChangeRecord)}
    full = min((phase.forms.get("full-rank", 0) for phase in phases), default=0)
    total = sum(phases[0].forms.values()) if phases else 0
    return max(min(total - len(known), full), 0) if known else 0
