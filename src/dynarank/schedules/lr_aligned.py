"""Dynamic rank that finds its own moments: the full-rank phase spans the learning rate's decay.

At a high learning rate the noise of the gradients is high, at a low one it is low. Full rank is to
be there when the one regime turns into the other: at the *decisive decay*, the last moment at
which the learning rate falls below the geometric mean of its peak and of where it ends (of a tenth
of the peak, where it ends lower). With the decay at a share d of the run, the full-rank phase
takes the last 46% of the time before it and the first 40% of the time after it::

    inflate = d - 0.46 d        deflate = d + 0.40 (1 - d)

Both published experiments fit this rule, which is ours: decays at 100 of 150 and 150 of 200 epochs
give (54, 120) and (81, 170), and were run with (55, 120) and (80, 170).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dynarank.forms import Form, FullRank, LowRank
from dynarank.schedules.base import Answer, Clock, Readings, State, When, step_of
from dynarank.schedules.serialization import serializable

__all__ = ["LRAligned", "decisive_decay", "full_rank_window"]

BEFORE, AFTER = 0.46, 0.40  # shares of the time before and after the decay, see above
USUAL_DECAY = (
    2 / 3
)  # where one is expected while nothing is known, as in the paper's first experiment
LATEST = 0.9  # without any decay to wait for, full rank ends here
_STEADY = 0.9  # a learning rate that never falls below this share of its peak has no decay
_TENTH = 0.1


@serializable
@dataclass(frozen=True)
class LRAligned:
    """``low`` before, full-rank around, ``last`` after the learning rate's decisive decay.

    Where the learning rate's future is known (``readings.forecast``), the window is computed from
    it. Where it is not, it is followed as it happens: full rank begins at the usual moment or with
    the decay, whichever is earlier, and ends when 40% of the time after the decay has passed, or,
    without any decay, at 90% of the run. A learning rate that rises again takes the decay back.

    Args:
        low: the form before.
        last: the form after.
        length: of the full-rank phase, as a share of the run; None: as the rule above says. A
            longer or shorter one keeps the shares of it before and after the decay.
        inflate: a fixed moment for the beginning; None: found.
        deflate: a fixed moment for the end; None: found.

    Raises:
        ValueError: a length outside [0, 1], moments that do not increase.

    Example:
        >>> schedule = LRAligned(LowRank(8), LowRank(8))
        >>> rates = tuple(0.1 if i < 500 else 0.01 for i in range(1001))
        >>> clock, readings = Clock(50, 100), Readings({"a": (16, 16)}, forecast=rates)
        >>> schedule.update(schedule.start(), clock, readings).plan
        {'a': FullRank()}

    Reference:
        The alignment is that of Shin, Jung, Hong, Lee, "Dynamic Rank Adjustment for Accurate and
        Efficient Neural Network Training", arXiv 2508.08625, 2025, set there by hand.
    """

    low: LowRank
    last: Form
    length: float | None = None
    inflate: When | None = None
    deflate: When | None = None

    spectra_every = None

    def __post_init__(self) -> None:
        if self.length is not None and not 0 <= self.length <= 1:
            raise ValueError(f"a full-rank phase takes a share of the run, got {self.length!r}")
        for moment in (self.inflate, self.deflate):
            if moment is not None and (moment < 0 or (isinstance(moment, float) and moment > 1)):
                raise ValueError(
                    f"a moment is a step (int >= 0) or a share of the run in [0, 1], got {moment!r}"
                )
        if type(self.inflate) is type(self.deflate) and self.inflate and self.deflate:
            if not self.inflate < self.deflate:
                raise ValueError(f"inflate comes before deflate: {self.inflate}, {self.deflate}")

    def start(self) -> State:
        """Nothing seen yet. ``began`` and ``decayed`` are steps."""
        return {"phase": 0, "peak": 0.0, "began": None, "decayed": None}

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The phase for this moment; phases never go backwards."""
        seen = _follow(state, clock, readings.learning_rate)
        begin, end = self._window(seen, clock, readings.forecast)
        phase = max(seen["phase"], (clock.step >= begin) + (clock.step >= end))
        if phase == 1 and seen["began"] is None:
            seen = {**seen, "began": clock.step}
        form = (self.low, FullRank(), self.last)[phase]
        return Answer(dict.fromkeys(readings.layers, form), {**seen, "phase": phase})

    def _window(self, seen: State, clock: Clock, forecast: tuple[float, ...]) -> tuple[int, int]:
        """The first steps of the full-rank and of the last phase, as far as one knows."""
        if forecast:
            begin, end = full_rank_window(decisive_decay(forecast), self.length)
        else:
            begin, end = self._online(seen, clock)
        total = clock.total_steps
        first = step_of(begin if self.inflate is None else self.inflate, total)
        last = step_of(end if self.deflate is None else self.deflate, total)
        return first, max(first, last)

    def _online(self, seen: State, clock: Clock) -> tuple[float, float]:
        total = clock.total_steps
        decay = None if seen["decayed"] is None else seen["decayed"] / total
        begin, _ = full_rank_window(None, self.length)
        if seen["began"] is not None:
            begin = seen["began"] / total
        elif decay is not None:
            begin = min(begin, decay)
        if self.length is not None:
            return begin, min(begin + self.length, 1.0)
        return begin, LATEST if decay is None else decay + AFTER * (1 - decay)


def _follow(state: State, clock: Clock, rate: float | None) -> State:
    """Take notice of the learning rate: its peak so far, and when it fell."""
    if rate is None or not math.isfinite(rate):
        return state
    peak = max(state["peak"], rate)
    if rate >= peak * math.sqrt(_TENTH):
        return {**state, "peak": peak, "decayed": None}
    fell = clock.step if state["decayed"] is None else state["decayed"]
    return {**state, "peak": peak, "decayed": fell}


@lru_cache(maxsize=64)
def decisive_decay(rates: Sequence[float]) -> float | None:
    """When the learning rate falls for good, as a share of the run; None if it never does.

    Args:
        rates: the learning rate at equal distances from the first step to the last.

    Example:
        >>> decisive_decay((1.0,) * 100 + (0.1,) * 30 + (0.01,) * 20)
        0.6666666666666666
        >>> decisive_decay((1.0, 1.0, 1.0)) is None
        True
    """
    if not rates:
        return None
    peak = max(rates)
    lowest = min(rates[rates.index(peak) :])
    if not peak > 0 or lowest > _STEADY * peak:
        return None
    threshold = math.sqrt(peak * max(lowest, _TENTH * peak))
    last_high = max(i for i, rate in enumerate(rates) if rate >= threshold)
    return (last_high + 1) / len(rates)


def full_rank_window(decay: float | None, length: float | None = None) -> tuple[float, float]:
    """When full rank begins and ends, as shares of the run, around a decay at a share of it.

    Args:
        decay: None: where one is usual.
        length: of the window; None: as the rule says.

    Example:
        >>> full_rank_window(100 / 150)
        (0.36, 0.8)
    """
    decay = USUAL_DECAY if decay is None else decay
    usual = BEFORE * decay + AFTER * (1 - decay)
    length = usual if length is None else length
    begin = decay - length * BEFORE * decay / usual
    begin = min(max(begin, 0.0), 1.0 - length)
    return round(begin, 9), round(begin + length, 9)
