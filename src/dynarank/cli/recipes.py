"""``dynarank recipes``: the recipes, a line each."""

from __future__ import annotations

from dynarank.cli.listing import JsonListOption, show_list
from dynarank.train.built_in_recipes import recipe_summaries

__all__ = ["recipes"]


def recipes(as_json: JsonListOption = False) -> None:
    """List the recipes.

    A recipe names the model, its data and how it is trained. `dynarank train NAME` runs one, under
    the schedules of `dynarank schedules`.
    """
    show_list(recipe_summaries(), as_json)
