"""Fitting a schedule to a budget of FLOPs, seconds or memory.

The schedule for a budget of FLOPs or seconds is that of ``dynamic_rank(budget=)``, see
:mod:`dynarank.planning.fit_total`. With a rank or an ending it is the paper's low-full-low order:
the full-rank phase is made as long as the budget allows, and of ranks and endings that are not
given the highest rank is chosen whose phase has at least three quarters of the usual length,
preferably with the ending that keeps the function unchanged. If there is none, the longest phase
wins. Memory budgets are in :mod:`dynarank.planning.fit_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from dynarank.cost.dry_run import dry_run
from dynarank.cost.flops import trace
from dynarank.forms import AdaptedExecution, FullRank, Plan, RankLike
from dynarank.planning.fit_memory import TargetRun, fit_memory
from dynarank.planning.fit_total import fit_flops, fit_seconds
from dynarank.scheduler.lr_forecast import Forecast
from dynarank.schedules.base import RankSchedule
from dynarank.schedules.fitted import TOLERANCE, FittedCost
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.schedules.options import Ending, check_count
from dynarank.surgery.optimizer_state import Optimizers, as_list
from dynarank.surgery.selection import LayerFilter

__all__ = ["RANKS", "fit_schedule"]

RANKS = (1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16)
"""The ranks to choose from where only the ending is given, as shares of each layer's own cost."""

_UNITS = {
    "flops": "a share of those at full rank (float)",
    "seconds": "a number",
    "memory": "a number of bytes (int) or a share of the peak at full rank (float)",
}

LONG_ENOUGH = 0.75  # of the usual length; below it, a lower rank with a longer phase is better


def fit_schedule(
    model: nn.Module,
    batch: Any,
    total_steps: int,
    *,
    flops: float | None = None,
    seconds: float | None = None,
    memory: int | float | None = None,
    optimizer: Optimizers = None,
    lr_scheduler: Any | Sequence[float] | None = None,
    lr_every: int | None = None,
    rank: RankLike | None = None,
    to: Ending | None = None,
    decomposition: str = "svd",
    alpha: float | None = None,
    execution: AdaptedExecution | None = None,
    layers: LayerFilter = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> RankSchedule:
    """Fit a schedule to a budget of FLOPs, of seconds or of memory.

    The model is measured, but not changed. A budget of FLOPs or seconds is met by that of
    ``schedules.dynamic_rank(budget=)``, in FLOPs of the scheduled layers; with a rank or an
    ending, by the paper's order (low, full, low or adapted) with the longest full-rank phase. If
    the learning rate becomes predictable only during the run, the latter recomputes its transition
    points within the same budget.

    Args:
        model: the model, full-rank or ranked.
        batch: a batch of the run: a tensor, a tuple or list of positional arguments of the forward
            pass, or a dict of keyword arguments.
        total_steps: the number of optimizer steps of the run.
        flops: a budget for the training FLOPs of the whole run, as a share of those at full rank.
        seconds: a budget for the time of all training steps, measured on this machine now, without
            data loading and evaluation.
        memory: a budget for the peak memory of a training step, in bytes (int) or as a share of the
            peak at full rank (float).
        optimizer: the model's optimizer or optimizers, for time and memory.
        lr_scheduler: the learning-rate scheduler, or the learning rate over the run; pass the same
            to :class:`dynarank.RankScheduler`.
        lr_every: how many optimizer steps pass from one step of the LR scheduler to the next; pass
            the same to :class:`dynarank.RankScheduler`.
        rank: the rank of the paper's order; None: chosen.
        to: the ending of the paper's order, ``"adapted"`` or ``"low-rank"``; None: chosen.
        decomposition: the decomposition's name.
        alpha: the adapter's scale is ``alpha / rank``; of the paper's order.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`; likewise.
        layers: which layers to schedule, a filter or glob patterns; pass the same to
            :class:`dynarank.RankScheduler`.
        loss: a function from the model's output to a scalar; None: the sum of all its tensors.

    Returns:
        An ordinary schedule, which can be serialized.

    Raises:
        ValueError: no budget or several; a budget that no choice meets, with the nearest possible
            one.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        >>> fit_schedule(model, torch.ones(8, 64), 1000, flops=0.62, layers="*")
        Budgeted(budget=Within(flops=0.62, of='layers', multiple_of=1), fitted=True)
        >>> fit_schedule(
        ...     model, torch.ones(8, 64), 1000, flops=0.62, rank=0.375, layers="*"
        ... ).schedule.to
        'low-rank'
    """
    kind, amount = _budget(flops=flops, seconds=seconds, memory=memory)
    total_steps = check_count("total_steps", total_steps)
    _check_parameters(model)
    run = TargetRun(model, as_list(optimizer), batch, total_steps, layers, loss)
    given = {"alpha": alpha, "execution": execution}
    options = {name: value for name, value in given.items() if value is not None}
    if kind != "memory" and rank is None and to is None and not options:
        return (fit_flops if kind == "flops" else fit_seconds)(amount, run, decomposition)
    choices = [
        DynamicRank(one, to=ending, decomposition=decomposition, **cast(Any, options))
        for one in (RANKS if rank is None else (rank,))
        for ending in (("adapted", "low-rank") if to is None else (to,))
    ]
    if kind == "memory":
        return fit_memory(choices, amount, run)
    price, allowed = _flops(run, amount) if kind == "flops" else _seconds(run, choices, amount)
    found = [_costed(choice, price, allowed, run) for choice in choices]
    forecast = Forecast(lr_scheduler, total_steps, lr_every).rates
    able = [one for one in found if one.fits(forecast)]
    if not able:
        raise ValueError(_refusal(kind, amount, found, forecast))
    return _best(able, forecast)


def _check_parameters(model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"a schedule is fitted to layers with weights, but {type(model).__name__} has no "
            "parameters; pass the model that will be trained"
        )


def _budget(**given: float | None) -> tuple[str, float]:
    """The kind of the given budget, and its amount."""
    found = {kind: amount for kind, amount in given.items() if amount is not None}
    if len(found) != 1:
        raise ValueError(f"a budget is one of {', '.join(given)}, got {', '.join(found) or 'none'}")
    kind, amount = found.popitem()
    if isinstance(amount, bool) or not isinstance(amount, Real) or not 0 < amount < math.inf:
        raise ValueError(
            f"a budget of {kind} is {_UNITS[kind]}, positive and finite, got {amount!r}"
        )
    return kind, int(amount) if isinstance(amount, Integral) else float(amount)


_Price: TypeAlias = Callable[[Plan], float]


def _costed(choice: DynamicRank, price: _Price, allowed: float, run: TargetRun) -> FittedCost:
    one, two, three = map(price, _phase_plans(choice, run))
    return FittedCost(choice, (one, two, three), allowed, run.total_steps)


def _best(able: Sequence[FittedCost], forecast: tuple[float, ...]) -> FittedCost:
    """The first choice with a long enough full-rank phase, or that with the longest phase."""
    lengths = [one.relative_length(forecast) for one in able]
    longest = lengths.index(max(lengths))
    first = next((i for i, length in enumerate(lengths) if length >= LONG_ENOUGH), longest)
    return able[first]


def _phase_plans(choice: DynamicRank, run: TargetRun) -> Iterator[Plan]:
    paths = run.shapes_of(choice)
    return (dict.fromkeys(paths, form) for form in (choice.low, FullRank(), choice.last))


def _flops(run: TargetRun, share: float) -> tuple[_Price, float]:
    """The FLOPs of a step under a plan, and the budget in FLOPs."""
    use = trace(run.model, run.batch, run.loss)
    full = use.flops(dict.fromkeys(use.layers, FullRank())).training
    return (lambda plan: use.flops(plan).training), share * full * run.total_steps


def _seconds(
    run: TargetRun, choices: Sequence[DynamicRank], seconds: float
) -> tuple[_Price, float]:
    """The time of a step under a plan, each plan measured once, and the budget in seconds."""
    plans = [plan for choice in choices for plan in _phase_plans(choice, run)]
    distinct = {frozenset(plan.items()): plan for plan in plans}
    measured = dry_run(run.model, run.optimizers, list(distinct.values()), run.batch, run.loss)
    known = {key: one.seconds for key, one in zip(distinct, measured, strict=True)}
    return (lambda plan: known[frozenset(plan.items())]), seconds


def _refusal(
    kind: str, amount: float, found: Sequence[FittedCost], forecast: tuple[float, ...]
) -> str:
    """The error message: the budget and the nearest possible one."""
    nearest = min(found, key=lambda one: abs(one.total(forecast) - one.allowed))
    possible = nearest.total(forecast) / nearest.allowed * amount
    shown = f"{possible:.3g}" if kind == "seconds" else f"{possible:.4f}"
    unit = {"flops": " of the FLOPs of full rank", "seconds": " seconds"}[kind]
    length = nearest.within(forecast).length or 0.0
    return (
        f"a budget of {amount:g}{unit} cannot be met within {TOLERANCE:.0%}; the nearest possible "
        f"is {shown}, with {nearest.schedule.low} and full rank for {length:.0%} of "
        f"{nearest.total_steps} steps"
    )
