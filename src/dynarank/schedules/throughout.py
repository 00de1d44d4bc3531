"""Constant schedules: full-rank or low-rank training from the first step to the last."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

from dynarank.forms import FullRank, LowRank, Plan, RankLike, Within
from dynarank.schedules.base import Clock, RankSchedule, Readings
from dynarank.schedules.options import share_within
from dynarank.schedules.phases import Phases

__all__ = ["FullRankThroughout", "LowRankThroughout", "low_rank"]


@dataclass(frozen=True)
class FullRankThroughout(RankSchedule):
    """Every layer full-rank throughout: ordinary training.

    Example:
        >>> FullRankThroughout()(Clock(0, 10), Readings({"a": (8, 8)}))
        {'a': FullRank()}
    """

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """Full-rank, every layer."""
        return dict.fromkeys(readings.layers, FullRank())


@dataclass(frozen=True)
class LowRankThroughout(RankSchedule):
    """Every layer low-rank throughout: ``W = join(factors)`` from the first step to the last.

    Args:
        rank: the rank of every layer.
        decomposition: the decomposition's name.

    Raises:
        ValueError: an impossible rank.

    Example:
        >>> LowRankThroughout(8)(Clock(0, 10), Readings({"a": (64, 64)}))
        {'a': LowRank(rank=8, decomposition='svd')}
    """

    rank: RankLike = 0.5
    _: KW_ONLY
    decomposition: str = "svd"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.form.rank)

    @cached_property
    def form(self) -> LowRank:
        """The form of every layer."""
        return LowRank(self.rank, self.decomposition)

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """Low-rank, every layer."""
        return dict.fromkeys(readings.layers, self.form)


def low_rank(
    rank: RankLike | None = None,
    *,
    budget: float | Within | None = None,
    decomposition: str | None = None,
) -> RankSchedule:
    """Every layer low-rank throughout: at a rank, or at the ranks that cost a budget.

    Args:
        rank: the rank of every layer; None: 0.5, half of each layer's own cost.
        budget: the training FLOPs relative to full rank, a share or a :class:`dynarank.Within`:
            every layer gets the same share of its own cost.
        decomposition: the decomposition's name.

    Raises:
        ValueError: both a rank and a budget, or an impossible value.

    Example:
        >>> low_rank(8)
        LowRankThroughout(rank=8, decomposition='svd')
        >>> low_rank(budget=0.5)(Clock(0, 10), Readings({"a": (64, 64)}))
        {'a': Within(flops=0.5, ranks='uniform', multiple_of=1)}

    Evidence: ``docs/evidence.md``: with its own learning rate it is often enough.
    """
    if rank is not None and budget is not None:
        raise ValueError(
            f"low rank is of a rank or of a budget, got rank={rank!r} and budget={budget!r}; "
            "leave out one"
        )
    if budget is None:
        return LowRankThroughout(
            0.5 if rank is None else rank, decomposition=decomposition or "svd"
        )
    found = share_within("budget", budget, decomposition)
    return Phases((0.0,), (replace(found, ranks="uniform"),))
