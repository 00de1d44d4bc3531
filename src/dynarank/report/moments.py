"""What happened when in a run: changes of form grouped by moment, and the spans between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynarank.records import ChangeRecord, EpochRecord, PhaseRecord, Run, SpectrumRecord

__all__ = [
    "Moment",
    "Span",
    "by_schedule",
    "change_kind",
    "first_of_each",
    "last_epoch",
    "moments",
    "spans",
]


@dataclass(frozen=True)
class Moment:
    """All the changes of form of one step."""

    epoch: float
    step: int
    changes: tuple[ChangeRecord, ...]

    @property
    def label(self) -> str:
        """``inflate``, ``deflate``; ``deflate + inflate`` where layers take turns."""
        return " + ".join(sorted({change_kind(change) for change in self.changes}))


@dataclass(frozen=True)
class Span:
    """A stretch of training with one prevailing form."""

    start: float
    end: float
    form: str


def change_kind(change: ChangeRecord) -> str:
    """Name a change of form: inflate, deflate, restart (of an adaptor), adapt or resize."""
    before, after = change.before.get("form"), change.after.get("form")
    if before == after:
        return "restart" if change.before == change.after else "resize"
    if after == "full-rank":
        return "inflate"
    return "adapt" if (before, after) == ("low-rank", "adapted") else "deflate"


def moments(run: Run) -> list[Moment]:
    """Group the run's changes of form, one moment a step, in order."""
    grouped: dict[int, list[ChangeRecord]] = {}
    for change in run.all(ChangeRecord):
        grouped.setdefault(change.step, []).append(change)
    return [Moment(at[0].epoch, step, tuple(at)) for step, at in sorted(grouped.items())]


def last_epoch(run: Run) -> float:
    """Find the latest epoch the run recorded anything at."""
    timed = (*run.all(EpochRecord), *run.all(SpectrumRecord), *run.all(PhaseRecord))
    return max((record.epoch for record in timed), default=0.0)


def spans(run: Run) -> list[Span]:
    """List the run's phases, neighbours with the same prevailing form made one."""
    phases = [phase for phase in run.all(PhaseRecord) if phase.forms]
    ends = [*(phase.epoch for phase in phases[1:]), last_epoch(run)]
    found: list[Span] = []
    for phase, end in zip(phases, ends, strict=False):
        form, start = _prevailing(phase.forms), phase.epoch
        if found and found[-1].form == form:
            start = found.pop().start
        found.append(Span(start, end, form))
    return [span for span in found if span.end > span.start]


def _prevailing(forms: Mapping[str, int]) -> str:
    """Name the form most layers have, of those that are not full-rank if there are any.

    Some layers (the last, say) stay full-rank under most schedules: they do not make a phase so.
    """
    reduced = {form: amount for form, amount in forms.items() if form != "full-rank"}
    return max(reduced or forms, key=lambda form: forms[form])


def by_schedule(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by schedule, schedules in order of first appearance."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.header.schedule, []).append(run)
    return grouped


def first_of_each(runs: Sequence[Run]) -> list[Run]:
    """Choose one run for each schedule: the first."""
    return [group[0] for group in by_schedule(runs).values()]
