"""What a rank is to one layer's weight: its limit, and whether its factors are cheaper."""

from __future__ import annotations

import math
from functools import lru_cache

from dynarank.decompositions import get_decomposition
from dynarank.forms import RankLike, resolve_rank

__all__ = ["is_cheaper", "rank_limit", "rank_within"]


def rank_limit(shape: tuple[int, ...], decomposition: str) -> int:
    """The largest rank of a weight of this shape.

    Example:
        >>> rank_limit((16, 8, 3, 3), "svd")
        16
    """
    return get_decomposition(decomposition).limit(shape)


@lru_cache(4096, typed=True)  # asked for every layer at every step; 1 and 1.0 are two ranks
def rank_within(rank: RankLike, shape: tuple[int, ...], decomposition: str) -> int:
    """The number of directions that ``rank`` means; an int above the limit means the limit.

    Example:
        >>> rank_within(100, (16, 8, 3, 3), "svd"), rank_within(0.5, (16, 8, 3, 3), "svd")
        (16, 8)
    """
    limit = rank_limit(shape, decomposition)
    return min(rank, limit) if isinstance(rank, int) else resolve_rank(rank, shape, limit)


def is_cheaper(shape: tuple[int, ...], rank: int, decomposition: str) -> bool:
    """Whether the factors have fewer entries than the weight, and so cost fewer FLOPs.

    Example:
        >>> is_cheaper((16, 16), 7, "svd"), is_cheaper((16, 16), 8, "svd")
        (True, False)
    """
    factors = get_decomposition(decomposition).shapes(shape, rank)
    return sum(math.prod(factor) for factor in factors) < math.prod(shape)
