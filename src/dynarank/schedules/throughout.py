"""Constant schedules: full-rank or low-rank training from the first step to the last."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from dynarank.forms import FullRank, LowRank, Plan, RankLike
from dynarank.schedules.base import Clock, RankSchedule, Readings

__all__ = ["FullRankThroughout", "LowRankThroughout"]


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
