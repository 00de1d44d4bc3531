from __future__ import annotations

import bisect
import math
from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form, Plan
from dynarank.schedules import (
    SCHEDULES,
    Clock,
    DynamicRank,
    FullRankThroughout,
    LowRankThroughout,
    Phase,
    Phases,
    RankSchedule,
    Readings,
    When,
    dynamic_rank,
    full_rank,
    get_preset,
    low_rank,
    step_of,
    timeline,
)

LAYERS = Readings({"a": (8, 6), "b": (4, 3, 3, 3)})
LOW, FULL, LAST = LowRank(2), FullRank(), Adapted(2)


def form_at(schedule: RankSchedule, step: int, total_steps: int) -> Form:
    plan = schedule(Clock(step, total_steps), LAYERS)
    assert list(plan) == ["a", "b"]
    (form,) = set(plan.values())
    return form


# Times and phases.


@pytest.mark.parametrize(
    ("when", "total_steps", "step"),
    [
        (0.0, 100, 0),
        (0.37, 100, 37),
        (0.29, 100, 29),  # 0.29 * 100 is just below 29
        (1.0, 100, 100),
        (0.366, 100, 37),
        (0.364, 100, 36),
        (0.8, 7, 6),
        (37, 100, 37),
        (1, 100, 1),
        (0, 100, 0),
        (np.float64(0.5), 10, 5),
        (np.int64(5), 10, 5),
    ],
    ids=str,
)
def test_a_share_is_rounded_to_a_step_and_an_int_is_one(
    when: When, total_steps: int, step: int
) -> None:
    assert step_of(when, total_steps) == step


def test_the_clocks_progress_is_a_share_of_the_run() -> None:
    assert [Clock(step, 8).progress for step in (0, 2, 8)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("starts", "forms", "message"),
    [
        ([], [], "a start for each form, got 0 starts and 0 forms"),
        ([0.0], [LOW, FULL], "got 1 starts and 2 forms"),
        ([0.0, 0.5], [LOW], "got 2 starts and 1 forms"),
        ([0.1], [LOW], "the first phase starts at 0, got 0.1"),
        ([5], [LOW], "the first phase starts at 0, got 5"),
        ([0.0, -0.5], [LOW, FULL], r"got -0.5"),
        ([0, -1], [LOW, FULL], r"got -1"),
        ([0.0, 1.5], [LOW, FULL], r"float in \[0, 1\]\), got 1.5"),
        ([0.0, math.nan], [LOW, FULL], r"got nan"),
        ([0.0, 0.5, 0.5], [LOW, FULL, LOW], "one after another, got 0.5 then 0.5"),
        ([0.0, 0.5, 0.4], [LOW, FULL, LOW], "got 0.5 then 0.4"),
        ([0, 7, 5], [LOW, FULL, LOW], "got 7 then 5"),
        ([0, 0], [LOW, FULL], "got 0 then 0"),
    ],
)
def test_impossible_phases_are_refused(starts: list[When], forms: list[Form], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phases(starts, forms)


def test_a_phase_may_start_at_any_share_or_step() -> None:
    assert Phases([0, 0.5, 60], [LOW, FULL, LAST]).starts == (0, 0.5, 60)
    assert form_at(Phases([0.0, 1.0], [LOW, FULL]), 9, 10) == LOW
    assert form_at(Phases([0, 10**9], [LOW, FULL]), 9, 10) == LOW


@pytest.mark.parametrize("starts", [[0, 90, 0.5], [0.0, 0.9, 50], [0, 0.0, 0.5]], ids=str)
def test_mixed_starts_that_do_not_increase_in_a_run_are_refused(starts: list[When]) -> None:
    with pytest.raises(ValueError, match="one after another"):
        Phases(starts, [LOW, FULL, LAST])(Clock(0, 100), LAYERS)


def test_a_share_may_be_of_any_float_type() -> None:
    schedule = Phases([0.0, np.float32(0.5)], [LOW, FULL])  # type: ignore[list-item]
    assert [phase.start for phase in timeline(schedule, LAYERS, 100)] == [0, 50]


@pytest.mark.parametrize(
    ("starts", "steps"),
    [([0.0, 0.37, 0.8], [37, 80]), ([0, 10, 11], [10, 11]), ([0, 0.25, 99], [25, 99])],
    ids=str,
)
def test_a_form_holds_from_its_start_to_the_next(starts: list[When], steps: list[int]) -> None:
    schedule = Phases(starts, [LOW, FULL, LAST])
    assert form_at(schedule, 0, 100) == LOW
    for step, (before, after) in zip(steps, [(LOW, FULL), (FULL, LAST)], strict=True):
        assert form_at(schedule, step - 1, 100) == before
        assert form_at(schedule, step, 100) == after
    assert form_at(schedule, 99, 100) == LAST


def test_a_share_stretches_with_the_run_and_an_int_does_not() -> None:
    for total_steps in (10, 1000):
        phases = timeline(Phases([0.0, 0.5, 0.8], [LOW, FULL, LOW]), LAYERS, total_steps)
        assert [phase.start / total_steps for phase in phases] == [0.0, 0.5, 0.8]
        phases = timeline(Phases([0, 5, 8], [LOW, FULL, LOW]), LAYERS, total_steps)
        assert [phase.start for phase in phases] == [0, 5, 8]


# The timeline.


def test_the_phases_of_a_run_follow_one_another() -> None:
    phases = timeline(dynamic_rank(2, inflate=0.4, deflate=0.8), LAYERS, 10)
    plans: list[Plan] = [dict.fromkeys("ab", form) for form in (LOW, FULL, LAST)]
    assert phases == [Phase(0, 4, plans[0]), Phase(4, 8, plans[1]), Phase(8, 10, plans[2])]
    assert [phase.steps for phase in phases] == [4, 4, 2]


GAPS = st.lists(st.integers(0, 3), min_size=1, max_size=3)  # several changes close together
RUNS = st.integers(1, 20_000) | st.integers(16_000, 20_000)
PLANS: list[Plan] = [{"a": LowRank(rank)} for rank in range(1, 14)]


@settings(deadline=None, max_examples=20)
@given(RUNS, st.data())
def test_boundaries_are_exact(total_steps: int, data: st.DataObject) -> None:
    """Any boundaries, as long as no plan comes back within a 4096th of the run."""
    starts = data.draw(st.lists(st.integers(0, total_steps + 5), max_size=4))
    boundaries = sorted(start + gap for start in starts for gap in data.draw(GAPS))

    def schedule(clock: Clock, readings: Readings) -> Plan:
        assert clock.total_steps == total_steps and 0 <= clock.step < total_steps
        return PLANS[bisect.bisect_right(boundaries, clock.step)]

    plans = [schedule(Clock(step, total_steps), LAYERS) for step in range(total_steps)]
    starts = [0, *(step for step in range(1, total_steps) if plans[step] is not plans[step - 1])]
    phases = timeline(schedule, LAYERS, total_steps)
    assert [phase.start for phase in phases] == starts
    assert [phase.stop for phase in phases] == [*starts[1:], total_steps]
    assert [phase.plan for phase in phases] == [plans[start] for start in starts]
    assert sum(phase.steps for phase in phases) == total_steps


@settings(deadline=None, max_examples=20)
@given(RUNS, st.data())
def test_phases_between_equal_plans_are_found_from_a_4096th_of_the_run_on(
    total_steps: int, data: st.DataObject
) -> None:
    shortest = math.ceil(total_steps / 4096)
    lengths = data.draw(st.lists(st.integers(shortest, shortest + 3), max_size=30))
    first = data.draw(st.integers(1, total_steps))
    boundaries = [first + sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def schedule(clock: Clock, readings: Readings) -> Plan:
        return PLANS[bisect.bisect_right(boundaries, clock.step) % 2]

    inside = [step for step in boundaries if step < total_steps]
    assert [phase.start for phase in timeline(schedule, LAYERS, total_steps)] == [0, *inside]


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4095, 4096, 4097, 8191, 8192, 12_289])
def test_the_last_step_can_be_a_phase(total_steps: int) -> None:
    last = total_steps - 1
    schedule = lambda clock, readings: {"a": LOW if clock.step < last else FULL}  # noqa: E731
    starts = [phase.start for phase in timeline(schedule, LAYERS, total_steps)]
    assert starts == ([0, last] if last else [0])


def test_a_long_run_is_not_asked_about_every_step() -> None:
    asked: list[int] = []

    def schedule(clock: Clock, readings: Readings) -> Plan:
        asked.append(clock.step)
        return {"a": LOW if clock.step < 123_457 else FULL}

    assert [phase.start for phase in timeline(schedule, LAYERS, 10**7)] == [0, 123_457]
    assert len(asked) < 20_000


@pytest.mark.parametrize("total_steps", [0, -5])
def test_a_run_has_at_least_one_step(total_steps: int) -> None:
    with pytest.raises(
        ValueError, match=f"total_steps is a whole number of at least 1, got {total_steps}"
    ):
        timeline(full_rank(), LAYERS, total_steps)


def test_a_users_own_function_is_a_schedule_and_sees_the_readings() -> None:
    seen: list[float | None] = []

    def wide_layers_late(clock: Clock, readings: Readings) -> Plan:
        seen.append(readings.learning_rate)
        wide = {path for path, shape in readings.layers.items() if shape[0] >= 8}
        return {p: LOW if p in wide and clock.progress >= 0.5 else FULL for p in readings.layers}

    phases = timeline(wide_layers_late, Readings(LAYERS.layers, 0.1), 10)
    assert [phase.start for phase in phases] == [0, 5]
    assert phases[1].plan == {"a": LOW, "b": FULL}
    assert set(seen) == {0.1}


# Presets.


def test_full_rank_and_low_rank_never_change() -> None:
    assert timeline(full_rank(), LAYERS, 100) == timeline(Phases((0.0,), (FULL,)), LAYERS, 100)
    low = Phases((0.0,), (LowRank(0.5),))
    assert timeline(low_rank(), LAYERS, 100) == timeline(low, LAYERS, 100)
    assert low_rank(3, decomposition="other").form == LowRank(3, "other")
    assert len(timeline(low_rank(2), LAYERS, 100)) == 1


def test_dynamic_rank_is_low_then_full_then_adapted() -> None:
    schedule = dynamic_rank(2, inflate=0.37, deflate=0.80)
    phases = Phases((0.0, 0.37, 0.80), (LOW, FULL, LAST))
    assert timeline(schedule, LAYERS, 100) == timeline(phases, LAYERS, 100)
    options = {"decomposition": "other", "alpha": 3.0, "execution": "two-branch"}
    schedule = dynamic_rank(4, inflate=10, deflate=20, **options)  # type: ignore[arg-type]
    assert [form_at(schedule, step, 30) for step in (9, 10, 19, 20)] == [
        LowRank(4, "other"), FULL, FULL, Adapted(4, "other", 3.0, "two-branch"),
    ]  # fmt: skip


def test_dynamic_rank_can_end_low_rank() -> None:
    schedule = dynamic_rank(2, inflate=0.3, deflate=0.8, to="low-rank")
    assert [form_at(schedule, step, 10) for step in (0, 3, 8)] == [LOW, FULL, LOW]


@pytest.mark.parametrize("to", ["lowrank", "full-rank", ""])
def test_dynamic_rank_has_two_endings(to: str) -> None:
    with pytest.raises(ValueError, match='deflates to "adapted" or "low-rank", got'):
        dynamic_rank(2, to=to)  # type: ignore[arg-type]


def test_dynamic_rank_refuses_transition_points_out_of_order_and_impossible_ranks() -> None:
    with pytest.raises(ValueError, match=r"got 0\.8 then 0\.3"):
        dynamic_rank(2, inflate=0.8, deflate=0.3)
    with pytest.raises(ValueError, match="length is for a computed full-rank phase"):
        dynamic_rank(2, inflate=0.3, deflate=0.8, length=0.4)
    with pytest.raises(ValueError, match="at least 1"):
        dynamic_rank(0)
    with pytest.raises(ValueError, match="alpha"):
        dynamic_rank(2, alpha=0.0)


def test_presets_take_the_options_of_dynamic_rank() -> None:
    options = {"rank": 3, "inflate": 0.1, "deflate": 0.2, "decomposition": "other", "alpha": 2.0}
    names = ("full-rank", "low-rank", "dynamic-rank", "dynamic-rank-low", "aligned")
    made = {name: get_preset(name)(**options) for name in names}
    ours = {"decomposition": "other", "alpha": 2.0}
    found = DynamicRank(3, **ours)  # type: ignore[arg-type]
    assert made == {
        "full-rank": FullRankThroughout(),
        "low-rank": LowRankThroughout(3, decomposition="other"),
        "dynamic-rank": replace(found, inflate=0.1, deflate=0.2),
        "dynamic-rank-low": replace(found, inflate=0.1, deflate=0.2, to="low-rank"),
        "aligned": found,
    }
    assert get_preset("low-rank")() == low_rank()
    assert get_preset("dynamic-rank")() == dynamic_rank(0.5)


def test_an_unknown_preset_is_refused_and_the_known_are_listed() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'dynamic_rank'") as error:
        get_preset("dynamic_rank")
    assert all(name in str(error.value) for name in SCHEDULES)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.floats(0.01, 0.5), st.floats(0.51, 1.0))
def test_a_presets_changes_come_at_the_rounded_steps(
    total_steps: int, inflate: float, deflate: float
) -> None:
    schedule = dynamic_rank(2, inflate=inflate, deflate=deflate)
    one, two = round(inflate * total_steps), round(deflate * total_steps)
    forms = [form_at(schedule, step, total_steps) for step in range(total_steps)]
    assert forms == ([LOW] * one + [FULL] * (two - one) + [LAST] * (total_steps - two))
    assert all(p.stop == q.start for p, q in pairwise(timeline(schedule, LAYERS, total_steps)))


def test_a_timeline_copes_with_one_dict_given_again_and_again() -> None:
    plan: dict[str, Form] = {}

    def schedule(clock: Clock, readings: Readings) -> Plan:
        plan["a"] = LOW if clock.step < 4 else FULL
        return plan

    found = [(phase.start, phase.plan) for phase in timeline(schedule, LAYERS, 12)]
    assert found == [(0, {"a": LOW}), (4, {"a": FULL})]
