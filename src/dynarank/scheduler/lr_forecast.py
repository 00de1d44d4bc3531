"""The learning rate's forecast, from a copy of the user's scheduler that is run ahead.

Nothing of the user's is touched: the scheduler is copied with a stand-in for its optimizer, which
has the groups' numbers and no parameters of the model's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["POINTS", "Forecast", "foresee"]

POINTS = 1001
"""How many learning rates a forecast holds, from the first step of a run to its last."""


class Forecast:
    """What is known of a run's learning rate: nothing, all of it, or more as the run goes on.

    How many optimizer steps lie between two steps of the LR scheduler is not given anywhere, so it
    is watched: a scheduler that is stepped once an epoch is understood at the end of the first.

    Args:
        source: a learning-rate scheduler; the rates of the run themselves, at equal distances; or
            None for nothing.
        total_steps: optimizer steps of the run.

    Raises:
        ValueError: rates that are not positive and finite.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> forecast = Forecast(torch.optim.lr_scheduler.StepLR(optimizer, 5), 10)
        >>> forecast.rates  # nobody knows yet how often it is stepped
        ()
    """

    def __init__(self, source: Any | Sequence[float] | None, total_steps: int) -> None:
        self.total_steps = total_steps
        self.rates: tuple[float, ...] = ()
        self._scheduler: Any = None
        self._copy: Any = None
        if isinstance(source, Sequence):
            self.rates = _checked(source)
        elif source is not None and not isinstance(source, ReduceLROnPlateau):
            self._scheduler, self._copy = source, _detached(source)
        self._seen = (0, _count(self._scheduler) or 0)  # the last step at which its count rose
        self._every: float | None = None
        self._rises = 0

    def watch(self, step: int) -> None:
        """Look at the scheduler after an optimizer step, and update the forecast if it can be.

        Its first rise is seen before or after the step it belongs to, by the order of the user's
        calls; from the first to the second the distance is exact.
        """
        count = _count(self._scheduler)
        if self._copy is None or count is None or count <= self._seen[1] or self._rises == 2:
            return
        since = step - self._seen[0] if self._rises else max(1, step - 1)
        every = since / (count - self._seen[1])
        self._seen, self._rises = (step, count), self._rises + 1
        if every != self._every:
            self._every = every
            self.rates = foresee(self._copy, self.total_steps, every)

    def state_dict(self) -> dict[str, Any]:
        """What is known, as plain data."""
        return {
            "rates": list(self.rates),
            "seen": list(self._seen),
            "every": self._every,
            "rises": self._rises,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.rates = tuple(state["rates"])
        self._seen = (int(state["seen"][0]), int(state["seen"][1]))
        self._every, self._rises = state["every"], int(state["rises"])


def foresee(lr_scheduler: Any, total_steps: int, every: float = 1) -> tuple[float, ...]:
    """The first group's learning rate at ``POINTS`` steps, evenly over the run from its first.

    Args:
        lr_scheduler: any of torch's or a subclass of one, as it is before the run; not touched.
        total_steps: optimizer steps of the run.
        every: optimizer steps from one step of the scheduler to the next.

    Returns:
        The rates; empty, with a warning, if the scheduler cannot be run without the user's help.

    Example:
        >>> optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
        >>> rates = foresee(torch.optim.lr_scheduler.MultiStepLR(optimizer, [50], 0.1), 100)
        >>> rates[499], rates[501]
        (1.0, 0.1)
    """
    ahead = _detached(lr_scheduler)
    if ahead is None:
        return ()
    count = max(1, round(total_steps / every))
    rates: list[float] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(count):
                rates.append(float(ahead.optimizer.param_groups[0]["lr"]))
                ahead.step()
    except Exception as error:  # a scheduler that wants a metric, or ends before the run does
        if not rates:
            return _unforeseen(lr_scheduler, error)
        rates += [rates[-1]] * (count - len(rates))
    return tuple(rates[min(i * count // (POINTS - 1), count - 1)] for i in range(POINTS))


def _detached(lr_scheduler: Any) -> Any:
    """A copy with an optimizer of its own; None, with a warning, if there cannot be one."""
    optimizer = getattr(lr_scheduler, "optimizer", None)
    if isinstance(lr_scheduler, ReduceLROnPlateau) or not isinstance(optimizer, Optimizer):
        return None
    try:
        return copy.deepcopy(lr_scheduler, {id(optimizer): _stand_in(optimizer)})
    except Exception as error:
        _unforeseen(lr_scheduler, error)
        return None


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the same numbers in its groups and none of their parameters."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        numbers = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
        groups.append({"params": [Parameter(torch.zeros(1))], **numbers})
    stand_in = torch.optim.SGD(groups, lr=0.0)
    stand_in._opt_called = True  # type: ignore[attr-defined]  # torch looks whether it was stepped
    return stand_in


def _unforeseen(lr_scheduler: Any, error: Exception) -> tuple[float, ...]:
    warnings.warn(
        f"the future of {type(lr_scheduler).__name__} cannot be foreseen ({error}); the learning "
        "rate will be followed as it comes",
        RuntimeWarning,
        stacklevel=3,
    )
    return ()


def _count(lr_scheduler: Any) -> int | None:
    """How often a scheduler has been stepped; of a chain, its first part."""
    parts = getattr(lr_scheduler, "_schedulers", None)
    if not hasattr(lr_scheduler, "last_epoch") and parts:
        return _count(parts[0])
    return getattr(lr_scheduler, "last_epoch", None)


def _checked(rates: Sequence[float]) -> tuple[float, ...]:
    for rate in rates:
        if not 0 <= rate < float("inf"):
            raise ValueError(f"a forecast holds finite rates, not negative ones; got {rate}")
    return tuple(map(float, rates))
