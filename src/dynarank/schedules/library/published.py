"""Dynamic rank with the values of the published code."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from dynarank.forms import Adapted, FullRank, LowRank, Rank, RankLike, Request
from dynarank.schedules.base import Clock, RankSchedule, Readings, When
from dynarank.schedules.phases import Phases

__all__ = ["PUBLISHED_ALPHAS", "Published"]

# By decomposition; what the published code calls CP is "separable" here.
PUBLISHED_ALPHAS = {"svd": 16.0, "tucker": 1.0, "separable": 64.0}
_HALF = Rank(0.5, of="out")


@dataclass(frozen=True)
class Published(RankSchedule):
    """Low-rank, full-rank, then adapted with two-branch execution, at the published code's values.

    To reproduce the published code, also pass ``RankScheduler(..., moments="reset")``: each of its
    three models has its own optimizer, whose momentum starts at zero.

    Args:
        rank: the rank of every layer; by default half of its output channels.
        inflate: when to inflate, a share of the run (float) or a step (int): epoch 55 of 150
            (CIFAR-10); 80 of 200 (CIFAR-100).
        deflate: when to deflate, a share of the run (float) or a step (int): epoch 120 of 150; 170
            of 200.
        decomposition: the decomposition's name; it determines alpha, 16 for those that the
            published code does not have.

    Raises:
        ValueError: transition points that do not increase, or an impossible rank.

    Example:
        >>> Published(8, decomposition="tucker").last
        Adapted(rank=8, decomposition='tucker', alpha=1.0, execution='two-branch')

    Evidence: ``docs/evidence.md``, beside fixed low rank of the same FLOPs.

    Reference:
        Shin, Jung, Hong, Lee, "Dynamic Rank Adjustment for Accurate and Efficient Neural Network
        Training", arXiv 2508.08625, 2025, and its code.
    """

    rank: RankLike = _HALF
    _: KW_ONLY
    inflate: When = 55 / 150
    deflate: When = 120 / 150
    decomposition: str = "svd"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.last.rank)
        _, inflate, deflate = self._phases.starts
        object.__setattr__(self, "inflate", inflate)
        object.__setattr__(self, "deflate", deflate)

    @cached_property
    def last(self) -> Adapted:
        """The form after deflation."""
        alpha = PUBLISHED_ALPHAS.get(self.decomposition, 16.0)
        return Adapted(self.rank, self.decomposition, alpha, "two-branch")

    @cached_property
    def _phases(self) -> Phases:
        forms = LowRank(self.rank, self.decomposition), FullRank(), self.last
        return Phases((0.0, self.inflate, self.deflate), forms)

    def __call__(self, clock: Clock, readings: Readings, /) -> Request:
        """The form of the current phase, for every layer."""
        return self._phases(clock, readings)
