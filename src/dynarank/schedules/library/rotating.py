"""Rotating inflation: groups of layers take turns at full rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache

from dynarank.forms import AdaptedExecution, Form, FullRank, Plan, RankLike
from dynarank.schedules.base import Clock, RankSchedule, Readings, When, step_of
from dynarank.schedules.options import (
    Ending,
    check_count,
    check_when,
    check_within,
    last_form,
    low_form,
)

__all__ = ["Rotating", "consecutive_groups"]


@dataclass(frozen=True)
class Rotating(RankSchedule):
    """Low-rank layers that take turns at full rank, one group of consecutive layers at a time.

    The layers form G groups of consecutive layers. The steps from ``begin`` to ``end`` are divided
    into G * ``turns`` equal parts, and in part i group ``i mod G`` is full-rank. A layer is
    low-rank before its first turn and has the form that ``to`` names after each turn. A run too
    short for all turns has fewer.

    Args:
        rank: the rank of the low-rank layers and of the adapters.
        share: the largest share of all weight entries that is full-rank at a time, in (0, 1]; a
            layer larger than that is a group of its own.
        turns: how often each layer becomes full-rank; each turn but the first starts from the form
            with which the previous turn ended.
        begin: when the first group becomes full-rank, a share of the run (float) or a step (int).
        end: when the last group deflates, a share of the run (float) or a step (int); training
            recovers from the last truncation in the remaining steps. At 1.0 the last group is
            full-rank when the run ends.
        to: ``"low-rank"``: truncate after each turn; memory and cost stay near those of low-rank
            training. ``"adapted"``: freeze W and add a zero-output adapter; the function is
            unchanged, but the frozen weights of all layers that have had a turn stay in memory, and
            an adapted step costs more than a low-rank one.
        decomposition: the decomposition's name.
        alpha: the adapter's scale is ``alpha / rank``.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`.

    Raises:
        ValueError: a share outside (0, 1], no turns, times outside the run or out of order, an
            unknown ending, an impossible rank.

    Example:
        >>> layers = {path: (8, 8) for path in "abcd"}
        >>> schedule = Rotating(2, turns=1, end=1.0)
        >>> [path for path, form in schedule(Clock(30, 100), Readings(layers)).items()
        ...  if form == FullRank()]
        ['b']
    """

    rank: RankLike = 0.5
    _: KW_ONLY
    share: float = 0.25
    turns: int = 4
    begin: When = 0.0
    end: When = 0.9
    to: Ending = "low-rank"
    decomposition: str = "svd"
    alpha: float = 16.0
    execution: AdaptedExecution = "auto"

    low, last = cached_property(low_form), cached_property(last_form)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.last.rank)
        check_within("share", self.share, "(0, 1]")
        object.__setattr__(self, "turns", check_count("turns", self.turns))
        object.__setattr__(self, "begin", check_when("begin", self.begin))
        object.__setattr__(self, "end", check_when("end", self.end))
        if type(self.begin) is type(self.end) and not self.begin < self.end:
            raise ValueError(f"begin comes before end, got {self.begin!r} and {self.end!r}")

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """The form of every layer at this step.

        Raises:
            ValueError: ``begin`` is a share and ``end`` a step, or the reverse, and ``begin`` does
                not come before ``end`` in a run of this length.
        """
        begin, end = step_of(self.begin, clock.total_steps), step_of(self.end, clock.total_steps)
        if begin > end:
            raise ValueError(
                f"begin comes before end, but {self.begin!r} and {self.end!r} are the steps "
                f"{begin} and {end} in a run of {clock.total_steps}"
            )
        sizes = tuple(math.prod(shape) for shape in readings.layers.values())
        groups = consecutive_groups(sizes, self.share)
        count = _count(groups)
        part = _part(clock.step - begin, end - begin, self.turns, max(count, 1))
        forms = (self._form(group, part, count) for group in groups)
        return dict(zip(readings.layers, forms, strict=True))

    def _form(self, group: int, part: int | None, count: int) -> Form:
        """The form of a group's layers in a part of the window; None: the window is over."""
        if part is None:
            return self.last
        if 0 <= part and part % count == group:
            return FullRank()
        return self.last if part >= group else self.low


def _part(step: int, steps: int, turns: int, groups: int) -> int | None:
    """The part of the window of ``steps`` that contains a step; -1 before the window, None after.

    Part i of n begins at step ceil(i * steps / n), so that parts differ by at most one step. In a
    short window there are fewer turns, not parts without a step: every group must have its turn.
    """
    if step < 0:
        return -1
    if step >= steps:
        return None
    parts = groups * max(1, min(turns, steps // groups))
    return step * parts // steps


@lru_cache(maxsize=64)
def consecutive_groups(sizes: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Partition the layers into the fewest consecutive groups, as equal as possible.

    A group of two layers or more has at most ``share`` of the sum of ``sizes``. Among all
    partitions into the fewest groups, this one minimizes the largest such group.

    Args:
        sizes: the number of weight entries of each layer, in network order.
        share: the largest share of the entries in one group, in (0, 1].

    Returns:
        The group of each layer.

    Example:
        >>> consecutive_groups((4, 4, 4, 4, 4, 4), 0.5)
        (0, 0, 0, 1, 1, 1)
        >>> consecutive_groups((1, 1, 100, 1), 0.25)
        (0, 0, 1, 2)
    """
    most = math.floor(share * sum(sizes))
    fewest = _count(_fill(sizes, most))
    low, high = -1, most  # the fewest groups suffice at a limit of high, not at low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _count(_fill(sizes, middle)) == fewest else (middle, high)
    return _fill(sizes, high)


def _fill(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """Fill each group greedily until the next layer would exceed ``most``.

    This gives the fewest groups, since every part of an admissible group is admissible too.
    """
    groups: list[int] = []
    held = 0
    for size in sizes:
        fits = bool(groups) and held + size <= most
        groups.append(groups[-1] + (not fits) if groups else 0)
        held = held + size if fits else size
    return tuple(groups)


def _count(groups: Sequence[int]) -> int:
    return max(groups, default=-1) + 1
