"""Recipes: validated TOML files that define a run."""

from __future__ import annotations

from pathlib import Path

from dynarank.files.nearest import did_you_mean
from dynarank.train.built_in_recipes import read_built_in, recipe_names, recipe_summaries
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.recipe_files import is_own_recipe, load_own_recipe

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_names", "recipe_summaries"]


def load_recipe(name: str) -> Recipe:
    """Load a built-in recipe by name, or one of your own.

    Args:
        name: a built-in name; or ``FILE.toml``, ``FILE.py`` (its ``recipe``), ``FILE.py:object`` or
            ``module:object``, see :mod:`dynarank.train.recipe_files`.

    Raises:
        RecipeError: an unknown name; the message lists the known ones and suggests the closest. Or
            a file that is no recipe; the message has the key and the nearest known one.
    """
    if is_own_recipe(name):
        return load_own_recipe(name)
    names = recipe_names()
    if name not in names:
        hint = did_you_mean(name, names) or "."
        file = f"{name}.toml"
        hint += f" A file is named with its ending: {file}." if Path(file).is_file() else ""
        raise RecipeError(f"unknown recipe {name!r}{hint} Known recipes: {', '.join(names)}.")
    return Recipe(name=name, **read_built_in(name))
