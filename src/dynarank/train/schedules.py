"""The schedule of a recipe, by name or fitted to the recipe's budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dynarank.cost.flops import trace
from dynarank.cost.schedule import cost_schedule
from dynarank.decompositions import get_decomposition
from dynarank.forms import Within
from dynarank.planning.fit_schedule import fit_schedule
from dynarank.scheduler.rank_scheduler import check_phases
from dynarank.schedules.base import RankSchedule, Readings
from dynarank.schedules.dynamic import Budgeted
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.schedules.rank_decay import Decay
from dynarank.schedules.timelines import timeline
from dynarank.surgery.optimizer_state import Optimizers
from dynarank.surgery.selection import select
from dynarank.surgery.sites import survey
from dynarank.train.rates import forecast_rates
from dynarank.train.recipes import Recipe, RecipeError
from dynarank.train.task import Task

__all__ = ["check_schedules", "make_schedule"]


def make_schedule(
    recipe: Recipe,
    name: str,
    model: nn.Module,
    batch: Any,
    total_steps: int,
    optimizer: Optimizers = None,
    *,
    measure: bool = False,
) -> RankSchedule:
    """The named schedule of a recipe, within the recipe's budget if it has one.

    Within a budget, ``low-rank`` has the uniform ranks that cost it, ``decay`` and
    ``dynamic-rank`` are the schedules of that total cost; the paper's order by its other names is
    fitted to it, in rank and transition points.

    Args:
        recipe: the recipe, for its options and budget.
        name: the name of the schedule.
        model: the model to which the schedule is fitted.
        batch: a batch for the model.
        total_steps: the number of optimizer steps of the run.
        optimizer: the model's optimizer or optimizers.
        measure: whether the run times the layers and leaves some full-rank.

    Raises:
        ValueError: an unknown schedule, a budget that cannot be met, or a budget with ``measure``.
    """
    schedule = recipe.schedule(name)
    low_full_low = isinstance(schedule, DynamicRank)
    if measure and (isinstance(schedule, Budgeted | Decay) or (recipe.budget and low_full_low)):
        raise RecipeError("pass either a budget or --measure, not both")
    if recipe.budget is None or not isinstance(schedule, Budgeted | DynamicRank):
        return schedule
    return fit_schedule(
        model,
        batch,
        total_steps,
        flops=recipe.budget,
        optimizer=optimizer,
        lr_scheduler=forecast_rates(recipe),
        to=schedule.to if isinstance(schedule, DynamicRank) else None,
        decomposition=recipe.decomposition,
        layers=recipe.layers,
    )


def check_schedules(
    chosen: Iterable[tuple[Recipe, str]], task: Task, epochs: int, *, measure: bool = False
) -> None:
    """Construct the schedules of several runs, and check that the model can follow their plans.

    Called before the first run, so that a mistake in the last one is found at once. Nothing is
    trained or written.

    Args:
        chosen: the recipe and the name of the schedule of each run.
        task: the task of one of the runs.
        epochs: the length of the runs.
        measure: as for :func:`make_schedule`.

    Raises:
        ValueError: the first schedule that is refused, with its name.
    """
    model, total_steps = task.model(), epochs * task.steps_per_epoch
    sites, use = survey(model), None
    for recipe, name in chosen:
        layers = {site.path: site.spec.unit_shape for site in select(sites, recipe.layers)}
        readings = Readings(layers, recipe.learning_rate, forecast_rates(recipe))
        try:
            get_decomposition(recipe.decomposition)
            schedule = make_schedule(
                recipe, name, model, task.sample(), total_steps, measure=measure
            )
            phases = timeline(schedule, readings, total_steps)
            check_phases(model, phases, sites)
            if any(isinstance(one, Within) for phase in phases for one in phase.plan.values()):
                use = trace(model, task.sample()) if use is None else use
                cost_schedule(use, schedule, list(layers), total_steps, forecast=readings.forecast)
        except ValueError as error:
            raise RecipeError(f"{recipe.name}, {name}: {error}") from error
