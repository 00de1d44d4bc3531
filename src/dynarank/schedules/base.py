"""A rank schedule is a function ``(clock, readings) -> plan``: it knows time, never a model.

Because a plan says what should be, not what to do, most schedules need no memory of what they said
before, and resuming a run is asking again. One that decides by what it has seen is a pure function
too, ``(state, clock, readings) -> (plan, state)``: its state is plain data, kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard, cast

from dynarank.forms import Form, Plan, form_from_data, form_to_data
from dynarank.schedules.readings import SpectralReading

__all__ = [
    "Answer",
    "Clock",
    "Decision",
    "Mapped",
    "Phase",
    "RankSchedule",
    "Readings",
    "Schedule",
    "State",
    "StatefulSchedule",
    "When",
    "ask",
    "is_stateful",
    "start",
    "step_of",
    "timeline",
]

When: TypeAlias = int | float
"""When: a float in [0, 1] is a share of the run, an int a step."""

State: TypeAlias = Mapping[str, Any]
"""What a schedule remembers: plain data, as JSON has it; never changed in place."""

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
        layers: the shape (out, in, *kernel) of each weight under the schedule, of a group if any.
        learning_rate: that of the optimizer's first group; None with no optimizer or several.
        forecast: the learning rate over the whole run, at equal distances from its first step to
            its last, where that can be foreseen; else empty.
        forms: the form that each layer has.
        spectra: rank health by layer, at the steps at which it was read; else empty.
    """

    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    learning_rate: float | None = None
    forecast: tuple[float, ...] = ()
    forms: Mapping[str, Form] = field(default_factory=dict[str, Form])
    spectra: Mapping[str, SpectralReading] = field(default_factory=dict[str, SpectralReading])


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
class Decision:
    """That a layer is to have another form, and why.

    Args:
        step: when.
        path: the layer.
        form: what it is to be.
        reason: the rule that spoke, in words.
        readings: the figures the rule looked at.
    """

    step: int
    path: str
    form: Form
    reason: str
    readings: Mapping[str, float] = field(default_factory=dict[str, float])

    def to_data(self) -> dict[str, Any]:
        """The decision as plain data, for JSON."""
        return {**vars(self), "form": form_to_data(self.form), "readings": dict(self.readings)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Decision:
        """The inverse of :meth:`to_data`."""
        values: dict[str, Any] = {**data, "form": form_from_data(data["form"])}
        return cls(**values)


class Answer(NamedTuple):
    """A schedule's plan for a moment, the state it goes on with, and what it has just decided."""

    plan: Plan
    state: State
    decisions: tuple[Decision, ...] = ()


class StatefulSchedule(Protocol):
    """A schedule that remembers: a pure function of state, clock and readings.

    It is asked once for every step, in order. ``spectra_every`` says how often the rank health of
    the layers is read for it, a share of the run or a number of steps; None: never. One with a true
    ``needs_values`` gets every singular value.
    """

    @property
    def spectra_every(self) -> When | None:
        """How often to read spectra."""
        ...

    def start(self) -> State:
        """The state before the first step."""
        ...

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The plan for this moment and the next state; ``state`` itself stays as it is."""
        ...


Schedule: TypeAlias = RankSchedule | StatefulSchedule


def is_stateful(schedule: Schedule) -> TypeGuard[StatefulSchedule]:
    """Whether the schedule keeps a state."""
    return hasattr(schedule, "update")


def start(schedule: Schedule) -> State:
    """The state that a schedule begins with; nothing for one without."""
    return schedule.start() if is_stateful(schedule) else {}


def ask(schedule: Schedule, state: State, clock: Clock, readings: Readings) -> Answer:
    """What the schedule, with a state or without, says at this moment.

    Example:
        >>> from dynarank.schedules import full_rank
        >>> ask(full_rank(), {}, Clock(0, 10), Readings({"a": (8, 8)})).plan
        {'a': FullRank()}
    """
    if is_stateful(schedule):
        return schedule.update(state, clock, readings)
    return Answer(cast(RankSchedule, schedule)(clock, readings), state)


@dataclass(frozen=True)
class Mapped:
    """A schedule whose plans another function has the last word on.

    Example:
        >>> from dynarank.schedules import full_rank
        >>> Mapped(full_rank(), lambda plan: {}).update({}, Clock(0, 1), Readings({"a": (2, 2)}))
        Answer(plan={}, state={}, decisions=())
    """

    schedule: Schedule
    function: Callable[[Plan], Plan]

    @property
    def spectra_every(self) -> When | None:
        """As the schedule has it."""
        return self.schedule.spectra_every if is_stateful(self.schedule) else None

    @property
    def needs_values(self) -> bool:
        """As the schedule has it."""
        return getattr(self.schedule, "needs_values", False)

    def start(self) -> State:
        """As the schedule has it."""
        return start(self.schedule)

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The schedule's answer, its plan mapped."""
        answer = ask(self.schedule, state, clock, readings)
        return answer._replace(plan=self.function(answer.plan))


def step_of(moment: When, total_steps: int) -> int:
    """The step that a moment means in a run of ``total_steps``: shares are rounded."""
    return round(moment * total_steps) if isinstance(moment, float) else moment


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


def timeline(schedule: Schedule, readings: Readings, total_steps: int) -> list[Phase]:
    """The phases a schedule will go through if the readings stay as they are.

    Where a forecast of the learning rate is known, its schedule is told of it as time goes on. A
    schedule that waits for spectra gets none, and so does nothing.

    Example:
        >>> from dynarank.schedules import dynamic_rank
        >>> schedule = dynamic_rank(0.5, inflate=0.4, deflate=0.8)
        >>> [p.start for p in timeline(schedule, Readings({"a": (8, 8)}), 100)]
        [0, 40, 80]
    """
    if not isinstance(total_steps, int) or total_steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"total_steps is a whole number of at least 1, got {total_steps!r}")
    if is_stateful(schedule):
        plans = dict(_stateful_plans(schedule, readings, total_steps))
    else:
        plans = dict(_plans(cast(RankSchedule, schedule), readings, total_steps))
    stops = [*list(plans)[1:], total_steps]
    return [Phase(at, stop, plan) for (at, plan), stop in zip(plans.items(), stops, strict=True)]


def _plans(
    schedule: RankSchedule, readings: Readings, total_steps: int
) -> Iterator[tuple[int, Plan]]:
    """The first step of each plan, found by bisection."""

    def plan(step: int) -> Plan:
        return dict(schedule(Clock(step, total_steps), readings))

    yield 0, plan(0)
    stride = max(1, total_steps // _MOMENTS)
    moments = sorted({*range(0, total_steps, stride), total_steps - 1})
    for low, high in pairwise(moments):
        while plan(low) != plan(high):
            low = _first_difference(plan, low, high)
            yield low, plan(low)


def _stateful_plans(
    schedule: StatefulSchedule, readings: Readings, total_steps: int
) -> Iterator[tuple[int, Plan]]:
    """The first step of each plan, from one step to the next, for a state depends on all before."""
    state, last = schedule.start(), None
    for step in range(total_steps):
        clock = Clock(step, total_steps)
        seen = replace(readings, learning_rate=_rate_at(readings, clock))
        plan, state, _ = schedule.update(state, clock, seen)
        if plan != last:
            last = dict(plan)
            yield step, last


def _rate_at(readings: Readings, clock: Clock) -> float | None:
    rates = readings.forecast
    return rates[int(clock.progress * len(rates))] if rates else readings.learning_rate


def _first_difference(plan: _PlanAt, low: int, high: int) -> int:
    before = plan(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan(middle) == before else (low, middle)
    return high


class _PlanAt(Protocol):
    def __call__(self, step: int, /) -> Plan: ...
