"""The interface of rank schedules: a pure function ``(clock, readings) -> plan``, without a model.

A plan is declarative: it says which form each layer should have, not what to change. In place of a
form it may give a budget (:class:`dynarank.Within`): the rank scheduler then finds the ranks. Most
schedules need no state, and a resumed run simply asks again. A schedule that depends on earlier
readings is a pure function too, ``(state, clock, readings) -> (plan, state)``; its state is plain
data that the rank scheduler stores.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast

from dynarank.form_data import form_from_data, form_to_data
from dynarank.forms import Form, Request, Within
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
    "ask",
    "step_of",
    "take_over",
]

When: TypeAlias = int | float
"""A time in a run: a float in [0, 1] is a share of the run, an int is a step."""

State: TypeAlias = Mapping[str, Any]
"""The state of a schedule: JSON-serializable data, never modified in place."""


@dataclass(frozen=True)
class Clock:
    """The time in a run: ``step`` of ``total_steps`` optimizer steps are done."""

    step: int
    total_steps: int

    @property
    def progress(self) -> float:
        """The share of the run that is done, ``step / total_steps``."""
        return self.step / self.total_steps


@dataclass(frozen=True)
class Readings:
    """The inputs of a schedule besides time: layer shapes and forms, learning rate, spectra.

    Args:
        layers: the shape (out, in, *kernel) of each scheduled weight, by path; for a grouped
            convolution, the shape of one group.
        learning_rate: the learning rate of the optimizer's first group; None without an optimizer
            or with several.
        forecast: the learning rate over the whole run, sampled at equal distances from the first
            step to the last; empty if it cannot be predicted.
        forms: the current form of each layer.
        spectra: the rank metrics of each layer, at the steps at which they are read; empty at all
            others.
        flops: the training FLOPs of the scheduled layers at full rank, and of everything else, as
            shares of the full-rank model's; None until a batch has been seen.
    """

    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    learning_rate: float | None = None
    forecast: tuple[float, ...] = ()
    forms: Mapping[str, Form] = field(default_factory=dict[str, Form])
    spectra: Mapping[str, SpectralReading] = field(default_factory=dict[str, SpectralReading])
    flops: tuple[float, float] | None = None


@dataclass(frozen=True)
class Decision:
    """A schedule's decision to change the form of one layer, with the reason.

    Args:
        step: the step of the decision.
        path: the layer's path.
        form: the layer's new form.
        reason: the rule that led to the decision, in words.
        readings: the figures that the rule used.
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
    """What a schedule returns: the plan, its next state and the decisions it has just made."""

    plan: Request
    state: State
    decisions: tuple[Decision, ...] = ()


_REQUIREMENTS = frozenset({"spectra", "singular_values"})


class RankSchedule:
    """The base class of rank schedules: which form each layer has at each step of a run.

    A stateless schedule implements ``__call__(clock, readings)``, which returns the plan. A
    stateful one implements :meth:`start` and :meth:`update` instead, and is called once per step,
    in order. A plain function ``(clock, readings) -> plan`` is a schedule too, see
    :func:`as_schedule`.

    Attributes:
        requires: the readings it needs besides the learning rate and the forms: ``"spectra"``, the
            rank metrics of the layers, and ``"singular_values"``, all singular values in them.
        spectra_every: how often the spectra are read, a share of the run (float) or steps (int).
        moments: the recommended policy for the optimizer's moments; None: no recommendation.
        rewarmup: the recommended number of steps over which the learning rate returns to its value
            after a change, see :class:`~dynarank.scheduler.lr_rewarmup.LRRewarmup`; None: no
            recommendation.
        fitted: whether it was fitted to a model on a machine. A checkpoint then contains the
            schedule itself, and a resumed run continues with that one.

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

    def __call__(self, clock: Clock, readings: Readings, /) -> Request:
        """The form, or the budget, of each layer at this step."""
        name = type(self).__name__
        raise NotImplementedError(
            f"{name} is stateful: call update(state, clock, readings)"
            if self.stateful
            else f"{name} is not a schedule yet: implement __call__, or start and update"
        )

    def start(self) -> State:
        """The state before the first step."""
        return {}

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The plan for this step and the next state; ``state`` is not modified."""
        return Answer(self(clock, readings), state)

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a saved state that cannot be one of this schedule and its layers.

        By default, the state of a stateless schedule must be that of :meth:`start`.
        """
        if not self.stateful and dict(state) != dict(self.start()):
            raise ValueError(f"{type(self).__name__} has no state, got {dict(state)!r}")

    @property
    def stateful(self) -> bool:
        """Whether the plan depends on earlier steps, so that no step may be skipped."""
        return type(self).update is not RankSchedule.update

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Construct the schedule from a recipe's options.

        Args:
            options: any of ``rank``, ``inflate``, ``deflate``, ``to``, ``decomposition``,
                ``alpha``, ``execution``, the schedule's own fields, and ``epoch``, one epoch as a
                share of the run. Options without a field of that name are ignored.

        Example:
            >>> from dynarank.schedules.library.lora import LoRA
            >>> LoRA.from_options({"rank": 4, "inflate": 0.3}).rank
            4
        """
        names = {f.name for f in fields(cast(Any, cls)) if f.init}
        return cls(**{name: value for name, value in options.items() if name in names})


ScheduleFunction: TypeAlias = Callable[[Clock, Readings], Request]
Schedule: TypeAlias = RankSchedule | ScheduleFunction
"""Anything accepted as a schedule: a :class:`RankSchedule` or a plain function."""


@dataclass(frozen=True)
class FunctionSchedule(RankSchedule):
    """A plain function ``(clock, readings) -> plan`` as a schedule."""

    function: ScheduleFunction

    def __call__(self, clock: Clock, readings: Readings, /) -> Request:
        """The plan that the function returns."""
        return self.function(clock, readings)


def as_schedule(schedule: Schedule) -> RankSchedule:
    """Check a schedule, or wrap a plain function in one.

    Raises:
        ValueError: it is neither a schedule nor a function of two arguments; or it requires spectra
            without ``spectra_every``, or the reverse.

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
    except ValueError:  # written in C: its signature is unknown
        pass
    return FunctionSchedule(schedule)


def ask(schedule: RankSchedule, state: State, clock: Clock, readings: Readings) -> Answer:
    """The schedule's answer at this step, if it is one.

    Raises:
        ValueError: the schedule, or a user's function in it, returned something else than a plan.

    Example:
        >>> ask(as_schedule(lambda clock, readings: None), {}, Clock(3, 9), Readings())
        Traceback (most recent call last):
        ValueError: <lambda> returned None at step 3; a schedule returns a plan, a dict ...
    """
    answer = schedule.update(state, clock, readings)
    if not isinstance(answer, Answer):  # pyright: ignore[reportUnnecessaryIsInstance]
        rule = "update returns Answer(plan, state), from dynarank.schedules"
        raise ValueError(_wrong_answer(schedule, clock, reprlib.repr(answer), rule))
    rule = (
        "a schedule returns a plan, a dict from the paths in readings.layers to FullRank(), "
        "LowRank(rank), Adapted(rank) or a budget, Within(...)"
    )
    if not isinstance(answer.plan, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(_wrong_answer(schedule, clock, reprlib.repr(answer.plan), rule))
    for path, form in answer.plan.items():
        if not isinstance(path, str) or not isinstance(form, Form | Within):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(_wrong_answer(schedule, clock, f"{form!r} for {path!r}", rule))
    return answer


def _wrong_answer(schedule: RankSchedule, clock: Clock, returned: str, rule: str) -> str:
    function = schedule.function if isinstance(schedule, FunctionSchedule) else type(schedule)
    name = getattr(function, "__name__", repr(function))
    return f"{name} returned {returned} at step {clock.step}; {rule}"


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
    """The error message for something that is not a schedule."""
    rule = "a schedule is a RankSchedule or a function (clock, readings) -> plan"
    name = getattr(value, "__name__", type(value).__name__)
    if isinstance(value, str):
        return f"{rule}, got the name {value!r}; dynarank.schedules.get_preset looks up names"
    if isinstance(value, Mapping):
        return f"{rule}, got a plan; give lambda clock, readings: plan, or use apply_plan"
    if hasattr(value, "update") and not isinstance(value, type):
        return f"{rule}; {name} has start and update: derive it from RankSchedule"
    if callable(value):
        return f"{rule}; {name} takes other arguments: did you mean {name}(...)?"
    return f"{rule}, got {value!r}"


@dataclass(frozen=True)
class Mapped(RankSchedule):
    """A schedule whose plans are passed through a function.

    Example:
        >>> from dynarank.schedules import full_rank
        >>> Mapped(full_rank(), lambda plan: {}).update({}, Clock(0, 1), Readings({"a": (2, 2)}))
        Answer(plan={}, state={}, decisions=())
    """

    schedule: RankSchedule
    function: Callable[[Request], Request]

    def __post_init__(self) -> None:
        take_over(self, self.schedule)

    def start(self) -> State:
        """The initial state of the wrapped schedule."""
        return self.schedule.start()

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        self.schedule.check_state(state, layers)

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The wrapped schedule's answer, with the function applied to its plan."""
        answer = self.schedule.update(state, clock, readings)
        return answer._replace(plan=self.function(answer.plan))


def take_over(outer: RankSchedule, inner: RankSchedule) -> None:
    """Copy the requirements and recommendations of a wrapped schedule to its wrapper."""
    for name in ("requires", "spectra_every", "moments", "rewarmup"):
        object.__setattr__(outer, name, getattr(inner, name))  # the wrapper is a frozen dataclass


def step_of(when: When, total_steps: int) -> int:
    """Convert a time to a step of a run of ``total_steps``; shares are rounded."""
    return round(when * total_steps) if isinstance(when, float) else when
