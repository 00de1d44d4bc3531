"""The schedule interface: what is accepted, what a class gets from its base, options by field."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dynarank as dr
from dynarank import FullRank, LowRank
from dynarank.forms import Plan
from dynarank.schedules import (
    SCHEDULES,
    Answer,
    Clock,
    DynamicRank,
    FunctionSchedule,
    Mapped,
    RankSchedule,
    Readings,
    State,
    as_schedule,
    closed_loop,
    full_rank,
    growing,
    low_rank,
    relora,
    schedule_to_data,
    timeline,
)

LAYERS = Readings({"a": (8, 8)})


def warm(clock: Clock, readings: Readings) -> Plan:
    form = FullRank() if clock.step < 2 else LowRank(2)
    return dict.fromkeys(readings.layers, form)


# What is a schedule.


def test_a_function_is_wrapped_once_and_a_schedule_is_itself() -> None:
    wrapped = as_schedule(warm)
    assert wrapped == FunctionSchedule(warm) and as_schedule(wrapped) is wrapped
    assert not wrapped.stateful and wrapped.start() == {}
    assert wrapped.update({"x": 1}, Clock(5, 9), LAYERS) == ({"a": LowRank(2)}, {"x": 1}, ())
    one = low_rank(2)
    assert as_schedule(one) is one
    for callable_ in (partial(warm), lambda clock, readings: {}, lambda *given: {}):
        assert isinstance(as_schedule(callable_), FunctionSchedule)


class Duck:
    def start(self) -> State:
        return {}

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        return Answer({}, state)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dynamic-rank", r"got the name 'dynamic-rank'; dynarank.schedules.get_preset"),
        ({"a": LowRank(2)}, r"got a plan; give lambda clock, readings: plan, or use apply_plan"),
        (DynamicRank, r"did you mean DynamicRank\(\.\.\.\)\?"),
        (dr.schedules.full_rank, r"did you mean FullRankThroughout\(\.\.\.\)\?"),
        (lambda clock: {}, r"<lambda> takes other arguments"),
        (Duck(), r"Duck has start and update: derive it from RankSchedule"),
        (3, r"\(clock, readings\) -> plan, got 3"),
        (None, r"got None"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_what_is_no_schedule_is_refused_with_the_way_out(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_schedule(value)
    with pytest.raises(ValueError, match=message):
        timeline(value, LAYERS, 10)
    model = dr.factorize(torch.nn.Linear(8, 8), 2)
    with pytest.raises(ValueError, match=message):
        dr.RankScheduler(model, None, value, 10)


@dataclass(frozen=True)
class Bare(RankSchedule):
    """Forgets to wrap its plan in an answer."""

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        return {}  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None at step 0; a schedule returns a plan, a dict from the paths"),
        ([LowRank(2)], r"returned \[LowRank\(.*\] at step 0; a schedule returns a plan"),
        ({"": 2}, r"returned 2 for '' at step 0; .* FullRank\(\), LowRank\(rank\), Adapted"),
        ({"": LowRank}, "returned <class .*LowRank'> for '' at step 0"),
        ({0: LowRank(2)}, r"returned LowRank\(.*\) for 0 at step 0"),
    ],
    ids=str,
)
def test_an_answer_that_is_no_plan_is_refused_with_its_step(returned: Any, message: str) -> None:
    def own(clock: Clock, readings: Readings) -> Plan:
        return returned

    @dataclass(frozen=True)
    class Own(RankSchedule):
        def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
            return returned

    @dataclass(frozen=True)
    class Stateful(RankSchedule):
        def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
            return Answer(returned, state)

    for schedule, name in ((own, "own"), (Own(), "Own"), (Stateful(), "Stateful")):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            timeline(schedule, LAYERS, 10)
        for layers in (None, "*"):
            with pytest.raises(ValueError, match=f"{name} {message}"):
                dr.RankScheduler(torch.nn.Linear(8, 8), None, schedule, 10, layers=layers)


def test_an_answer_without_a_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Bare returned {} at step 0; update returns Answer\("):
        timeline(Bare(), LAYERS, 10)


def test_an_answer_that_is_no_plan_is_named_in_mid_run_too() -> None:
    def own(clock: Clock, readings: Readings) -> Plan:
        return None if readings.forms.get("") == LowRank(2) else {"": LowRank(2)}  # type: ignore[return-value]

    ranks = dr.RankScheduler(torch.nn.Linear(8, 8), None, own, 10, layers=lambda m, p: True)
    with pytest.raises(ValueError, match="own returned None at step 1"):
        ranks.step()


@pytest.mark.parametrize("total_steps", [0, -1, 2.5, 10.0, True, "10", None])
def test_a_run_has_a_whole_number_of_steps(total_steps: Any) -> None:
    message = "total_steps is a whole number of at least 1, got"
    with pytest.raises(ValueError, match=message):
        timeline(low_rank(2), LAYERS, total_steps)
    with pytest.raises(ValueError, match=message):
        dr.RankScheduler(torch.nn.Linear(8, 8), None, low_rank(2), total_steps)
    with pytest.raises(ValueError, match=message):
        dr.fit_schedule(torch.nn.Linear(8, 8), torch.ones(1, 8), total_steps, flops=0.5)


def test_whole_numbers_of_other_libraries_are_counts_too() -> None:
    ten = np.int64(10)
    assert timeline(low_rank(2), LAYERS, ten) == timeline(low_rank(2), LAYERS, 10)
    ranks = dr.RankScheduler(torch.nn.Linear(8, 8), None, low_rank(2), ten)
    assert json.loads(json.dumps(ranks.state_dict()))["total_steps"] == 10
    for schedule in (
        dr.schedules.rotating(2, turns=np.int64(3)),
        closed_loop(2, patience=np.int64(3), most_changes=np.int64(3)),
    ):
        assert json.dumps(schedule_to_data(schedule))
    with pytest.raises(ValueError, match=r"turns is a whole number of at least 1, got 1\.5"):
        dr.schedules.rotating(2, turns=1.5)  # type: ignore[arg-type]


def test_every_name_of_the_package_is_there_and_others_are_not() -> None:
    assert all(getattr(dr.schedules, name) is not None for name in dr.schedules.__all__)
    assert set(dir(dr.schedules)) == set(dr.schedules.__all__)
    with pytest.raises(AttributeError, match="no attribute 'presets'"):
        dr.schedules.presets  # noqa: B018
    assert dr.schedules.rotating is dr.schedules.Rotating


def test_the_names_for_type_checkers_are_those_at_run_time() -> None:
    stub = ast.parse(Path(dr.schedules.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    *_, told = stub.body
    assert isinstance(told, ast.Assign)
    assert set(ast.literal_eval(told.value)) == set(dr.schedules.__all__)


# What a schedule requires.


@dataclass(frozen=True)
class Reading(RankSchedule):
    """Asks for what it is told to."""

    asked: frozenset[str] = frozenset({"spectra"})
    every: float | int | None = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "requires", self.asked)
        object.__setattr__(self, "spectra_every", self.every)

    def start(self) -> State:
        return {"seen": []}

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        found = [clock.step] * bool(readings.spectra)
        values = [len(reading.values) for reading in readings.spectra.values()]
        plan: Plan = dict.fromkeys(readings.layers, FullRank())
        return Answer(plan, {"seen": [*state["seen"], *zip(found, values, strict=False)]})


@pytest.mark.parametrize("values", [False, True])
def test_what_it_requires_it_is_given_when_it_asks_for_it(values: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8))
    asked = frozenset({"spectra", "singular_values"} if values else {"spectra"})
    ranks = dr.RankScheduler(model, None, Reading(asked), 6)
    for _ in range(5):
        ranks.step()
    count = 6 if values else 0
    assert ranks.state_dict()["schedule"]["seen"] == [(0, count), (2, count), (4, count)]


def test_requirements_of_the_library() -> None:
    assert closed_loop().requires == {"spectra"}
    assert growing().requires == {"spectra", "singular_values"}
    assert full_rank().requires == frozenset() and full_rank().spectra_every is None
    for name, preset in SCHEDULES.items():
        schedule = as_schedule(preset(epoch=0.1))
        assert bool(schedule.requires) == (name in ("cuttlefish", "growing", "closed-loop"))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Reading(frozenset({"gradients"})), "requires gradients; a schedule may require singular"),
        (Reading(every=None), r"requires \{'spectra'\} and has spectra_every=None"),
        (Reading(frozenset()), "requires nothing and has spectra_every=2"),
    ],
)
def test_requirements_that_cannot_be_met_are_refused(schedule: Reading, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_schedule(schedule)


# What a class gets from its base.


def test_a_wrapper_requires_and_recommends_what_the_schedule_does() -> None:
    for schedule in (growing(), relora(), low_rank()):
        mapped = Mapped(schedule, dict)
        for name in ("requires", "spectra_every", "moments", "rewarmup"):
            assert getattr(mapped, name) == getattr(schedule, name)


def test_a_stateful_schedule_has_no_plan_without_its_state() -> None:
    for schedule in (closed_loop(), DynamicRank()):
        assert schedule.stateful
        with pytest.raises(NotImplementedError, match="is stateful: call update"):
            schedule(Clock(0, 9), LAYERS)
    assert not DynamicRank(inflate=0.2, deflate=0.8).stateful
    with pytest.raises(NotImplementedError, match="RankSchedule is not a schedule yet"):
        timeline(RankSchedule(), LAYERS, 9)


def test_a_class_takes_those_options_that_it_has_fields_for() -> None:
    options = {"rank": 3, "inflate": 0.1, "epoch": 0.01, "share": 0.5, "nonsense": 1}
    assert DynamicRank.from_options(options) == DynamicRank(3, inflate=0.1)
    assert dr.schedules.rotating.from_options(options) == dr.schedules.rotating(3, share=0.5)
    assert dr.schedules.full_rank.from_options(options) == full_rank()
