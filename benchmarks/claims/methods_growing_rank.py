"""docs/methods/growing-rank.md."""

from __future__ import annotations

from collections.abc import Iterator

from dynarank.schedules import growing

PAGE = "docs/methods/growing-rank.md"
SETTINGS = ("arXiv 2306.11250, 2023",)


def claims() -> Iterator[str]:
    """Yield the threshold that the schedule has."""
    yield f"1 - var(s without its first m) / var(s) > {growing().threshold}"
