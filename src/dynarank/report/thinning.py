"""Even subsampling, to keep figures readable and the page small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from dynarank.report.formats import plural

__all__ = ["evenly", "kept_text", "within"]

_T = TypeVar("_T")


def evenly(items: Sequence[_T], most: int) -> list[_T]:
    """At most ``most`` of the items, evenly spaced, including the first and the last.

    Example:
        >>> evenly([0, 1, 2, 3, 4, 5, 6], 3)
        [0, 3, 6]
    """
    if len(items) <= most:
        return list(items)
    if most < 2:
        return list(items[:most])
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def within(budget: int, layers: int, readings: int, size: int, least: int = 4) -> tuple[int, int]:
    """How many layers and readings of ``size`` numbers each fit the budget.

    Readings are dropped first, down to ``least``; then layers.

    Example:
        >>> within(240_000, layers=300, readings=41, size=64)
        (300, 12)
    """
    fitting = budget // max(layers * size, 1)
    kept = min(readings, max(fitting, least))
    return min(layers, max(budget // max(kept * size, 1), 1)), kept


def kept_text(kept: int, total: int, noun: str) -> str:
    """Say how much is shown: ``12 of 41 readings``; empty if all of it is."""
    return f"{kept:,} of {plural(total, noun)}" if kept < total else ""
