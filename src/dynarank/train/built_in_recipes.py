"""The files of the built-in recipes: their names and what they say, without torch."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

__all__ = ["read_built_in", "recipe_names", "recipe_summaries"]

_FOLDER = files("dynarank.train") / "recipes"


def recipe_names() -> list[str]:
    """The names of all recipes."""
    names = (file.name for file in _FOLDER.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def recipe_summaries() -> dict[str, str]:
    """What each recipe trains, in one line.

    Example:
        >>> recipe_summaries()["imdb-lstm"]
        'A bidirectional LSTM on IMDb movie reviews, with a word vocabulary.'
    """
    return {name: read_built_in(name)["summary"] for name in recipe_names()}


def read_built_in(name: str) -> dict[str, Any]:
    """The settings in the file of a recipe."""
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
