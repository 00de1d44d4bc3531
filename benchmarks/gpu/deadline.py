"""A deadline, which loops look at."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Deadline"]


class Deadline:
    """So many seconds from now.

    Args:
        seconds: how many.
        clock: the clock.

    Example:
        >>> Deadline(60).passed, Deadline(0).passed
        (False, True)
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """The seconds that are left; negative once it has passed."""
        return self._end - self._clock()

    @property
    def passed(self) -> bool:
        """Whether it has passed."""
        return self.left <= 0
