"""The task of a recipe and its sketch on the meta device, made by the module of its data set."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import torch

from dynarank.train.recipe import Recipe
from dynarank.train.registry import DATA
from dynarank.train.task import Sketch, Task

__all__ = ["make_task", "sketch"]


class _TaskModule(Protocol):
    def make_task(
        self,
        recipe: Recipe,
        data: str | None,
        *,
        seed: int,
        device: torch.device,
        train_limit: int | None,
        test_limit: int | None,
    ) -> Task: ...

    def sketch(self, recipe: Recipe) -> Sketch: ...


def make_task(
    recipe: Recipe,
    data: str | None = None,
    *,
    seed: int,
    device: torch.device,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> Task:
    """Load a recipe's data and make its task.

    Args:
        recipe: the recipe.
        data: the location of its data: a folder, a file, or ``hub``; None: the value of
            DYNARANK_DATA.
        seed: the seed of data order and augmentation.
        device: the device of batches and model.
        train_limit: the number of training examples to use; None: all.
        test_limit: the number of test examples to use; None: all.

    Raises:
        ValueError: the data is missing, or has fewer examples than requested.
        ImportError: a required package is not installed.
    """
    return _task_module(recipe).make_task(
        recipe, data, seed=seed, device=device, train_limit=train_limit, test_limit=test_limit
    )


def sketch(recipe: Recipe) -> Sketch:
    """A recipe's network and one batch on the meta device; needs no data but a user's own.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> sketch(load_recipe("digits")).sample.shape
        torch.Size([64, 1, 8, 8])
    """
    return _task_module(recipe).sketch(recipe)


def _task_module(recipe: Recipe) -> _TaskModule:
    if recipe.has_own_data:
        return cast(_TaskModule, import_module("dynarank.train.own_task"))
    return cast(_TaskModule, import_module(DATA[recipe.data.partition(":")[0]]))
