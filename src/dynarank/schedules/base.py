"""What a rank schedule is: a function ``(clock, readings) -> plan`` that knows time, never a model.

A plan says what should be, not what to do, so most schedules need no memory of what they said
before, and resuming a run is asking again. A schedule that decides by what it has seen is a pure
function too, ``(state, clock, readings) -> (plan, state)``; its state is plain data that the rank
scheduler keeps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast

from dynarank.forms import Form, Plan
from dynarank.schedules.form_data import form_from_data, form_to_data
from dynarank.schedules.readings import SpectralReading

__all__ = [
    "Answer",
    "Clock",
    "Decision",
    "FunctionSchedule",
    "Mapped",
    "RankSchedule",
    "Readings",
    "Schedule",
    "State",
    "When",
    "as_schedule",
    "step_of",
    "take_over",
]

When: TypeAlias = int | float
"""When: a float in [0, 1] is a share of the run, an int a step."""

State: TypeAlias = Mapping[str, Any]
"""What a schedule remembers: plain data, as JSON has it; never changed in place."""


@dataclass(frozen=True)
class Clock:
    """The time in a run: ``step`` optimizer steps are done, of ``total_steps``."""

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
        spectra: the rank metrics of each layer, at the steps at which it was read; else empty.
    """

    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    learning_rate: float | None = None
    forecast: tuple[float, ...] = ()
    forms: Mapping[str, Form] = field(default_factory=dict[str, Form])
    spectra: Mapping[str, SpectralReading] = field(default_factory=dict[str, SpectralReading])


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
    """A schedule's plan, the state it goes on with, and what it has just decided."""

    plan: Plan
    state: State
    decisions: tuple[Decision, ...] = ()


_REQUIREMENTS = frozenset({"spectra", "singular_values"})


class RankSchedule:
    """The base class of rank schedules: which form each layer has at each step of a run.

    A schedule without memory implements ``__call__(clock, readings)``, the plan. One that remembers
    implements :meth:`start` and :meth:`update` instead; it is asked once for every step, in order.
    A plain function ``(clock, readings) -> plan`` is a schedule too, see :func:`as_schedule`.

    Attributes:
        requires: what it must be given beside the learning rate and the forms: ``"spectra"``, the
            rank metrics of the layers, and ``"singular_values"``, every singular value in them.
        spectra_every: how often the spectra are read, a share of the run (float) or steps (int).
        moments: the policy for the optimizer's moments it is meant for; None: whichever.
        rewarmup: the steps over which the learning rate should come back after a change, see
            :class:`~dynarank.scheduler.lr_rewarmup.LRRewarmup`; None: as the user likes.
        fitted: whether it was fitted to a model on a machine. A checkpoint then holds the schedule
            itself, and a resumed run goes on with that one.

    Example:
        >>> from dataclasses import dataclass
        >>> from dynarank.forms import FullRank, LowRank
        >>> from dynarank.schedules.timelines import timeline
        >>> @dataclass(frozen=True)
        ... class WarmStart(RankSchedule):
        ...     rank: int = 8
        ...     until: float = 0.2
        ...     def __call__(self, clock, readings):
        ...         form = FullRank() if clock.progress < self.until else LowRank(self.rank)
        ...         return {path: form for path in readings.layers}
        >>> [p.start for p in timeline(WarmStart(), Readings({"a": (64, 64)}), 100)]
        [0, 20]
    """

    requires: frozenset[str] = frozenset()
    spectra_every: When | None = None
    moments: Literal["project", "calibrated", "reset", "prune"] | None = None
    rewarmup: int | None = None
    fitted: bool = False

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """The form of each layer at this step."""
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} keeps a state: ask update(state, clock, readings)"
            if self.stateful
            else f"{name} is no schedule yet: it implements neither __call__ nor start and update"
        )

    def start(self) -> State:
        """The state before the first step."""
        return {}

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The plan for this step and the next state; ``state`` itself stays as it is."""
        return Answer(self(clock, readings), state)

    @property
    def stateful(self) -> bool:
        """Whether the plan depends on the steps before, so that every step must be asked for."""
        return type(self).update is not RankSchedule.update

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """The schedule with those of a recipe's options that it has fields for.

        Args:
            options: any of ``rank``, ``inflate``, ``deflate``, ``to``, ``decomposition``,
                ``alpha``, ``execution``, the schedule's own fields, and ``epoch``, one epoch as a
                share of the run. Those that the class has no field for are left out.

        Example:
            >>> from dynarank.schedules.library.lora import LoRA
            >>> LoRA.from_options({"rank": 4, "inflate": 0.3}).rank
            4
        """
        names = {f.name for f in fields(cast(Any, cls)) if f.init}
        return cls(**{name: value for name, value in options.items() if name in names})


ScheduleFunction: TypeAlias = Callable[[Clock, Readings], Plan]
Schedule: TypeAlias = RankSchedule | ScheduleFunction
"""What is accepted as a schedule: a :class:`RankSchedule`, or a function to be made one."""


@dataclass(frozen=True)
class FunctionSchedule(RankSchedule):
    """A plain function ``(clock, readings) -> plan`` as a schedule."""

    function: ScheduleFunction

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """What the function says."""
        return self.function(clock, readings)


def as_schedule(schedule: Schedule) -> RankSchedule:
    """The schedule itself, checked, or a user's function made one.

    Raises:
        ValueError: it is neither; or it requires spectra without saying how often, or the reverse.

    Example:
        >>> as_schedule(lambda clock, readings: {}).update({}, Clock(0, 1), Readings())
        Answer(plan={}, state={}, decisions=())
    """
    if isinstance(schedule, RankSchedule):
        return _checked(schedule)
    if not callable(schedule) or isinstance(schedule, type):
        raise ValueError(_no_schedule(schedule))
    try:
        inspect.signature(schedule).bind(None, None)
    except TypeError:
        raise ValueError(_no_schedule(schedule)) from None
    except ValueError:  # written in C: nobody knows its arguments
        pass
    return FunctionSchedule(schedule)


def _checked(schedule: RankSchedule) -> RankSchedule:
    name = type(schedule).__name__
    if unknown := schedule.requires - _REQUIREMENTS:
        raise ValueError(
            f"{name} requires {', '.join(sorted(unknown))}; a schedule may require "
            f"{', '.join(sorted(_REQUIREMENTS))}"
        )
    if bool(schedule.requires) != (schedule.spectra_every is not None):
        raise ValueError(
            f"{name} requires {set(schedule.requires) or 'nothing'} and has "
            f"spectra_every={schedule.spectra_every!r}; a schedule that reads spectra has both "
            'requires = frozenset({"spectra"}) and a spectra_every, any other has neither'
        )
    return schedule


def _no_schedule(value: object) -> str:
    """What to do instead."""
    rule = "a schedule is a RankSchedule or a function (clock, readings) -> plan"
    name = getattr(value, "__name__", type(value).__name__)
    if isinstance(value, str):
        return f"{rule}, got the name {value!r}; dynarank.schedules.get_preset has them by name"
    if isinstance(value, Mapping):
        return f"{rule}, got a plan; give lambda clock, readings: plan, or use apply_plan"
    if hasattr(value, "update") and not isinstance(value, type):
        return f"{rule}; {name} has start and update: derive it from RankSchedule"
    if callable(value):
        return f"{rule}; {name} takes other arguments: did you mean {name}(...)?"
    return f"{rule}, got {value!r}"


@dataclass(frozen=True)
class Mapped(RankSchedule):
    """A schedule whose plans another function has the last word on.

    Example:
        >>> from dynarank.schedules import full_rank
        >>> Mapped(full_rank(), lambda plan: {}).update({}, Clock(0, 1), Readings({"a": (2, 2)}))
        Answer(plan={}, state={}, decisions=())
    """

    schedule: RankSchedule
    function: Callable[[Plan], Plan]

    def __post_init__(self) -> None:
        take_over(self, self.schedule)

    def start(self) -> State:
        """As the schedule has it."""
        return self.schedule.start()

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The schedule's answer, its plan mapped."""
        answer = self.schedule.update(state, clock, readings)
        return answer._replace(plan=self.function(answer.plan))


def take_over(outer: RankSchedule, inner: RankSchedule) -> None:
    """Have a schedule that wraps another require and recommend what that one does."""
    for name in ("requires", "spectra_every", "moments", "rewarmup"):
        object.__setattr__(outer, name, getattr(inner, name))  # the wrapper is a frozen dataclass


def step_of(when: When, total_steps: int) -> int:
    """The step that a time means in a run of ``total_steps``: shares are rounded."""
    return round(when * total_steps) if isinstance(when, float) else when
