"""LoRA as a rank schedule: a frozen weight and a low-rank adapter from the first step on."""

from __future__ import annotations

from dynarank.forms import Adapted, AdaptedExecution, RankLike
from dynarank.schedules.phases import Phases

__all__ = ["lora"]


def lora(
    rank: RankLike = 8,
    *,
    alpha: float = 8.0,
    decomposition: str = "svd",
    execution: AdaptedExecution = "auto",
) -> Phases:
    """Every layer adapted throughout: ``W = W_0 + alpha / rank * up @ down``, W_0 frozen.

    Args:
        rank: of the adapters.
        alpha: the adapter's scale is ``alpha / rank``; the paper takes the first rank that is tried
            and leaves it there.
        decomposition: the decomposition's name.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`.

    Example:
        >>> lora(4).forms
        (Adapted(rank=4, decomposition='svd', alpha=8.0),)

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, 2021.
    """
    return Phases((0.0,), (Adapted(rank, decomposition, alpha, execution),))
