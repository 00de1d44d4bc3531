"""A schedule whose training steps keep to a budget of memory.

Full rank all at once has the highest peak. Where that does not fit, only a share of the network is
full-rank at a time (rotating inflation), the largest share that fits; at the least none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.cost.dry_run import dry_run
from dynarank.forms import Form, FullRank, Plan
from dynarank.scheduler.targets import scheduled_layers
from dynarank.schedules import LRAligned, Readings, Schedule, low_rank, rotating, timeline
from dynarank.schedules.budget import Budgeted
from dynarank.surgery.selection import LayerFilter
from dynarank.surgery.sites import survey

__all__ = ["Settled", "fit_memory"]

SHARES = (1 / 2, 1 / 4, 1 / 8)
"""Shares of the network to be full-rank at a time, the largest that fits is taken."""


@dataclass(frozen=True)
class Settled:
    """A schedule that fits, whatever the learning rate does.

    Args:
        chosen: the schedule.
        peak_bytes: the largest peak of its phases, as rehearsed.
    """

    chosen: Schedule
    peak_bytes: int

    def schedule(self, forecast: tuple[float, ...]) -> Schedule:
        """The schedule."""
        return self.chosen


def fit_memory(
    wish: Budgeted,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    sample: Any,
    total_steps: int,
    *,
    layers: LayerFilter = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> Settled:
    """The schedule with the most full rank whose steps, rehearsed on copies, fit the budget.

    Args: as :func:`dynarank.allocation.fit_schedule.fit` takes them.

    Raises:
        ValueError: nothing fits; the message names the least peak there is.
    """

    def peak(plan: Plan) -> int:
        return dry_run(model, optimizers, [plan], sample, loss, rounds=0)[0].peak_bytes

    able = [site.path for site in survey(model) if site.form is not None]
    full = peak(dict.fromkeys(able, FullRank()))
    amount = wish.budget.amount
    allowed = amount * full if isinstance(amount, float) else amount
    least = full
    for schedule in _candidates(wish):
        paths = scheduled_layers(model, schedule, total_steps, layers)
        shapes = {site.path: site.shape for site in paths}
        found = 0
        for plan in _plans(schedule, shapes, total_steps):
            found = max(found, peak(plan))
            if found > allowed:
                break
        else:
            return Settled(schedule, found)
        least = min(least, found)
    shown = f"{amount:g} of the peak at full rank" if isinstance(amount, float) else "bytes"
    raise ValueError(
        f"a budget of memory of {allowed:,.0f} bytes ({shown}) cannot be met; the nearest possible "
        f"is {least:,} bytes, {least / full:.3f} of the peak at full rank"
    )


def _candidates(wish: Budgeted) -> Iterator[Schedule]:
    """Schedules to try: full rank all at once, then shares of it, then none; higher ranks first."""
    forms = list(wish.candidates())
    ranks = list(dict.fromkeys(low for low, _ in forms))
    for low, last in forms:
        yield LRAligned(low, last)
    for share in SHARES:
        for low in ranks:
            yield rotating(low.rank, share=share, decomposition=low.decomposition)
    yield from (low_rank(low.rank, decomposition=low.decomposition) for low in ranks)


def _plans(
    schedule: Schedule, shapes: dict[str, tuple[int, ...]], total_steps: int
) -> Iterator[Plan]:
    """Each plan of the schedule once."""
    phases = timeline(schedule, Readings(shapes), total_steps)
    distinct: dict[frozenset[tuple[str, Form]], Plan] = {
        frozenset(phase.plan.items()): phase.plan for phase in phases
    }
    yield from distinct.values()
