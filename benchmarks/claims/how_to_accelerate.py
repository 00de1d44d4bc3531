"""With Accelerate: its oldest version."""

from __future__ import annotations

from collections.abc import Iterator

from .versions import versions

PAGE = "docs/how-to/accelerate.md"
SETTINGS = ("here 20 of 40 batches",)


def claims() -> Iterator[str]:
    """Yield the version."""
    (oldest,) = versions("accelerate")
    yield f"with Accelerate {oldest} or later"
