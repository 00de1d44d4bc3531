"""Scheduling of costly work in a training loop: every N steps, or within a share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Cadence"]

_T = TypeVar("_T")
_MARGIN = 2  # the next call may take longer than the last


class Cadence:
    """Calls a function every ``every`` steps, or so that it takes at most ``share`` of the time.

    With ``share``, the first call is made once twice its estimated duration is within the share of
    the time since the first step; after that the duration of the last call counts. The steps of the
    calls then depend on the clock; the training itself does not.

    Args:
        every: the number of steps between calls; None: as often as ``share`` allows.
        share: the largest share of the time since the first step.
        clock: a function that returns the time in seconds.

    Raises:
        ValueError: ``every`` is below 1, or ``share`` is not in (0, 1].

    Example:
        >>> pace = Cadence(every=2)
        >>> [pace.step(lambda: "done", lambda: 0.0) for _ in range(4)]
        [None, 'done', None, 'done']
    """

    def __init__(
        self,
        every: int | None = None,
        share: float = 0.01,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"a monitor reads every 1 or more steps, got every={every}")
        if not 0 < share <= 1:
            raise ValueError(f"the share of time for readings must lie in (0, 1], got {share!r}")
        self.clock = clock
        self._every, self._share = every, share
        self._steps = 0
        self._began = 0.0
        self._spent = 0.0
        self._cost: float | None = None  # the expected duration of the next call, once known

    def step(self, do: Callable[[], _T], guess: Callable[[], float]) -> _T | None:
        """Count a step; call ``do`` if a call is due after it, and return its result, else None.

        Args:
            do: the function to call.
            guess: estimates the duration of the first call in seconds; called at the second step.
        """
        self._steps += 1
        if self._every is not None:
            return do() if self._steps % self._every == 0 else None
        now = self.clock()
        if self._steps == 1:
            self._began = now
            return None
        if self._cost is None:
            self._cost = guess()
            self._spent = self.clock() - now
        if self._spent + _MARGIN * self._cost > self._share * (now - self._began):
            return None
        begun = self.clock()
        done = do()
        self._cost = self.clock() - begun
        self._spent += self._cost
        return done

    def elapsed(self) -> float:
        """The time since the first step, in seconds."""
        return self.clock() - self._began
