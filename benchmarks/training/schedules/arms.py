"""The arms: a schedule and a learning rate, relative to the problem's, for each problem.

Rates are the best of those tried on seeds of 100 and more, which are not reported: 0.5, 1, 2 and 4
for full rank, low rank and a decay of fash, fewer for the others and mostly seed 100; vis2 has the
problem's own. "low rank"
is the low end of the gap that the tables speak of; "fixed B" is low rank with the same share of its
own cost in every layer, "dynamic B" what the library chooses for the same total.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynarank.forms import Rank
from dynarank.schedules import decay, dynamic_rank, full_rank, low_rank
from dynarank.schedules.base import RankSchedule


@dataclass(frozen=True)
class Arm:
    """A named schedule with the factor of the learning rate that was best for it."""

    name: str
    schedule: RankSchedule
    rate: float = 1


def budgets(fixed: float, dynamic: float) -> list[Arm]:
    """Fixed and dynamic rank for three budgets, at these rates."""
    pairs = [
        (
            Arm(f"fixed {b}", low_rank(budget=b), fixed),
            Arm(f"dynamic {b}", dynamic_rank(budget=b), dynamic),
        )
        for b in (0.3, 0.5, 0.7)
    ]
    return [arm for pair in pairs for arm in pair]


def share(value: float) -> Rank:
    """A share of the largest rank."""
    return Rank(value, of="min")


ARMS = {
    "fash": [
        Arm("full rank", full_rank(), 2),
        Arm("low rank", low_rank(share(1 / 16)), 4),
        Arm("decay to .44, one cut", decay(end=0.44, cuts=[0.1]), 2),
        Arm("decay to .3, one cut", decay(end=0.3, cuts=[0.1]), 2),
        Arm("decay to .2, one cut", decay(end=0.2, cuts=[0.1]), 2),
        Arm("decay, total .22", decay(total=0.22, cuts=[0.03, 0.06, 0.11, 0.20]), 2),
        *budgets(2, 2),
    ],
    "fash1024": [
        Arm("full rank", full_rank(), 1),
        Arm("low rank", low_rank(share(1 / 16)), 2),
        Arm("decay to .132, one cut", decay(end=0.132, cuts=[0.08]), 2),
    ],
    "lm2": [
        Arm("full rank", full_rank(), 2),
        Arm("low rank", low_rank(share(1 / 4)), 1),
        Arm("dynamic 0.448, 1.0x", dynamic_rank(budget=0.448), 2),
        Arm("dynamic 0.538, 1.2x", dynamic_rank(budget=0.538), 2),
        *budgets(1, 2),
        Arm("dynamic 0.8", dynamic_rank(budget=0.8), 2),
    ],
    "lmw": [
        Arm("full rank", full_rank(), 2),
        Arm("low rank", low_rank(share(1 / 4)), 1),
        Arm("dynamic 0.392, 1.0x", dynamic_rank(budget=0.392), 2),
    ],
    "vis2": [
        Arm("full rank", full_rank()),
        Arm("low rank", low_rank(Rank(1 / 4, of="out"))),
        Arm("fixed 0.5", low_rank(budget=0.5)),
        Arm("decay 0.5", decay(total=0.5)),
    ],
    "visw": [
        Arm("full rank", full_rank()),
        Arm("low rank", low_rank(Rank(1 / 4, of="out"))),
        Arm("fixed 0.5", low_rank(budget=0.5)),
        Arm("decay 0.5", decay(total=0.5)),
    ],
    "vit": [
        Arm("full rank", full_rank()),
        Arm("low rank", low_rank(share(1 / 4))),
        Arm("fixed 0.5", low_rank(budget=0.5)),
        Arm("dynamic 0.5", dynamic_rank(budget=0.5)),
    ],
}
