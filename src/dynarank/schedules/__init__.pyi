"""The names of :mod:`dynarank.schedules` for type checkers; at run time they load lazily."""

from dynarank.schedules.base import (
    Answer as Answer,
)
from dynarank.schedules.base import (
    Clock as Clock,
)
from dynarank.schedules.base import (
    Decision as Decision,
)
from dynarank.schedules.base import (
    FunctionSchedule as FunctionSchedule,
)
from dynarank.schedules.base import (
    Mapped as Mapped,
)
from dynarank.schedules.base import (
    RankSchedule as RankSchedule,
)
from dynarank.schedules.base import (
    Readings as Readings,
)
from dynarank.schedules.base import (
    Schedule as Schedule,
)
from dynarank.schedules.base import (
    State as State,
)
from dynarank.schedules.base import (
    When as When,
)
from dynarank.schedules.base import (
    as_schedule as as_schedule,
)
from dynarank.schedules.base import (
    step_of as step_of,
)
from dynarank.schedules.catalog import (
    SCHEDULES as SCHEDULES,
)
from dynarank.schedules.catalog import (
    get_preset as get_preset,
)
from dynarank.schedules.fitted import (
    FittedCost as FittedCost,
)
from dynarank.schedules.fitted import (
    FittedMemory as FittedMemory,
)
from dynarank.schedules.library.closed_loop import (
    ClosedLoop as ClosedLoop,
)
from dynarank.schedules.library.cuttlefish import (
    Cuttlefish as Cuttlefish,
)
from dynarank.schedules.library.growing import (
    Growing as Growing,
)
from dynarank.schedules.library.lora import (
    LoRA as LoRA,
)
from dynarank.schedules.library.published import (
    Published as Published,
)
from dynarank.schedules.library.pufferfish import (
    Pufferfish as Pufferfish,
)
from dynarank.schedules.library.relora import (
    ReLoRA as ReLoRA,
)
from dynarank.schedules.library.rotating import (
    Rotating as Rotating,
)
from dynarank.schedules.lr_aligned import (
    DynamicRank as DynamicRank,
)
from dynarank.schedules.phases import (
    Phases as Phases,
)
from dynarank.schedules.recorded import (
    Replay as Replay,
)
from dynarank.schedules.recorded import (
    decide_again as decide_again,
)
from dynarank.schedules.recorded import (
    replay as replay,
)
from dynarank.schedules.recorded import (
    spectra_from_records as spectra_from_records,
)
from dynarank.schedules.serialization import (
    schedule_from_data as schedule_from_data,
)
from dynarank.schedules.serialization import (
    schedule_to_data as schedule_to_data,
)
from dynarank.schedules.serialization import (
    serializable as serializable,
)
from dynarank.schedules.throughout import (
    FullRankThroughout as FullRankThroughout,
)
from dynarank.schedules.throughout import (
    LowRankThroughout as LowRankThroughout,
)
from dynarank.schedules.timelines import (
    Phase as Phase,
)
from dynarank.schedules.timelines import (
    timeline as timeline,
)

CLASSES: dict[str, str]
__all__: list[str]
