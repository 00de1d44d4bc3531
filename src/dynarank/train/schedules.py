"""The schedule of a recipe, by name or fitted to the recipe's budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from glob import escape
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dynarank.decompositions.registry import get_decomposition
from dynarank.distributed.processes import Processes
from dynarank.layers.running import preserve_state
from dynarank.planning.fit_schedule import fit_schedule
from dynarank.scheduler.budgets import Budgets
from dynarank.scheduler.scheduled_layers import check_phases
from dynarank.schedules.base import RankSchedule, Readings
from dynarank.schedules.dynamic import Budgeted
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.schedules.options import share_within
from dynarank.schedules.rank_decay import Decay
from dynarank.schedules.timelines import Phase, timeline
from dynarank.surgery.optimizer_state import Optimizers, check_movable
from dynarank.surgery.selection import select
from dynarank.surgery.sites import survey
from dynarank.train.optimizers import make_optimizer
from dynarank.train.own_code import calling
from dynarank.train.own_task import OwnTask
from dynarank.train.rates import forecast_rates, make_lr_scheduler
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.shares import Shares, count_examples
from dynarank.train.task import Task

__all__ = ["check_schedules", "make_schedule", "passing_forward", "with_default_layers"]

_ALONE = Processes()


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
        lr_scheduler=forecast_rates(recipe, total_steps),
        to=schedule.to if isinstance(schedule, DynamicRank) else None,
        decomposition=recipe.decomposition,
        layers=recipe.layers,
    )


def with_default_layers(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe with its layers by name; if it names none, those that are taken by default.

    These are the layers that :func:`dynarank.factorize` takes at the recipe's rank, whatever the
    schedule.

    Raises:
        ValueError: no layer of the model gets cheaper.

    Example:
        >>> recipe = Recipe(data="digits", model="mlp", epochs=1, learning_rate=0.1)
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> with_default_layers(recipe, model).layers
        ('0',)
    """
    if recipe.layers is not None:
        return recipe
    chosen = select(survey(model), None, recipe.rank, recipe.decomposition)
    return recipe.model_copy(update={"layers": tuple(escape(site.path) for site in chosen)})


def check_schedules(
    chosen: Iterable[tuple[Recipe, str]],
    task: Task,
    epochs: int,
    *,
    measure: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    processes: Processes = _ALONE,
) -> None:
    """Check all that several runs ask for, before the first one.

    Schedules, optimizers and LR schedules are constructed, the plans are compared with the model,
    and a task of the user's own takes one training step, on a network that is not used again; of
    built-in data, one batch goes through the network.
    Nothing is written, and the random state is given back.

    Args:
        chosen: the recipe and the name of the schedule of each run.
        task: the task of one of the runs.
        epochs: the length of the runs.
        measure: as for :func:`make_schedule`.
        autocast: the context of a forward pass.
        processes: those that will train together, among which batches are split.

    Raises:
        ValueError: the first request that is refused, with the recipe and the schedule.
    """
    fitting: set[str] = set()
    with torch.random.fork_rng():
        for recipe, name in chosen:
            try:
                model = task.model()
                optimizer = make_optimizer(recipe, model)
                if isinstance(task, OwnTask):
                    task.check(model, optimizer, autocast)
                elif recipe.model not in fitting:
                    _check_network(recipe, task, model, autocast)
                    fitting.add(recipe.model)
                if processes.size > 1:
                    _check_shares(task, model, processes)
                _check(recipe, name, task, epochs, model, optimizer, measure)
            except ValueError as error:
                raise RecipeError(f"{recipe.name}, {name}: {error}") from error


def _check_network(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Raise RecipeError if the network, which may be another than the data was made for, fails."""
    with passing_forward(recipe), preserve_state(model), torch.no_grad(), autocast():
        task.loss(model, next(task.epoch(0)))


def _check_shares(task: Task, model: nn.Module, processes: Processes) -> None:
    """Raise RecipeError if a batch cannot be split."""
    batch = next(task.epoch(0))
    Shares(task, processes, count_examples(batch)).of(model, batch)


def passing_forward(recipe: Recipe) -> AbstractContextManager[None]:
    """A context whose errors are those of the recipe's network on its data."""
    return calling(f"model {recipe.model!r} on data {recipe.data!r}", recipe.root)


def _check(
    recipe: Recipe,
    name: str,
    task: Task,
    epochs: int,
    model: nn.Module,
    optimizer: Optimizer,
    measure: bool,
) -> None:
    """Construct what a run constructs, but for its rank scheduler."""
    get_decomposition(recipe.decomposition)
    if recipe.budget is not None:
        share_within("budget", recipe.budget)
    recipe, sites = with_default_layers(recipe, model), survey(model)
    total_steps = epochs * task.steps_per_epoch
    make_lr_scheduler(recipe, optimizer, total_steps)
    scheduled = select(sites, recipe.layers)
    layers = {site.path: site.spec.unit_shape for site in scheduled}
    forecast = forecast_rates(recipe, total_steps)
    schedule = make_schedule(
        recipe, name, model, task.sample(), total_steps, optimizer, measure=measure
    )
    budgets = Budgets(model, lambda: [task.sample()])

    def phases(schedule: RankSchedule) -> list[Phase]:
        rate, shares = recipe.learning_rate, budgets.shares(layers)
        return timeline(schedule, Readings(layers, rate, forecast, flops=shares), total_steps)

    budgets.expect(schedule, phases)
    check_phases(model, phases(schedule), sites)
    changes = schedule.spectra_every is not None or any(phase.start for phase in phases(schedule))
    check_movable([optimizer], schedule.moments or recipe.moments, scheduled if changes else ())
