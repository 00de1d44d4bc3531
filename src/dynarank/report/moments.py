"""What happened when in a run: changes of form grouped by moment, and the spans between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynarank.records import ChangeRecord, EpochRecord, PhaseRecord, Run, SpectrumRecord

__all__ = [
    "Span",
    "When",
    "by_schedule",
    "change_kind",
    "comparable",
    "first_of_each",
    "last_epoch",
    "moments",
    "spans",
]


@dataclass(frozen=True)
class When:
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
    """A stretch of training, and the shares of the layers that are full-rank and adapted in it."""

    start: float
    end: float
    full_rank: float
    adapted: float


def change_kind(change: ChangeRecord) -> str:
    """Name a change of form: inflate, deflate, restart (of an adapter), adapt or resize."""
    before, after = change.before.get("form"), change.after.get("form")
    if before == after:
        return "restart" if change.before == change.after else "resize"
    if after == "full-rank":
        return "inflate"
    return "adapt" if (before, after) == ("low-rank", "adapted") else "deflate"


def moments(run: Run) -> list[When]:
    """Group the run's changes of form, one moment a step, in order."""
    grouped: dict[int, list[ChangeRecord]] = {}
    for change in run.all(ChangeRecord):
        grouped.setdefault(change.step, []).append(change)
    return [When(at[0].epoch, step, tuple(at)) for step, at in sorted(grouped.items())]


def last_epoch(run: Run) -> float:
    """Find the latest epoch the run recorded anything at."""
    timed = (*run.all(EpochRecord), *run.all(SpectrumRecord), *run.all(PhaseRecord))
    return max((record.epoch for record in timed), default=0.0)


def spans(run: Run) -> list[Span]:
    """List the run's phases, neighbors with the same shares of forms made one."""
    phases = [phase for phase in run.all(PhaseRecord) if sum(phase.forms.values())]
    ends = [*(phase.epoch for phase in phases[1:]), last_epoch(run)]
    found: list[Span] = []
    for phase, end in zip(phases, ends, strict=False):
        total, start = sum(phase.forms.values()), phase.epoch
        shares = (phase.forms.get("full-rank", 0) / total, phase.forms.get("adapted", 0) / total)
        if found and (found[-1].full_rank, found[-1].adapted) == shares:
            start = found.pop().start
        found.append(Span(start, end, *shares))
    return [span for span in found if span.end > span.start]


def comparable(runs: Sequence[Run]) -> list[Run]:
    """Runs that may share a figure: schedules of several recipes are told apart by their names.

    Raises:
        ValueError: there is no run, or the runs are judged by different metrics.
    """
    if not runs:
        raise ValueError("a report needs at least one run, got none")
    metrics = list(dict.fromkeys(run.header.metric.name for run in runs))
    if len(metrics) > 1:
        raise ValueError(
            f"runs judged by different metrics ({', '.join(metrics)}) cannot share a report; "
            "give the folder of one recipe"
        )
    if len({run.header.recipe for run in runs}) == 1:
        return list(runs)
    return [_renamed(run, f"{run.header.recipe}: {run.header.schedule}") for run in runs]


def _renamed(run: Run, schedule: str) -> Run:
    header = run.header.model_copy(update={"schedule": schedule})
    return Run(run.folder, run.config, [header, *run.records[1:]])


def by_schedule(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by schedule, schedules in order of first appearance."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.header.schedule, []).append(run)
    return grouped


def first_of_each(runs: Sequence[Run]) -> list[Run]:
    """Choose one run for each schedule: the first."""
    return [group[0] for group in by_schedule(runs).values()]
