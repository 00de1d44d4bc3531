"""Recipes: validated TOML files that define a run."""

from __future__ import annotations

import difflib
import tomllib
from importlib.resources import files

from dynarank.train.recipe import Recipe, RecipeError

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_names"]


def recipe_names() -> list[str]:
    """The names of all recipes."""
    folder = files("dynarank.train.recipes")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_recipe(name: str) -> Recipe:
    """Load a recipe by name.

    Raises:
        RecipeError: an unknown name; the message lists the known ones and suggests the closest.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise RecipeError(f"unknown recipe {name!r}{hint} Known recipes: {', '.join(names)}.")
    text = (files("dynarank.train.recipes") / f"{name}.toml").read_text(encoding="utf-8")
    return Recipe(name=name, **tomllib.loads(text))
