"""The named schedules: full-rank, low-rank, and the paper's dynamic rank with both its endings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, overload

from dynarank.forms import Adapted, AdaptedExecution, Form, FullRank, LowRank, RankLike
from dynarank.schedules.base import Schedule, When
from dynarank.schedules.budget import Budget, Budgeted
from dynarank.schedules.library.closed_loop import closed_loop
from dynarank.schedules.library.cuttlefish import cuttlefish
from dynarank.schedules.library.growing import growing
from dynarank.schedules.library.lora import lora
from dynarank.schedules.library.pufferfish import pufferfish
from dynarank.schedules.library.relora import relora
from dynarank.schedules.library.rotating import rotating
from dynarank.schedules.lr_aligned import LRAligned
from dynarank.schedules.options import Ending
from dynarank.schedules.phases import Phases
from dynarank.schedules.published import published

__all__ = ["PRESETS", "dynamic_rank", "full_rank", "get_preset", "low_rank"]


def full_rank() -> Phases:
    """Every layer full-rank throughout: ordinary training.

    Example:
        >>> full_rank().forms
        (FullRank(),)
    """
    return Phases((0.0,), (FullRank(),))


def low_rank(rank: RankLike = 0.5, *, decomposition: str = "svd") -> Phases:
    """Every layer low-rank throughout: ``W = join(factors)`` from the first step to the last.

    Example:
        >>> low_rank(8).forms
        (LowRank(rank=8, decomposition='svd'),)
    """
    return Phases((0.0,), (LowRank(rank, decomposition),))


@overload
def dynamic_rank(
    rank: RankLike | None = None,
    *,
    inflate: When | None = None,
    deflate: When | None = None,
    to: Ending | None = None,
    budget: None = None,
    decomposition: str = "svd",
    alpha: float = 16.0,
    execution: AdaptedExecution = "auto",
) -> Phases | LRAligned: ...


@overload
def dynamic_rank(
    rank: RankLike | None = None,
    *,
    inflate: None = None,
    deflate: None = None,
    to: Ending | None = None,
    budget: Budget | float,
    decomposition: str = "svd",
    alpha: float = 16.0,
    execution: AdaptedExecution = "auto",
) -> Budgeted: ...


def dynamic_rank(
    rank: RankLike | None = None,
    *,
    inflate: When | None = None,
    deflate: When | None = None,
    to: Ending | None = None,
    budget: Budget | float | None = None,
    decomposition: str = "svd",
    alpha: float = 16.0,
    execution: AdaptedExecution = "auto",
) -> Phases | LRAligned | Budgeted:
    """Low-rank, full-rank from ``inflate`` on, deflated from ``deflate`` on.

    Inflate while the learning rate is still high (high-noise regime), stay full-rank across its
    first decay, deflate in the low-noise regime. Moments that are not given are found from the
    learning rate, see :class:`~dynarank.schedules.LRAligned`. Within a budget, the length of the
    full-rank phase is found too, and the rank and the ending unless they are given; the rank
    scheduler then needs a batch, ``RankScheduler(..., sample=batch)``.

    Args:
        rank: of the low-rank phase, and of the deflated one; None: 0.5, or within a budget found.
        inflate: when to inflate, a share of the run (float) or a step (int); None: found.
        deflate: when to deflate, likewise.
        to: ``"adapted"``, the paper's: freeze W, add a zero-output adapter; the function is
            unchanged. ``"low-rank"``: truncate; the cost really falls. None: adapted, or within a
            budget found.
        budget: a share of the training FLOPs of full rank, or a :class:`Budget`.
        decomposition: the decomposition's name.
        alpha: the adapter's scale is ``alpha / rank``.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`.

    Raises:
        ValueError: moments that do not increase, or are given beside a budget; an unknown ending;
            an impossible rank.

    Example:
        >>> dynamic_rank(0.5, inflate=55 / 150, deflate=120 / 150).starts[1:]
        (0.36666666666666664, 0.8)

    Reference:
        Shin, Jung, Hong, Lee, "Dynamic Rank Adjustment for Accurate and Efficient Neural Network
        Training", arXiv 2508.08625, 2025. Its CIFAR-10 epochs are 55 and 120 of 150.
    """
    if to not in ("adapted", "low-rank", None):
        raise ValueError(f'dynamic rank deflates to "adapted" or "low-rank", got {to!r}')
    if budget is not None:
        if inflate is not None or deflate is not None:
            raise ValueError(
                "within a budget the moments are found; give a budget or inflate and deflate, got "
                f"inflate={inflate!r}, deflate={deflate!r}, budget={budget!r}"
            )
        wanted = budget if isinstance(budget, Budget) else Budget(flops=budget)
        return Budgeted(wanted, rank, to, decomposition, alpha, execution)
    rank = 0.5 if rank is None else rank
    low = LowRank(rank, decomposition)
    last: Form = low if to == "low-rank" else Adapted(rank, decomposition, alpha, execution)
    if inflate is None or deflate is None:
        return LRAligned(low, last, inflate=inflate, deflate=deflate)
    return Phases((0.0, inflate, deflate), (low, FullRank(), last))


def _full_rank(**_: Any) -> Phases:
    return full_rank()


def _low_rank(rank: RankLike = 0.5, decomposition: str = "svd", **_: Any) -> Phases:
    return low_rank(rank, decomposition=decomposition)


def _taking(make: Callable[..., Schedule], **options: Any) -> Schedule:
    """The schedule with those of the options that it knows."""
    return make(**{name: options[name] for name in signature(make).parameters if name in options})


def _aligned(**options: Any) -> Schedule:
    """Dynamic rank whose moments are found, whatever moments there are."""
    free = {k: v for k, v in options.items() if k not in ("inflate", "deflate")}
    return dynamic_rank(**free)


PRESETS: dict[str, Callable[..., Schedule]] = {
    "full-rank": _full_rank,
    "low-rank": _low_rank,
    "dynamic-rank": partial(dynamic_rank, to="adapted"),
    "dynamic-rank-low": partial(dynamic_rank, to="low-rank"),
    "aligned": _aligned,
    "published": partial(_taking, published),
    "lora": partial(_taking, lora),
    "relora": partial(_taking, relora),
    "pufferfish": partial(_taking, pufferfish),
    "cuttlefish": partial(_taking, cuttlefish),
    "growing": partial(_taking, growing),
    "rotating": partial(_taking, rotating),
    "closed-loop": partial(_taking, closed_loop),
}
"""Schedules by name, each taking ``dynamic_rank``'s keyword arguments and using those it needs."""


def get_preset(name: str) -> Callable[..., Schedule]:
    """The schedule of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
