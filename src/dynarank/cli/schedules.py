"""``dynarank schedules``: the rank schedules, a line each."""

from __future__ import annotations

from dynarank.cli.listing import JsonListOption, show_list
from dynarank.schedules.catalog import schedule_summaries

__all__ = ["schedules"]


def schedules(as_json: JsonListOption = False) -> None:
    """List the rank schedules.

    A rank schedule says which form and rank each layer has at each step. `dynarank train` trains
    under one or several of them, `dynarank plan` shows what one costs.
    """
    show_list(schedule_summaries(), as_json)
