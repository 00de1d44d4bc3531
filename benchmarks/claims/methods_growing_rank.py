"""Growing rank: the threshold that the schedule has."""

from __future__ import annotations

from collections.abc import Iterator

from dynarank.schedules import growing

PAGE = "docs/methods/growing-rank.md"
SETTINGS: tuple[str, ...] = ()


def claims() -> Iterator[str]:
    """Yield the threshold that the schedule has."""
    yield f"1 - var(s without its first m) / var(s) > {growing().threshold}"
