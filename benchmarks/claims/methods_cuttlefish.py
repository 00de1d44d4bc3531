"""Cuttlefish: the thresholds that the schedule has."""

from __future__ import annotations

from collections.abc import Iterator

from dynarank.schedules import cuttlefish

PAGE = "docs/methods/cuttlefish.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the thresholds that the schedule has."""
    schedule = cuttlefish()
    of_last_two, of_last = (schedule.threshold * factor for factor in schedule.relaxed)
    yield f"value of the last {schedule.recent} slopes is at most {schedule.threshold}"
    yield f"For the last two layers the threshold is {of_last_two}, for the last one {of_last}."
    yield f"The threshold is absolute, {schedule.threshold} per epoch"
    yield f"It needs {schedule.window + 2} readings"
