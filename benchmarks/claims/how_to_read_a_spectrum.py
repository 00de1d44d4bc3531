"""Read a spectrum: the share of energy that the command asks for, and what the rest amounts to."""

from __future__ import annotations

import math
from collections.abc import Iterator

PAGE = "docs/how-to/read-a-spectrum.md"
ENERGY = 0.99
SETTINGS = (
    "| 99% | the energy rank: the fewest singular values with 99% of `sum s^2`",
    '"saves nothing" at 99%',
)


def claims() -> Iterator[str]:
    """Yield the relative change of a weight that loses the rest of its energy."""
    change = math.sqrt(1 - ENERGY)
    yield f"{ENERGY:.0%} of the energy is a relative change of the weight by {change:.0%}"
