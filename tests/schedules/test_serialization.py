"""Schedules as plain data and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from closed_loops import DECISIONS, FORMS
from closed_loops import SCHEDULES as LOOPS
from hypothesis import given, settings

from dynarank import Adapted, FullRank, LowRank
from dynarank.forms import Form, Plan, Rank
from dynarank.schedules import (
    SCHEDULES,
    Clock,
    Decision,
    DynamicRank,
    FittedCost,
    FittedMemory,
    Mapped,
    Phases,
    RankSchedule,
    Readings,
    Replay,
    as_schedule,
    dynamic_rank,
    full_rank,
    get_preset,
    low_rank,
    rotating,
    schedule_from_data,
    schedule_to_data,
)
from dynarank.schedules import serialization as schedule_data
from dynarank.schedules.serialization import serializable


def through_json(schedule: Any) -> Any:
    return schedule_from_data(json.loads(json.dumps(schedule_to_data(schedule))))


RANKS = st.integers(1, 9) | st.floats(0.1, 1.0) | st.builds(Rank, st.floats(0.1, 1.0))
PHASES = st.builds(
    lambda starts, forms: Phases((0, *sorted(starts)), forms[: len(starts) + 1]),
    st.sets(st.integers(1, 100), min_size=3, max_size=3),
    st.lists(st.sampled_from(FORMS) | st.builds(LowRank, RANKS), min_size=4, max_size=4),
)
ROTATING = st.builds(
    rotating,
    RANKS,
    share=st.floats(0.1, 1.0),
    turns=st.integers(1, 9),
    begin=st.integers(0, 9) | st.floats(0, 0.4),
    end=st.floats(0.5, 1.0),
    to=st.sampled_from(["low-rank", "adapted"]),
)
REPLAYS = st.builds(Replay, st.sampled_from(FORMS), DECISIONS.map(tuple))


@settings(deadline=None, max_examples=200)
@given(PHASES | ROTATING | REPLAYS | LOOPS)
def test_a_schedule_is_the_same_after_json(schedule: RankSchedule) -> None:
    again = through_json(schedule)
    assert again == schedule and type(again) is type(schedule)
    assert schedule_to_data(again) == schedule_to_data(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_preset_can_be_written_down(name: str) -> None:
    schedule = get_preset(name)(rank=3, decomposition="svd")
    assert through_json(schedule) == schedule


@pytest.mark.parametrize(
    "schedule",
    [
        dynamic_rank(),
        dynamic_rank(0.25, inflate=0.2, to="low-rank"),
        FittedCost(DynamicRank(0.25, to="low-rank"), (1.0, 2.5, 1.25), 1e12, 300),
        FittedMemory(rotating(0.25, share=0.125), 10**9),
    ],
    ids=str,
)
def test_schedules_that_find_their_times_are_the_same_after_json(
    schedule: RankSchedule,
) -> None:
    assert through_json(schedule) == schedule


def test_what_it_looks_like() -> None:
    half = Rank(0.5, "min")
    assert schedule_to_data(dynamic_rank(8, inflate=10, deflate=0.8)) == {
        "class": "DynamicRank",
        "rank": 8,
        "inflate": 10,
        "deflate": 0.8,
        "to": "adapted",
        "length": None,
        "decomposition": "svd",
        "alpha": 16.0,
        "execution": "auto",
    }
    assert schedule_to_data(Phases((0.0, 10, 0.8), (LowRank(half), FullRank(), Adapted(half)))) == {
        "class": "Phases",
        "starts": [0.0, 10, 0.8],
        "forms": [
            {
                "form": "low-rank",
                "rank": {"value": 0.5, "of": "min", "multiple_of": 1},
                "decomposition": "svd",
                "execution": "auto",
                "recompute": False,
            },
            {"form": "full-rank"},
            {
                "form": "adapted",
                "rank": {"value": 0.5, "of": "min", "multiple_of": 1},
                "decomposition": "svd",
                "alpha": 16.0,
                "execution": "auto",
                "recompute": False,
                "restart": 0,
            },
        ],
    }


@dataclass(frozen=True)
class Nested(RankSchedule):
    """All that a schedule's field may be."""

    inner: RankSchedule
    rank: Rank
    plan: Plan
    numbers: tuple[float | None, ...]
    word: str
    flag: bool = False
    decisions: tuple[Decision, ...] = ()
    deep: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        return self.plan


@pytest.fixture
def nested(monkeypatch: pytest.MonkeyPatch) -> type[Nested]:
    monkeypatch.setattr(schedule_data, "_CLASSES", dict(schedule_data._CLASSES))
    return serializable(Nested)


def test_schedules_within_schedules_ranks_plans_and_all_the_rest(nested: type[Nested]) -> None:
    plan: dict[str, Form] = {"class": FullRank(), "form": LowRank(2), "map": Adapted(3)}
    decision = Decision(3, "a", FullRank(), "a rule", {"x": 0.5})
    schedule = nested(
        nested(rotating(), Rank(0.5), {}, (), "", True),
        Rank(0.25, "out", 8),
        plan,
        (1, 0.5, None, math.inf),
        "form",
        decisions=(decision,),
        deep={"a": ((1, 2), (3,))},
    )
    again = through_json(schedule)
    assert again == schedule and isinstance(again, Nested)
    assert isinstance(again.numbers[0], int) and again.flag is False
    assert isinstance(again.inner, Nested) and again.inner.flag is True


def test_what_cannot_be_registered_is_refused_with_the_way_out(nested: type[Nested]) -> None:
    class Plain(RankSchedule):
        pass

    with pytest.raises(ValueError, match=r"Plain is not a dataclass; write @serializable above"):
        serializable(Plain)
    for name in ("Phases", "Nested", "Rank"):
        taken = dataclass(frozen=True)(type(name, (RankSchedule,), {}))
        with pytest.raises(ValueError, match=f"the name {name} is taken.*give yours another"):
            serializable(taken)
    assert serializable(nested) is nested


def own(clock: Clock, readings: Readings) -> Plan:
    return {}


@dataclass(frozen=True)
class Own(RankSchedule):
    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        return {}


class Derived(Phases):
    pass


IMPOSTOR = type("Phases", (Own,), {})()


@pytest.mark.parametrize(
    ("schedule", "what"),
    [
        (own, "own cannot be serialized: only registered schedules"),
        (as_schedule(own), "own cannot be serialized"),
        (Mapped(full_rank(), dict), "cannot be serialized"),
        (lambda clock, readings: {}, "<lambda> cannot"),
        (partial(own), "functools.partial"),
        (Own(), r"Own\(\) cannot"),
        (Derived((0.0,), (FullRank(),)), "Derived"),
        (IMPOSTOR, "cannot be serialized"),
        (FullRank(), "cannot be serialized"),
        (Rank(0.5), "cannot be serialized"),
        (3, "3 cannot"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_not_ours_is_refused(schedule: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        schedule_to_data(schedule)


def test_a_users_function_within_a_schedule_is_refused(nested: type[Nested]) -> None:
    with pytest.raises(ValueError, match="own cannot be serialized"):
        schedule_to_data(nested(own, Rank(0.5), {}, (), ""))
    with pytest.raises(ValueError, match="strings as keys, got 3"):
        schedule_to_data(nested(full_rank(), Rank(0.5), {3: FullRank()}, (), ""))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"class": "Phase"}, "unknown schedule 'Phase'; known: .*Phases, .*Rotating"),
        ({}, "unknown schedule None"),
        ({"class": ["Phases"]}, "unknown schedule"),
        ({"class": "Phases", "starts": [0.0]}, "unknown or missing: forms"),
        ({**schedule_to_data(low_rank()), "x": 1}, "rank, decomposition; unknown or missing: x"),
        ({"class": "Phases", "starts": [0.5], "forms": [{"form": "full-rank"}]}, "starts at 0"),
        ({"class": "Phases", "starts": [0.0], "forms": [{"form": "half"}]}, "unknown form 'half'"),
        ({"form": "full-rank"}, "a schedule's data names its class"),
        ({"class": "Rank", "value": 0.5}, "a schedule's data names its class"),
    ],
    ids=str,
)
def test_impossible_data_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from_data(data)


def test_fields_with_defaults_may_be_missing() -> None:
    data = schedule_to_data(rotating())
    del data["turns"], data["end"]
    assert schedule_from_data(data) == rotating()


@pytest.mark.parametrize(
    "schedule",
    [
        DynamicRank(2, length=np.float32(0.25), alpha=np.float32(4)),
        SCHEDULES["growing"](first=np.int64(3), spectra_every=np.int64(2)),
        Phases([0, np.int64(5)], [FullRank(), Adapted(2, alpha=np.float32(4))]),
        Replay(FullRank(), (Decision(np.int64(3), "0", FullRank(), "r", {"a": np.float32(2)}),)),
        FittedMemory(DynamicRank(2), np.int64(33)),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_numpy_numbers_are_written_as_plain_ones(schedule: RankSchedule) -> None:
    data = json.loads(json.dumps(schedule_to_data(schedule)))
    assert schedule_from_data(data) == schedule
