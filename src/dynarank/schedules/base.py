"""A rank schedule is a function ``(clock, readings) -> plan``: it knows time, never a model.

Because a plan says what should be, not what to do, a schedule needs no memory of what it asked
before, and resuming a run is asking again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from dynarank.forms import Plan

__all__ = ["Clock", "Phase", "RankSchedule", "Readings", "timeline"]

# Plans are compared at this many moments of a run, and a change between two of them is then found
# to the step: a phase shorter than a 4096th of the run could be missed.
_MOMENTS = 4096


@dataclass(frozen=True)
class Clock:
    """A moment of a run: ``step`` optimizer steps are done, of ``total_steps``."""

    step: int
    total_steps: int

    @property
    def progress(self) -> float:
        """Step / total_steps."""
        return self.step / self.total_steps


@dataclass(frozen=True)
class Readings:
    """What a schedule may look at.

    Args:
        layers: the weight's shape (out, in, *kernel) of each layer under the schedule.
        learning_rate: that of the optimizer's first group; None with no optimizer or several.
    """

    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    learning_rate: float | None = None


class RankSchedule(Protocol):
    """The plan for a moment: any function of this signature is a schedule.

    Example:
        >>> from dynarank.forms import FullRank, LowRank
        >>> def warm(clock, readings):
        ...     form = FullRank() if clock.progress < 0.2 else LowRank(0.25)
        ...     return {path: form for path in readings.layers}
    """

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """The form of each layer at this moment."""
        ...


@dataclass(frozen=True)
class Phase:
    """The steps ``start <= step < stop`` during which one plan holds."""

    start: int
    stop: int
    plan: Plan

    @property
    def steps(self) -> int:
        """How many steps the phase lasts."""
        return self.stop - self.start


def timeline(schedule: RankSchedule, readings: Readings, total_steps: int) -> list[Phase]:
    """The phases a schedule will go through if the readings stay as they are.

    Example:
        >>> from dynarank.schedules import dynamic_rank
        >>> schedule = dynamic_rank(0.5, inflate=0.4, deflate=0.8)
        >>> [p.start for p in timeline(schedule, Readings({"a": (8, 8)}), 100)]
        [0, 40, 80]
    """
    if not isinstance(total_steps, int) or total_steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"total_steps is a whole number of at least 1, got {total_steps!r}")

    def plan(step: int) -> Plan:
        return dict(schedule(Clock(step, total_steps), readings))

    starts = [0, *_changes(plan, total_steps)]
    stops = [*starts[1:], total_steps]
    return [Phase(start, stop, plan(start)) for start, stop in zip(starts, stops, strict=True)]


def _changes(plan: _PlanAt, total_steps: int) -> Iterator[int]:
    """The first step of each new plan."""
    stride = max(1, total_steps // _MOMENTS)
    moments = sorted({*range(0, total_steps, stride), total_steps - 1})
    for low, high in pairwise(moments):
        while plan(low) != plan(high):
            first = _first_difference(plan, low, high)
            yield first
            low = first


def _first_difference(plan: _PlanAt, low: int, high: int) -> int:
    before = plan(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan(middle) == before else (low, middle)
    return high


class _PlanAt(Protocol):
    def __call__(self, step: int, /) -> Plan: ...
