"""``dynamic_rank`` and ``low_rank``: which schedule their arguments mean."""

from __future__ import annotations

from typing import Any

import pytest

from dynarank.forms import Within
from dynarank.schedules import (
    Budgeted,
    Clock,
    Decay,
    DynamicRank,
    LowRankThroughout,
    Phases,
    Readings,
    dynamic_rank,
    get_preset,
    low_rank,
    timeline,
)
from dynarank.schedules.rank_decay import BUDGET

MATRIX, KERNEL, POINTWISE = (64, 64), (64, 64, 3, 3), (64, 64, 1, 1)


def plans(schedule: Any, layers: dict[str, tuple[int, ...]]) -> list[Any]:
    return [phase.plan for phase in timeline(schedule, Readings(layers), 200)]


def test_a_budget_means_the_family_and_a_rank_or_time_the_papers_order() -> None:
    assert dynamic_rank() == Budgeted(BUDGET)
    assert dynamic_rank(budget=0.3) == Budgeted(Within(flops=0.3, multiple_of=1))
    assert dynamic_rank(decomposition="tucker").budget.decomposition == "tucker"  # type: ignore[attr-defined]
    assert dynamic_rank(0.25) == DynamicRank(0.25)
    assert dynamic_rank(inflate=0.2, deflate=0.7) == DynamicRank(inflate=0.2, deflate=0.7)
    options: dict[str, Any] = dict(to="low-rank", length=0.3, decomposition="cp")
    assert dynamic_rank(8, **options) == DynamicRank(8, **options)
    assert dynamic_rank(alpha=4.0, execution="merged").execution == "merged"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "layers",
    [
        {"a": MATRIX},
        {"a": POINTWISE},
        {"a": MATRIX, "stem": (8, 3, 3, 3)},
        {"a": (32, 64, 1)},
        {"lstm": (256, 64), "embedding": (1000, 64)},
    ],
    ids=str,
)
def test_matrices_decay(layers: dict[str, tuple[int, ...]]) -> None:
    found = plans(dynamic_rank(budget=0.5), layers)
    assert found == plans(Decay(total=0.5), layers)


@pytest.mark.parametrize(
    "layers",
    [{"a": KERNEL}, {"a": (64, 64, 5)}, {"a": (8, 8, 3, 3, 3)}, {"a": KERNEL, "head": MATRIX}],
    ids=str,
)
def test_convolutions_have_fixed_low_rank_of_the_same_cost(
    layers: dict[str, tuple[int, ...]],
) -> None:
    assert plans(dynamic_rank(budget=0.5), layers) == plans(low_rank(budget=0.5), layers)
    assert plans(low_rank(budget=0.5), layers) == [
        dict.fromkeys(layers, Within(flops=0.5, ranks="uniform", multiple_of=1))
    ]


@pytest.mark.parametrize("make", [dynamic_rank, None], ids=["dynamic", "decay"])
def test_a_total_of_the_model_is_one_of_its_layers_once_a_batch_has_been_seen(make: Any) -> None:
    """A fifth of the FLOPs is outside of the layers, and cannot fall."""
    schedule: Any = make(budget=0.5) if make else Decay(total=0.5)
    clock, start = Clock(1, 100), schedule.start()
    assert schedule.update(start, clock, Readings({"a": MATRIX})).state["flops"] is None
    known = schedule.update(start, clock, Readings({"a": MATRIX}, flops=(0.8, 0.2)))
    schedule.check_state(known.state, {})
    layers = Within(flops=0.375, of="layers", multiple_of=1)
    for flops in ((0.8, 0.2), (0.7, 0.3), None):  # what was seen first holds
        later = schedule.update(known.state, Clock(99, 100), Readings({"a": MATRIX}, flops=flops))
        assert later.plan == Decay(total=layers)(Clock(99, 100), Readings({"a": MATRIX}))
    with pytest.raises(ValueError, match=r"0\.5 of the FLOPs cannot be met: .* costs 0\.6000"):
        schedule.update(start, clock, Readings({"a": MATRIX}, flops=(0.4, 0.6)))
    for flops in ([0.5], "ab", 3):
        with pytest.raises(ValueError, match="no such state can arise"):
            schedule.check_state({**start, "flops": flops}, {})


def test_low_rank_is_of_a_rank_or_of_a_budget() -> None:
    assert low_rank() == LowRankThroughout(0.5)
    assert low_rank(8, decomposition="cp") == LowRankThroughout(8, decomposition="cp")
    params = Within(params=0.25, of="layers")
    assert low_rank(budget=params, decomposition="cp") == Phases(
        (0.0,), (Within(params=0.25, of="layers", ranks="uniform", decomposition="cp"),)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dynamic_rank(8, budget=0.5), "got budget=0.5 and rank=8; leave out one"),
        (
            lambda: dynamic_rank(budget=0.5, inflate=0.2, to="low-rank"),
            "got budget=0.5 and inflate=0.2, to='low-rank'; leave out",
        ),
        (lambda: dynamic_rank(budget=1.5), r"share in \(0, 1\].*got 1.5"),
        (lambda: dynamic_rank(budget=Within(bytes=0.5)), "a budget of FLOPs"),
        (lambda: dynamic_rank(budget=10**9), r"share in \(0, 1\]"),
        (
            lambda: dynamic_rank(budget=Within(flops=0.5, decomposition="cp"), decomposition="svd"),
            "budget has the decomposition 'cp', got 'svd' as well",
        ),
        (lambda: low_rank(8, budget=0.5), "got rank=8 and budget=0.5; leave out one"),
        (lambda: dynamic_rank(0.5, length=0.2, inflate=0.1, deflate=0.5), "length is for a comp"),
    ],
)
def test_contradictions_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_named_schedules_take_a_budget() -> None:
    options: dict[str, Any] = dict(rank=0.25, inflate=0.2, deflate=0.8, decomposition="tucker")
    budget = Within(flops=0.4, decomposition="tucker", multiple_of=1)
    assert get_preset("decay")(**options, budget=0.4) == Decay(total=budget)
    assert get_preset("dynamic-rank")(**options, budget=0.4) == Budgeted(budget)
    assert get_preset("low-rank")(**options, budget=0.4) == low_rank(budget=budget)
    order = get_preset("dynamic-rank")(**options, budget=None)
    assert isinstance(order, DynamicRank) and (order.inflate, order.rank) == (0.2, 0.25)
    assert get_preset("full-rank")(budget=0.4) == get_preset("full-rank")()
