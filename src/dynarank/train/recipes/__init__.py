"""Recipes: validated TOML files that define a run."""

from __future__ import annotations

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path

from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.recipe_files import is_own_recipe, load_own_recipe

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_names"]


def recipe_names() -> list[str]:
    """The names of all recipes."""
    folder = files("dynarank.train.recipes")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


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
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        file = f"{name}.toml"
        hint += f" A file is named with its ending: {file}." if Path(file).is_file() else ""
        raise RecipeError(f"unknown recipe {name!r}{hint} Known recipes: {', '.join(names)}.")
    text = (files("dynarank.train.recipes") / f"{name}.toml").read_text(encoding="utf-8")
    return Recipe(name=name, **tomllib.loads(text))
