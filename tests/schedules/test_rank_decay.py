"""A decay comes down in steps, costs what it should, and follows a warm-up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynarank.forms import Form, FullRank, Within
from dynarank.schedules import (
    Answer,
    Clock,
    Decay,
    Readings,
    dynamic_rank,
    schedule_from_data,
    schedule_to_data,
    timeline,
)
from dynarank.schedules.dynamic import Budgeted

LAYERS = {"a": (64, 64), "b": (16, 64)}
SHARES = st.floats(0.001, 1.0)
# Their number, or increasing times: shares, or steps.
CUTS = (
    st.integers(1, 9)
    | st.lists(st.floats(0, 0.5), min_size=1, max_size=6, unique=True).map(sorted)
    | st.lists(st.integers(0, 60), min_size=1, max_size=6, unique=True).map(sorted)
)
WITHIN = st.builds(
    Within,
    flops=SHARES,
    of=st.sampled_from(["model", "layers"]),
    ranks=st.sampled_from(["energy", "uniform"]),
    decomposition=st.sampled_from(["svd", "tucker", "best"]),
)


def amount(answer: Form | Within) -> float:
    assert isinstance(answer, FullRank | Within)
    return 1.0 if isinstance(answer, FullRank) else answer.amount


def phases(schedule: Any, steps: int, **readings: Any) -> list[tuple[int, float]]:
    """The first step and the budget of each phase of a schedule, the same for every layer."""
    found: list[tuple[int, float]] = []
    for phase in timeline(schedule, Readings(LAYERS, **readings), steps):
        assert set(phase.plan) == set(LAYERS)
        (answer,) = set(phase.plan.values())
        found.append((phase.start, amount(answer)))
    return found


def mean_budget(found: list[tuple[int, float]], steps: int) -> float:
    """What a run costs, relative to the same run at full rank."""
    stops = [start for start, _ in found[1:]] + [steps]
    return sum(b * (stop - at) for (at, b), stop in zip(found, stops, strict=True)) / steps


def test_times_are_evenly_spaced_on_a_logarithmic_scale_and_budgets_geometric() -> None:
    assert phases(Decay(end=0.45, cuts=3), 1000) == [
        (0, 1.0),
        (20, pytest.approx(0.45 ** (1 / 3), abs=1e-6)),
        (126, pytest.approx(0.45 ** (2 / 3), abs=1e-6)),  # sqrt(.02 * .8)
        (800, 0.45),
    ]
    assert phases(Decay(end=0.45, cuts=1), 1000) == [(0, 1.0), (126, 0.45)]
    assert len(phases(Decay(), 1000)) == 9


def test_a_small_budget_is_reached_earlier() -> None:
    """Full rank and a late end would use it up."""
    last = {total: Decay(total=total).times[-1] for total in (0.05, 0.15, 0.33, 0.5, 0.9)}
    assert last == {0.05: 0.01, 0.15: 0.09, 0.33: 0.4356, 0.5: 0.8, 0.9: 0.8}
    for total in last:
        assert 0.6 * total < Decay(total=total).budgets(10_000)[-1] < total
    assert Decay(end=0.4).times == Decay(total=0.5).times


@settings(deadline=None)
@given(SHARES, CUTS, st.floats(0.01, 1.0), st.integers(100, 800))
def test_budgets_never_rise_and_the_run_costs_their_mean(
    end: float, cuts: list[Any], high: float, steps: int
) -> None:
    schedule = Decay(end=min(end, high), cuts=cuts, high=high)
    found = phases(schedule, steps)
    budgets, starts = [b for _, b in found], [at for at, _ in found]
    assert budgets == sorted(budgets, reverse=True)
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert budgets[-1] == min(end, high)
    assert mean_budget(found, steps) == pytest.approx(schedule.cost(steps), abs=1e-9)


@settings(deadline=None)
@given(SHARES, CUTS, st.integers(100, 800))
def test_a_total_is_what_the_run_costs(total: float, cuts: list[Any], steps: int) -> None:
    schedule = Decay(total=total, cuts=cuts)
    try:
        found = phases(schedule, steps)
    except ValueError as error:
        nearest = float(str(error).split("possible is ")[1].split(":")[0])
        assert nearest > total
        found, total = phases(Decay(total=min(nearest + 1e-4, 1.0), cuts=cuts), steps), nearest
    assert mean_budget(found, steps) == pytest.approx(total, abs=2e-4)
    assert 0 < found[-1][1] <= total + 1e-6


@pytest.mark.parametrize("steps", [100, 137, 1000, 9876])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_a_total_is_met_to_the_step(budget: float, steps: int) -> None:
    """Times are rounded to steps, and the end is computed from the rounded ones."""
    found = phases(dynamic_rank(budget=budget), steps)
    assert mean_budget(found, steps) == pytest.approx(budget, rel=1e-4)


@settings(deadline=None)
@given(WITHIN, CUTS, st.booleans(), st.sampled_from(["start", "warmup"]))
def test_it_is_the_same_after_json(budget: Any, cuts: Any, total: bool, after: Any) -> None:
    decay = Decay(**{"total" if total else "end": budget}, cuts=cuts, after=after)
    for one in (decay, Budgeted(budget)):
        again = schedule_from_data(json.loads(json.dumps(schedule_to_data(one))))
        assert again == one


def test_the_options_of_a_budget_hold_for_every_cut() -> None:
    end = Within(params=0.25, of="layers", decomposition="tucker", multiple_of=16)
    answers = [p.plan["a"] for p in timeline(Decay(end, cuts=4), Readings(LAYERS), 100)]
    assert answers[0] == FullRank() and answers[-1] == end
    assert answers[1] == Within(
        params=0.707107, of="layers", decomposition="tucker", multiple_of=16
    )


def test_it_may_begin_below_full_rank() -> None:
    schedule = Decay(end=0.2, high=0.8, cuts=(0.5,))
    assert phases(schedule, 100) == [(0, 0.8), (50, 0.2)]
    first, last = (p.plan["a"] for p in timeline(schedule, Readings(LAYERS), 100))
    assert isinstance(first, Within) and first.ranks == "uniform"  # nothing is learned yet
    assert isinstance(last, Within) and last.ranks == "energy"
    assert phases(Decay(total=0.5, high=0.8, cuts=(0.5,)), 100)[1][1] == pytest.approx(0.2)


RATES = tuple(min(i / 200, 1.0) for i in range(1001))  # 20% of warm-up


@pytest.mark.parametrize("known", [True, False], ids=["forecast", "observed"])
def test_after_the_warmup_it_is_timed_from_the_peak(known: bool) -> None:
    schedule = Decay(total=0.5, cuts=(0.1, 0.25), after="warmup")
    state, found = schedule.start(), {}
    for step in range(100):
        rate = RATES[step * 10]
        readings = Readings(LAYERS, rate, RATES if known else ())
        answer = schedule.update(state, Clock(step, 100), readings)
        state = json.loads(json.dumps(answer.state))  # as a checkpoint has it
        schedule.check_state(state, LAYERS)
        found.setdefault(answer.plan["a"], step)
    assert list(found.values()) == [0, 28, 40]  # 20 + .1 * 80, 20 + .25 * 80
    cuts = [(step, amount(answer)) for answer, step in found.items()]
    assert mean_budget(cuts, 100) == pytest.approx(0.5, abs=1e-5)


def test_a_peak_that_moves_after_the_first_cut_changes_nothing() -> None:
    schedule, state, seen = Decay(total=0.5, after="warmup"), None, []
    for step in range(100):
        rates = RATES if step > 60 else ()
        readings = Readings(LAYERS, 1.0 if step < 50 else 2.0, rates)
        answer: Answer = schedule.update(state or schedule.start(), Clock(step, 100), readings)
        state = answer.state
        if answer.plan["a"] not in seen:
            seen.append(answer.plan["a"])
    assert seen == [p.plan["a"] for p in timeline(Decay(total=0.5), Readings(LAYERS), 100)]


def test_states_that_cannot_arise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no such state can arise: \{'peak': '-1'\}"):
        Decay(after="warmup").check_state(
            {"rate": 0.0, "peak": -1, "cut": False, "flops": None}, LAYERS
        )
    with pytest.raises(ValueError, match="no such state can arise"):
        Decay().check_state({"peak": 1}, LAYERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 0.3, "total": 0.5}, "an end or a total.*got end=0.3 and total=0.5; leave out one"),
        ({"end": 0.0}, r"share in \(0, 1\].*got 0.0"),
        ({"end": 1.5}, r"share in \(0, 1\].*got 1.5"),
        ({"end": "half"}, "end is a share of full rank.*got 'half'"),
        ({"total": True}, "total is a share of full rank.*got True"),
        ({"end": Within(flops=10**9)}, r"end is a share of full rank.*Within\(flops=1000000000\)"),
        ({"total": Within(params=0.5)}, r"budget of FLOPs, got Within\(params=0.5\)"),
        ({"end": 0.9, "high": 0.5}, "falls from high=0.5, but its end is 0.9; give a smaller end"),
        ({"high": 0.0}, r"high.*\(0, 1\], got 0.0"),
        ({"cuts": 0}, "cuts is a whole number of at least 1, got 0"),
        ({"cuts": ()}, "at least one cut"),
        ({"cuts": (0.2, 0.1)}, "cuts come one after another, got 0.2 then 0.1"),
        ({"cuts": (0.1, 1.5)}, "the time of a cut is a step"),
        ({"after": "peak"}, '"start" or after the "warmup", got \'peak\''),
    ],
    ids=str,
)
def test_impossible_requests_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decay(**options)


def test_what_depends_on_the_length_of_the_run_is_refused_when_it_is_known() -> None:
    with pytest.raises(ValueError, match=r"total of 0\.05 cannot be met in 100 steps.*is 0\.10"):
        phases(Decay(total=0.05, cuts=(0.1,)), 100)
    with pytest.raises(ValueError, match=r"are the steps \(50, 20\) in a run of 100"):
        phases(Decay(end=0.2, cuts=(0.5, 20)), 100)
