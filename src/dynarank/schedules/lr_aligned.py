"""Dynamic rank: low-rank, full-rank across the learning-rate decay, deflated after it.

Gradient noise is high at a high learning rate and low at a low one. Layers should be full-rank
around the transition between these regimes: the *decisive decay*, the last time that the learning
rate falls below the geometric mean of its peak and its final value (or a tenth of the peak, if the
final value is lower). With the decay at a share d of the run, the full-rank phase covers the last
46% of the time before it and the first 40% of the time after it::

    inflate = d - 0.46 d        deflate = d + 0.40 (1 - d)

The rule is ours and fits both published experiments: decays at 100 of 150 and 150 of 200 epochs
give (54, 120) and (81, 170); the experiments used (55, 120) and (80, 170).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache

from dynarank.forms import AdaptedExecution, FullRank, RankLike, Request
from dynarank.schedules.base import Answer, Clock, RankSchedule, Readings, State, When, step_of
from dynarank.schedules.options import Ending, check_when, check_within, last_form, low_form
from dynarank.schedules.phases import Phases
from dynarank.schedules.state_rules import (
    Rule,
    check_fields,
    is_count,
    is_number,
    is_step_or_none,
)

__all__ = ["DynamicRank", "decisive_decay", "full_rank_window"]

BEFORE, AFTER = 0.46, 0.40  # shares of the time before and after the decay, see above
USUAL_DECAY = 2 / 3  # assumed where the decay is unknown: that of the paper's first experiment
LATEST = 0.9  # without any decay, the full-rank phase ends here
_STEADY = 0.9  # a learning rate that never falls below this share of its peak has no decay
_TENTH = 0.1


@dataclass(frozen=True)
class DynamicRank(RankSchedule):
    """Low-rank, full-rank from ``inflate`` on, deflated from ``deflate`` on.

    Inflate while the learning rate is still high (high-noise regime), stay full-rank across its
    decisive decay, deflate in the low-noise regime. Transition points that are not given are
    computed from the forecast of the learning rate (``readings.forecast``). Without a forecast they
    follow the learning rate as it is observed: the full-rank phase begins at 36% of the run or with
    the decay, whichever is earlier, and ends when 40% of the time after the decay has passed, or,
    without any decay, at 90% of the run. A learning rate that rises again cancels the decay.

    Args:
        rank: the rank of the low-rank phase and of the deflated one.
        inflate: when to inflate, a share of the run (float) or a step (int); None: computed.
        deflate: when to deflate, a share of the run (float) or a step (int); None: computed.
        to: ``"adapted"``, as in the paper: freeze W, add a zero-output adapter; the function is
            unchanged. ``"low-rank"``: truncate; the cost really falls.
        length: the length of a computed full-rank phase, as a share of the run; None: by the rule
            above. Its parts before and after the decay keep their proportion.
        decomposition: the decomposition's name.
        alpha: the adapter's scale is ``alpha / rank``.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`.

    Raises:
        ValueError: transition points outside the run or not increasing; both given together with
            ``length``; an unknown ending; an impossible rank.

    Example:
        >>> from dynarank.schedules.timelines import timeline
        >>> rates = tuple(0.1 if i < 500 else 0.01 for i in range(1001))
        >>> readings = Readings({"a": (64, 64)}, forecast=rates)
        >>> [phase.start for phase in timeline(DynamicRank(8), readings, 100)]
        [0, 27, 70]

    Evidence: ``docs/evidence.md``, beside fixed low rank of the same FLOPs.

    Reference:
        Shin, Jung, Hong, Lee, "Dynamic Rank Adjustment for Accurate and Efficient Neural Network
        Training", arXiv 2508.08625, 2025. Its CIFAR-10 epochs, set by hand, are 55 and 120 of 150.
    """

    rank: RankLike = 0.5
    _: KW_ONLY
    inflate: When | None = None
    deflate: When | None = None
    to: Ending = "adapted"
    length: float | None = None
    decomposition: str = "svd"
    alpha: float = 16.0
    execution: AdaptedExecution = "auto"

    low, last = cached_property(low_form), cached_property(last_form)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.last.rank)
        for name in ("inflate", "deflate"):
            if (when := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_when(name, when))
        if self.length is not None:
            check_within("length, a share of the run,", self.length, "[0, 1]")
        if self._given is not None and self.length is not None:
            raise ValueError(
                "length is for a computed full-rank phase, but inflate and deflate are both given; "
                f"leave out one of inflate={self.inflate!r}, deflate={self.deflate!r} and "
                f"length={self.length!r}"
            )

    @cached_property
    def _given(self) -> Phases | None:
        """The phases if both transition points are given, else None."""
        if self.inflate is None or self.deflate is None:
            return None
        return Phases((0.0, self.inflate, self.deflate), (self.low, FullRank(), self.last))

    @property
    def stateful(self) -> bool:
        """Whether a transition point depends on the learning rates seen so far."""
        return self._given is None

    def __call__(self, clock: Clock, readings: Readings, /) -> Request:
        """The form of the current phase, if both transition points are given."""
        if self._given is None:
            return super().__call__(clock, readings)
        return self._given(clock, readings)

    def start(self) -> State:
        """The initial state; ``began`` and ``decayed`` are steps."""
        return {"phase": 0, "peak": 0.0, "began": None, "decayed": None} if self.stateful else {}

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        rules: dict[str, Rule] = {
            "phase": lambda phase: is_count(phase) and phase <= 2,
            "peak": lambda peak: is_number(peak) and peak >= 0,
            "began": is_step_or_none,
            "decayed": is_step_or_none,
        }
        check_fields(state, rules if self.stateful else {})

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The form of the current phase, for every layer; phases never go backwards."""
        if self._given is not None:
            return Answer(self._given(clock, readings), state)
        seen = _follow(state, clock, readings.learning_rate)
        begin, end = self._window(seen, clock, readings.forecast)
        phase = max(seen["phase"], (clock.step >= begin) + (clock.step >= end))
        if phase == 1 and seen["began"] is None:
            seen = {**seen, "began": clock.step}
        form = (self.low, FullRank(), self.last)[phase]
        return Answer(dict.fromkeys(readings.layers, form), {**seen, "phase": phase})

    def _window(self, seen: State, clock: Clock, forecast: tuple[float, ...]) -> tuple[int, int]:
        """The first steps of the full-rank and of the last phase, as currently known."""
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
    """Update the state with the learning rate: its peak so far, and when it fell."""
    if rate is None or not math.isfinite(rate):
        return state
    peak = max(state["peak"], rate)
    if rate >= peak * math.sqrt(_TENTH):
        return {**state, "peak": peak, "decayed": None}
    fell = clock.step if state["decayed"] is None else state["decayed"]
    return {**state, "peak": peak, "decayed": fell}


@lru_cache(maxsize=64)
def decisive_decay(rates: Sequence[float]) -> float | None:
    """The time of the last large learning-rate decay, as a share of the run; None without one.

    Args:
        rates: the learning rate, sampled at equal distances from the first step to the last.

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
    """The beginning and end of the full-rank phase around a decay, as shares of the run.

    Args:
        decay: the time of the decay, as a share of the run; None: the usual one, 2/3.
        length: the length of the phase, as a share of the run; None: by the rule above.

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
