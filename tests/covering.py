"""Covering arrays: few rows of a product of test parameters in which every pair still occurs."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

Row = tuple[Any, ...]
Axes = Mapping[str, Iterable[Any]]  # "case, form": [(case, form), ...], "dtype": [...]


def over(axes: Axes) -> pytest.MarkDecorator:
    """Run a test over a covering set of the product of ``axes``; over all of it on request.

    Like ``pytest.mark.parametrize`` for each of ``axes``, whose keys may hold several names. By
    default only the rows of `covering` run; ``pytest --all-laws`` runs the whole product.
    """
    return pytest.mark.product(axes)


def selected(axes: Axes, *, everything: bool) -> tuple[list[str], list[Row]]:
    """The names of the parameters and the rows that run: a covering set or the whole product."""
    names, rows = product(axes)
    return names, rows if everything else covering(names, rows)


def product(axes: Axes) -> tuple[list[str], list[Row]]:
    """The names of the parameters, and a row of values for each combination."""
    names = [name.strip() for key in axes for name in key.split(",")]
    columns = [
        [tuple(value) if "," in key else (value,) for value in values]
        for key, values in axes.items()
    ]
    return names, [sum(parts, ()) for parts in itertools.product(*columns)]


def coordinates(names: Iterable[str], row: Row) -> dict[str, Hashable]:
    """What is varied: a form's decomposition counts as a parameter of its own."""
    found: dict[str, Hashable] = {}
    for name, value in zip(names, row, strict=True):
        if decomposition := getattr(value, "decomposition", None):
            found["decomposition"] = decomposition
            value = replace(value, decomposition="svd")
        found[name] = value
    return found


def covering(names: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """Rows that hold every pair of values that any row holds, chosen greedily, in their order.

    Those that add the most pairs are taken first: each pass takes what adds at least a number of
    new pairs, and the number falls by one from pass to pass.
    """
    held = [_pairs(coordinates(names, row)) for row in rows]
    missing = set[Hashable]().union(*held)
    chosen: set[int] = set()
    for least in range(max(map(len, held), default=0), 0, -1):
        for index, pairs in enumerate(held):
            if index not in chosen and len(pairs & missing) >= least:
                chosen.add(index)
                missing -= pairs
    return [rows[index] for index in sorted(chosen)]


def _pairs(row: dict[str, Hashable]) -> set[Hashable]:
    """Every value and every pair of values of a row."""
    return {frozenset(some) for n in (1, 2) for some in itertools.combinations(row.items(), n)}
