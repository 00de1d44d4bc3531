"""Pufferfish: full-rank, then low-rank except for the first and last layers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

from dynarank.forms import FullRank, LowRank, Plan, Rank, RankLike
from dynarank.schedules.base import Clock, RankSchedule, Readings, When, step_of
from dynarank.schedules.phases import Phases

__all__ = ["Pufferfish"]

_QUARTER = Rank(0.25, of="min")


@dataclass(frozen=True)
class Pufferfish(RankSchedule):
    """Full-rank until ``switch``, then low-rank at one rank ratio except for first and last layers.

    Args:
        rank: the rank of the low-rank layers; by default a quarter of the full rank,
            min(out, in * kernel).
        switch: when to truncate, a share of the run (float) or a step (int).
        first: how many scheduled layers at the beginning of the network stay full-rank, a number
            (int) or a share of them, rounded down (float).
        last: how many scheduled layers at its end stay full-rank (the classifier), a number (int)
            or a share of them, rounded down (float).
        decomposition: the decomposition's name.

    Raises:
        ValueError: a transition point, a rank or a number of layers out of range.

    Example:
        >>> schedule = Pufferfish(first=1, last=0)
        >>> schedule(Clock(90, 300), Readings({"stem": (64, 3, 3, 3), "conv": (64, 64, 3, 3)}))
        {'stem': FullRank(), 'conv': LowRank(rank=Rank(value=0.25, of='min', multiple_of=1), \
decomposition='svd')}

    Evidence: ``docs/evidence.md``, beside fixed low rank of the same FLOPs.

    Reference:
        Wang, Agarwal, Papailiopoulos, "Pufferfish: Communication-efficient Models At No Extra
        Cost", arXiv 2103.03936, 2021. The defaults are those of its ResNet-18 on CIFAR-10.
    """

    rank: RankLike = _QUARTER
    _: KW_ONLY
    switch: When = 80 / 300
    first: int | float = 1 / 6
    last: int | float = 1
    decomposition: str = "svd"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.form.rank)
        Phases((0, self.switch), (FullRank(), self.form))  # validates the switch
        for count in (self.first, self.last):
            if not count >= 0 or (isinstance(count, float) and count > 1):
                raise ValueError(
                    "layers kept full-rank are a number (int >= 0) or a share (float in [0, 1]), "
                    f"got first={self.first!r}, last={self.last!r}"
                )

    @cached_property
    def form(self) -> LowRank:
        """The form of the layers in between after the switch."""
        return LowRank(self.rank, self.decomposition)

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """The form of every layer at this step.

        Raises:
            ValueError: no layer is left between the first and the last ones.
        """
        plan: Plan = dict.fromkeys(readings.layers, FullRank())
        if clock.step < step_of(self.switch, clock.total_steps):
            return plan
        first, last = (
            int(count * len(plan)) if isinstance(count, float) else count
            for count in (self.first, self.last)
        )
        between = list(plan)[first : len(plan) - last]
        if plan and not between:
            raise ValueError(
                f"of {len(plan)} layers the first {first} and the last {last} stay full-rank, "
                "which leaves none to become low-rank; lower first or last"
            )
        return {**plan, **dict.fromkeys(between, self.form)}
