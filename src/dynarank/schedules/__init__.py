"""Rank schedules: functions of clock and readings that give a plan."""

from __future__ import annotations

from dynarank.schedules.base import Clock, Phase, RankSchedule, Readings, timeline
from dynarank.schedules.phases import Moment, Phases, step_of
from dynarank.schedules.presets import PRESETS, dynamic_rank, full_rank, get_preset, low_rank

__all__ = [
    "PRESETS",
    "Clock",
    "Moment",
    "Phase",
    "Phases",
    "RankSchedule",
    "Readings",
    "dynamic_rank",
    "full_rank",
    "get_preset",
    "low_rank",
    "step_of",
    "timeline",
]
