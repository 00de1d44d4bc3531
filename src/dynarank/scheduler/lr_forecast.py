"""The learning rate's forecast, from a copy of the user's LR scheduler that is run ahead.

The scheduler is copied with an optimizer of its own, which has the same groups but none of the
model's parameters, so the user's scheduler, optimizer and model are not touched.
"""

from __future__ import annotations

import copy
import math
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dynarank.scheduler.lr_interval import (
    WAYS,
    check_lr_every,
    follows_learning_rate,
    inner_lr_scheduler,
    interval_told,
    likely_interval,
    steps_per_call,
)
from dynarank.schedules.base import Readings, Schedule
from dynarank.surgery.own_references import wrapped

__all__ = ["POINTS", "Forecast", "check_lr_scheduler", "unknown_rates"]

POINTS = 1001
"""How many learning rates a forecast holds, from the first step of a run to its last."""

_AGAIN = "the transition points that follow the learning rate are computed again"


class Forecast:
    """The learning rates of a whole run, as soon as they are known.

    How often an LR scheduler is stepped is what the user says, else what its length tells (see
    :func:`~dynarank.scheduler.lr_interval.likely_interval`), else unknown. Its step count is
    watched in any case: if that rises once an epoch, the rates are known at the end of the first
    epoch, and a wrong expectation is corrected.

    Args:
        source: an LR scheduler, wrapped by a trainer or not; the rates of the run themselves, at
            equal distances; or None.
        total_steps: optimizer steps of the run.
        every: optimizer steps from one step of the LR scheduler to the next; None: not said.

    Raises:
        ValueError: rates that are negative or not finite, something that is not an LR scheduler,
            or an ``every`` that is no number of steps.

    Example:
        >>> optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [50], 0.1)
        >>> forecast = Forecast(scheduler, total_steps=100)
        >>> forecast.rates  # unknown until the scheduler has been stepped
        ()
        >>> optimizer.step(); scheduler.step(); _ = forecast.watch(1)
        >>> forecast.rates[499], forecast.rates[501]
        (1.0, 0.1)
    """

    def __init__(
        self, source: Any | Sequence[float] | None, total_steps: int, every: int | None = None
    ) -> None:
        self.total_steps = total_steps
        self._told = check_lr_every(every, source) or interval_told(source)
        self._per_call, source = steps_per_call(source), inner_lr_scheduler(source)
        self.rates: tuple[float, ...] = ()
        if isinstance(source, Sequence) and not isinstance(source, str):
            if wrong := [rate for rate in source if not 0 <= rate < float("inf")]:
                raise ValueError(f"learning rates are finite and at least 0, got {wrong[0]}")
            self.rates, source = tuple(map(float, source)), None
        elif source is not None and (isinstance(source, type) or not hasattr(source, "step")):
            raise ValueError(
                "lr_scheduler is an LR scheduler, such as CosineAnnealingLR(optimizer, steps), or "
                f"a list of the learning rates of the run, got {source!r}"
            )
        self._scheduler, self._copy = source, _detached(source)
        self._seen = (0, _count(source) or 0)  # the last step at which its count rose
        self._every: float | None = None
        self._rises = 0
        self._guess: float | None = None  # what its length told, until it is stepped
        self._past = 0  # steps of the LR scheduler in this run that its copy has behind it
        if self._copy is not None:
            self._guess = None if self._told else self._likely(source)
            self._expect(self._guess if self._told is None else self._each(self._told))

    @property
    def source(self) -> Any:
        """The LR scheduler that is watched; None for given rates, or without any."""
        return self._scheduler

    @property
    def every(self) -> float | None:
        """Optimizer steps from one step of the LR scheduler to the next; None: not known yet."""
        return self._every

    @property
    def told(self) -> bool:
        """Whether the user has said how often the LR scheduler is stepped."""
        return self._told is not None

    def _each(self, calls: int) -> float:
        """Optimizer steps from one step of torch's LR scheduler to the next, calls so far apart."""
        return calls if self._per_call == 1 else calls / self._per_call

    def _likely(self, source: Any) -> float | None:
        """What the length of the LR scheduler tells of that."""
        calls = likely_interval(source, self.total_steps * self._per_call)
        if calls is None or calls == self._per_call > 1:
            return None  # as long as the run, and stepped faster: it may end early, or be epochs
        return self._each(calls)

    def _expect(self, every: float | None) -> None:
        """Foresee the rates for an LR scheduler that is stepped so often."""
        if every is not None and every != self._every and self._copy is not None:
            past = [self._rate_of(i) for i in range(self._past)]
            self._every = every
            self.rates = _foresee(self._copy, self.total_steps, every, past)

    def _rate_of(self, index: int) -> float:
        """The forecast rate after this many steps of the LR scheduler."""
        assert self._every is not None
        at = math.ceil(index * self._every * (POINTS - 1) / self.total_steps)
        return self.rates[min(at, len(self.rates) - 1)]

    def watch(self, step: int) -> str:
        """Look at the scheduler after an optimizer step, and update the forecast if it was stepped.

        At the first rise of its count, the interval between its steps is known up to one optimizer
        step, by the order of the user's calls; at the second it is known exactly.

        Returns:
            What was wrong with the interval that its length had told; else empty.
        """
        count = _count(self._scheduler)
        if self._copy is None or count is None or count <= self._seen[1] or self._rises == 2:
            return ""
        since = step - self._seen[0] if self._rises else max(1, step - 1)
        every = since / (count - self._seen[1])
        first, self._seen, self._rises = not self._rises, (step, count), self._rises + 1
        calls = every * self._per_call
        if first and self._every is not None and step - 1 <= self._every * self._per_call <= step:
            return ""  # as expected
        guess, told, self._guess = self._guess, self._told, None
        if told is not None and calls != told:
            warnings.warn(
                f"{self._name} is stepped every {calls:g} optimizer steps, not every {told} "
                f"(lr_every={told}): {_AGAIN}; give lr_every={calls:g}",
                RuntimeWarning,
                stacklevel=3,
            )
            self._told = None
        self._expect(every)
        if guess in (None, every):
            return ""
        return f"{self._name} is not stepped every {guess:g} steps, as its length tells: {_AGAIN}"

    @property
    def _name(self) -> str:
        return type(self._scheduler).__name__

    def state_dict(self) -> dict[str, Any]:
        """What is known, as plain data."""
        known = {"rates": list(self.rates), "seen": list(self._seen)}
        return {**known, "every": self._every, "rises": self._rises}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: it is not what that returned. Nothing has changed then.
        """
        rates, every = state.get("rates"), state.get("every")
        seen, rises = state.get("seen"), state.get("rises")
        if (
            set(state) != set(self.state_dict())
            or not (isinstance(rates, Sequence) and all(map(_is_rate, rates)))
            or len(rates) not in (0, POINTS, len(self.rates))
            or not (every is None or (_is_rate(every) and every > 0))
            or not (isinstance(seen, Sequence) and [*map(type, seen)] == [int, int])
            or not (seen[0] >= 0 and seen[1] >= -1)
            or not (type(rises) is int and 0 <= rises <= 2)
        ):
            raise ValueError(
                "the state of a forecast is its learning rates, finite and at least 0, and when "
                f"they were found: rates, seen, every and rises, got {reprlib.repr(dict(state))}"
            )
        self._guess = None
        self.rates, self._seen = tuple(rates), (seen[0], seen[1])
        self._every, self._rises = every, rises
        if self.rates and self._copy is not None:
            self._past = _count(self._copy) or 0


def unknown_rates(
    forecast: Forecast, schedule: Schedule, readings: Readings, total_steps: int
) -> str:
    """Why the phases of a run are not known before its first step; empty if they are."""
    if forecast.source is None or forecast.rates:
        return ""
    if not follows_learning_rate(schedule, readings, total_steps):
        return ""
    name = type(forecast.source).__name__
    if isinstance(forecast.source, ReduceLROnPlateau):
        return (
            f"{name} lowers the learning rate by what it sees: the transition points follow it "
            "during the run, and are not known before"
        )
    return (
        f"how often {name} is stepped is not known before the run, and the transition points "
        f"depend on it: until it is stepped they are those of an unknown learning rate; {WAYS}"
    )


def check_lr_scheduler(source: Any, optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for the LR scheduler of an optimizer that is not one of these."""
    own = getattr(inner_lr_scheduler(source), "optimizer", None)
    known = {id(one) for optimizer in optimizers for one in wrapped(optimizer)}
    if isinstance(own, Optimizer) and not any(id(one) in known for one in wrapped(own)):
        raise ValueError(
            f"lr_scheduler is a {type(source).__name__} of another optimizer "
            f"({type(own).__name__}) than the one given; give that of this optimizer, or the "
            "learning rates of the run as a list"
        )


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast(float, value) < float("inf")


def _foresee(
    lr_scheduler: Any, total_steps: int, every: float, past: Sequence[float] = ()
) -> tuple[float, ...]:
    """The first group's rate at ``POINTS`` steps of a run, evenly from its first to its last.

    ``every`` is the number of optimizer steps from one step of the LR scheduler to the next, and
    ``past`` the rates of its steps so far. Empty, with a warning, if the scheduler cannot be run
    without the user's help.
    """
    ahead = _detached(lr_scheduler)
    if ahead is None:
        return ()
    count = max(1, math.ceil(total_steps / every))
    rates = list(past[:count])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(count - len(rates)):
                rates.append(float(ahead.optimizer.param_groups[0]["lr"]))
                ahead.step()
    except Exception as error:  # a scheduler that wants a metric, or ends before the run does
        if not rates:
            _warn(lr_scheduler, error)
            return ()
        rates += [rates[-1]] * (count - len(rates))
    last = POINTS - 1
    return tuple(
        rates[min(int(i * total_steps / (last * every)), count - 1)] for i in range(POINTS)
    )


def _detached(lr_scheduler: Any) -> Any:
    """A copy with an optimizer of its own; None if there cannot be one."""
    optimizer = getattr(lr_scheduler, "optimizer", None)
    if isinstance(lr_scheduler, ReduceLROnPlateau) or not isinstance(optimizer, Optimizer):
        return None
    groups: list[dict[str, Any]] = []
    try:
        for group in optimizer.param_groups:
            options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            groups.append({"params": [Parameter(torch.zeros(1, device="cpu"))], **options})
        own = torch.optim.SGD(groups, lr=0.0)
        own._opt_called = True  # type: ignore[attr-defined]  # torch looks whether it was stepped
        return copy.deepcopy(lr_scheduler, {id(optimizer): own})
    except Exception as error:
        _warn(lr_scheduler, error)
        return None


def _warn(lr_scheduler: Any, error: Exception) -> None:
    warnings.warn(
        f"the learning rates of {type(lr_scheduler).__name__} cannot be forecast ({error}); the "
        "schedule will follow the learning rate as it is observed",
        RuntimeWarning,
        stacklevel=3,
    )


def _count(lr_scheduler: Any) -> int | None:
    """How often a scheduler has been stepped; of a chain, its first part."""
    parts = getattr(lr_scheduler, "_schedulers", None)
    if not hasattr(lr_scheduler, "last_epoch") and parts:
        return _count(parts[0])
    return getattr(lr_scheduler, "last_epoch", None)
