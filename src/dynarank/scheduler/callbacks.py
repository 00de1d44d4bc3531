"""Callbacks of the rank scheduler: what happens around its changes, in one list."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Protocol, TypeAlias

from torch import nn
from torch.optim import Optimizer

from dynarank.decompositions.truncation import ActivationStats
from dynarank.distributed.processes import Processes
from dynarank.forms import Change, Form
from dynarank.surgery.edit import restore_on_exit
from dynarank.surgery.sites import Site

__all__ = [
    "Callback",
    "CallbackLike",
    "Ranks",
    "load_callback",
    "may_prepare",
    "named_callbacks",
    "stateful_callbacks",
]


class Ranks(Protocol):
    """What a callback may use of the rank scheduler that calls it."""

    model: nn.Module
    optimizer: list[Optimizer]
    last_step: int
    """How many optimizer steps are done; 0 while the first plan is applied."""

    @property
    def processes(self) -> Processes:
        """The processes that train the model together: a callback is called in all of them."""
        ...


class Callback:
    """The base class of callbacks; a method that is not overridden does nothing.

    Callbacks are called in the order of the list, and change no layer's form themselves. An
    exception ends the call at once and reaches the user; callbacks later in the list are not
    called. Raised by :meth:`before_change`, nothing has changed; raised by :meth:`after_change`,
    the change stands and is not made again.

    Example:
        >>> class Count(Callback):
        ...     changes = 0
        ...     def after_change(self, ranks, changes):
        ...         self.changes += len(changes)
    """

    def on_start(self, ranks: Ranks) -> None:
        """Called once, after all checks and before the first plan is applied."""

    def on_copy(self, ranks: Ranks) -> None:
        """Called in place of :meth:`on_start` when copied or unpickled: register hooks again."""

    def after_step(self, ranks: Ranks) -> None:
        """Called after each optimizer step, before the schedule is asked for the next."""

    def before_change(
        self, ranks: Ranks, wanted: Sequence[tuple[Site, Form]]
    ) -> Mapping[str, ActivationStats] | None:
        """Called before layers change form, with each weight that is to and its new form.

        A weight that turns out to be unfit keeps its form, and comes again at its next try. If
        :class:`UnfitWeightError` is raised, truncations are postponed; then this is called again
        for the other changes.

        Returns:
            A calibration for the weights that are truncated, from one callback at most.
        """

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        """Called after layers have changed form; not for changes that were postponed."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; raises ValueError for what it cannot have returned."""

    def close(self) -> None:
        """Called by ``RankScheduler.close``, possibly twice: remove hooks, close files."""


CallbackLike: TypeAlias = Callback | Callable[[list[Change]], object]
"""A callback, or a function that is called with the list of changes after each change."""


class _AfterChange(Callback):
    def __init__(self, function: Callable[[list[Change]], object]) -> None:
        self.function = function

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        self.function(changes)


def named_callbacks(values: Iterable[CallbackLike]) -> dict[str, Callback]:
    """Callbacks by their classes' names, numbered from the second of a class on.

    Raises:
        ValueError: one is neither a callback nor a function.
    """
    named, seen = dict[str, Callback](), Counter[str]()
    for value in values:
        if isinstance(value, Callback):
            one = value
        elif callable(value) and not isinstance(value, type):
            one = _AfterChange(value)
        else:
            raise ValueError(
                "callbacks are Callback objects, or functions called with the list of changes, got "
                f"{value!r}"
            )
        name = type(one).__name__
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name}-{seen[name]}"] = one
    return named


def may_prepare(callbacks: Iterable[Callback]) -> bool:
    """Whether one that is the user's own may make a weight ready for a change before it is made."""
    before = ("on_start", "after_step", "before_change")
    methods = [getattr(type(one), name) for one in callbacks for name in before]
    return not all(str(method.__module__).startswith("dynarank.") for method in methods)


def stateful_callbacks(callbacks: Mapping[str, Callback]) -> dict[str, Callback]:
    """The callbacks that have a state, by name."""
    base = Callback.state_dict
    return {name: one for name, one in callbacks.items() if type(one).state_dict is not base}


def load_callback(name: str, callback: Callback, state: Mapping[str, Any], undo: ExitStack) -> None:
    """Load a callback's state; ``undo`` can take it back, even if only half of it was loaded."""
    before = copy.deepcopy(callback.state_dict())

    def reload() -> None:
        with suppress(Exception), ExitStack() as attributes:
            restore_on_exit(vars(callback), attributes)  # if it refuses its own state
            callback.load_state_dict(before)
            attributes.pop_all()

    undo.callback(reload)
    restore_on_exit(vars(callback), undo)
    try:
        callback.load_state_dict(state)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"the callback {name} refuses the saved state {dict(state)!r}: {error!r}"
        ) from error
