"""Fitting a schedule to a memory budget.

Making all layers full-rank at once has the highest peak. If that does not fit, only a share of the
network is full-rank at a time (rotating inflation): the largest share that fits, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.cost.dry_run import dry_run
from dynarank.forms import Form, FullRank, Plan, Within
from dynarank.scheduler.scheduled_layers import scheduled_layers
from dynarank.schedules.base import RankSchedule, Readings
from dynarank.schedules.fitted import FittedMemory
from dynarank.schedules.library.rotating import Rotating
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.schedules.throughout import LowRankThroughout
from dynarank.schedules.timelines import timeline
from dynarank.surgery.selection import LayerFilter
from dynarank.surgery.sites import survey

__all__ = ["TargetRun", "fit_memory"]

SHARES = (1 / 2, 1 / 4, 1 / 8)
"""Shares of the network that may be full-rank at a time; the largest one that fits is used."""


@dataclass(frozen=True)
class TargetRun:
    """The run to which a schedule is fitted: model, optimizers, a batch, length and layers."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    batch: Any
    total_steps: int
    layers: LayerFilter = None
    loss: Callable[[Any], Tensor] | None = None

    def shapes_of(self, schedule: RankSchedule) -> dict[str, tuple[int, ...]]:
        """The shapes of the scheduled weights, by path."""
        sites = scheduled_layers(survey(self.model), schedule, self.total_steps, self.layers)
        return {site.path: site.shape for site in sites}


def fit_memory(choices: Sequence[DynamicRank], amount: float, run: TargetRun) -> FittedMemory:
    """Find the schedule with the most full rank whose peak memory, measured on copies, fits.

    Args:
        choices: dynamic-rank schedules to choose from, higher ranks first.
        amount: the allowed peak: bytes (int) or a share of the peak at full rank (float).
        run: the run to which it is fitted.

    Raises:
        ValueError: nothing fits; the message gives the lowest possible peak.
    """

    def peak(plan: Plan) -> int:
        batch, loss = run.batch, run.loss
        return dry_run(run.model, run.optimizers, [plan], batch, loss, rounds=0)[0].peak_bytes

    able = [site.path for site in survey(run.model) if site.form is not None]
    least = full = peak(dict.fromkeys(able, FullRank()))
    allowed = amount * full if isinstance(amount, float) else amount
    for schedule in _candidates(choices):
        found = 0
        for plan in _plans(schedule, run):
            found = max(found, peak(plan))
            if found > allowed:
                break
        else:
            return FittedMemory(schedule, found)
        least = min(least, found)
    shown = f"{amount:g} of the peak at full rank" if isinstance(amount, float) else "bytes"
    raise ValueError(
        f"a memory budget of {allowed:,.0f} bytes ({shown}) cannot be met; the nearest possible "
        f"is {least:,} bytes, {least / full:.3f} of the peak at full rank"
    )


def _candidates(choices: Sequence[DynamicRank]) -> Iterator[RankSchedule]:
    """The schedules to try: all layers full-rank, shares of them, none; higher ranks first."""
    yield from choices
    low = list(dict.fromkeys(choice.low for choice in choices))
    for share in SHARES:
        yield from (Rotating(one.rank, share=share, decomposition=one.decomposition) for one in low)
    yield from (LowRankThroughout(one.rank, decomposition=one.decomposition) for one in low)


def _plans(schedule: RankSchedule, run: TargetRun) -> Iterator[Plan]:
    """The distinct plans of the schedule, which has no budgets."""
    phases = timeline(schedule, Readings(run.shapes_of(schedule)), run.total_steps)
    distinct: dict[frozenset[tuple[str, Form]], Plan] = {}
    for phase in phases:
        plan = {path: one for path, one in phase.plan.items() if not isinstance(one, Within)}
        distinct.setdefault(frozenset(plan.items()), plan)
    yield from distinct.values()
