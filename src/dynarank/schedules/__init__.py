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
from dynarank.schedules.cuttlefish import Cuttlefish, cuttlefish
from dynarank.schedules.data import schedule_from_data, schedule_to_data
from dynarank.schedules.growing import Growing, growing
from dynarank.schedules.lora import lora
from dynarank.schedules.lr_aligned import LRAligned
from dynarank.schedules.phases import Phases
from dynarank.schedules.presets import PRESETS, dynamic_rank, full_rank, get_preset, low_rank
from dynarank.schedules.published import published
from dynarank.schedules.pufferfish import Hybrid, pufferfish
from dynarank.schedules.relora import Restarts, relora
from dynarank.schedules.replay import Replay, decide_again, replay, spectra_from_records
from dynarank.schedules.rotating import Rotating, rotating
from dynarank.schedules.spectral import ClosedLoop, closed_loop

__all__ = [
    "PRESETS",
    "Answer",
    "Budget",
    "Budgeted",
    "Clock",
    "ClosedLoop",
    "Cuttlefish",
    "Decision",
    "Growing",
    "Hybrid",
    "LRAligned",
    "Mapped",
    "Moment",
    "Phase",
    "Phases",
    "RankSchedule",
    "Readings",
    "Replay",
    "Restarts",
    "Rotating",
    "Schedule",
    "State",
    "StatefulSchedule",
    "ask",
    "closed_loop",
    "cuttlefish",
    "decide_again",
    "dynamic_rank",
    "full_rank",
    "get_preset",
    "growing",
    "is_stateful",
    "lora",
    "low_rank",
    "published",
    "pufferfish",
    "relora",
    "replay",
    "rotating",
    "schedule_from_data",
    "schedule_to_data",
    "spectra_from_records",
    "start",
    "step_of",
    "timeline",
]
