"""Options shared by several schedules: times, ranks and endings."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeAlias

from dynarank.decompositions import get_decomposition
from dynarank.forms import Adapted, LowRank, RankLike, Within
from dynarank.schedules.base import When

__all__ = [
    "Ending",
    "check_count",
    "check_when",
    "check_within",
    "last_form",
    "low_form",
    "rank_within",
    "share_within",
]

Ending: TypeAlias = Literal["adapted", "low-rank"]
"""How a layer deflates: to a frozen weight with a zero-output adapter, or to truncated factors."""


def check_count(name: str, count: int, least: int = 1) -> int:
    """Check a whole number and convert it to a Python int.

    Raises:
        ValueError: it is not whole, or below ``least``.

    Example:
        >>> import numpy as np
        >>> check_count("turns", np.int64(3))
        3
    """
    if isinstance(count, SupportsIndex) and not isinstance(count, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        if (found := operator.index(count)) >= least:
            return found
    raise ValueError(f"{name} is a whole number of at least {least}, got {count!r}")


def check_when(name: str, when: When) -> When:
    """Check a time and convert it to a Python number.

    Raises:
        ValueError: a step below 0, or a share outside [0, 1].

    Example:
        >>> check_when("begin", 0.5)
        0.5
    """
    if isinstance(when, SupportsIndex) and not isinstance(when, bool):
        when = operator.index(when)
    else:
        when = float(when)
    if when < 0 or (isinstance(when, float) and not when <= 1):
        raise ValueError(
            f"{name} is a step (int >= 0) or a share of the run (float in [0, 1]), got {when!r}"
        )
    return when


def share_within(name: str, budget: object, decomposition: str | None = None) -> Within:
    """A budget as a :class:`dynarank.Within`; a plain number is a share of the model's FLOPs.

    It is met to a single direction, since its cost is what was asked for.

    Raises:
        ValueError: it is not a share in (0, 1], or has another decomposition than the one named.

    Example:
        >>> share_within("end", 0.5, "tucker")
        Within(flops=0.5, decomposition='tucker', multiple_of=1)
    """
    if isinstance(budget, SupportsFloat) and not isinstance(budget, bool):
        name = decomposition or "svd"
        return Within(flops=float(budget), decomposition=name, multiple_of=1)
    if not isinstance(budget, Within) or not isinstance(budget.amount, float):
        raise ValueError(
            f"{name} is a share of full rank, a number in (0, 1] or a Within with one, got "
            f"{budget!r}"
        )
    if decomposition is None:
        return budget
    if budget.decomposition not in ("svd", decomposition):
        raise ValueError(
            f"{name} has the decomposition {budget.decomposition!r}, got {decomposition!r} as well"
        )
    return replace(budget, decomposition=decomposition)


def low_form(schedule: Any) -> LowRank:
    """The low-rank form of a schedule, from its fields ``rank`` and ``decomposition``."""
    return LowRank(schedule.rank, schedule.decomposition)


def last_form(schedule: Any) -> LowRank | Adapted:
    """The form that layers deflate to, from the schedule's ``to`` and its adapter fields.

    Raises:
        ValueError: an unknown ending, or an impossible rank.

    Example:
        >>> from dynarank.schedules.lr_aligned import DynamicRank
        >>> last_form(DynamicRank(8, to="low-rank"))
        LowRank(rank=8, decomposition='svd')
    """
    if schedule.to not in ("adapted", "low-rank"):
        raise ValueError(f'a layer deflates to "adapted" or "low-rank", got {schedule.to!r}')
    if schedule.to == "low-rank":
        return low_form(schedule)
    rank, alpha = schedule.rank, schedule.alpha
    return Adapted(rank, schedule.decomposition, alpha, schedule.execution)


def check_within(name: str, value: float, interval: str) -> None:
    """Check that a number lies in an interval, written as ``"(0, 1]"``.

    Raises:
        ValueError: the value is outside, or not a number.

    Example:
        >>> check_within("share", 1.0, "(0, 1]")
    """
    low, high = map(float, interval[1:-1].split(","))
    below = value < low or (value == low and interval[0] == "(")
    above = value > high or (value == high and interval[-1] == ")")
    if below or above or value != value:
        raise ValueError(f"{name} lies in {interval}, got {value!r}")


@lru_cache(4096, typed=True)  # called for every layer at every step; 1 and 1.0 are two ranks
def rank_within(rank: RankLike, shape: tuple[int, ...], decomposition: str) -> int:
    """Resolve ``rank`` to a number of directions; an int above the layer's limit means the limit.

    Example:
        >>> rank_within(100, (16, 8, 3, 3), "svd"), rank_within(0.5, (16, 8, 3, 3), "svd")
        (16, 6)
    """
    known = get_decomposition(decomposition)
    if isinstance(rank, int):
        return min(rank, known.limit(shape))
    return known.resolve_rank(rank, shape)
