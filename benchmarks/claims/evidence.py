"""Evidence: the blocks that are written from the records, and the answers."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.training.harness.evidence import blocks

PAGE = "docs/evidence.md"
SETTINGS = ("95% intervals", "t-test at 5%")


def claims() -> Iterator[str]:
    """Yield the blocks."""
    yield from blocks().values()
