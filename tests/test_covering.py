from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
from covering import Row, coordinates, covering, over, product, selected
from hypothesis import given

from dynarank import Adapted, FullRank, LowRank

NAMES = ["a", "b", "c", "d"]
rows_of_four = st.lists(st.tuples(*[st.integers(0, 3)] * 4), max_size=80, unique=True)


def meetings(rows: list[Row]) -> set[Any]:
    """Every two values that meet in a row, by position."""
    places = itertools.combinations(range(4), 2)
    return {(i, row[i], j, row[j]) for i, j in places for row in rows}


@given(rows_of_four)
def test_every_pair_of_any_table_is_kept(rows: list[Row]) -> None:
    few = covering(NAMES, rows)
    assert meetings(few) == meetings(rows)
    assert few == [row for row in rows if row in few]  # in their order, each once
    assert few == covering(NAMES, rows)


@given(rows_of_four, st.sampled_from(range(4)))
def test_a_row_with_a_new_value_gets_in(rows: list[Row], place: int) -> None:
    new = tuple(9 if i == place else 0 for i in range(4))
    assert new in covering(NAMES, [*rows, new])


def test_a_product_shrinks_to_about_its_largest_pair() -> None:
    names, rows = product({"a": range(8), "b": range(6), "c": range(5), "d": range(2)})
    assert len(rows) == 480
    assert 48 <= len(covering(names, rows)) <= 56


def test_one_parameter_cannot_be_covered_by_less() -> None:
    assert covering(*product({"a": [3, 1, 2]})) == [(3,), (1,), (2,)]
    assert covering(["a"], []) == []


def test_a_forms_decomposition_is_a_parameter_of_its_own() -> None:
    one = coordinates(["form", "x"], (Adapted(3, "cp"), 1))
    assert one == {"decomposition": "cp", "form": Adapted(3), "x": 1}
    assert coordinates(["form"], (FullRank(),)) == {"form": FullRank()}
    forms = [form for d in ("svd", "cp", "tucker") for form in (LowRank(3, d), Adapted(3, d))]
    few = covering(*product({"form": forms, "x": [1, 2]}))
    assert {(f.decomposition, x) for f, x in few} == set(
        itertools.product(["svd", "cp", "tucker"], [1, 2])
    )


@over({"a, b": [(1, 2), (3, 4)], "c": [5, 6, 7]})
def test_a_test_gets_the_values_by_name(a: int, b: int, c: int) -> None:
    assert (a, b) in [(1, 2), (3, 4)] and c in (5, 6, 7)


def test_all_of_it_runs_on_request() -> None:
    axes = {"a": range(8), "b": range(6), "c": range(5)}
    assert selected(axes, everything=True) == product(axes)
    assert selected(axes, everything=False) == (["a", "b", "c"], covering(*product(axes)))
