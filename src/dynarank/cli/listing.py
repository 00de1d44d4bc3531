"""Names and a line about each, as a list or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from textwrap import fill
from typing import Annotated, TypeAlias

import typer

from dynarank.cli.show import console

__all__ = ["JsonListOption", "show_list"]

JsonListOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print a JSON object: the line by the name.")
]


def show_list(lines: Mapping[str, str], as_json: bool) -> None:
    """Print each name with its line, wrapped beside it."""
    if as_json:
        print(json.dumps(lines, indent=2))
        return
    out, left = console(), max(map(len, lines), default=0) + 2
    width = out.width if out.is_terminal else sys.maxsize  # a line each for grep
    for name, line in lines.items():
        print(fill(line, width, initial_indent=name.ljust(left), subsequent_indent=" " * left))
