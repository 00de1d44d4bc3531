"""The names of :mod:`dynarank.schedules` for type checkers; at run time they load lazily."""

from dynarank.schedules.base import (
    Answer,
    Clock,
    Decision,
    FunctionSchedule,
    Mapped,
    RankSchedule,
    Readings,
    Schedule,
    State,
    When,
    as_schedule,
    step_of,
)
from dynarank.schedules.catalog import SCHEDULES, get_preset
from dynarank.schedules.dynamic import Budgeted, dynamic_rank
from dynarank.schedules.fitted import FittedCost, FittedMemory
from dynarank.schedules.library.closed_loop import ClosedLoop
from dynarank.schedules.library.cuttlefish import Cuttlefish
from dynarank.schedules.library.growing import Growing
from dynarank.schedules.library.lora import LoRA
from dynarank.schedules.library.published import Published
from dynarank.schedules.library.pufferfish import Pufferfish
from dynarank.schedules.library.relora import ReLoRA
from dynarank.schedules.library.rotating import Rotating
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.schedules.phases import Phases
from dynarank.schedules.rank_decay import Decay
from dynarank.schedules.recorded import Replay, decide_again, replay, spectra_from_records
from dynarank.schedules.serialization import schedule_from_data, schedule_to_data, serializable
from dynarank.schedules.throughout import FullRankThroughout, LowRankThroughout, low_rank
from dynarank.schedules.timelines import Phase, timeline

CLASSES: dict[str, str]

closed_loop = ClosedLoop
cuttlefish = Cuttlefish
decay = Decay
full_rank = FullRankThroughout
growing = Growing
lora = LoRA
published = Published
pufferfish = Pufferfish
relora = ReLoRA
rotating = Rotating

__all__ = [
    "SCHEDULES",
    "Answer",
    "Budgeted",
    "Clock",
    "ClosedLoop",
    "Cuttlefish",
    "Decay",
    "Decision",
    "DynamicRank",
    "FittedCost",
    "FittedMemory",
    "FullRankThroughout",
    "FunctionSchedule",
    "Growing",
    "LoRA",
    "LowRankThroughout",
    "Mapped",
    "Phase",
    "Phases",
    "Published",
    "Pufferfish",
    "RankSchedule",
    "ReLoRA",
    "Readings",
    "Replay",
    "Rotating",
    "Schedule",
    "State",
    "When",
    "as_schedule",
    "closed_loop",
    "cuttlefish",
    "decay",
    "decide_again",
    "dynamic_rank",
    "full_rank",
    "get_preset",
    "growing",
    "lora",
    "low_rank",
    "published",
    "pufferfish",
    "relora",
    "replay",
    "rotating",
    "schedule_from_data",
    "schedule_to_data",
    "serializable",
    "spectra_from_records",
    "step_of",
    "timeline",
]
