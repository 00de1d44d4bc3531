"""Callbacks of the rank scheduler: what happens around its changes, in one list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from torch import nn
from torch.optim import Optimizer

from dynarank.forms import Change, Plan
from dynarank.monitors.calibration import Calibration

__all__ = [
    "Callback",
    "CallbackLike",
    "Ranks",
    "as_callback",
    "calibration_for",
    "callback_states",
    "load_callback_states",
]


class Ranks(Protocol):
    """What a callback may use of the rank scheduler that calls it."""

    model: nn.Module
    optimizer: list[Optimizer]
    last_step: int
    """How many optimizer steps are done; 0 while the first plan is applied."""


class Callback:
    """The base class of callbacks; a method that is not overridden does nothing.

    Callbacks are called in the order of the list. An exception ends the call at once and reaches
    the user; callbacks later in the list are not called. Raised by :meth:`before_change`, nothing
    has changed; raised by :meth:`after_change`, the change stands and is not made again.

    Example:
        >>> class Count(Callback):
        ...     changes = 0
        ...     def after_change(self, ranks, changes):
        ...         self.changes += len(changes)
    """

    def on_start(self, ranks: Ranks) -> None:
        """Called once, when all is checked and before the first plan is applied."""

    def after_step(self, ranks: Ranks) -> None:
        """Called after each optimizer step, before the schedule is asked for the next."""

    def before_change(self, ranks: Ranks, plan: Plan) -> Calibration | None:
        """Called before the model is brought to another plan.

        Returns:
            A calibration for the weights that are truncated, from one callback at most.
        """

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        """Called after layers have changed form; not after a change that was put off."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""

    def close(self) -> None:
        """Called by ``RankScheduler.close``: take off hooks, close files; may come twice."""


CallbackLike: TypeAlias = Callback | Callable[[list[Change]], object]
"""A callback, or a function that is called with the list of changes after each change."""


class _AfterChange(Callback):
    def __init__(self, function: Callable[[list[Change]], object]) -> None:
        self.function = function

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        self.function(changes)


def as_callback(value: CallbackLike) -> Callback:
    """The callback itself, or a function of the changes made one.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, Callback):
        return value
    if isinstance(value, type) or not callable(value):
        raise ValueError(
            "callbacks are Callback objects, or functions called with the list of changes, got "
            f"{value!r}"
        )
    return _AfterChange(value)


def calibration_for(callbacks: Iterable[Callback], ranks: Ranks, plan: Plan) -> Calibration | None:
    """Tell all callbacks of the plan; the calibration that one of them gives.

    Raises:
        ValueError: two of them give one.
    """
    found = [one.before_change(ranks, plan) for one in callbacks]
    given = [calibration for calibration in found if calibration is not None]
    if len(given) > 1:
        raise ValueError(f"{len(given)} callbacks calibrate one change; leave one in callbacks")
    return given[0] if given else None


def callback_states(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """The states of those that have one, by name."""
    return {name: state for name, one in _named(callbacks) if (state := one.state_dict())}


def load_callback_states(callbacks: Iterable[Callback], states: Mapping[str, Any]) -> None:
    """Give each callback its own; one without a saved state stays as it is.

    Raises:
        ValueError: the state of a callback that is not there; nothing is loaded then.
    """
    named = dict(_named(callbacks))
    if missing := states.keys() - named.keys():
        raise ValueError(
            f"the saved run had the callbacks {', '.join(sorted(missing))}, this one has not; "
            "give the same callbacks"
        )
    for name, state in states.items():
        named[name].load_state_dict(state)


def _named(callbacks: Iterable[Callback]) -> Iterator[tuple[str, Callback]]:
    """Each with its class's name, numbered from the second of a class on."""
    seen = Counter[str]()
    for one in callbacks:
        name = type(one).__name__
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name}-{seen[name]}"), one
