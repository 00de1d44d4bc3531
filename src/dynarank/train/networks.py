"""The network of a recipe: a built-in one, or what a function of the user's own makes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from dynarank.train.own_code import accepted, calling, check_options
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.registry import MODELS, build_model

__all__ = ["build_network", "network_facts", "sketch_network"]

_ALSO = {"classes": "num_classes", "channels": "in_channels", "inputs": "in_features"}
_MADE: WeakSet[nn.Module] = WeakSet()  # a network that is returned twice is trained already

# What each network was told of the data.
_FACTS: WeakKeyDictionary[nn.Module, dict[str, dict[str, Any]]] = WeakKeyDictionary()


def build_network(recipe: Recipe, known: Mapping[str, Any], **offered: Any) -> nn.Module:
    """A new network of a recipe, with its ``model_options``.

    Args:
        recipe: the recipe.
        known: what a built-in network of the data set is told, such as ``classes``.
        offered: what else the data tells; one of the user's own is told what it has parameters for.

    Raises:
        ValueError: an option that the network does not have.
        RecipeError: the function raised an exception, or returned no new network.

    Example:
        >>> recipe = Recipe(data="digits", model="torch.nn:Linear", epochs=1, learning_rate=0.1)
        >>> recipe = recipe.with_settings({"model_options.out_features": 10})
        >>> build_network(recipe, {"classes": 10}, inputs=64)
        Linear(in_features=64, out_features=10, bias=True)
    """
    if recipe.model in MODELS:
        builder = import_module(MODELS[recipe.model]).MODELS[recipe.model]
        options = {**known, **accepted(builder, offered), **recipe.model_options}
        made = build_model(recipe.model, **options)
    else:
        made = _build_own(recipe, {**known, **offered})
    _FACTS[made] = {"known": dict(known), "offered": dict(offered)}
    return made


def network_facts(model: nn.Module) -> dict[str, dict[str, Any]] | None:
    """The arguments by which :func:`build_network` makes the network again; None: it did not."""
    return _FACTS.get(model)


def _build_own(recipe: Recipe, facts: Mapping[str, Any]) -> nn.Module:
    function, name = recipe.load(recipe.model), f"model {recipe.model!r}"
    if isinstance(function, nn.Module):
        raise RecipeError(f"{name} is a network; name a function or class that makes one")
    also = {_ALSO[key]: value for key, value in facts.items() if key in _ALSO}
    options = {**accepted(function, {**facts, **also}), **recipe.model_options}
    what = f"{name} with model_options (of the data, {', '.join(facts) or 'nothing'} is known)"
    check_options(function, options, what)
    with calling(name, recipe.root):
        made = function(**options)
    if not isinstance(made, nn.Module):
        raise RecipeError(f"{name} must return an nn.Module, got {made!r}")
    if made in _MADE:
        raise RecipeError(f"{name} returned the same network twice; every run needs a new one")
    _MADE.add(made)
    return made


def sketch_network(recipe: Recipe, known: Mapping[str, Any], **offered: Any) -> nn.Module:
    """A recipe's network on the meta device; made on the CPU first if it cannot be there.

    See :func:`build_network`.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                made = build_network(recipe, known, **offered)
        except (RecipeError, RuntimeError):
            if recipe.model in MODELS:
                raise
            made = build_network(recipe, known, **offered)
    return made.to("meta")
