"""The arms: a schedule and a learning rate, relative to the problem's, for each problem."""

from __future__ import annotations

from dataclasses import dataclass

from dynarank.forms import FullRank, LowRank, Rank, Within
from dynarank.schedules import Phases
from dynarank.schedules.base import RankSchedule


@dataclass(frozen=True)
class Arm:
    """A named schedule with the factor of the learning rate that was best for it."""

    name: str
    schedule: RankSchedule
    rate: float


def low(share: float) -> RankSchedule:
    """Fixed low rank, a share of the largest rank."""
    return Phases([0.0], [LowRank(Rank(share, of="min"))])


def fixed(flops: float) -> RankSchedule:
    """Fixed low rank, uniform, of this cost."""
    return Phases([0.0], [Within(flops=flops, ranks="uniform")])


def decay(**budgets: float) -> RankSchedule:
    """Full rank, then budgets of FLOPs: ``decay(at5=.3)`` is .3 from 5% of the run on."""
    starts = [float(at.removeprefix("at")) / 100 for at in budgets]
    return Phases([0.0, *starts], [FullRank(), *(Within(flops=b) for b in budgets.values())])


FULL = Phases([0.0], [FullRank()])

ARMS = {
    "fash": [
        Arm("full rank", FULL, 1.4),
        Arm("low rank", low(1 / 16), 4),
        Arm("decay to .44", decay(at10=0.6, at20=0.44), 1.4),
        Arm("decay to .117", decay(at8=0.3, at20=0.117), 2),
    ],
    "lm2": [
        Arm("full rank", FULL, 2),
        Arm("low rank", low(1 / 4), 1),
    ],
}
