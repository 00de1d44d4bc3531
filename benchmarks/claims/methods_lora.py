"""docs/methods/lora.md."""

from __future__ import annotations

from collections.abc import Iterator

PAGE = "docs/methods/lora.md"
SETTINGS = ("arXiv 2106.09685, 2021",)


def claims() -> Iterator[str]:
    """Yield nothing: all figures are settings."""
    yield from ()
