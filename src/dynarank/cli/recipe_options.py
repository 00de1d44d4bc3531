"""The recipe of a command: its argument, and the options that change its settings."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeAlias

import typer

from dynarank.decompositions.registry import get_decomposition
from dynarank.forms import RankLike
from dynarank.train.recipes import Recipe, RecipeError, recipe_names

__all__ = [
    "BatchSizeOption",
    "LearningRateOption",
    "RecipeArgument",
    "SetOption",
    "change_recipe",
    "complete_recipe",
    "parse_settings",
]


def complete_recipe(incomplete: str) -> list[str]:
    """The names of recipes that begin so, for shell completion."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


RECIPE_HELP = (
    "The name of a recipe (`dynarank recipes` lists them), or your own: FILE.toml, FILE.py or "
    "module:object."
)

RecipeArgument: TypeAlias = Annotated[
    str, typer.Argument(help=RECIPE_HELP, autocompletion=complete_recipe)
]
SetOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value of a setting of the recipe, as in TOML, such as warmup=0.1 or "
        "model_options.width=8; repeatable.",
    ),
]
LearningRateOption: TypeAlias = Annotated[
    float | None, typer.Option("--lr", help="Override the recipe's learning rate.")
]
BatchSizeOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Override the recipe's batch size.")
]


def change_recipe(
    recipe: Recipe,
    settings: Sequence[str] | None,
    *,
    lr: float | None,
    batch_size: int | None,
    rank: RankLike | None = None,
    decomposition: str | None,
    budget: float | None = None,
) -> Recipe:
    """The recipe with the settings that the options of a command give.

    Raises:
        RecipeError: a setting is unknown, impossible, or given twice.
        ValueError: an unknown decomposition.
    """
    options = {
        "learning_rate": ("--lr", lr),
        "batch_size": ("--batch-size", batch_size),
        "rank": ("--rank", rank),
        "decomposition": ("--decomposition", decomposition),
        "budget": ("--budget", budget),
    }
    changed = parse_settings(settings or ())
    for key, (option, value) in options.items():
        if value is not None and key in changed:
            raise RecipeError(f"either {option} or --set {key}, got {value} and {changed[key]}")
        if value is not None:
            changed[key] = value
    recipe = recipe.with_settings(changed) if changed else recipe
    get_decomposition(recipe.decomposition)
    return recipe


def parse_settings(given: Iterable[str]) -> dict[str, Any]:
    """The values of ``--set``: TOML values by key; a text that is none stands for itself.

    Raises:
        RecipeError: no ``key=value``, or a key twice.

    Example:
        >>> parse_settings(["warmup=0.1", "optimizer=adamw", "decay_at=[8, 12]"])
        {'warmup': 0.1, 'optimizer': 'adamw', 'decay_at': [8, 12]}
    """
    found: dict[str, Any] = {}
    for one in given:
        key, equals, text = (part.strip() for part in one.partition("="))
        if not equals or not key:
            raise RecipeError(f"--set takes key=value, such as warmup=0.1, got {one!r}")
        if key in found:
            raise RecipeError(f"--set {key} is given twice: {found[key]} and {text}")
        found[key] = _value(text)
    return found


def _value(text: str) -> Any:
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text
