"""Decay: full rank at first, then smaller and smaller budgets in a few cuts, most of them early.

With n cuts, the budgets fall geometrically from h (full rank: 1) to e, at times that are evenly
spaced on a logarithmic scale unless they are given::

    b_i = h (e / h)^(i / n)                              i = 0, ..., n
    t_i = first (last / first)^((i - 1) / (n - 1))       i = 1, ..., n

The mean budget over the run is its total cost, relative to a run at full rank: exactly, for a
budget of FLOPs is a share of the full-rank ones. A total cost therefore determines e.

A total of the model becomes one of the scheduled layers as soon as a batch has shown what they cost
(o) and all else does (r), each relative to the model: ``(total - r) / o`` of their own cost. So the
decay is geometric in what can fall.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal, Self, cast

from dynarank.forms import Form, FullRank, Request, Within
from dynarank.schedules.base import Answer, Clock, RankSchedule, Readings, State, When, step_of
from dynarank.schedules.budget_error import BudgetError
from dynarank.schedules.options import check_count, check_when, check_within, share_within
from dynarank.schedules.state_rules import Rule, check_fields, is_count, is_number

__all__ = ["BUDGET", "Decay"]

BUDGET = Within(flops=0.5, of="layers", multiple_of=1)
"""The total cost if nothing is said: of the layers, so that any model can meet it."""

# From the exploration of 2026-11-28 (benchmarks/training/results/2026-11-28-exploration; a GPT and
# MLPs, one CPU core, n = 1 to 4): at equal cost many small cuts did better than one or two on the
# GPT, and as well on the MLPs. The smaller the budget, the earlier: where the layers had a share b
# of their cost, the last cut did best at 10% of the run for b = .15, at 40% for .33, at 60 to 80%
# from .5 on. What they give on other seeds: docs/evidence.md.
CUTS = 8
LATEST, LAST_PER_SQUARE = 0.8, 4.0  # the last cut, at 4 b^2 of the run
FIRST = 1 / 40  # of the time of the last cut
TOTAL_PER_END = 1.25  # of such a decay, nearly

_DIGITS = 6  # of the budgets that are computed
_LEAST = 10**-_DIGITS


@dataclass(frozen=True)
class Decay(RankSchedule):
    """From full rank down to a budget, in a few cuts.

    Each cut keeps the ranks that matter most for the outputs at that time, measured on a few
    batches. Give ``end``, the last budget, or ``total``, the cost of the whole run.

    Args:
        end: the last budget: a share of the model's full-rank training FLOPs, which is met to a
            single direction; or any :class:`dynarank.Within` with a share, whose other options
            hold for every cut.
        total: the training FLOPs of the whole run relative to full rank, a share or a ``Within``;
            ``end`` is computed from it; calibrations before the cuts are not in it, and
            :func:`dynarank.estimate` says what they add. Neither:
            ``Within(flops=0.5, of="layers")``.
        cuts: the number of cuts, the last one at most at 80% of the run, earlier with a small
            budget; or their times, shares of the run (float) or steps (int), increasing. For
            budgets of your own at each time use :class:`~dynarank.schedules.phases.Phases`.
        high: the budget before the first cut, a share; 1: full rank. Below, ranks are uniform at
            first.
        after: ``"start"``: the cuts are timed from the beginning of the run; ``"warmup"``: from the
            time at which the learning rate first reaches its peak, as shares of the rest of the
            run. Without a forecast of the learning rate, it is the peak so far.

    Raises:
        ValueError: both ``end`` and ``total``; a budget that is not a share, or above ``high``; a
            total that the phase before the first cut exceeds already, or of other than FLOPs; times
            that do not increase.

    Example:
        >>> from dynarank.schedules.timelines import timeline
        >>> schedule = Decay(end=0.36, cuts=2)
        >>> [(p.start, p.plan["a"]) for p in timeline(schedule, Readings({"a": (64, 64)}), 100)]
        [(0, FullRank()), (2, Within(flops=0.6, multiple_of=1)), ...]
        >>> round(schedule.cost(100), 4), Decay(total=0.5).budgets(100)[-1]
        (0.56, 0.388531)

    Evidence: ``docs/evidence.md``, against fixed low rank of the same FLOPs.
    """

    end: float | Within | None = None
    _: KW_ONLY
    total: float | Within | None = None
    cuts: int | Sequence[When] = CUTS
    high: float = 1.0
    after: Literal["start", "warmup"] = "start"

    def __post_init__(self) -> None:
        if self.end is not None and self.total is not None:
            raise ValueError(
                f"a decay has an end or a total, which determines its end, got end={self.end!r} "
                f"and total={self.total!r}; leave out one"
            )
        name = "total" if self.end is None else "end"
        budget = share_within(name, BUDGET if (given := getattr(self, name)) is None else given)
        object.__setattr__(self, name, budget)
        object.__setattr__(self, "cuts", _checked(self.cuts))
        check_within("high, the budget before the first cut,", self.high, "(0, 1]")
        object.__setattr__(self, "high", float(self.high))
        if self.after not in ("start", "warmup"):
            raise ValueError(
                f'cuts are timed after the "start" or after the "warmup", got {self.after!r}'
            )
        if budget.amount > self.high:
            raise ValueError(
                f"a decay falls from high={self.high:g}, but its {name} is {budget.amount:g}; "
                f"give a smaller {name}" + ("" if self.high == 1 else " or a larger high")
            )
        if self.end is None and budget.kind != "flops":
            raise ValueError(f"the total cost of a run is a budget of FLOPs, got {budget!r}")

    @property
    def budget(self) -> Within:
        """The end or the total, whichever is given."""
        found = self.total if self.end is None else self.end
        assert isinstance(found, Within)
        return found

    @cached_property
    def times(self) -> tuple[When, ...]:
        """The times of the cuts, counted from the step after which they are timed."""
        if isinstance(self.cuts, Sequence):
            return tuple(self.cuts)
        total = self.budget.amount * (1.0 if self.end is None else TOTAL_PER_END)
        last = min(LAST_PER_SQUARE * total**2, LATEST)
        return _log_spaced(FIRST * last, last, self.cuts)

    def budgets(self, total_steps: int, begin: int = 0) -> tuple[float, ...]:
        """The budgets of a run, the first before the first cut.

        Args:
            total_steps: the length of the run.
            begin: the step from which the cuts are timed.

        Raises:
            ValueError: the total cannot be met in a run of this length; or as :meth:`steps`.
        """
        share, steps = float(self.budget.amount), self.steps(total_steps, begin)
        end = _end(share, self.high, steps, total_steps) if self.end is None else share
        return _geometric(self.high, end, len(steps))

    def cost(self, total_steps: int, begin: int = 0) -> float:
        """The mean budget of a run: with FLOPs, its cost relative to full rank."""
        steps = self.steps(total_steps, begin)
        return _mean(self.budgets(total_steps, begin), steps, total_steps)

    @property
    def stateful(self) -> bool:
        """Whether the cuts follow the learning rate, or the total is one of the model."""
        return self.after == "warmup" or (self.end is None and self.budget.of == "model")

    def __call__(self, clock: Clock, readings: Readings, /) -> Request:
        """The current budget, for every layer."""
        if self.stateful:
            return super().__call__(clock, readings)
        return self._plan(clock, readings, begin=0)

    def start(self) -> State:
        """The initial state: the learning rate's peak so far and its step, the FLOPs when known."""
        return {"rate": 0.0, "peak": 0, "cut": False, "flops": None} if self.stateful else {}

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        rules: dict[str, Rule] = {
            "rate": lambda rate: is_number(rate) and rate >= 0,
            "peak": is_count,
            "cut": lambda cut: type(cut) is bool,
            "flops": _is_flops_or_none,
        }
        check_fields(state, rules if self.stateful else {})

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The current budget, for every layer; from the first cut on, peak and FLOPs are fixed."""
        if not self.stateful:
            return Answer(self(clock, readings), state)
        seen = dict(state)
        if not state["cut"]:
            seen |= _follow(state, clock, readings) if self.after == "warmup" else {}
            seen["flops"] = state["flops"] or (readings.flops and [*readings.flops])
        own = self if seen["flops"] is None else _of_layers(self, *seen["flops"])
        cut = clock.step >= own.steps(clock.total_steps, seen["peak"])[0]
        return Answer(own._plan(clock, readings, seen["peak"]), {**seen, "cut": cut})

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """The default decay, with the decomposition of a recipe."""
        return cls(total=share_within("total", BUDGET, options.get("decomposition")))

    def _plan(self, clock: Clock, readings: Readings, begin: int) -> Request:
        steps, answers = _phases(self, clock.total_steps, begin)
        return dict.fromkeys(readings.layers, answers[bisect_right(steps, clock.step)])

    def steps(self, total_steps: int, begin: int = 0) -> tuple[int, ...]:
        """The steps of the cuts in a run.

        Raises:
            ValueError: steps and shares are mixed, and do not increase in a run of this length.
        """
        steps = tuple(begin + step_of(when, total_steps - begin) for when in self.times)
        if steps != tuple(sorted(steps)):
            raise ValueError(
                f"cuts come one after another, but {self.times} are the steps {steps} in a run of "
                f"{total_steps}"
            )
        return steps


@lru_cache(maxsize=64)  # asked at every step
def _of_layers(decay: Decay, own: float, rest: float) -> Decay:
    """A decay with a total of the model, as one with a total of the layers.

    Raises:
        ValueError: everything else costs more than the total.
    """
    if decay.end is not None or decay.budget.of == "layers":
        return decay
    total, high = ((share - rest) / own for share in (decay.budget.amount, decay.high))
    if total <= 0:
        raise BudgetError(
            f"a total of {decay.budget} cannot be met: everything but the scheduled layers costs "
            f"{rest:.4f}; allow more than that, or schedule more layers"
        )
    budget = replace(decay.budget, flops=min(total, 1.0), of="layers")
    return replace(decay, total=budget, high=min(high, 1.0))


@lru_cache(maxsize=64)
def _phases(
    schedule: Decay, total_steps: int, begin: int
) -> tuple[tuple[int, ...], tuple[Form | Within, ...]]:
    """The steps of the cuts, and the answers before the first and after each."""
    budget = schedule.budget
    answers = [
        FullRank() if share == 1 else replace(budget, **{budget.kind: share})
        for share in schedule.budgets(total_steps, begin)
    ]
    if isinstance(first := answers[0], Within):  # nothing has been learned that could be kept
        answers[0] = replace(first, ranks="uniform")
    return schedule.steps(total_steps, begin), tuple(answers)


def _checked(cuts: int | Sequence[When]) -> int | tuple[When, ...]:
    if not isinstance(cuts, Sequence):
        return check_count("cuts", cuts)
    times = tuple(check_when("the time of a cut", when) for when in cuts)
    if not times:
        raise ValueError("a decay has at least one cut, got no times")
    for one, two in pairwise(times):
        if type(one) is type(two) and not one < two:
            raise ValueError(f"cuts come one after another, got {one!r} then {two!r}")
    return times


def _log_spaced(first: float, last: float, n: int) -> tuple[float, ...]:
    """``n`` times from ``first`` to ``last``; a single one is in the middle."""
    places = [i / (n - 1) for i in range(n)] if n > 1 else [0.5]
    return tuple(round(first * (last / first) ** place, _DIGITS) for place in places)


def _geometric(high: float, end: float, n: int) -> tuple[float, ...]:
    """``n + 1`` budgets from ``high`` to ``end``, rounded so that every machine finds the same."""
    between = (round(high * (end / high) ** (i / n), _DIGITS) for i in range(1, n))
    return (high, *(min(max(one, end), high) for one in between), end)


def _mean(budgets: Sequence[float], steps: Sequence[int], total_steps: int) -> float:
    """The mean of the budgets over a run with cuts at these steps."""
    edges = [0, *(min(step, total_steps) for step in steps), total_steps]
    lengths = [stop - begin for begin, stop in pairwise(edges)]
    return sum(b * n for b, n in zip(budgets, lengths, strict=True)) / total_steps


def _end(total: float, high: float, steps: tuple[int, ...], total_steps: int) -> float:
    """The end for which the mean budget is ``total``, by bisection: the mean grows with it."""

    def mean(end: float) -> float:
        return _mean(_geometric(high, end, len(steps)), steps, total_steps)

    if mean(high) <= total:
        return high
    low, end = _LEAST, high
    if mean(low) > total:
        raise BudgetError(
            f"a total of {total:g} cannot be met in {total_steps} steps with cuts at {steps}; the "
            f"nearest possible is {math.ceil(mean(low) * 1e4) / 1e4:.4f}: cut earlier, or begin "
            f"below high={high:g}"
        )
    while end - low > _LEAST / 1000:
        middle = (low + end) / 2
        low, end = (middle, end) if mean(middle) <= total else (low, middle)
    return max(math.floor(low / _LEAST + 0.01) / 10**_DIGITS, _LEAST)


def _is_flops_or_none(value: Any) -> bool:
    if value is None or not isinstance(value, Sequence):
        return value is None
    return len(cast(Sequence[Any], value)) == 2 and all(map(is_number, cast(Sequence[Any], value)))


def _follow(state: State, clock: Clock, readings: Readings) -> State:
    """The state with the learning rate's peak: as forecast, else as observed so far."""
    rates = readings.forecast
    if rates:
        first = rates.index(max(rates))
        return {**state, "peak": round(first / len(rates) * clock.total_steps)}
    rate = readings.learning_rate
    if rate is None or not state["rate"] < rate < float("inf"):
        return state
    return {**state, "rate": rate, "peak": clock.step}
