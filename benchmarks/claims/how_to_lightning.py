"""With Lightning: its oldest version, and those that do not work."""

from __future__ import annotations

from collections.abc import Iterator

from .versions import versions

PAGE = "docs/how-to/lightning.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the versions."""
    oldest, *without = versions("lightning")
    yield f"with Lightning {oldest} or later, except {' and '.join(without)};"
