"""LoRA: a frozen weight with a low-rank adapter from the first step on."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from dynarank.forms import Adapted, AdaptedExecution, Plan, RankLike
from dynarank.schedules.base import Clock, RankSchedule, Readings

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA(RankSchedule):
    """Every layer adapted throughout: ``W = W_0 + alpha / rank * up @ down``, W_0 frozen.

    Args:
        rank: the rank of the adapters.
        alpha: the adapter's scale is ``alpha / rank``; the paper sets alpha to the first rank it
            tries and does not tune it.
        decomposition: the decomposition's name.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`.

    Raises:
        ValueError: an impossible rank or alpha.

    Example:
        >>> LoRA(4).form
        Adapted(rank=4, decomposition='svd', alpha=8.0)

    Evidence: ``docs/evidence.md``, beside fixed low rank of the same FLOPs.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, 2021.
    """

    rank: RankLike = 8
    _: KW_ONLY
    alpha: float = 8.0
    decomposition: str = "svd"
    execution: AdaptedExecution = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.form.rank)

    @cached_property
    def form(self) -> Adapted:
        """The form of every layer."""
        return Adapted(self.rank, self.decomposition, self.alpha, self.execution)

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """Adapted, every layer."""
        return dict.fromkeys(readings.layers, self.form)
