"""Cuttlefish: low-rank once all stable ranks have settled, at ranks derived from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Self, cast

from dynarank.decompositions import get_decomposition
from dynarank.forms import Form, FullRank, LowRank, Plan
from dynarank.schedules.base import Answer, Clock, Decision, RankSchedule, Readings, State, When
from dynarank.schedules.options import rank_within
from dynarank.schedules.state_rules import Rule, check_fields, is_count, is_number, mapping_of

__all__ = ["Cuttlefish", "mean_slope"]


@dataclass(frozen=True)
class Cuttlefish(RankSchedule):
    """Full-rank until every layer's stable rank has settled, then low-rank at derived ranks.

    Let t_0, t_1, ... be the stable ranks of a layer at successive readings, rounded down, and
    ``a_i = a_(i-1) + 2 / (window + 1) (t_i - a_(i-1))`` their exponential moving average. A layer
    has settled once the mean ``|a'|`` over the last ``recent`` readings is at most ``threshold``,
    and stays settled. For the last two layers the threshold is ``relaxed[0]`` times as high, for
    the last one ``relaxed[1]`` times. At the reading after all layers have settled,
    ``rank = ceil(t / t_0 * full_rank)``; a layer whose factors would not be cheaper at that rank
    stays full-rank.

    Args:
        spectra_every: the interval between readings, a share of the run (float) or steps (int). The
            published code uses an epoch; the default is an epoch of a run of 300.
        window: the window of the moving average, and the number of readings before which nothing
            is decided.
        recent: the number of readings over which the slope is averaged.
        threshold: the largest slope of a settled layer, in stable rank per reading.
        relaxed: the factors on the threshold for the last two layers and for the last one.
        decomposition: the decomposition's name.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> schedule = Cuttlefish(390)
        >>> schedule.update(schedule.start(), Clock(0, 9), Readings({"a": (8, 8)})).plan
        {'a': FullRank()}

    Evidence: ``docs/evidence.md``, beside fixed low rank of the same FLOPs.

    Reference:
        Wang et al., "Cuttlefish: Low-Rank Model Training without All the Tuning", arXiv 2305.02538,
        2023; the details of the rule are those of its code.
    """

    spectra_every: When | None = 1 / 300
    _: KW_ONLY
    window: int = 15
    recent: int = 11
    threshold: float = 0.1
    relaxed: tuple[float, float] = (2.5, 5.0)
    decomposition: str = "svd"

    requires = frozenset({"spectra"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "relaxed", tuple(self.relaxed))
        every = self.spectra_every
        if every is None or not every > 0 or (isinstance(every, float) and every > 1):
            raise ValueError(
                "spectra_every is a number of steps (int >= 1) or a share of the run (float in "
                f"(0, 1]), got {self.spectra_every!r}"
            )
        if self.window < 1 or self.recent < 1 or not self.threshold >= 0 or min(self.relaxed) < 1:
            raise ValueError(
                "window and recent are at least 1, threshold at least 0 and relaxed at least 1, "
                f"got {self.window!r}, {self.recent!r}, {self.threshold!r} and {self.relaxed!r}"
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Construct from options; by default one reading per epoch, as in the published code."""
        every = {"spectra_every": options["epoch"]} if "epoch" in options else {}
        return super().from_options({**every, **options})

    def start(self) -> State:
        """The empty state: no readings."""
        return {"count": 0, "first": {}, "smooth": {}, "settled": []}

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        counts, smooth = mapping_of(is_count, layers), mapping_of(_are_averages, layers)
        if "ranks" in state:
            check_fields(state, {"ranks": counts})
            return
        rules: dict[str, Rule] = {"count": is_count, "first": counts, "smooth": smooth}
        check_fields(state, {**rules, "settled": lambda paths: _are_paths(paths, layers)})

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The plan for this step; a reading counts if it has finite values for every layer."""
        full: Plan = dict.fromkeys(readings.layers, FullRank())
        if "ranks" in state:
            return Answer({path: self._form(state["ranks"].get(path, 0)) for path in full}, state)
        now = _whole_ranks(readings)
        if now is None:
            return Answer(full, state)
        if len(state["settled"]) == len(full):
            return self._switch(state, clock, readings, now)
        return Answer(full, self._observe(state, now))

    def _observe(self, state: State, now: Mapping[str, int]) -> State:
        """The state after one more reading."""
        smooth = {
            path: self._smoothed(state["smooth"].get(path, ()), rank) for path, rank in now.items()
        }
        settled = set(state["settled"])
        left = len(now) - len(settled)
        if state["count"] >= self.window:
            limit = self.threshold * {2: self.relaxed[0], 1: self.relaxed[1]}.get(left, 1.0)
            settled |= {p for p, values in smooth.items() if mean_slope(values) <= limit}
        return {
            "count": state["count"] + 1,
            "first": state["first"] or dict(now),
            "smooth": smooth,
            "settled": sorted(settled),
        }

    def _smoothed(self, values: Sequence[float], rank: int) -> list[float]:
        """The moving averages from which the next slopes are computed, the newest last."""
        if not values:
            return [float(rank)]
        newest = values[-1] + 2 / (self.window + 1) * (rank - values[-1])
        return [*values, newest][-(self.recent + 1) :]

    def _switch(
        self, state: State, clock: Clock, readings: Readings, now: Mapping[str, int]
    ) -> Answer:
        ranks: dict[str, int] = {}
        decisions: list[Decision] = []
        for path, shape in readings.layers.items():
            first, largest = (
                state["first"].get(path, now[path]),
                min(shape[0], math.prod(shape[1:])),
            )
            scaled = -(-now[path] * largest // first)  # rounded up in integers, exactly
            rank = rank_within(min(scaled, largest), shape, self.decomposition)
            cheaper = _is_cheaper(shape, rank, self.decomposition)
            ranks[path] = rank if cheaper else 0
            figures = {"stable_rank": now[path], "stable_rank_at_start": first, "rank": rank}
            reason = "every layer's stable rank has settled"
            if not cheaper:
                reason += "; factors of its rank would not be cheaper"
            form = self._form(ranks[path])
            decisions.append(Decision(clock.step, path, form, reason, _as_floats(figures)))
        plan = {path: self._form(rank) for path, rank in ranks.items()}
        return Answer(plan, {"ranks": ranks}, tuple(decisions))

    def _form(self, rank: int) -> Form:
        return LowRank(rank, self.decomposition) if rank else FullRank()


def _are_paths(values: Any, layers: Mapping[str, Any]) -> bool:
    return isinstance(values, list) and set(cast(list[Any], values)) <= set(layers)


def _are_averages(values: Any) -> bool:
    return isinstance(values, Sequence) and all(map(is_number, cast(Sequence[Any], values)))


def mean_slope(values: Sequence[float]) -> float:
    """The mean absolute slope of equidistant values, without the slope at the first one.

    Slopes are ``(v_(i+1) - v_(i-1)) / 2`` inside and ``v_n - v_(n-1)`` at the end. With fewer than
    three values, the only slope there is.

    Example:
        >>> mean_slope([5.0, 4.0, 2.0, 2.0])
        0.8333333333333334
    """
    slopes = [abs(after - before) / 2 for before, after in zip(values, values[2:], strict=False)]
    slopes.append(abs(values[-1] - values[-2]))
    return sum(slopes) / len(slopes)


def _whole_ranks(readings: Readings) -> dict[str, int] | None:
    """The stable ranks, rounded down; None unless every layer has a finite one."""
    spectra = readings.spectra
    if not all(path in spectra and spectra[path].finite for path in readings.layers):
        return None
    return {path: max(1, int(spectra[path].stable_rank)) for path in readings.layers}


def _as_floats(figures: Mapping[str, int]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _is_cheaper(shape: tuple[int, ...], rank: int, decomposition: str) -> bool:
    """Whether the factors have fewer entries than the weight, and so cost fewer FLOPs."""
    factors = get_decomposition(decomposition).shapes(shape, rank)
    return sum(math.prod(factor) for factor in factors) < math.prod(shape)
