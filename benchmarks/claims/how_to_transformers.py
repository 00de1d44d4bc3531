"""With transformers: its oldest version."""

from __future__ import annotations

from collections.abc import Iterator

from .versions import versions

PAGE = "docs/how-to/transformers.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the version."""
    (oldest,) = versions("transformers")
    yield f"with transformers {oldest} or later"
