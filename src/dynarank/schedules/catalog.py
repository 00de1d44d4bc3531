"""The named schedules of the command line and of recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynarank.forms import Within
from dynarank.schedules.base import RankSchedule
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

__all__ = ["SCHEDULES", "Preset", "get_preset"]


@dataclass(frozen=True)
class Preset:
    """A named schedule: a class and fixed options.

    Args:
        cls: the schedule's class.
        fixed: options that override those of the recipe.
        within: the schedule for a recipe with a budget; None: the same.
    """

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
    "full-rank": Preset(FullRankThroughout),
    "low-rank": Preset(LowRankThroughout, within=lambda budget: low_rank(budget=budget)),
    "decay": Preset(Decay, within=lambda budget: Decay(total=budget)),
    "dynamic-rank": Preset(DynamicRank, {"to": "adapted"}, within=Budgeted),
    "dynamic-rank-low": Preset(DynamicRank, {"to": "low-rank"}),
    "aligned": Preset(DynamicRank, {"inflate": None, "deflate": None}),
    "published": Preset(Published),
    "lora": Preset(LoRA),
    "relora": Preset(ReLoRA),
    "pufferfish": Preset(Pufferfish),
    "cuttlefish": Preset(Cuttlefish),
    "growing": Preset(Growing),
    "rotating": Preset(Rotating),
    "closed-loop": Preset(ClosedLoop),
}
"""All named schedules. A new one is a class and a line here."""


def get_preset(name: str) -> Preset:
    """Look up a named schedule, to be called with a recipe's options.

    Raises:
        ValueError: an unknown name; the message lists the known ones.

    Example:
        >>> get_preset("low-rank")(rank=8, alpha=16.0)
        LowRankThroughout(rank=8, decomposition='svd')
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]
