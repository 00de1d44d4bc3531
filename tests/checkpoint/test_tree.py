from __future__ import annotations

import json
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dynarank.checkpoint.tree import flatten, unflatten

# Nested data goes through JSON and a table of tensors, and comes back as it was.


def through_json(data: object) -> Any:
    values, tensors = flatten(data)
    return unflatten(json.loads(json.dumps(values, allow_nan=False)), tensors)


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor | np.ndarray):
        same = type(one) is type(other) and one.dtype == other.dtype
        return same and bool((torch.as_tensor(one) == torch.as_tensor(other)).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple | deque):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])])
)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float64, torch.float32, torch.bool, torch.int64, torch.bfloat16]),
)
KEYS = st.text() | st.integers() | st.sampled_from(["$tensor", "$x", "a/b"])
DATA = st.recursive(
    SCALARS | TENSORS,
    lambda inside: (
        st.lists(inside, max_size=4)
        | st.lists(inside, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inside, max_size=4)
    ),
    max_leaves=12,
)


@given(DATA)
def test_nested_data_comes_back_as_it_was(data: object) -> None:
    assert alike(through_json(data), data)


def test_other_containers_come_back_too() -> None:
    data = {
        "set": {1, "a", frozenset({2})},
        frozenset(): {frozenset({1})},
        "counter": Counter([3, 3, 4]),
        "deque": deque([1, 2], 5),
    }
    assert through_json(data) == data
    assert through_json(data)["deque"].maxlen == 5
    assert through_json(OrderedDict(a=np.float64(2), b=np.arange(3)))["a"] == 2.0


def test_a_tensor_that_stands_in_two_places_is_one_again() -> None:
    shared = torch.ones(2)
    found = through_json({"a": shared, "b": [shared, torch.ones(2)]})
    assert found["a"] is found["b"][0] is not found["b"][1]


@pytest.mark.parametrize(
    "value",
    [
        print,
        torch.Generator(),
        np.array([object()]),
        torch.empty(2, device="meta"),
        torch.eye(2).to_sparse(),
        np.longdouble(1),
        np.arange(2, dtype=">i4"),
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored_is_refused_by_its_place(value: object) -> None:
    with pytest.raises(TypeError, match=r"extra\['a'\]\['1'\]"):
        flatten({"a": [0, value]}, "extra")


def test_data_that_contains_itself_is_refused() -> None:
    data: list[object] = []
    data.append(data)
    with pytest.raises(TypeError, match="contains itself"):
        flatten(data)


@pytest.mark.parametrize(
    "value",
    [
        {"$tensor": "gone"},
        {"$dtype": "__reduce__"},
        {"$eval": "print"},
        {"$tuple": 3},
        {"$set": [[1]]},
        {"$int": "zz"},
        {"$bytes": "*"},
        {"$size": ["a"]},
        {"$device": "nowhere"},
        {"$counter": [[1]]},
        {"$items": [1]},
        {"$deque": [1]},
        {"$tensor": ["a"]},
    ],
    ids=str,
)
def test_what_was_not_written_here_is_an_error_and_runs_nothing(value: object) -> None:
    with pytest.raises(ValueError, match="does not hold what was saved"):
        unflatten([value], {})
