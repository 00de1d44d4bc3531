"""The schedule of a recipe, by name or fitted to the recipe's budget."""

from __future__ import annotations

from typing import Any

from torch import nn

from dynarank.allocation.fit_schedule import fit_schedule
from dynarank.schedules.base import RankSchedule
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.surgery.optimizer_state import Optimizers
from dynarank.train.rates import forecast_rates
from dynarank.train.recipes import Recipe

__all__ = ["make_schedule"]


def make_schedule(
    recipe: Recipe,
    name: str,
    model: nn.Module,
    batch: Any,
    total_steps: int,
    optimizer: Optimizers = None,
) -> RankSchedule:
    """The named schedule of a recipe; if the recipe has a budget, dynamic rank is fitted to it.

    Fitting chooses rank and transition points, and the ending unless the name determines it.

    Args:
        recipe: the recipe, for its options and budget.
        name: the name of the schedule.
        model: the model to which the schedule is fitted.
        batch: a batch for the model.
        total_steps: the number of optimizer steps of the run.
        optimizer: the model's optimizer or optimizers.

    Raises:
        ValueError: an unknown schedule, or a budget that cannot be met.
    """
    schedule = recipe.schedule(name)
    if recipe.budget is None or not isinstance(schedule, DynamicRank):
        return schedule
    return fit_schedule(
        model,
        batch,
        total_steps,
        flops=recipe.budget,
        optimizer=optimizer,
        lr_scheduler=forecast_rates(recipe),
        to="low-rank" if schedule.to == "low-rank" else None,
        decomposition=recipe.decomposition,
        layers=recipe.layers,
    )
