"""What several schedules take alike: moments of the run, and what layers deflate to."""

from __future__ import annotations

import operator
from typing import Literal, SupportsIndex, TypeAlias

from dynarank.forms import Adapted, AdaptedExecution, LowRank, RankLike
from dynarank.schedules.base import When

__all__ = ["Ending", "check_when", "check_within", "ending"]

Ending: TypeAlias = Literal["adapted", "low-rank"]
"""What a layer deflates to: a frozen weight with a zero-output adapter, or truncated factors."""


def check_when(name: str, moment: When) -> When:
    """The moment, with other libraries' numbers made Python's.

    Raises:
        ValueError: a step below 0, or a share outside [0, 1].

    Example:
        >>> check_when("begin", 0.5)
        0.5
    """
    if isinstance(moment, SupportsIndex) and not isinstance(moment, bool):
        moment = operator.index(moment)
    else:
        moment = float(moment)
    if moment < 0 or (isinstance(moment, float) and not moment <= 1):
        raise ValueError(
            f"{name} is a step (int >= 0) or a share of the run (float in [0, 1]), got {moment!r}"
        )
    return moment


def ending(
    to: Ending, rank: RankLike, decomposition: str, alpha: float, execution: AdaptedExecution
) -> LowRank | Adapted:
    """The form that layers deflate to.

    Raises:
        ValueError: an unknown ending, or an impossible rank.

    Example:
        >>> ending("low-rank", 8, "svd", 16.0, "auto")
        LowRank(rank=8, decomposition='svd')
    """
    if to not in ("adapted", "low-rank"):
        raise ValueError(f'a layer deflates to "adapted" or "low-rank", got {to!r}')
    if to == "low-rank":
        return LowRank(rank, decomposition)
    return Adapted(rank, decomposition, alpha, execution)


def check_within(name: str, value: float, interval: str) -> None:
    """Raise for a number outside an interval, written as ``"(0, 1]"``.

    Raises:
        ValueError: it is outside, or not a number.

    Example:
        >>> check_within("share", 1.0, "(0, 1]")
    """
    low, high = map(float, interval[1:-1].split(","))
    below = value < low or (value == low and interval[0] == "(")
    above = value > high or (value == high and interval[-1] == ")")
    if below or above or value != value:
        raise ValueError(f"{name} lies in {interval}, got {value!r}")
