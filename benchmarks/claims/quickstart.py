"""Quickstart: the version of Python."""

from __future__ import annotations

from collections.abc import Iterator

from .versions import python

PAGE = "docs/quickstart.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the oldest version."""
    yield f"with Python {python()} or newer"
