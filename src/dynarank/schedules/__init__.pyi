"""The names of :mod:`dynarank.schedules` for type checkers; at run time they load lazily."""

from dynarank.schedules.base import (
    Answer as Answer,
    Clock as Clock,
    Decision as Decision,
    FunctionSchedule as FunctionSchedule,
    Mapped as Mapped,
    RankSchedule as RankSchedule,
    Readings as Readings,
    Schedule as Schedule,
    State as State,
    When as When,
    as_schedule as as_schedule,
    step_of as step_of,
)
from dynarank.schedules.catalog import (
    SCHEDULES as SCHEDULES,
    get_preset as get_preset,
)
from dynarank.schedules.fitted import (
    FittedCost as FittedCost,
    FittedMemory as FittedMemory,
)
from dynarank.schedules.library.closed_loop import (
    ClosedLoop as ClosedLoop,
    ClosedLoop as closed_loop,
)
from dynarank.schedules.library.cuttlefish import (
    Cuttlefish as Cuttlefish,
    Cuttlefish as cuttlefish,
)
from dynarank.schedules.library.growing import (
    Growing as Growing,
    Growing as growing,
)
from dynarank.schedules.library.lora import (
    LoRA as LoRA,
    LoRA as lora,
)
from dynarank.schedules.library.pufferfish import (
    Pufferfish as Pufferfish,
    Pufferfish as pufferfish,
)
from dynarank.schedules.library.relora import (
    ReLoRA as ReLoRA,
    ReLoRA as relora,
)
from dynarank.schedules.library.rotating import (
    Rotating as Rotating,
    Rotating as rotating,
)
from dynarank.schedules.lr_aligned import (
    DynamicRank as DynamicRank,
    DynamicRank as dynamic_rank,
)
from dynarank.schedules.phases import (
    Phases as Phases,
)
from dynarank.schedules.library.published import (
    Published as Published,
    Published as published,
)
from dynarank.schedules.recorded import (
    Replay as Replay,
    decide_again as decide_again,
    replay as replay,
    spectra_from_records as spectra_from_records,
)
from dynarank.schedules.serialization import (
    schedule_from_data as schedule_from_data,
    schedule_to_data as schedule_to_data,
    serializable as serializable,
)
from dynarank.schedules.throughout import (
    FullRankThroughout as FullRankThroughout,
    FullRankThroughout as full_rank,
    LowRankThroughout as LowRankThroughout,
    LowRankThroughout as low_rank,
)
from dynarank.schedules.timelines import (
    Phase as Phase,
    timeline as timeline,
)

CLASSES: dict[str, str]
__all__: list[str]
