"""The optimizer of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dynarank.train.own_code import calling, check_options, is_reference
from dynarank.train.recipe import OPTIMIZERS, Recipe
from dynarank.train.recipe_error import RecipeError

__all__ = ["OPTIMIZER_SLOTS", "make_optimizer", "optimizer_slots"]

_NAMED: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
}

OPTIMIZER_SLOTS = {"sgd": 1, "adamw": 2}
"""The number of values per parameter in the state of each optimizer."""


def optimizer_slots(recipe: Recipe) -> int:
    """The number of values per parameter in the state of a recipe's optimizer.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> optimizer_slots(load_recipe("digits"))
        1
    """
    if recipe.optimizer in OPTIMIZER_SLOTS:
        return OPTIMIZER_SLOTS[recipe.optimizer]
    one = nn.Linear(2, 2, bias=False)
    optimizer = make_optimizer(recipe, one)
    one.weight.grad = torch.ones_like(one.weight)
    optimizer.step()
    state: dict[Any, Any] = optimizer.state[one.weight]
    held = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.shape == one.weight.shape for value in held)


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Make the recipe's optimizer, with weight decay on weights and factors but not on vectors.

    One of the user's own is called as ``function(parameters, lr=..., **optimizer_options)``; the
    parameters are a list, or such groups if the recipe has a ``weight_decay``.

    Raises:
        RecipeError: the function raised an exception, or returned no optimizer of the model.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> optimizer = make_optimizer(load_recipe("digits"), nn.Linear(4, 2))
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0005, 0.0]
    """
    if is_reference(recipe.optimizer):
        return _own(recipe, model)
    groups = _decay_groups(model, recipe.weight_decay)
    kind = _NAMED[recipe.optimizer]
    fixed = {key: getattr(recipe, key) for key in OPTIMIZERS[recipe.optimizer]}
    options: dict[str, Any] = {"lr": recipe.learning_rate, **fixed, **recipe.optimizer_options}
    check_options(kind, options, f"optimizer {recipe.optimizer!r} with optimizer_options", more=1)
    return kind(groups, **options)


def _own(recipe: Recipe, model: nn.Module) -> Optimizer:
    name, function = f"optimizer {recipe.optimizer!r}", recipe.load(recipe.optimizer)
    options = {"lr": recipe.learning_rate, **recipe.optimizer_options}
    check_options(function, options, f"{name} with optimizer_options", more=1)
    decay, parameters = recipe.weight_decay, list(model.parameters())
    with calling(name, recipe.root):
        made = function(_decay_groups(model, decay) if decay else parameters, **options)
    if not isinstance(made, Optimizer):
        raise RecipeError(f"{name} must return a torch.optim.Optimizer, got {made!r}")
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if not held <= {id(p) for p in parameters}:
        raise RecipeError(f"{name} holds parameters that it was not given; return a new one")
    return made


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights (later their factors) decay; normalizations and biases do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
