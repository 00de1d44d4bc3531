"""Rotating inflation: groups, fair turns, at most a share at a time, and what it costs."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from small_run import forms, net, sgd, train_step
from torch import nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.cost.flops import trace
from dynarank.cost.schedule import ScheduleCost, cost_schedule
from dynarank.forms import Plan
from dynarank.schedules import (
    Clock,
    Readings,
    Rotating,
    dynamic_rank,
    get_preset,
    low_rank,
    rotating,
    step_of,
    timeline,
)
from dynarank.schedules.library.rotating import consecutive_groups

LOW, FULL, LAST = LowRank(1), FullRank(), Adapted(1)
SIZES = st.lists(st.integers(1, 40) | st.integers(100, 1000), min_size=1, max_size=12)
SHARES = st.floats(0.05, 1.0)


def layers_of(sizes: list[int]) -> dict[str, tuple[int, ...]]:
    return {f"layer{i}": (size, 1) for i, size in enumerate(sizes)}


def plans(schedule: Rotating, sizes: list[int], total_steps: int) -> list[Plan]:
    readings = Readings(layers_of(sizes))
    return [schedule(Clock(step, total_steps), readings) for step in range(total_steps)]


def full_in(plan: Plan) -> list[int]:
    return [i for i, form in enumerate(plan.values()) if form == FULL]


# Groups.


def every_cut(sizes: list[int]) -> list[list[list[int]]]:
    """All ways to cut a sequence into consecutive groups."""
    inner = range(1, len(sizes))
    cuts = [cut for n in range(len(sizes)) for cut in combinations(inner, n)]
    return [[sizes[a:b] for a, b in pairwise((0, *cut, len(sizes)))] for cut in cuts]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), SHARES)
def test_groups_are_the_fewest_and_most_equal_there_can_be(sizes: list[int], share: float) -> None:
    """Against all ways there are."""
    groups = consecutive_groups(tuple(sizes), share)
    assert list(groups) == sorted(groups) and set(groups) == set(range(groups[-1] + 1))
    mine = [[s for s, g in zip(sizes, groups, strict=True) if g == k] for k in sorted(set(groups))]
    largest = lambda cut: max((sum(g) for g in cut if len(g) > 1), default=0)  # noqa: E731
    allowed = [cut for cut in every_cut(sizes) if largest(cut) <= share * sum(sizes)]
    assert mine in allowed
    fewest = min(map(len, allowed))
    assert len(mine) == fewest
    assert largest(mine) == min(largest(cut) for cut in allowed if len(cut) == fewest)


@pytest.mark.parametrize(
    ("sizes", "share", "groups"),
    [
        ((4, 4, 4, 4), 0.5, (0, 0, 1, 1)),
        ((4, 4, 4, 4), 0.25, (0, 1, 2, 3)),
        ((4, 4, 4, 4), 0.2, (0, 1, 2, 3)),  # none fits, each is a group all the same
        ((4, 4, 4, 4), 1.0, (0, 0, 0, 0)),
        ((1, 1, 100, 1, 1), 0.25, (0, 0, 1, 2, 2)),  # far larger than the share
        ((7,), 0.1, (0,)),
        ((), 0.5, ()),
        ((3, 1, 1, 1), 0.5, (0, 1, 1, 1)),
        ((1, 1, 1, 1, 1, 1), 0.7, (0, 0, 0, 1, 1, 1)),  # balanced, not 4 and 2
    ],
    ids=str,
)
def test_groups_by_hand(sizes: tuple[int, ...], share: float, groups: tuple[int, ...]) -> None:
    assert consecutive_groups(sizes, share) == groups


def test_a_network_of_very_many_layers_is_grouped_quickly_and_within_the_share() -> None:
    sizes = tuple(1 + (i * 7919) % 1000 for i in range(3000))
    groups = consecutive_groups(sizes, 0.1)
    held = [0] * (groups[-1] + 1)
    for size, group in zip(sizes, groups, strict=True):
        held[group] += size
    assert len(held) == 11 and max(held) <= 0.1 * sum(sizes)


# Whole runs.


@settings(deadline=None, max_examples=120)
@given(SIZES, SHARES, st.integers(1, 5), st.integers(1, 200), st.data())
def test_every_layer_gets_its_time_and_never_more_than_a_share_is_full(
    sizes: list[int], share: float, turns: int, total_steps: int, data: st.DataObject
) -> None:
    begin = data.draw(st.floats(0, 0.5) | st.integers(0, total_steps // 2), label="begin")
    end = data.draw(st.floats(0.6, 1.0) | st.integers(total_steps // 2 + 1, total_steps + 5))
    schedule = rotating(1, share=share, turns=turns, begin=begin, end=end, to="adapted")
    run = plans(schedule, sizes, total_steps)
    first = step_of(begin, total_steps)
    last = min(step_of(end, total_steps), total_steps)
    groups = consecutive_groups(tuple(sizes), share)

    assert all(form == LOW for plan in run[:first] for form in plan.values())
    assert all(form == LAST for plan in run[last:] for form in plan.values())
    for plan in run[first:last]:  # exactly one group
        full = full_in(plan)
        assert full and len({groups[i] for i in full}) == 1
        assert full == [i for i, group in enumerate(groups) if group == groups[full[0]]]
        assert len(full) == 1 or sum(sizes[i] for i in full) <= share * sum(sizes)

    if step_of(end, total_steps) <= total_steps:  # the window is whole
        times = [sum(plan[path] == FULL for plan in run) for path in layers_of(sizes)]
        assert max(times) - min(times) <= turns
        assert min(times) >= 1 or last - first <= groups[-1]


@settings(deadline=None, max_examples=60)
@given(SIZES, SHARES, st.integers(1, 4), st.integers(1, 300))
def test_groups_take_their_turns_in_the_networks_order_and_the_timeline_agrees(
    sizes: list[int], share: float, turns: int, total_steps: int
) -> None:
    schedule = rotating(1, share=share, turns=turns, end=1.0)
    run = plans(schedule, sizes, total_steps)
    count = consecutive_groups(tuple(sizes), share)[-1] + 1
    order = [consecutive_groups(tuple(sizes), share)[full_in(plan)[0]] for plan in run]
    taken = [order[0], *(b for a, b in pairwise(order) if a != b)]
    if total_steps >= count > 1:
        done = min(turns, total_steps // count)
        assert taken == [*range(count)] * done
    phases = timeline(schedule, Readings(layers_of(sizes)), total_steps)
    assert [plan for phase in phases for plan in [phase.plan] * phase.steps] == run


def test_a_hand_computed_run() -> None:
    """Two groups, two turns, the 8 steps from 2 to 10: parts of two steps."""
    for last, after in (("low-rank", LOW), ("adapted", LAST)):
        schedule = rotating(1, share=0.5, turns=2, begin=2, end=10, to=last)  # type: ignore[arg-type]
        run = [tuple(plan.values()) for plan in plans(schedule, [4, 4], 12)]
        parts = [(FULL, LOW), (after, FULL), (FULL, after), (after, FULL)]
        assert run == [(LOW, LOW)] * 2 + [p for p in parts for _ in range(2)] + [(after, after)] * 2


def test_a_run_too_short_for_all_turns_makes_fewer() -> None:
    run = plans(rotating(1, share=0.25, turns=10, end=1.0), [4, 4, 4, 4], 8)
    assert [full_in(plan) for plan in run] == [[i] for i in (0, 1, 2, 3, 0, 1, 2, 3)]


# What it costs.


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [part for _ in range(8) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(64, 10))


def test_peaks_stay_near_the_low_rank_ones_where_dynamic_rank_reaches_full_rank() -> None:
    use = trace(deep(), torch.ones(16, 64))
    layers = [path for path in use.layers if use.layers[path].shape == (64, 64)]

    def cost(schedule: Any) -> ScheduleCost:
        return cost_schedule(use, schedule, layers, 1000)

    low, dynamic = cost(low_rank(0.25)), cost(dynamic_rank(0.25, to="low-rank"))
    turning = cost(rotating(0.25, share=0.25))

    def peak_flops(cost: ScheduleCost) -> float:
        return max(phase.relative_training for phase in cost.phases)

    def peak_bytes(cost: ScheduleCost) -> int:
        return max(phase.state_bytes for phase in cost.phases)

    assert peak_flops(dynamic) == 1 and dynamic.peak_trainable == 8 * 65 * 64 + 650
    for peak in (peak_bytes, lambda c: c.peak_trainable):  # two layers of eight
        assert peak(turning) == peak(low) + (peak(dynamic) - peak(low)) / 4
    # The first layer needs no gradient of its inputs, so the others are more than their share.
    assert peak_flops(turning) < peak_flops(low) + 0.28 * (1 - peak_flops(low))


def test_the_adapted_ending_keeps_the_base_in_memory() -> None:
    use = trace(deep(), torch.ones(16, 64))
    layers = [path for path in use.layers if use.layers[path].shape == (64, 64)]
    totals = {
        to: [
            phase.total_parameters
            for phase in cost_schedule(use, rotating(0.25, to=to), layers, 1000).phases  # type: ignore[arg-type]
        ]
        for to in ("low-rank", "adapted")
    }
    assert max(totals["low-rank"]) < 0.65 * use.parameters({})[1]
    assert totals["adapted"][-1] > use.parameters({})[1]  # every weight, and the adapters


# With a scheduler.


def test_a_scheduler_turns_the_share_through_a_network() -> None:
    model = net()
    optimizer = sgd(model)
    schedule = rotating(2, share=0.5, turns=1, begin=0, end=8, to="adapted")
    ranks = dr.RankScheduler(model, optimizer, schedule, 12)
    seen = []
    for step in range(12):
        seen.append(forms(model)[:2])  # the last layer is not under the schedule
        train_step(model, optimizer, step)
        ranks.step()
    low, last = LowRank(2), Adapted(2)
    assert seen == [[FULL, low]] * 4 + [[last, FULL]] * 4 + [[last, last]] * 4
    assert all(math.isfinite(p.sum().item()) for p in model.parameters())


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, r"share lies in \(0, 1\], got 0.0"),
        ({"share": 1.5}, r"share lies in \(0, 1\], got 1.5"),
        ({"share": math.nan}, r"got nan"),
        ({"turns": 0}, "turns is a whole number of at least 1, got 0"),
        ({"turns": 1.5}, "got 1.5"),
        ({"begin": -1}, r"begin is a step \(int >= 0\) or a share .* got -1"),
        ({"end": 1.5}, r"end is a step .* got 1.5"),
        ({"begin": 0.5, "end": 0.5}, "begin comes before end, got 0.5 and 0.5"),
        ({"begin": 9, "end": 7}, "begin comes before end, got 9 and 7"),
        ({"to": "full-rank"}, 'deflates to "adapted" or "low-rank", got \'full-rank\''),
        ({"rank": 0}, "at least 1"),
    ],
    ids=str,
)
def test_impossible_rotations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotating(**options)


def test_mixed_times_out_of_order_in_a_run_are_refused() -> None:
    schedule = rotating(begin=60, end=0.5)
    assert schedule(Clock(0, 1000), Readings({"a": (4, 4)})) == {"a": LowRank(0.5)}
    with pytest.raises(ValueError, match="are the steps 60 and 50 in a run of 100"):
        schedule(Clock(0, 100), Readings({"a": (4, 4)}))


def test_the_preset_takes_what_it_knows_and_ignores_the_rest() -> None:
    made = get_preset("rotating")(rank=3, inflate=0.1, deflate=0.2, alpha=2.0, decomposition="cp")
    assert made == rotating(3, alpha=2.0, decomposition="cp")
    assert get_preset("rotating")() == rotating()
