"""The named schedules of the command line and of recipes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynarank.files.nearest import did_you_mean
from dynarank.forms import Within
from dynarank.schedules.base import FunctionSchedule, RankSchedule
from dynarank.schedules.dynamic import Budgeted
from dynarank.schedules.library.closed_loop import ClosedLoop
from dynarank.schedules.library.cuttlefish import Cuttlefish
from dynarank.schedules.library.growing import Growing
from dynarank.schedules.library.lora import LoRA
from dynarank.schedules.library.published import Published
from dynarank.schedules.library.pufferfish import Pufferfish
from dynarank.schedules.library.relora import ReLoRA
from dynarank.schedules.library.rotating import Rotating
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.schedules.options import share_within
from dynarank.schedules.rank_decay import Decay
from dynarank.schedules.throughout import FullRankThroughout, LowRankThroughout, low_rank

__all__ = ["SCHEDULES", "Preset", "get_preset", "schedule_name", "schedule_summaries"]


@dataclass(frozen=True)
class Preset:
    """A named schedule: a class and fixed options.

    Args:
        summary: what it does, in one line.
        cls: the schedule's class.
        fixed: options that override those of the recipe.
        within: the schedule for a recipe with a budget; None: the same.
    """

    summary: str
    cls: type[RankSchedule]
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    within: Callable[[Within], RankSchedule] | None = None

    def __call__(self, **options: Any) -> RankSchedule:
        """Construct the schedule from options, see ``RankSchedule.from_options``.

        Args:
            options: the options, among them ``budget``, the training FLOPs of the run relative to
                full rank.
        """
        budget = options.pop("budget", None)
        if budget is None or self.within is None:
            return self.cls.from_options({**options, **self.fixed})
        return self.within(share_within("budget", budget, options.get("decomposition")))


SCHEDULES: dict[str, Preset] = {
    "full-rank": Preset("Every layer full-rank: ordinary training.", FullRankThroughout),
    "low-rank": Preset(
        "Every layer low-rank from the first step to the last.",
        LowRankThroughout,
        within=lambda budget: low_rank(budget=budget),
    ),
    "decay": Preset(
        "From full rank down to a budget in a few data-aware cuts.",
        Decay,
        within=lambda budget: Decay(total=budget),
    ),
    "dynamic-rank": Preset(
        "Low-rank, full-rank while the learning rate is high, then adapters. With a budget: the "
        "schedule of that total cost.",
        DynamicRank,
        {"to": "adapted"},
        within=Budgeted,
    ),
    "dynamic-rank-low": Preset(
        "Low-rank, full-rank while the learning rate is high, then low-rank again.",
        DynamicRank,
        {"to": "low-rank"},
    ),
    "aligned": Preset(
        "Like dynamic-rank, with transition points from the learning rate, not from the recipe.",
        DynamicRank,
        {"inflate": None, "deflate": None},
    ),
    "published": Preset(
        "Like dynamic-rank, with two-branch adapters, as the published code runs it.", Published
    ),
    "lora": Preset("Frozen weights with low-rank adapters throughout.", LoRA),
    "relora": Preset(
        "Full-rank at first, then adapters that are merged and restarted at intervals.", ReLoRA
    ),
    "pufferfish": Preset("Full-rank, then low-rank from a fixed epoch on.", Pufferfish),
    "cuttlefish": Preset(
        "Full-rank until the stable ranks have settled, then low-rank at ranks read from them.",
        Cuttlefish,
    ),
    "growing": Preset("Low-rank, with ranks that grow while they explain too little.", Growing),
    "rotating": Preset(
        "Low-rank; groups of layers take turns at full rank, so that peak memory stays low.",
        Rotating,
    ),
    "closed-loop": Preset(
        "Each layer inflates when its effective rank asks for it, and deflates once settled.",
        ClosedLoop,
    ),
}
"""All named schedules. A new one is a class and an entry here."""


def get_preset(name: str) -> Preset:
    """Look up a named schedule, to be called with a recipe's options.

    Raises:
        ValueError: an unknown name; the message lists the known ones and suggests the nearest.

    Example:
        >>> get_preset("low-rank")(rank=8, alpha=16.0)
        LowRankThroughout(rank=8, decomposition='svd')
    """
    if name not in SCHEDULES:
        hint = did_you_mean(name, SCHEDULES)
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}{hint}")
    return SCHEDULES[name]


def schedule_name(schedule: RankSchedule) -> str:
    """The name of a schedule: that of the catalog, else that of its class or function.

    Example:
        >>> schedule_name(DynamicRank(8, to="low-rank")), schedule_name(Budgeted(Within(flops=0.5)))
        ('dynamic-rank-low', 'dynamic-rank')
    """
    if isinstance(schedule, Budgeted):
        return "dynamic-rank"
    for name, preset in SCHEDULES.items():
        fixed = preset.fixed.items()
        if type(schedule) is preset.cls and all(getattr(schedule, k) == v for k, v in fixed):
            return name
    own = schedule.function if isinstance(schedule, FunctionSchedule) else type(schedule)
    name = getattr(own, "__name__", type(own).__name__).strip("<>")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).replace("_", "-").lower()


def schedule_summaries() -> dict[str, str]:
    """What each named schedule does, in one line.

    Example:
        >>> schedule_summaries()["lora"]
        'Frozen weights with low-rank adapters throughout.'
    """
    return {name: preset.summary for name, preset in SCHEDULES.items()}
