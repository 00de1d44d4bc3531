"""Commands that are imported when they are called: ``--help`` needs none of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

__all__ = ["LazyGroup", "make_app"]


class LazyGroup(TyperGroup):
    """A group whose commands are modules of their names in :mod:`dynarank.cli`.

    What it lists are stand-ins, enough for the help and for shell completion.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command to call, in place of its stand-in."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(str(name)), rest


def make_app(summaries: dict[str, str], **options: Any) -> typer.Typer:
    """The app with these commands, each with its line of help."""
    app = typer.Typer(cls=LazyGroup, rich_markup_mode="markdown", **options)
    for name, summary in summaries.items():
        app.command(name, help=summary)(_stand_in)
    return app


def _stand_in() -> None: ...


def _load(name: str) -> Any:
    alone = typer.Typer(rich_markup_mode="markdown", add_completion=False)
    alone.command(name)(getattr(import_module(f"dynarank.cli.{name}"), name))
    return get_command(alone)
