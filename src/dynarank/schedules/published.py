"""The paper's method as its published code runs it, in what a schedule decides."""

from __future__ import annotations

from dynarank.forms import Adapted, FullRank, LowRank, RankLike
from dynarank.schedules.base import When
from dynarank.schedules.phases import Phases

__all__ = ["PUBLISHED_ALPHAS", "published"]

# By decomposition; what the published code calls CP is "separable" here.
PUBLISHED_ALPHAS = {"svd": 16.0, "tucker": 1.0, "separable": 64.0}


def published(
    rank: RankLike = 0.5,
    *,
    inflate: When = 55 / 150,
    deflate: When = 120 / 150,
    decomposition: str = "svd",
) -> Phases:
    """Low-rank, full-rank, then adapted in two branches, each at the published code's values.

    The rest of it is the scheduler's: ``RankScheduler(..., moments="reset")``, for each of its
    three models has an optimizer of its own, whose momentum is zero at the change.

    Args:
        rank: half of the output channels, in every layer.
        inflate: epoch 55 of 150 (CIFAR-10); 80 of 200 (CIFAR-100).
        deflate: epoch 120 of 150; 170 of 200.
        decomposition: the decomposition's name; it sets alpha, 16 for one the code does not have.

    Raises:
        ValueError: moments that do not increase.

    Example:
        >>> published(0.5, decomposition="tucker").forms[2]
        Adapted(rank=0.5, decomposition='tucker', alpha=1.0, execution='two-branch')

    Reference:
        Shin, Jung, Hong, Lee, "Dynamic Rank Adjustment for Accurate and Efficient Neural Network
        Training", arXiv 2508.08625, 2025, and its code.
    """
    last = Adapted(rank, decomposition, PUBLISHED_ALPHAS.get(decomposition, 16.0), "two-branch")
    return Phases((0.0, inflate, deflate), (LowRank(rank, decomposition), FullRank(), last))
