"""Rank schedules: functions ``(clock, readings) -> plan``.

Each schedule is a class. Lower-case names are for calls like ``dr.schedules.decay(end=0.4)``: they
are aliases of the classes or, where the arguments decide the class (``dynamic_rank``,
``low_rank``), functions. Modules are imported lazily, on first access to one of their names.
"""

from dynarank.files.lazy_names import lazy_names

CLASSES = {
    "Budgeted": "dynamic",
    "ClosedLoop": "library.closed_loop",
    "Cuttlefish": "library.cuttlefish",
    "Decay": "rank_decay",
    "DynamicRank": "lr_aligned",
    "FittedCost": "fitted",
    "FittedMemory": "fitted",
    "FullRankThroughout": "throughout",
    "Growing": "library.growing",
    "LoRA": "library.lora",
    "LowRankThroughout": "throughout",
    "Phases": "phases",
    "Published": "library.published",
    "Pufferfish": "library.pufferfish",
    "ReLoRA": "library.relora",
    "Replay": "recorded",
    "Rotating": "library.rotating",
}
"""The schedules that can be serialized, each with its module."""

_ALIASES = {
    "closed_loop": "ClosedLoop",
    "cuttlefish": "Cuttlefish",
    "decay": "Decay",
    "full_rank": "FullRankThroughout",
    "growing": "Growing",
    "lora": "LoRA",
    "published": "Published",
    "pufferfish": "Pufferfish",
    "relora": "ReLoRA",
    "rotating": "Rotating",
}

_OTHERS = {
    "Answer": "base",
    "Clock": "base",
    "Decision": "base",
    "FunctionSchedule": "base",
    "Mapped": "base",
    "Phase": "timelines",
    "RankSchedule": "base",
    "Readings": "base",
    "SCHEDULES": "catalog",
    "Schedule": "base",
    "State": "base",
    "When": "base",
    "as_schedule": "base",
    "decide_again": "recorded",
    "dynamic_rank": "dynamic",
    "get_preset": "catalog",
    "low_rank": "throughout",
    "replay": "recorded",
    "schedule_from_data": "serialization",
    "schedule_to_data": "serialization",
    "serializable": "serialization",
    "spectra_from_records": "recorded",
    "step_of": "base",
    "timeline": "timelines",
}

__all__ = [*CLASSES, *_ALIASES, *_OTHERS]  # pyright: ignore[reportUnsupportedDunderAll]

_HOMES = {**CLASSES, **{name: f"{CLASSES[of]}:{of}" for name, of in _ALIASES.items()}, **_OTHERS}
__getattr__, _ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
