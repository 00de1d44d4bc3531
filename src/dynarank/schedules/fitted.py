"""Schedules fitted to a budget for one model and run, as ``dynarank.fit_schedule`` returns them.

The forecast of the learning rate may improve during a run, and the length of the full-rank phase
depends on it. So a fitted schedule stores what was measured, the cost of a step in each phase, and
recomputes the transition points as a pure function of the forecast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dynarank.schedules.base import Answer, Clock, RankSchedule, Readings, State, step_of, take_over
from dynarank.schedules.lr_aligned import DynamicRank, decisive_decay, full_rank_window

__all__ = ["FittedCost", "FittedMemory", "FittedTime"]

TOLERANCE = 0.01  # a budget is met within 1% of it


@dataclass(frozen=True)
class FittedCost(RankSchedule):
    """Dynamic rank with the longest full-rank phase that a budget of FLOPs or seconds allows.

    Args:
        schedule: the schedule to fit; its ``length`` is replaced.
        costs: the cost of a step in each of the three phases, in FLOPs or seconds.
        allowed: the budget for the whole run, in the same unit.
        total_steps: the number of steps of the run.

    Example:
        >>> schedule = FittedCost(DynamicRank(8), (1.0, 2.0, 1.0), allowed=130.0, total_steps=100)
        >>> schedule.within(()).length, schedule.total(())
        (0.3, 130.0)
    """

    schedule: DynamicRank
    costs: tuple[float, float, float]
    allowed: float
    total_steps: int

    fitted = True

    def start(self) -> State:
        """The initial state of dynamic rank."""
        return self.schedule.start()

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        self.schedule.check_state(state, layers)

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The plan of the schedule fitted to the current learning-rate forecast."""
        return self.within(readings.forecast).update(state, clock, readings)

    def within(self, forecast: tuple[float, ...]) -> DynamicRank:
        """The schedule whose cost is nearest to the budget."""
        return _within(self, forecast)

    def total(self, forecast: tuple[float, ...], full_steps: int | None = None) -> float:
        """The cost of the run with ``full_steps`` full-rank steps; None: of the fitted schedule."""
        steps = self.full_steps(forecast) if full_steps is None else full_steps
        begin, end = full_rank_window(decisive_decay(forecast), steps / self.total_steps)
        first, last = (step_of(when, self.total_steps) for when in (begin, end))
        lengths = first, last - first, self.total_steps - last
        return sum(cost * n for cost, n in zip(self.costs, lengths, strict=True))

    def relative_length(self, forecast: tuple[float, ...]) -> float:
        """The length of the full-rank phase relative to the default one."""
        begin, end = full_rank_window(decisive_decay(forecast))
        return self.full_steps(forecast) / self.total_steps / (end - begin)

    def fits(self, forecast: tuple[float, ...]) -> bool:
        """Whether the budget is met."""
        return abs(self.total(forecast) - self.allowed) <= TOLERANCE * self.allowed

    def full_steps(self, forecast: tuple[float, ...]) -> int:
        """The number of full-rank steps, by bisection: the cost grows with it, up to rounding."""
        low, high = 0, self.total_steps
        while high - low > 1:
            middle = (low + high) // 2
            inside = self.total(forecast, middle) <= self.allowed
            low, high = (middle, high) if inside else (low, middle)
        near = {max(low - 1, 0), low, high, min(high + 1, self.total_steps)}
        return min(near, key=lambda n: abs(self.total(forecast, n) - self.allowed))


@dataclass(frozen=True)
class _Measured(RankSchedule):
    """The base class of schedules that were chosen by a measurement, which a resume keeps."""

    schedule: RankSchedule

    fitted = True

    def __post_init__(self) -> None:
        take_over(self, self.schedule)

    def start(self) -> State:
        """The initial state of the wrapped schedule."""
        return self.schedule.start()

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        self.schedule.check_state(state, layers)

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The wrapped schedule's answer."""
        return self.schedule.update(state, clock, readings)


@dataclass(frozen=True)
class FittedMemory(_Measured):
    """A schedule whose training steps all stay within a memory budget.

    Args:
        schedule: the schedule.
        peak_bytes: the highest peak memory of its phases, measured on copies of the model.
    """

    peak_bytes: int


@dataclass(frozen=True)
class FittedTime(_Measured):
    """A schedule whose training steps together take a given time.

    Args:
        schedule: the schedule.
        seconds: the predicted time, from steps measured on copies of the model.
    """

    seconds: float


@lru_cache(maxsize=64)  # called at every step; a forecast changes at most twice in a run
def _within(fitted: FittedCost, forecast: tuple[float, ...]) -> DynamicRank:
    return replace(fitted.schedule, length=fitted.full_steps(forecast) / fitted.total_steps)
