"""The smallest total or end that a schedule can meet, for the refusal of a smaller one.

What a total of a run leaves for the last cut depends on the times of the cuts, on the cost of all
but the scheduled layers and on their smallest ranks. So it is found by asking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from dynarank.forms import Within
from dynarank.schedules.base import RankSchedule
from dynarank.schedules.budget_error import BudgetError
from dynarank.schedules.dynamic import Budgeted
from dynarank.schedules.options import share_within
from dynarank.schedules.rank_decay import Decay

__all__ = ["met"]

_T = TypeVar("_T")
_GRID = 10_000  # shares are advised to four digits


def met(schedule: RankSchedule, check: Callable[[RankSchedule], _T]) -> _T:
    """What ``check`` returns for a schedule; its refusal names the smallest share that it accepts.

    Args:
        schedule: any schedule; of those without a total or an end, refusals pass as they are.
        check: raises BudgetError for a schedule whose budgets cannot be met.

    Raises:
        BudgetError: the budgets cannot be met.

    Example:
        >>> met(Decay(total=0.05, cuts=(0.1,)), lambda schedule: schedule.budgets(100))
        Traceback (most recent call last):
        ...
        dynarank.schedules.budget_error.BudgetError: total=0.05 of the FLOPs cannot be met; ...
    """
    try:
        return check(schedule)
    except BudgetError as error:
        if (asked := _asked(schedule)) is None or (least := _least(schedule, check)) is None:
            raise
        name, budget = asked
        unit = str(replace(budget, **{budget.kind: 1.0})).partition(" of ")[2]
        raise BudgetError(
            f"{name}={budget.amount!r} of {unit} cannot be met; the smallest possible is {least}, "
            "with the smallest ranks after the last cut: allow that much, or schedule more layers"
        ) from error


def _asked(schedule: RankSchedule) -> tuple[str, Within] | None:
    """The argument from which a schedule finds its budgets, and its name."""
    if isinstance(schedule, Budgeted):
        return "budget", share_within("budget", schedule.budget)
    if isinstance(schedule, Decay):
        return ("total" if schedule.end is None else "end"), schedule.budget
    return None


def _with(schedule: RankSchedule, share: float) -> RankSchedule:
    """The schedule for another share."""
    asked = _asked(schedule)
    assert isinstance(schedule, Budgeted | Decay) and asked is not None
    name, budget = asked
    return replace(schedule, **{name: replace(budget, **{budget.kind: share})})


def _least(schedule: RankSchedule, check: Callable[[RankSchedule], object]) -> float | None:
    """The smallest share that is accepted, by bisection; None: none is."""

    def accepted(places: int) -> bool:
        try:
            check(_with(schedule, places / _GRID))
        except ValueError:
            return False
        return True

    low, high = 0, round(_GRID * (schedule.high if isinstance(schedule, Decay) else 1.0))
    if not accepted(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if accepted(middle) else (middle, high)
    return high / _GRID
