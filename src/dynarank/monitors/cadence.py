"""Scheduling of costly work in a training loop: every N steps, or within a share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

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

    def state_dict(self) -> dict[str, Any]:
        """The steps counted and the seconds spent, as plain data."""
        elapsed = self.elapsed() if self._steps else 0.0
        return {
            "steps": self._steps,
            "elapsed": elapsed,
            "spent": self._spent,
            "expected": self._cost,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting.

        Raises:
            ValueError: it is not what :meth:`state_dict` returned.
        """
        steps, elapsed, spent, expected = (
            state.get(key) for key in ("steps", "elapsed", "spent", "expected")
        )
        if (
            set(state) != set(self.state_dict())
            or type(steps) is not int
            or steps < 0
            or not (_is_time(elapsed) and _is_time(spent))
            or not (expected is None or _is_time(expected))
        ):
            raise ValueError(
                "the state of a cadence is a count of steps and times in seconds (steps, elapsed, "
                f"spent, expected), got {dict(state)!r}"
            )
        self._steps, self._spent, self._cost = steps, cast(float, spent), cast(Any, expected)
        self._began = self.clock() - cast(float, elapsed)

    def elapsed(self) -> float:
        """The time since the first step, in seconds."""
        return self.clock() - self._began


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast(float, value) < math.inf
