"""docs/methods/pufferfish.md."""

from __future__ import annotations

from collections.abc import Iterator

PAGE = "docs/methods/pufferfish.md"
SETTINGS = ("arXiv 2103.03936, 2021",)


def claims() -> Iterator[str]:
    """Yield nothing: all figures are settings."""
    yield from ()
