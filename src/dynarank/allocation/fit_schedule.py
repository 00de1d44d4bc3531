"""A schedule within a budget: the window's length, the rank and the ending that keep to it.

Of every rank and ending the full-rank phase is made as long as the budget allows. The highest rank
is taken whose phase is three quarters of the usual length or longer, of its two endings rather the
one that keeps the function; where no phase is so long, the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.allocation.fit_memory import Settled, fit_memory
from dynarank.cost.dry_run import dry_run
from dynarank.cost.flops import ModelUse, trace
from dynarank.forms import Form, FullRank, LowRank, Plan
from dynarank.scheduler.targets import scheduled_layers
from dynarank.schedules import LRAligned
from dynarank.schedules.base import step_of
from dynarank.schedules.budget import Budget, Budgeted
from dynarank.schedules.lr_aligned import decisive_decay, full_rank_window
from dynarank.surgery.selection import LayerFilter

__all__ = ["Fitted", "fit"]

LONG_ENOUGH = 0.75  # of the usual length; below it a lower rank buys more full rank
TOLERANCE = 0.01  # a budget is met within 1% of it


@dataclass(frozen=True)
class Fitted:
    """A choice of forms with its costs a step, in the budget's unit.

    Args:
        low: the form before the full-rank phase.
        last: the form after it.
        costs: of a step in each of the three phases.
        allowed: what the whole run may cost.
        total_steps: of the run.
    """

    low: LowRank
    last: Form
    costs: tuple[float, float, float]
    allowed: float
    total_steps: int

    def schedule(self, forecast: tuple[float, ...]) -> LRAligned:
        """The schedule whose cost comes nearest to what is allowed."""
        return self._schedule(self._full_steps(forecast))

    def total(self, forecast: tuple[float, ...], full_steps: int | None = None) -> float:
        """What the run costs; None: with the schedule that fits."""
        steps = self._full_steps(forecast) if full_steps is None else full_steps
        begin, end = full_rank_window(decisive_decay(forecast), steps / self.total_steps)
        first, last = (step_of(moment, self.total_steps) for moment in (begin, end))
        lengths = first, last - first, self.total_steps - last
        return sum(cost * n for cost, n in zip(self.costs, lengths, strict=True))

    def relative_length(self, forecast: tuple[float, ...]) -> float:
        """The length of the full-rank phase over the usual one."""
        begin, end = full_rank_window(decisive_decay(forecast))
        return self._full_steps(forecast) / self.total_steps / (end - begin)

    def fits(self, forecast: tuple[float, ...]) -> bool:
        """Whether the budget is met."""
        return abs(self.total(forecast) - self.allowed) <= TOLERANCE * self.allowed

    def _schedule(self, full_steps: int) -> LRAligned:
        return LRAligned(self.low, self.last, length=full_steps / self.total_steps)

    def _full_steps(self, forecast: tuple[float, ...]) -> int:
        """Full-rank steps by bisection: the cost grows with them but for rounding."""
        low, high = 0, self.total_steps
        while high - low > 1:
            middle = (low + high) // 2
            inside = self.total(forecast, middle) <= self.allowed
            low, high = (middle, high) if inside else (low, middle)
        near = {max(low - 1, 0), low, high, min(high + 1, self.total_steps)}
        return min(near, key=lambda n: abs(self.total(forecast, n) - self.allowed))


def fit(
    wish: Budgeted,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    sample: Any,
    total_steps: int,
    *,
    forecast: tuple[float, ...] = (),
    layers: LayerFilter = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> Fitted | Settled:
    """Choose rank, ending and length such that the run keeps to the budget.

    Args:
        wish: the budget and what may be chosen.
        model: the model, full-rank or ranked; it is not changed.
        optimizers: its optimizers, for budgets of seconds and memory.
        sample: a batch.
        total_steps: steps of the run.
        forecast: the learning rate over the run, if known.
        layers: which layers, as :class:`dynarank.RankScheduler` takes them.
        loss: from the model's output to a scalar.

    Raises:
        ValueError: no batch; a budget that no choice meets, with the nearest that one does.
    """
    if sample is None:
        raise ValueError(
            f"a budget of {wish.budget.kind} was asked for without a batch to reckon it from; "
            "give RankScheduler(sample=batch)"
        )
    if wish.budget.kind == "memory":
        return fit_memory(wish, model, optimizers, sample, total_steps, layers=layers, loss=loss)
    found = list(_choices(wish, model, optimizers, sample, total_steps, layers, loss))
    able = [one for one in found if one.fits(forecast)]
    if not able:
        raise ValueError(_refusal(wish.budget, found, forecast))
    lengths = [one.relative_length(forecast) for one in able]
    longest = lengths.index(max(lengths))
    first = next((i for i, length in enumerate(lengths) if length >= LONG_ENOUGH), longest)
    return able[first]


def _choices(
    wish: Budgeted,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    sample: Any,
    total_steps: int,
    layers: LayerFilter,
    loss: Callable[[Any], Tensor] | None,
) -> list[Fitted]:
    candidates = list(wish.candidates())
    plans = [
        _phase_plans(model, LRAligned(low, last), low, last, total_steps, layers)
        for low, last in candidates
    ]
    use = trace(model, sample, loss)
    if wish.budget.kind == "flops":
        price = _flops_price(use)
        allowed = wish.budget.amount * price(dict.fromkeys(use.layers, FullRank())) * total_steps
    else:
        price = _seconds_price(model, optimizers, plans, sample, loss)
        allowed = wish.budget.amount
    return [
        Fitted(low, last, (price(one), price(two), price(three)), allowed, total_steps)
        for (low, last), (one, two, three) in zip(candidates, plans, strict=True)
    ]


def _phase_plans(
    model: nn.Module,
    schedule: LRAligned,
    low: LowRank,
    last: Form,
    total_steps: int,
    layers: LayerFilter,
) -> tuple[Plan, Plan, Plan]:
    paths = [site.path for site in scheduled_layers(model, schedule, total_steps, layers)]
    one, two, three = (dict.fromkeys(paths, form) for form in (low, FullRank(), last))
    return one, two, three


def _flops_price(use: ModelUse) -> Callable[[Plan], float]:
    return lambda plan: use.flops(plan).training


def _seconds_price(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    plans: Sequence[tuple[Plan, ...]],
    sample: Any,
    loss: Callable[[Any], Tensor] | None,
) -> Callable[[Plan], float]:
    """Seconds of a step, each plan rehearsed once."""
    known: dict[frozenset[tuple[str, Form]], float] = {}
    distinct = {frozenset(plan.items()): plan for three in plans for plan in three}
    measured = dry_run(model, optimizers, list(distinct.values()), sample, loss)
    known.update({k: one.seconds for k, one in zip(distinct, measured, strict=True)})
    return lambda plan: known[frozenset(plan.items())]


def _refusal(budget: Budget, found: Sequence[Fitted], forecast: tuple[float, ...]) -> str:
    """What was asked for, and the nearest there is."""
    nearest = min(found, key=lambda one: abs(one.total(forecast) - one.allowed))
    possible = nearest.total(forecast) / nearest.allowed * budget.amount
    shown = f"{possible:.3g}" if budget.kind == "seconds" else f"{possible:.4f}"
    unit = {"flops": " of the FLOPs of full rank", "seconds": " seconds"}[budget.kind]
    length = nearest.schedule(forecast).length or 0.0
    return (
        f"a budget of {budget.amount:g}{unit} cannot be met within {TOLERANCE:.0%}; the nearest "
        f"possible is {shown}, with {nearest.low} and full rank for {length:.0%} of "
        f"{nearest.total_steps} steps"
    )
