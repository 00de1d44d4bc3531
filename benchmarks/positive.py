"""An argument of a command that is a number of more than 0."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return a type for ``argparse``: numbers above 0 that are finite.

    Example:
        >>> positive(float)("1.5")
        1.5
    """

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:  # nor nan
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
        return value

    return number
