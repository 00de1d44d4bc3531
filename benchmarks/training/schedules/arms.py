"""The arms: a schedule and a learning rate, relative to the problem's, for each problem."""

from __future__ import annotations

from dataclasses import dataclass

from dynarank.schedules.base import RankSchedule


@dataclass(frozen=True)
class Arm:
    """A named schedule with the factor of the learning rate that was best for it."""

    name: str
    schedule: RankSchedule
    rate: float
