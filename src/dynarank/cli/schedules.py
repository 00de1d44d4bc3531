"""``dynarank schedules``: the rank schedules, a line each."""

from __future__ import annotations

from dynarank.cli.listing import JsonListOption, show_list
from dynarank.schedules.catalog import schedule_summaries

__all__ = ["schedules"]


def schedules(as_json: JsonListOption = False) -> None:
    """List the rank schedules.

    A rank schedule says which form and rank each layer has at each step. `dynarank train RECIPE
    --schedule NAME` trains under one, `dynarank plan RECIPE --schedule NAME` shows what it costs.
    """
    show_list(schedule_summaries(), as_json)
