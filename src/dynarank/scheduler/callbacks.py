"""Callbacks of the rank scheduler: what happens around its changes, in one list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from torch import nn
from torch.optim import Optimizer

from dynarank.forms import Change, Plan
from dynarank.monitors.calibration import Calibration

__all__ = ["Callback", "CallbackLike", "CallbackList", "Ranks"]


class Ranks(Protocol):
    """What a callback may use of the rank scheduler that calls it."""

    @property
    def model(self) -> nn.Module:
        """The model."""
        ...

    @property
    def optimizer(self) -> list[Optimizer]:
        """Its optimizers."""
        ...

    @property
    def last_step(self) -> int:
        """How many optimizer steps are done; 0 while the first plan is applied."""
        ...


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


class CallbackList(Callback):
    """Several callbacks as one.

    Raises:
        ValueError: something that is neither a callback nor a function; two calibrations for one
            change; the saved state of a callback that is not there.
    """

    def __init__(self, callbacks: Sequence[CallbackLike]) -> None:
        self._all = [_as_callback(one) for one in callbacks]

    def on_start(self, ranks: Ranks) -> None:
        """In order."""
        for one in self._all:
            one.on_start(ranks)

    def after_step(self, ranks: Ranks) -> None:
        """In order."""
        for one in self._all:
            one.after_step(ranks)

    def before_change(self, ranks: Ranks, plan: Plan) -> Calibration | None:
        """In order; the one calibration."""
        found = [one.before_change(ranks, plan) for one in self._all]
        given = [calibration for calibration in found if calibration is not None]
        if len(given) > 1:
            raise ValueError(f"{len(given)} callbacks calibrate one change; leave one in callbacks")
        return given[0] if given else None

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        """In order."""
        for one in self._all:
            one.after_change(ranks, changes)

    def state_dict(self) -> dict[str, Any]:
        """The states there are, by the callbacks' names."""
        return {name: state for name, one in self._named() if (state := one.state_dict())}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise for the state of a callback that is not there."""
        if missing := state.keys() - {name for name, _ in self._named()}:
            raise ValueError(
                f"the saved run had the callbacks {', '.join(sorted(missing))}, this one has not; "
                "give the same callbacks"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Each its own; one without a saved state stays as it is."""
        for name, one in self._named():
            if name in state:
                one.load_state_dict(state[name])

    def close(self) -> None:
        """The last first."""
        for one in reversed(self._all):
            one.close()

    def _named(self) -> Iterable[tuple[str, Callback]]:
        """Each with its class's name, numbered from the second of a class on."""
        seen = Counter[str]()
        for one in self._all:
            name = type(one).__name__
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name}-{seen[name]}"), one


def _as_callback(value: CallbackLike) -> Callback:
    if isinstance(value, Callback):
        return value
    if isinstance(value, type) or not callable(value):
        raise ValueError(
            "callbacks are Callback objects, or functions called with the list of changes, got "
            f"{value!r}"
        )
    return _AfterChange(value)
