"""Growing rank by InRank's rule: a layer's rank grows while its directions explain too little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate

from dynarank.forms import LowRank, Plan, Rank, RankLike
from dynarank.schedules.base import (
    Answer,
    Clock,
    Decision,
    RankSchedule,
    Readings,
    State,
    When,
    step_of,
)
from dynarank.schedules.options import rank_within
from dynarank.schedules.state_rules import check_fields, is_count, mapping_of

__all__ = ["Growing", "explained"]

_HALF = Rank(0.5, of="min")
_BUFFER = Rank(100 / 768, of="min")  # 100 directions of GPT-2's 768


@dataclass(frozen=True)
class Growing(RankSchedule):
    """Low-rank layers whose rank grows while their directions explain too little.

    A layer has ``modes + buffer`` directions, at most ``rank``; the modes grow until ``stop``. At
    each reading, ``modes' = min m: explained(s, m) > threshold`` for m from ``modes`` on, and
    ``modes + buffer - 1`` if even the buffer's directions do not suffice; never more than
    ``rank - buffer``. From ``stop`` on the layer has its modes only.

    Args:
        rank: the largest rank; by default half of the full rank, min(out, in * kernel).
        first: the initial number of modes.
        buffer: directions that train but are not counted as modes yet; by default 100 of 768, as a
            share of the full rank.
        threshold: the share of the variance that the modes should explain, in (0, 1).
        spectra_every: the interval between readings, a share of the run (float) or steps (int).
        warmup: the time before which nothing grows, a share of the run (float) or a step (int).
        stop: the time at which growth ends and the buffer is cut off; None: never.
        decomposition: the decomposition's name.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> schedule = Growing(first=2, buffer=4)
        >>> schedule.update(schedule.start(), Clock(0, 9), Readings({"a": (64, 64)})).plan
        {'a': LowRank(rank=6, decomposition='svd')}

    Evidence: ``docs/evidence.md``, beside fixed low rank of the same FLOPs.

    Reference:
        Zhao, Zhang, Chen, Schaefer, Anandkumar, "InRank: Incremental Low-Rank Learning", arXiv
        2306.11250, 2023; the rule is that of InRank-Efficient in its code.
    """

    rank: RankLike = _HALF
    _: KW_ONLY
    first: RankLike = 2
    buffer: RankLike = _BUFFER
    threshold: float = 0.9
    spectra_every: When | None = 0.01
    warmup: When = 0.02
    stop: When | None = 0.5
    decomposition: str = "svd"

    requires = frozenset({"spectra", "singular_values"})

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"the threshold lies in (0, 1), got {self.threshold!r}")
        for name in ("spectra_every", "warmup", "stop"):
            when: When | None = getattr(self, name)
            if when is None:
                continue
            least = 0 if name == "warmup" else 1e-12
            if not when >= least or (isinstance(when, float) and when > 1):
                raise ValueError(
                    f"{name} is a step (int) or a share of the run (float up to 1), got {when!r}"
                )
        for rank in (self.first, self.buffer, self.rank):
            LowRank(rank, self.decomposition)  # validates the rank

    def start(self) -> State:
        """The initial state, before any growth."""
        return {"modes": {}, "cut": False}

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        modes = mapping_of(lambda count: is_count(count) and count > 0, layers)
        check_fields(state, {"modes": modes, "cut": lambda cut: isinstance(cut, bool)})

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The plan for this step; ranks grow where a reading requires it.

        Raises:
            ValueError: a reading without all its singular values.
        """
        layers = readings.layers
        modes = {path: state["modes"].get(path) or self._first(layers[path]) for path in layers}
        ended = self.stop is not None and clock.step >= step_of(self.stop, clock.total_steps)
        decided: dict[str, Decision] = {}
        if ended and not state["cut"]:
            decided = {path: self._cut(path, clock, modes[path]) for path in layers}
        elif not ended and clock.step > step_of(self.warmup, clock.total_steps):
            decided = dict(self._growth(modes, clock, readings))
        modes |= {path: int(decision.readings["modes"]) for path, decision in decided.items()}
        ranks = modes if ended else {path: self._rank(layers[path], modes[path]) for path in layers}
        plan: Plan = {path: LowRank(rank, self.decomposition) for path, rank in ranks.items()}
        return Answer(plan, {"modes": modes, "cut": ended}, tuple(decided.values()))

    def _growth(
        self, modes: Mapping[str, int], clock: Clock, readings: Readings
    ) -> Iterator[tuple[str, Decision]]:
        """A decision for each layer that grows."""
        for path, values in _seen(readings).items():
            shape, before = readings.layers[path], modes[path]
            buffer, most = self._within(self.buffer, shape), self._within(self.rank, shape)
            shares = explained(values)
            choices = range(before, min(before + buffer, most - buffer, len(shares)))
            enough = (m for m in choices if shares[m] > self.threshold)
            now = next(enough, choices[-1] if choices else before)
            if now == before:
                continue
            form = LowRank(self._rank(shape, now), self.decomposition)
            reason = f"{before} modes explain {shares[before]:.3f} (threshold {self.threshold})"
            figures = {"modes": float(now), "explained": shares[now], "before": shares[before]}
            yield path, Decision(clock.step, path, form, reason, figures)

    def _cut(self, path: str, clock: Clock, modes: int) -> Decision:
        form, figures = LowRank(modes, self.decomposition), {"modes": float(modes)}
        return Decision(clock.step, path, form, "growth has ended: buffer cut off", figures)

    def _first(self, shape: tuple[int, ...]) -> int:
        return self._within(self.first, shape)

    def _rank(self, shape: tuple[int, ...], modes: int) -> int:
        return min(modes + self._within(self.buffer, shape), self._within(self.rank, shape))

    def _within(self, rank: RankLike, shape: tuple[int, ...]) -> int:
        return rank_within(rank, shape, self.decomposition)


def explained(values: Sequence[float]) -> list[float]:
    """The share of the variance that the first m singular values explain, m = 0, 1, ..., n - 1.

    ``1 - var(s with its first m values set to zero) / var(s)``; 1 where the variance is zero.

    Example:
        >>> [round(share, 3) for share in explained([3.0, 1.0, 0.0, 0.0])]
        [0.0, 0.875, 1.0, 1.0]
    """
    sums = list(accumulate(reversed(values)))[::-1]
    squares = list(accumulate(value * value for value in reversed(values)))[::-1]
    variances = [
        square - total * total / len(values) for total, square in zip(sums, squares, strict=True)
    ]
    whole = variances[0]
    return [1 - variance / whole if whole > 0 else 1.0 for variance in variances]


def _seen(readings: Readings) -> dict[str, Sequence[float]]:
    """The complete, finite singular values of the layers that were read."""
    seen: dict[str, Sequence[float]] = {}
    for path, reading in readings.spectra.items():
        if path not in readings.layers or not reading.finite:
            continue
        if len(reading.values) < reading.full_rank:
            raise ValueError(
                f"layer {path!r}: growing ranks need all {reading.full_rank} singular values, "
                f"the reading has {len(reading.values)}; have the monitor keep them"
            )
        seen[path] = reading.values
    return seen
