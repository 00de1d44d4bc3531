"""The choice of one option for each layer within a budget, against every choice there is."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import given, settings

from dynarank.allocation.knapsack import Option, choose, least_cost

options = st.lists(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=5, unique=True
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(options, st.floats(0, 1))
def test_the_choice_is_within_the_budget_and_near_the_best_there_is(
    drawn: list[list[tuple[int, int]]], share: float
) -> None:
    """Against every choice there is: short of the best by less than one step; filled up."""
    layers = {i: [Option(o, *o) for o in mine] for i, mine in enumerate(drawn)}
    least, most = least_cost(layers), sum(max(o.cost for o in m) for m in layers.values())
    budget = least + share * (most - least)
    chosen = choose(layers, budget)
    spent, value = (sum(getattr(o, k) for o in chosen.values()) for k in ("cost", "value"))
    best = max(
        sum(o.value for o in every)
        for every in itertools.product(*layers.values())
        if sum(o.cost for o in every) <= budget
    )
    step = max(max(o.value for o in m) - min(o.value for o in m) for m in layers.values())
    assert spent <= budget
    assert best - step <= value <= best
    for layer, old in chosen.items():
        assert not any(
            o.value > old.value and spent - old.cost + o.cost <= budget for o in layers[layer]
        )


def test_what_is_left_of_the_budget_is_used_off_the_hull() -> None:
    layers = {"a": [Option("least", 1, 0), Option("middle", 3, 1), Option("most", 6, 10)]}
    assert [choose(layers, budget)["a"].what for budget in (2, 4, 6)] == ["least", "middle", "most"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.05, 1), min_size=2, max_size=4), min_size=2, max_size=3),
    st.floats(0, 1),
)
def test_with_falling_gains_the_gap_is_below_one_rank(
    drawn: list[list[float]], share: float
) -> None:
    """Retained energy is concave in the rank: short of the best by less than one rank's gain."""
    layers = {}
    for i, gains in enumerate(drawn):
        kept = itertools.accumulate(sorted(gains, reverse=True))
        layers[i] = [Option(r, 2.0 * r + 2 * i * r, v) for r, v in enumerate(kept, 1)]
    least, most = least_cost(layers), sum(m[-1].cost for m in layers.values())
    budget = least + share * (most - least)
    value = sum(o.value for o in choose(layers, budget).values())
    best = max(
        sum(o.value for o in every)
        for every in itertools.product(*layers.values())
        if sum(o.cost for o in every) <= budget
    )
    assert best - value < max(max(gains) for gains in drawn)
