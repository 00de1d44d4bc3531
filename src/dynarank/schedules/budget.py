"""Dynamic rank within a budget: what may be spent, and what may be chosen to keep to it.

:mod:`dynarank.allocation.fit_schedule` makes a schedule of it, for a model and a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dynarank.forms import Adapted, AdaptedExecution, Form, LowRank, RankLike
from dynarank.schedules.serialization import serializable

__all__ = ["RANKS", "Budget", "Budgeted"]

RANKS = (1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16)
"""Ranks to choose from, as shares of the output channels: the paper's and smaller ones."""


@serializable
@dataclass(frozen=True)
class Budget:
    """What a whole run may cost: one of three.

    Args:
        flops: training FLOPs over those of the same run at full rank, a share.
        seconds: time of all training steps, measured on this machine before the run; data loading
            and evaluation come on top.
        memory: the peak of a training step: an int in bytes, a float as a share of the peak at
            full rank.

    Raises:
        ValueError: none or several given, or one that is not positive and finite.

    Example:
        >>> Budget(flops=0.62).kind, Budget(flops=0.62).amount
        ('flops', 0.62)
    """

    flops: float | None = None
    seconds: float | None = None
    memory: int | float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ValueError(
                f"a budget is one of flops, seconds and memory, got {', '.join(given) or 'none'}"
            )
        if isinstance(self.amount, bool) or not 0 < self.amount < math.inf:
            raise ValueError(f"a budget of {self.kind} is positive and finite, got {self.amount!r}")

    @property
    def kind(self) -> str:
        """Which of the three it is."""
        return next(name for name, value in vars(self).items() if value is not None)

    @property
    def amount(self) -> float:
        """How much."""
        return getattr(self, self.kind)


@serializable
@dataclass(frozen=True)
class Budgeted:
    """A wish for dynamic rank within a budget.

    Args:
        budget: what the run may cost.
        rank: the rank; None: chosen from ``RANKS``.
        to: the ending, ``"adapted"`` or ``"low-rank"``; None: chosen.
        decomposition: the decomposition's name.
        alpha: the adapter's scale is ``alpha / rank``.
        execution: how the adapted form multiplies.

    Example:
        >>> len(list(Budgeted(Budget(flops=0.62)).candidates()))
        12
    """

    budget: Budget
    rank: RankLike | None = None
    to: str | None = None
    decomposition: str = "svd"
    alpha: float = 16.0
    execution: AdaptedExecution = "auto"

    def candidates(self) -> Iterator[tuple[LowRank, Form]]:
        """The forms before and after full rank to choose from: higher ranks first."""
        for rank in RANKS if self.rank is None else (self.rank,):
            low = LowRank(rank, self.decomposition)
            if self.to != "low-rank":
                yield low, Adapted(rank, self.decomposition, self.alpha, self.execution)
            if self.to != "adapted":
                yield low, low
