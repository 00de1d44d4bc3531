"""Headroom: the rates and the bound that the probe has."""

from __future__ import annotations

from collections.abc import Iterator

from dynarank.planning.headroom import RATES
from dynarank.planning.headroom_result import MATTERS

PAGE = "docs/methods/headroom.md"
SETTINGS = ("in our pilot (n = 1 to 3 short runs)",)


def claims() -> Iterator[str]:
    """Yield the rates and the bound that the probe has."""
    lowest, usual, highest = RATES
    yield f"best of 1/{1 / lowest:.0f}, {usual:.0f} and {highest:.0f} times the optimizer's rate"
    yield f"off by more than a factor of {highest:.0f}"
    yield f"low rank is within {MATTERS:.0%} of the full-rank loss"
    yield f"the cut network is within {MATTERS:.0%} of full rank"
