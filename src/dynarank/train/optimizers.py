"""The optimizer of a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dynarank.train.recipes import Recipe

__all__ = ["OPTIMIZER_SLOTS", "make_optimizer"]

OPTIMIZER_SLOTS = {"sgd": 1, "adamw": 2}
"""The number of values per parameter in the state of each optimizer."""


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Make the recipe's optimizer, with weight decay on weights and factors but not on vectors.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> optimizer = make_optimizer(load_recipe("digits"), nn.Linear(4, 2))
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0005, 0.0]
    """
    groups = _decay_groups(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights (later their factors) decay; normalizations and biases do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
