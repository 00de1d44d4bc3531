"""The headroom probe on a recipe: its task, optimizer, clipping and precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.forms import RankLike
from dynarank.planning.headroom import headroom, runs
from dynarank.planning.headroom_result import Headroom
from dynarank.train.loop import DivergedError, Machine
from dynarank.train.optimizers import make_optimizer
from dynarank.train.recipe import Recipe
from dynarank.train.schedules import check_schedules, with_default_layers
from dynarank.train.task import Task

__all__ = ["probe_recipe", "probe_steps"]

FEWEST = 100
"""Steps of a run: with fewer, the loss still tells of the initial weights."""


def probe_steps(recipe: Recipe, task: Task, share: float, ranks: int, seeds: int) -> int:
    """The length of each run, so that all together take a share of the steps of a real one.

    At least 100 steps each, which in a short recipe is more than the share.
    """
    whole = recipe.epochs * task.steps_per_epoch
    return max(FEWEST, int(share * whole / runs(ranks, seeds)))


def probe_recipe(
    recipe: Recipe,
    task: Task,
    machine: Machine,
    ranks: Sequence[RankLike],
    *,
    steps: int,
    seeds: int,
    progress: Callable[[int, int], None] | None = None,
) -> Headroom:
    """Probe a recipe: see :func:`dynarank.headroom`.

    Raises:
        ValueError: as :func:`dynarank.headroom`, or the network does not fit the data.
        DivergedError: full rank diverged at every learning rate.
    """
    check_schedules([(recipe, "full-rank")], task, recipe.epochs, autocast=machine.autocast)
    with torch.random.fork_rng(devices=[]):
        recipe = with_default_layers(recipe, task.model())

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with machine.autocast():
            return task.loss(model, batch)[0]

    def optimizer(parameters: list[nn.Parameter]) -> Optimizer:
        return _clipped(make_optimizer(recipe, nn.ParameterList(parameters)), recipe.clip_norm)

    try:
        return headroom(
            task.model,
            itertools.chain.from_iterable(map(task.epoch, itertools.count())),
            loss=loss,
            optimizer=optimizer,
            ranks=ranks,
            steps=steps,
            seeds=seeds,
            layers=recipe.layers,
            decomposition=recipe.decomposition,
            sample=task.sample(),
            progress=progress,
        )
    except FloatingPointError as error:
        raise DivergedError(str(error)) from error


def _clipped(optimizer: Optimizer, norm: float | None) -> Optimizer:
    """The optimizer, with gradients clipped before each step."""

    def clip(optimizer: Optimizer, *_: Any) -> None:
        if norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, norm)

    optimizer.register_step_pre_hook(clip)
    return optimizer
