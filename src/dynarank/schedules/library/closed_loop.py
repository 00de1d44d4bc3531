"""A closed-loop schedule: each layer inflates and deflates by its own effective and stable rank.

Legend, for one layer: e and t are its effective and stable rank, smoothed over the readings since
the layer's last change, ``x <- a x + (1 - a) reading``; e* is the largest e since then; r is its
low rank, c the number of its changes, and h = hysteresis^(c // 2).

- inflate if ``e < (1 - fall h) e*``: the layer loses directions;
- inflate a low-rank layer if ``e > (1 - (1 - saturation) / h) r``: it uses all its directions;
- deflate if ``|t - t_before| < (settled / h) t_before``: its stable rank has settled.

Each condition must hold at ``patience`` consecutive readings. After a layer has inflated and
deflated, repeating the cycle takes ``hysteresis`` times the evidence, so that layers do not
oscillate. ``most_changes`` limits the number of changes in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from functools import cached_property, partial
from typing import Any

from dynarank.forms import AdaptedExecution, Form, FullRank, LowRank, RankLike, form_name
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
from dynarank.schedules.options import (
    Ending,
    check_count,
    check_when,
    check_within,
    last_form,
    low_form,
)
from dynarank.schedules.readings import SpectralReading
from dynarank.schedules.state_rules import Rule, check_fields, is_count, is_number, mapping_of

__all__ = ["ClosedLoop", "Evidence", "Thresholds"]


@dataclass(frozen=True)
class Thresholds:
    """The thresholds at which a reading counts as evidence for a change.

    Args:
        fall: the effective rank has fallen if ``e < (1 - fall) e*``.
        saturation: it saturates the low rank if ``e > saturation r``.
        settled: the stable rank has settled if ``|t - t_before| < settled t_before``.

    Example:
        >>> Thresholds(0.25, 0.5, 0.5).stricter(2.0)
        Thresholds(fall=0.5, saturation=0.75, settled=0.25)
    """

    fall: float
    saturation: float
    settled: float

    def stricter(self, times: float) -> Thresholds:
        """Thresholds that need ``times`` the evidence; a fall of 1 or more is never reached."""
        saturation = 1 - (1 - self.saturation) / times
        return Thresholds(self.fall * times, saturation, self.settled / times)


@dataclass(frozen=True)
class Evidence:
    """The readings of one layer since its last change, summarized.

    Args:
        effective_rank: e, the smoothed effective rank; None before the first reading.
        stable_rank: t, the smoothed stable rank.
        stable_rank_before: t one reading earlier.
        best: e*, the largest e.
        fallen: the number of consecutive readings at which e has been below its threshold.
        saturated: the number of consecutive readings at which e has been above its threshold.
        settled: the number of consecutive readings at which t has been settled.
    """

    effective_rank: float | None = None
    stable_rank: float | None = None
    stable_rank_before: float | None = None
    best: float | None = None
    fallen: int = 0
    saturated: int = 0
    settled: int = 0

    def with_reading(
        self, reading: SpectralReading, thresholds: Thresholds, smoothing: float
    ) -> Evidence:
        """The evidence after one more reading, which must be finite.

        Example:
            >>> reading = SpectralReading(7.9, 4.0, 8, 1.0, rank=8, full_rank=64)
            >>> Evidence().with_reading(reading, Thresholds(0.1, 0.95, 0.002), 0.5).saturated
            1
        """
        assert reading.finite
        e = _smoothed(self.effective_rank, reading.effective_rank, smoothing)
        t = _smoothed(self.stable_rank, reading.stable_rank, smoothing)
        best = e if self.best is None else max(self.best, e)
        before = self.stable_rank
        still = before is not None and abs(t - before) < thresholds.settled * before
        return Evidence(
            e,
            t,
            before,
            best,
            self.fallen + 1 if e < (1 - thresholds.fall) * best else 0,
            self.saturated + 1 if e > thresholds.saturation * reading.rank else 0,
            self.settled + 1 if still else 0,
        )


def _smoothed(before: float | None, now: float, smoothing: float) -> float:
    if before is None:
        return now
    return before + (1 - smoothing) * (now - before)  # in this form a constant stays exact


@dataclass(frozen=True)
class _Layer:
    """The state of one layer.

    Args:
        changes: the number of changes so far; if it is odd, the layer is full-rank.
        changed: the step of the last change.
        skipped: the number of unusable readings: missing, not finite, or taken while a change was
            decided but not yet made.
        evidence: the evidence since the last change.
    """

    changes: int = 0
    changed: int = 0
    skipped: int = 0
    evidence: Evidence = field(default_factory=Evidence)


@dataclass(frozen=True)
class ClosedLoop(RankSchedule):
    """Low-rank layers that inflate when their effective rank asks for it, and deflate once settled.

    Args:
        rank: the rank of the low-rank layers and of the adapters.
        fall: inflate when the effective rank is this share below its best since the last change.
        saturation: inflate a low-rank layer when its effective rank is above this share of its
            rank. The effective rank of random factors is nearly their rank, and falls as the layer
            learns, so this rule means nothing before the end of ``warmup``. Keep
            ``saturation > 1 - fall``, or every layer meets one of the two rules.
        settled: deflate when the smoothed stable rank changes by less than this share from one
            reading to the next. It depends on ``spectra_every``: readings twice as far apart
            differ by up to twice as much.
        smoothing: a, the weight of the old value in ``x <- a x + (1 - a) reading``, in [0, 1).
        patience: at how many consecutive readings a rule must hold.
        warmup: the time before which no layer changes, a share of the run (float) or a step (int).
        cooldown: the shortest time between two changes of a layer, a share of the run (float) or a
            number of steps (int).
        hysteresis: how many times the evidence a layer needs to repeat a change, at least 1.
        most_changes: the largest number of changes per layer; 2: inflate once, deflate once.
        last_inflation: the time after which no layer inflates, a share of the run (float) or a
            step (int); None: no limit.
        spectra_every: how often the spectra are read, a share of the run (float) or steps (int).
        to: what layers deflate to. ``"adapted"``: freeze W, add a zero-output adapter; the function
            is unchanged. ``"low-rank"``: truncate; the cost really falls.
        decomposition: the decomposition's name.
        alpha: the adapter's scale is ``alpha / rank``.
        execution: how the adapted form multiplies, see :class:`dynarank.Adapted`.

    Raises:
        ValueError: a threshold outside its range, a time outside the run, an unknown ending, an
            impossible rank.

    Example:
        >>> schedule = ClosedLoop(8, most_changes=4, to="low-rank")
        >>> schedule.update(schedule.start(), Clock(0, 100), Readings({"a": (64, 64)})).plan
        {'a': LowRank(rank=8, decomposition='svd')}

    Evidence: ``docs/evidence.md``, beside fixed low rank of the same FLOPs.

    Reference:
        Roy and Vetterli, "The effective rank", 2007, for the measure. Ending full-rank training at
        a plateau of the stable rank is the rule of Wang et al., "Cuttlefish", arXiv 2305.02538,
        2023, for the whole network at once; the loop per layer is ours.
    """

    rank: RankLike = 0.5
    _: KW_ONLY
    fall: float = 0.1
    saturation: float = 0.95
    settled: float = 0.002
    smoothing: float = 0.5
    patience: int = 3
    warmup: When = 0.1
    cooldown: When = 0.1
    hysteresis: float = 2.0
    most_changes: int = 2
    last_inflation: When | None = 0.8
    spectra_every: When | None = 0.01
    to: Ending = "adapted"
    decomposition: str = "svd"
    alpha: float = 16.0
    execution: AdaptedExecution = "auto"

    low, last = cached_property(low_form), cached_property(last_form)

    requires = frozenset({"spectra"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.last.rank)
        check_within("fall", self.fall, "(0, 1)")
        check_within("saturation", self.saturation, "(0, 1)")
        check_within("settled", self.settled, "(0, 1)")
        check_within("smoothing", self.smoothing, "[0, 1)")
        check_within("hysteresis", self.hysteresis, "[1, 100]")
        for name, least in (("patience", 1), ("most_changes", 0)):
            object.__setattr__(self, name, check_count(name, getattr(self, name), least))
        for name in ("warmup", "cooldown", "last_inflation", "spectra_every"):
            if (when := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_when(name, when))
        if self.spectra_every is None or not self.spectra_every > 0:
            raise ValueError(f"spectra_every is above 0, got {self.spectra_every!r}")

    def start(self) -> State:
        """The empty state: no layer has been read."""
        return {"layers": {}}

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        counts = ("changes", "changed", "skipped")
        rules: dict[str, Rule] = {**dict.fromkeys(counts, is_count), "evidence": _is_evidence}
        check_fields(state, {"layers": mapping_of(partial(_follows, rules), layers)})

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The form of each layer, after its own spectrum, if one was read, has been judged."""
        kept: Mapping[str, Mapping[str, Any]] = state["layers"]
        decisions: list[Decision] = []
        if readings.spectra:  # the state changes only where spectra are read
            judged = {
                path: self._judge(path, _recalled(kept.get(path, {})), clock, readings)
                for path in readings.layers
            }
            decisions = [decision for _, decision in judged.values() if decision is not None]
            kept = {path: asdict(layer) for path, (layer, _) in judged.items()}
            state = {"layers": kept}
        plan = {
            path: self._form(kept[path]["changes"] if path in kept else 0)
            for path in readings.layers
        }
        return Answer(plan, state, tuple(decisions))

    def _form(self, changes: int) -> Form:
        if changes % 2:
            return FullRank()
        return self.last if changes else self.low

    def _thresholds(self, layer: _Layer) -> Thresholds:
        times = self.hysteresis ** min(layer.changes // 2, 64)  # a larger power would overflow
        return Thresholds(self.fall, self.saturation, self.settled).stricter(times)

    def _judge(
        self, path: str, layer: _Layer, clock: Clock, readings: Readings
    ) -> tuple[_Layer, Decision | None]:
        """The next state of a layer after these readings, and the decision about it, if any."""
        reading, form = readings.spectra.get(path), self._form(layer.changes)
        waits = form_name(readings.forms.get(path, form)) != form_name(form)
        if reading is None or not reading.finite or waits:
            return _Layer(layer.changes, layer.changed, layer.skipped + 1, layer.evidence), None
        thresholds = self._thresholds(layer)
        evidence = layer.evidence.with_reading(reading, thresholds, self.smoothing)
        layer = _Layer(layer.changes, layer.changed, layer.skipped, evidence)
        if not self._may_change(layer, clock):
            return layer, None
        found = self._deflate(evidence, thresholds) if layer.changes % 2 else None
        if not layer.changes % 2:
            found = self._inflate(evidence, thresholds, reading.rank, form)
        if found is None:
            return layer, None
        layer = _Layer(layer.changes + 1, clock.step, layer.skipped)
        return layer, Decision(clock.step, path, self._form(layer.changes), *found)

    def _may_change(self, layer: _Layer, clock: Clock) -> bool:
        """Whether the layer is out of warm-up and cooldown, and has changes left."""
        total, last = clock.total_steps, self.last_inflation
        first = step_of(self.warmup, total)
        if layer.changes:
            first = max(first, layer.changed + step_of(self.cooldown, total))
        too_late = not layer.changes % 2 and last is not None and clock.step >= step_of(last, total)
        return layer.changes < self.most_changes and clock.step >= first and not too_late

    def _inflate(
        self, known: Evidence, thresholds: Thresholds, rank: int, form: Form
    ) -> _Found | None:
        """The reason why a layer inflates, with the figures; None: it does not."""
        e, best = known.effective_rank, known.best
        assert e is not None and best is not None
        if known.fallen >= self.patience:
            return "effective rank has fallen from its best", {
                "effective_rank": e,
                "best_effective_rank": best,
                "fall": 1 - e / best,
                "threshold": thresholds.fall,
                "in_a_row": known.fallen,
            }
        if isinstance(form, LowRank) and known.saturated >= self.patience:
            return "effective rank saturates the low rank", {
                "effective_rank": e,
                "rank": rank,
                "saturation": e / rank,
                "threshold": thresholds.saturation,
                "in_a_row": known.saturated,
            }
        return None

    def _deflate(self, known: Evidence, thresholds: Thresholds) -> _Found | None:
        """The reason why a layer deflates, with the figures; None: it does not."""
        if known.settled < self.patience:
            return None
        t, before = known.stable_rank, known.stable_rank_before
        assert t is not None and before is not None
        return "stable rank has settled", {
            "stable_rank": t,
            "stable_rank_before": before,
            "change": abs(t - before) / before,
            "threshold": thresholds.settled,
            "in_a_row": known.settled,
        }


_Found = tuple[str, dict[str, float]]


def _follows(rules: Mapping[str, Rule], value: Any) -> bool:
    check_fields(value, rules)
    return True


def _is_evidence(value: Any) -> bool:
    counts, seen = ("fallen", "saturated", "settled"), Evidence()
    ranks = [f.name for f in fields(seen) if f.name not in counts]
    rules = {**dict.fromkeys(counts, is_count), **dict.fromkeys(ranks, _is_rank_or_none)}
    return _follows(rules, value)


def _is_rank_or_none(value: Any) -> bool:
    return value is None or (is_number(value) and value >= 0)


def _recalled(kept: Mapping[str, Any]) -> _Layer:
    values: dict[str, Any] = {**kept, "evidence": Evidence(**kept.get("evidence", {}))}
    return _Layer(**values)
