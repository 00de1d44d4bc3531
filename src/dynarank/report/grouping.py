"""Grouping runs by schedule, and checking that runs can share a report."""

from __future__ import annotations

from collections.abc import Sequence

from dynarank.files.printable import printable
from dynarank.records import EpochRecord, Run, StepRecord

__all__ = [
    "by_schedule",
    "comparable",
    "final_scores",
    "first_of_each",
    "has_scores",
    "last_losses",
    "run_name",
]


def comparable(runs: Sequence[Run]) -> list[Run]:
    """Check that runs can share a figure, and prefix schedules with their recipe if it varies.

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
    shown = [_shown(run) for run in runs]
    if len({run.header.recipe for run in shown}) == 1:
        return shown
    return [_with(run, schedule=f"{run.header.recipe}: {run.header.schedule}") for run in shown]


def _shown(run: Run) -> Run:
    """The run with names that can be shown: one line without control characters, not endless."""
    header = run.header
    names = ("recipe", "schedule", "device", "hardware", "precision", "started")
    update: dict[str, object] = {name: printable(getattr(header, name)) for name in names}
    update["metric"] = header.metric.model_copy(update={"name": printable(header.metric.name, 60)})
    return _with(run, **update)


def _with(run: Run, **update: object) -> Run:
    header = run.header.model_copy(update=update)
    return Run(run.folder, run.config, [header, *run.records[1:]], run.damage, run.notes)


def by_schedule(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by schedule, schedules in order of first appearance."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.header.schedule, []).append(run)
    return grouped


def first_of_each(runs: Sequence[Run]) -> list[Run]:
    """Choose one run for each schedule: the first."""
    return [group[0] for group in by_schedule(runs).values()]


def run_name(run: Run) -> str:
    """A run's schedule, and its seed if it has one: ``low-rank (seed 0)``."""
    header = run.header
    return header.schedule if header.seed is None else f"{header.schedule} (seed {header.seed})"


def final_scores(runs: Sequence[Run]) -> list[float]:
    """The test scores of the finished runs, without those of runs that recorded none."""
    ends = [run.summary for run in runs if run.summary is not None]
    return [end.test_score for end in ends if end.test_score is not None]


def has_scores(runs: Sequence[Run]) -> bool:
    """Tell whether any run recorded a test score, at its end or on the way."""
    epochs = (epoch for run in runs for epoch in run.all(EpochRecord))
    return bool(final_scores(runs)) or any(epoch.test_score is not None for epoch in epochs)


def last_losses(run: Run) -> tuple[float | None, float | None]:
    """The last test loss and the last training loss of a run; None where none was recorded."""
    epochs, steps = run.all(EpochRecord), run.all(StepRecord)
    tested = [epoch.test_loss for epoch in epochs if epoch.test_loss is not None]
    trained = [each.train_loss for each in (*steps, *epochs) if each.train_loss is not None]
    return tested[-1] if tested else None, trained[-1] if trained else None
