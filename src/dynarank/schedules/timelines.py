"""The phases of a schedule, computed before the run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

from dynarank.forms import Request
from dynarank.schedules.base import Clock, RankSchedule, Readings, Schedule, as_schedule, ask
from dynarank.schedules.budget_error import BudgetError
from dynarank.schedules.options import check_count

__all__ = ["Phase", "timeline"]

# Plans are compared at this many steps of a run, and the exact step of a change is then bisected: a
# phase shorter than 1/4096 of the run could be missed.
_SAMPLES = 4096


@dataclass(frozen=True)
class Phase:
    """The steps ``start <= step < stop`` during which one plan of forms and budgets holds."""

    start: int
    stop: int
    plan: Request

    @property
    def steps(self) -> int:
        """The number of steps of the phase."""
        return self.stop - self.start


@contextmanager
def from_step(phase: Phase) -> Generator[None]:
    """Errors in this block say from which step on they hold."""
    try:
        yield
    except ValueError as error:
        kind = BudgetError if isinstance(error, BudgetError) else ValueError
        raise kind(f"from step {phase.start}, {error}") from None


def timeline(schedule: Schedule, readings: Readings, total_steps: int) -> list[Phase]:
    """The phases of a schedule over a run, assuming that the readings do not change.

    With a forecast of the learning rate, the schedule sees the forecast rate at each step. No
    spectra are available in advance, so a schedule that depends on them makes no changes.

    Raises:
        ValueError: something that is not a schedule, an answer that is not a plan, or no steps.

    Example:
        >>> from dynarank.schedules import dynamic_rank
        >>> schedule = dynamic_rank(0.5, inflate=0.4, deflate=0.8)
        >>> [p.start for p in timeline(schedule, Readings({"a": (8, 8)}), 100)]
        [0, 40, 80]
    """
    total_steps, schedule = check_count("total_steps", total_steps), as_schedule(schedule)
    find = _stateful_plans if schedule.stateful else _plans
    plans = dict(find(schedule, readings, total_steps))
    stops = [*list(plans)[1:], total_steps]
    return [Phase(at, stop, plan) for (at, plan), stop in zip(plans.items(), stops, strict=True)]


def _plans(
    schedule: RankSchedule, readings: Readings, total_steps: int
) -> Iterator[tuple[int, Request]]:
    """The first step of each plan, found by bisection."""

    def plan(step: int) -> Request:
        clock = Clock(step, total_steps)
        return dict(ask(schedule, {}, clock, _seen_at(readings, clock)).plan)

    yield 0, plan(0)
    stride = max(1, total_steps // _SAMPLES)
    samples = sorted({*range(0, total_steps, stride), total_steps - 1})
    for low, high in pairwise(samples):
        while plan(low) != plan(high):
            low = _first_difference(plan, low, high)
            yield low, plan(low)


def _stateful_plans(
    schedule: RankSchedule, readings: Readings, total_steps: int
) -> Iterator[tuple[int, Request]]:
    """The first step of each plan, step by step, since the state depends on all earlier steps."""
    state, last = schedule.start(), None
    for step in range(total_steps):
        clock = Clock(step, total_steps)
        plan, state, _ = ask(schedule, state, clock, _seen_at(readings, clock))
        if plan != last:
            last = dict(plan)
            yield step, last


def _seen_at(readings: Readings, clock: Clock) -> Readings:
    """The readings with the learning rate that is forecast for the step."""
    if not (rates := readings.forecast):
        return readings
    # Rounded up: a forecast of at least as many points as steps then gives each step its own rate.
    at = -(-clock.step * (len(rates) - 1) // clock.total_steps)
    return replace(readings, learning_rate=rates[at])


def _first_difference(plan: Callable[[int], Request], low: int, high: int) -> int:
    before = plan(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan(middle) == before else (low, middle)
    return high
