"""The closed loop: its rule by hand, and what holds for any sequence of readings."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from closed_loops import (
    LAYERS,
    READINGS,
    SCHEDULES,
    SPECTRA,
    Spectra,
    answers,
    reading,
)
from hypothesis import given, settings

from dynarank import Adapted, FullRank, LowRank
from dynarank.schedules import (
    Clock,
    ClosedLoop,
    Decision,
    Readings,
    closed_loop,
    get_preset,
    step_of,
    timeline,
)
from dynarank.schedules.library.closed_loop import Evidence, Thresholds
from dynarank.schedules.readings import SpectralReading

LOW, FULL, LAST = LowRank(8), FullRank(), LowRank(8)


def decisions(schedule: ClosedLoop, *args: Any, **named: Any) -> list[Decision]:
    return [d for answer in answers(schedule, *args, **named) for d in answer.decisions]


# The rule by hand. No smoothing, no patience, no waiting, unless a test is about it.

PLAIN: dict[str, Any] = dict(
    fall=0.2, saturation=0.9, settled=0.1, smoothing=0.0, patience=1, warmup=0, cooldown=0,
    hysteresis=1.0, most_changes=10, last_inflation=None, to="low-rank",
)  # fmt: skip


def plain(**options: Any) -> ClosedLoop:
    return closed_loop(8, **(PLAIN | options))


def test_a_hand_computed_trace() -> None:
    """With everything on: two layers, readings at steps 0, 10, 20, ..., smoothed by a half.

    a: e = 8, 8, 6, 5 against its best of 8; 0.2 below is 6.4, so it has fallen at 20 and 30, twice
    in a row. Full-rank from 30 on, everything is reset: t = 4, 4.2, 4.3, 4.35: steps of 0.2/4
    = 5%, 0.1/4.2 = 2.4%, 0.05/4.3 = 1.2%: below 3% at 60 and 70, so it deflates at 70.
    b: e = 9.5, 9.25, 9.125, ... is above 0.9 * 10 from the start, but nothing changes before
    step 10.
    """
    schedule = closed_loop(
        8, fall=0.2, saturation=0.9, settled=0.03, smoothing=0.5, patience=2, warmup=0.1,
        cooldown=0.15, hysteresis=2.0, most_changes=2, spectra_every=0.1, to="low-rank",
    )  # fmt: skip
    a = [(8, 3), (8, 3), (4, 3), (4, 3), (20, 4), (20, 4.4), (20, 4.4), (20, 4.4), (1, 1), (1, 1)]
    b = [(9.5, 3), (9, 3), *[(30, 5 * 1.5**i) for i in range(8)]]
    spectra = {
        10 * i: {"a": reading(*one), "b": reading(*two)}
        for i, (one, two) in enumerate(zip(a, b, strict=True))
    }
    found = decisions(schedule, spectra)
    assert [(d.step, d.path, d.form, d.reason) for d in found] == [
        (10, "b", FULL, "effective rank saturates the low rank"),
        (30, "a", FULL, "effective rank has fallen from its best"),
        (70, "a", LAST, "stable rank has settled"),
    ]
    assert found[0].readings == pytest.approx(
        {"effective_rank": 9.25, "rank": 10, "saturation": 0.925, "threshold": 0.9, "in_a_row": 2}
    )
    assert found[1].readings == pytest.approx(
        {
            "effective_rank": 5,
            "best_effective_rank": 8,
            "fall": 0.375,
            "threshold": 0.2,
            "in_a_row": 2,
        }
    )
    assert found[2].readings == pytest.approx(
        {
            "stable_rank": 4.35,
            "stable_rank_before": 4.3,
            "change": 0.05 / 4.3,
            "threshold": 0.03,
            "in_a_row": 2,
        }
    )


def test_the_plan_follows_the_decisions_at_once() -> None:
    schedule = plain(warmup=1, to="adapted")
    both = {"a": reading(9.5, 3), "b": reading(7, 3)}
    plans = [dict(answer.plan) for answer in answers(schedule, [both] * 3, 4)]
    last = Adapted(8)
    assert plans == [
        {"a": LOW, "b": LOW},
        {"a": FULL, "b": LOW},  # saturated; settled at the next reading but one
        {"a": FULL, "b": LOW},
        {"a": FULL, "b": LOW},
    ]
    plans = [dict(answer.plan) for answer in answers(schedule, [both] * 4, 4)]
    assert plans[3] == {"a": last, "b": LOW}


@pytest.mark.parametrize(
    ("effective", "fallen"),
    [
        ([8, 6.41], None),
        ([8, 6.39], 1),
        ([5, 8, 6.39], 2),  # against the best so far, not the first
        ([8, 7, 6.5, 6], 3),  # in small steps too
        ([8, 6.39, 8], 1),
    ],
    ids=str,
)
def test_a_fall_is_counted_from_the_best(effective: list[float], fallen: int | None) -> None:
    found = decisions(plain(), [{"a": reading(e, 3 * 2.0**i)} for i, e in enumerate(effective)])
    assert [d.step for d in found] == ([] if fallen is None else [fallen])


def test_a_layer_is_reset_after_a_change() -> None:
    """The best of its low-rank time does not count against its full-rank time, nor back."""
    spectra = [reading(8, 3), reading(4, 3), reading(40, 3), reading(40, 3), reading(4, 9)]
    spectra += [reading(4, 3)] * 3
    found = decisions(plain(), [{"a": one} for one in spectra])
    assert [(d.step, d.form) for d in found] == [(1, FULL), (3, LAST)]


def test_smoothing_lets_one_outlier_pass() -> None:
    ranks = [8.0] * 4 + [6.0] + [8.0] * 4
    spectra = [{"a": reading(e, 2.0 * i)} for i, e in enumerate(ranks)]
    assert [d.step for d in decisions(plain(), spectra)] == [4]
    assert decisions(plain(smoothing=0.5), spectra) == []


def test_patience_asks_for_readings_in_a_row() -> None:
    ranks = [8.0, 6.0, 6.0, 8.0, 6.0, 6.0, 6.0, 6.0]
    spectra = [{"a": reading(e, 2.0 * i)} for i, e in enumerate(ranks)]
    assert [d.step for d in decisions(plain(patience=3), spectra)] == [6]


def test_patience_asks_for_saturated_and_settled_readings_in_a_row_too() -> None:
    ranks = [9.5, 9.5, 9.0, 9.5, 9.5, 9.5]  # above 9 three times in a row at 5
    spectra = [{"a": reading(e, 3 * 2.0**i)} for i, e in enumerate(ranks)]
    # Full-rank from 5 on: steps of t below 10% at 7, 8, then one of 50%, and then at 10, 11, 12.
    spectra += [{"a": reading(30, t)} for t in (4, 4.1, 4.2, 6.3, 6.4, 6.5, 6.6)]
    found = decisions(plain(patience=3), spectra)
    assert [(d.step, d.form) for d in found] == [(5, FULL), (12, LAST)]


def test_nothing_changes_in_warmup_or_from_the_last_inflation_on() -> None:
    saturated = [{"a": reading(9.5, 3 * 2.0**i)} for i in range(100)]
    assert [d.step for d in decisions(plain(warmup=0.3), saturated)] == [30]
    assert [d.step for d in decisions(plain(warmup=0.3, last_inflation=0.3), saturated)] == []
    assert [d.step for d in decisions(plain(warmup=0.3, last_inflation=31), saturated)] == [30]
    still = [{"a": reading(9.5, 3)} for _ in range(100)]
    found = decisions(plain(warmup=30, cooldown=10, last_inflation=31), still)
    assert [(d.step, d.form) for d in found] == [(30, FULL), (40, LAST)]  # deflation may be later


def test_an_adapted_layer_does_not_saturate_but_falls() -> None:
    schedule = plain(to="adapted")
    ranks = [9.5, 9.5, 9.5, 30, 30, 20]  # inflates at 0, deflates at 2, falls at 5
    found = decisions(schedule, [{"a": reading(e, 3)} for e in ranks])
    assert [(d.step, d.form) for d in found] == [(0, FULL), (2, Adapted(8)), (5, FULL)]


def test_the_way_back_needs_more_evidence() -> None:
    """Thresholds of 0.2, 0.9 and 0.1 become 0.4, 0.95 and 0.05 after one time there and back."""
    schedule = plain(hysteresis=2.0)
    back = [reading(9.1, 3), reading(9, 3), reading(9, 3)]  # inflated at 0, deflated at 2
    for extra, again in ((reading(9.4, 3), False), (reading(9.6, 3), True)):
        found = decisions(schedule, [{"a": one} for one in [*back, extra]])
        assert len(found) == 2 + again
    for extra, again in ((reading(5.5, 3), False), (reading(5.3, 3), True)):
        found = decisions(schedule, [{"a": one} for one in [*back, reading(9, 3), extra]])
        assert len(found) == 2 + again
    again_full = [*back, reading(9.6, 3), reading(9, 3)]
    for extra, settled in ((reading(9, 3.2), False), (reading(9, 3.1), True)):
        found = decisions(schedule, [{"a": one} for one in [*again_full, extra]])
        assert len(found) == 3 + settled
    assert Thresholds(0.2, 0.9, 0.1).stricter(2.0) == Thresholds(0.4, 0.95, 0.05)


def test_a_reading_of_a_weight_whose_change_is_not_made_yet_is_skipped() -> None:
    spectra = [{"a": reading(9.5, 3)}] * 6
    assert [d.step for d in decisions(plain(), spectra)] == [0, 2, 3, 5]
    late = list(answers(plain(), spectra, forms={"a": LOW}))
    assert [d.step for answer in late for d in answer.decisions] == [0]
    assert late[-1].state["layers"]["a"]["skipped"] == 5


def test_a_weight_of_zeros_is_left_alone() -> None:
    assert decisions(plain(), [{"a": reading(0, 0)}] * 20) == []


def test_without_spectra_nothing_happens_and_the_timeline_says_so() -> None:
    schedule = closed_loop(8)
    assert schedule.stateful and schedule.requires == {"spectra"}
    (phase,) = timeline(schedule, Readings(LAYERS), 50)
    assert phase.plan == {"a": LOW, "b": LOW}
    answer = schedule.update(schedule.start(), Clock(3, 50), Readings(LAYERS))
    assert answer.state == schedule.start()


# For any sequence of readings.

ANY = settings(deadline=None, max_examples=150)


@ANY
@given(SCHEDULES, SPECTRA)
def test_cap_warmup_cooldown_and_order_hold(schedule: ClosedLoop, spectra: list[Spectra]) -> None:
    run = list(answers(schedule, spectra, 60))
    for path in LAYERS:
        made = [d for answer in run for d in answer.decisions if d.path == path]
        assert len(made) <= schedule.most_changes
        assert [d.form for d in made] == [
            schedule.last if i % 2 else FULL for i in range(len(made))
        ]  # there and back, never twice the same
        assert all(d.step >= step_of(schedule.warmup, 60) for d in made)
        cooldown = step_of(schedule.cooldown, 60)
        assert all(two.step - one.step >= max(cooldown, 1) for one, two in pairwise(made))
        if (last := schedule.last_inflation) is not None:
            assert all(d.step < step_of(last, 60) for d in made if d.form == FULL)
        for step, answer in enumerate(run):
            decided = [d.form for d in made if d.step <= step]
            assert answer.plan[path] == (decided[-1] if decided else schedule.low)


@ANY
@given(SCHEDULES, SPECTRA)
def test_every_decision_can_be_checked_by_hand(
    schedule: ClosedLoop, spectra: list[Spectra]
) -> None:
    """Its figures are finite, pass its threshold, and thresholds are as strict as the way says."""
    made: dict[str, int] = {}
    for decision in decisions(schedule, spectra, 60):
        figures = decision.readings
        assert all(math.isfinite(value) for value in figures.values())
        assert figures["in_a_row"] >= schedule.patience
        times = schedule.hysteresis ** (made.get(decision.path, 0) // 2)
        made[decision.path] = made.get(decision.path, 0) + 1
        threshold = figures["threshold"]
        if "fall" in figures:
            assert threshold == pytest.approx(schedule.fall * times)
            fallen = 1 - figures["effective_rank"] / figures["best_effective_rank"]
            assert figures["fall"] == fallen and fallen > threshold * (1 - 1e-9)
        elif "saturation" in figures:
            assert 1 - threshold == pytest.approx((1 - schedule.saturation) / times)
            assert figures["effective_rank"] > threshold * figures["rank"]
        else:
            assert threshold == pytest.approx(schedule.settled / times)
            change = abs(figures["stable_rank"] - figures["stable_rank_before"])
            assert change < threshold * figures["stable_rank_before"]


@ANY
@given(SCHEDULES, SPECTRA)
def test_readings_that_are_not_finite_change_nothing(
    schedule: ClosedLoop, spectra: list[Spectra]
) -> None:
    """A run is the same as if they had been missing, and a step with only such decides nothing."""
    finite = [{p: r for p, r in one.items() if r.finite} for one in spectra]
    state = schedule.start()
    for step, (one, clean) in enumerate(zip(spectra, finite, strict=True)):
        before = state
        answer = schedule.update(state, Clock(step, 60), Readings(LAYERS, spectra=one))
        state = answer.state
        assert {d.path for d in answer.decisions} <= clean.keys()
        for path in one.keys() - clean.keys():
            old = before["layers"].get(path, {"skipped": 0})
            assert state["layers"][path]["skipped"] == old["skipped"] + 1
            rest = {k: v for k, v in state["layers"][path].items() if k != "skipped"}
            if "changes" in old:
                assert rest == {k: v for k, v in old.items() if k != "skipped"}
    assert decisions(schedule, finite, 60) == decisions(schedule, spectra, 60)


@ANY
@given(SCHEDULES, SPECTRA)
def test_it_is_a_pure_function_whose_state_survives_json(
    schedule: ClosedLoop, spectra: list[Spectra]
) -> None:
    """Asked twice it answers alike, leaves the state as it was, and goes on from JSON alike."""
    state = schedule.start()
    for step, one in enumerate(spectra):
        kept, clock, readings = copy.deepcopy(state), Clock(step, 60), Readings(LAYERS, spectra=one)
        answer = schedule.update(state, clock, readings)
        assert state == kept
        assert schedule.update(state, clock, readings) == answer
        assert state == kept
        text = json.dumps(state, allow_nan=False)
        assert schedule.update(json.loads(text), clock, readings) == answer
        state = json.loads(json.dumps(answer.state, allow_nan=False))
        assert state == answer.state


@ANY
@given(READINGS.filter(lambda r: r.finite), st.integers(2, 40), SCHEDULES)
def test_a_layer_that_stands_still_changes_there_and_back_at_most_as_the_cap_says(
    one: SpectralReading, count: int, schedule: ClosedLoop
) -> None:
    """Under constant readings nothing falls: only saturation inflates, and ever less easily."""
    strict = replace(schedule, hysteresis=2.0, most_changes=100, cooldown=0, warmup=0)
    made = decisions(strict, [{"a": one}] * count, 60)
    room = 1 - one.effective_rank / one.rank
    assert all(d.reason != "effective rank has fallen from its best" for d in made)
    if room > 0:  # it is not saturated for good
        times = sum(d.form == FULL for d in made)
        assert times <= max(0, math.ceil(math.log2((1 - strict.saturation) / room) + 1e-9))


def test_evidence_is_of_finite_readings() -> None:
    with pytest.raises(AssertionError):
        Evidence().with_reading(reading(math.nan, 1), Thresholds(0.1, 0.9, 0.1), 0.5)


# What is refused, and the preset.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fall": 0.0}, r"fall lies in \(0, 1\), got 0.0"),
        ({"saturation": 1.0}, r"saturation lies in \(0, 1\), got 1.0"),
        ({"settled": math.nan}, r"settled lies in \(0, 1\), got nan"),
        ({"smoothing": 1.0}, r"smoothing lies in \[0, 1\), got 1.0"),
        ({"hysteresis": 0.5}, r"hysteresis lies in \[1, 100\], got 0.5"),
        ({"patience": 0}, "patience is a whole number of at least 1, got 0"),
        ({"patience": 1.5}, "patience is a whole number of at least 1, got 1.5"),
        ({"most_changes": -1}, "most_changes is a whole number of at least 0, got -1"),
        ({"warmup": 1.5}, "warmup is a step .* got 1.5"),
        ({"cooldown": -1}, "cooldown is a step .* got -1"),
        ({"last_inflation": -0.1}, "last_inflation is a step .* got -0.1"),
        ({"spectra_every": 0}, "spectra_every is above 0, got 0"),
        ({"to": "full"}, 'deflates to "adapted" or "low-rank", got \'full\''),
        ({"rank": 1.5}, r"must lie in \(0, 1\], got 1.5"),
    ],
    ids=str,
)
def test_impossible_loops_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        closed_loop(**options)


def test_the_preset_takes_what_it_knows_and_ignores_the_rest() -> None:
    made = get_preset("closed-loop")(rank=3, inflate=0.1, deflate=0.2, alpha=2.0, fall=0.3)
    assert made == closed_loop(3, alpha=2.0, fall=0.3)
    assert get_preset("closed-loop")() == closed_loop()
