"""Rank schedules: functions of clock and readings that give a plan."""

from __future__ import annotations

from dynarank.schedules.base import (
    Answer,
    Clock,
    Decision,
    Mapped,
    Phase,
    RankSchedule,
    Readings,
    Schedule,
    State,
    StatefulSchedule,
    When,
    ask,
    is_stateful,
    start,
    step_of,
    timeline,
)
from dynarank.schedules.budget import Budget, Budgeted
from dynarank.schedules.library.closed_loop import ClosedLoop, closed_loop
from dynarank.schedules.library.cuttlefish import Cuttlefish, cuttlefish
from dynarank.schedules.library.growing import Growing, growing
from dynarank.schedules.library.lora import lora
from dynarank.schedules.library.pufferfish import Hybrid, pufferfish
from dynarank.schedules.library.relora import Restarts, relora
from dynarank.schedules.library.rotating import Rotating, rotating
from dynarank.schedules.lr_aligned import LRAligned
from dynarank.schedules.phases import Phases
from dynarank.schedules.presets import PRESETS, dynamic_rank, full_rank, get_preset, low_rank
from dynarank.schedules.published import published
from dynarank.schedules.replay import Replay, decide_again, replay, spectra_from_records
from dynarank.schedules.serialization import schedule_from_data, schedule_to_data

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
    "When",
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
