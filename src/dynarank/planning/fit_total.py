"""Fitting the schedule for a total budget to a model: the share that its layers may cost.

With f the share of the full-rank FLOPs that the scheduled layers have, and everything else as it
is, a run that costs B costs its layers ``(B - (1 - f)) / f`` of their own FLOPs. The time of a step
is taken as linear in the layers' FLOPs, through two measured points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dynarank.cost.budget import rounded_up
from dynarank.cost.dry_run import dry_run
from dynarank.cost.flops import trace
from dynarank.forms import FullRank, LowRank, Within
from dynarank.planning.fit_memory import TargetRun
from dynarank.schedules.base import Clock, Readings
from dynarank.schedules.dynamic import Budgeted

__all__ = ["fit_flops", "fit_seconds"]

LOW, LEAST = 1 / 4, 1 / 16  # shares of the layers' cost: what is timed, and how far that is trusted


def fit_flops(amount: float, run: TargetRun, decomposition: str = "svd") -> Budgeted:
    """The schedule whose run costs a share of the full-rank training FLOPs.

    Args:
        amount: the share.
        run: the run to which it is fitted.
        decomposition: the decomposition's name.

    Raises:
        ValueError: the share is above 1, or below what the smallest ranks cost.
    """
    family = _Family(run, decomposition)
    use = trace(run.model, run.batch, run.loss)
    own, rest = use.shares(family.shapes)
    forms = (LowRank(1, decomposition), FullRank())
    layers = [use.layers[path] for path in family.shapes]
    costs = [[layer.flops(form).training for form in forms] for layer in layers]
    least = family.least(sum(map(min, costs)) / sum(full for _, full in costs))
    share = min((amount - rest) / own, 1.0)
    if least <= share and amount <= 1:
        return family.member(share)
    smallest = rounded_up(rest + least * own, lambda share: (share - rest) / own >= least)
    nearest = 1.0 if amount > 1 else smallest
    raise ValueError(
        f"a budget of {amount!r} of the FLOPs of full rank cannot be met; the nearest possible is "
        f"{nearest}: the {len(layers)} scheduled layers have {own:.0%} of the FLOPs"
    )


def fit_seconds(seconds: float, run: TargetRun, decomposition: str = "svd") -> Budgeted:
    """The schedule whose training steps take a given time together.

    Args:
        seconds: the time of all steps.
        run: the run to which it is fitted.
        decomposition: the decomposition's name.

    Raises:
        ValueError: the time is above that of full rank, or below that of low rank.
    """
    family = _Family(run, decomposition)
    forms = (FullRank(), LowRank(LOW, decomposition))
    plans = [dict.fromkeys(family.shapes, form) for form in forms]
    measured = dry_run(run.model, run.optimizers, plans, run.batch, run.loss)
    full, low = (one.seconds * run.total_steps for one in measured)
    slope = max((full - low) / (1 - LOW), 0.0)
    least = full - slope * (1 - LEAST)
    if not least <= seconds <= full:
        raise ValueError(
            f"a budget of {seconds:g} seconds cannot be met; the nearest possible is "
            f"{full if seconds > full else least:.3g}: {run.total_steps} steps take {full:.3g} at "
            f"full rank and {low:.3g} at {LOW:g} of the layers' FLOPs"
        )
    share = 1 - (full - seconds) / slope if slope else 1.0
    return family.member(share)


@dataclass(frozen=True)
class _Family:
    """The schedules for the total budgets of a run's layers."""

    run: TargetRun
    decomposition: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the scheduled weights."""
        return self.run.shapes_of(self.member(0.5))

    def member(self, share: float) -> Budgeted:
        """The schedule for a share of the layers' full-rank FLOPs."""
        name = self.decomposition
        budget = Within(flops=share, of="layers", decomposition=name, multiple_of=1)
        return Budgeted(budget, fitted=True)

    def least(self, end: float) -> float:
        """The smallest total share whose last budget is at least ``end``, by bisection."""
        last, readings = self.run.total_steps - 1, Readings(self.shapes)
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            answer = self.member(middle)(Clock(last, self.run.total_steps), readings)
            budgets = [one.amount for one in answer.values() if isinstance(one, Within)]
            low, high = (middle, high) if budgets and budgets[0] < end else (low, middle)
        return high
