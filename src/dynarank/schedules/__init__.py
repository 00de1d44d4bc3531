"""Rank schedules: functions of clock and readings that give a plan."""

from __future__ import annotations

from dynarank.schedules.base import (
    Answer,
    Clock,
    Decision,
    Mapped,
    Moment,
    Phase,
    RankSchedule,
    Readings,
    Schedule,
    State,
    StatefulSchedule,
    ask,
    is_stateful,
    start,
    step_of,
    timeline,
)
from dynarank.schedules.budgeted import Budget, Budgeted
from dynarank.schedules.lr_aligned import LRAligned
from dynarank.schedules.phases import Phases
from dynarank.schedules.presets import PRESETS, dynamic_rank, full_rank, get_preset, low_rank

__all__ = [
    "PRESETS",
    "Answer",
    "Budget",
    "Budgeted",
    "Clock",
    "Decision",
    "LRAligned",
    "Mapped",
    "Moment",
    "Phase",
    "Phases",
    "RankSchedule",
    "Readings",
    "Schedule",
    "State",
    "StatefulSchedule",
    "ask",
    "dynamic_rank",
    "full_rank",
    "get_preset",
    "is_stateful",
    "low_rank",
    "start",
    "step_of",
    "timeline",
]
