"""The multiple-choice knapsack: one option per layer, with the most value within a budget.

Each layer has options with a cost and a value, and exactly one is chosen. If the values of each
layer are concave in cost, as retained energy is, taking the steps with the most value per cost
first is optimal up to the last step (Sinha and Zoltners, "The multiple-choice knapsack problem",
1979). Otherwise the steps are those of the upper convex hull.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Option", "choose", "choose_evenly", "least_cost"]

_What = TypeVar("_What")
_Layer = TypeVar("_Layer", bound=Hashable)


@dataclass(frozen=True)
class Option(Generic[_What]):
    """An option with its cost and its value."""

    what: _What
    cost: float
    value: float


def least_cost(options: Mapping[_Layer, Sequence[Option[_What]]]) -> float:
    """The cost of the cheapest choice."""
    return sum(min(o.cost for o in mine) for mine in options.values())


def choose(
    options: Mapping[_Layer, Sequence[Option[_What]]], budget: float
) -> dict[_Layer, Option[_What]]:
    """Choose one option per layer, with the most value at a total cost of at most ``budget``.

    Greedy along the hulls, followed by single improvements until no change of one layer gains value
    within the budget. The result is below the optimum by less than the value of one hull step.

    Args:
        options: the options of each layer.
        budget: the largest total cost, at least :func:`least_cost`.

    Example:
        >>> options = {"a": [Option(1, 1, 0.6), Option(2, 2, 0.9)], "b": [Option(1, 1, 0.5)]}
        >>> {layer: option.what for layer, option in choose(options, 3).items()}
        {'a': 2, 'b': 1}
    """
    hulls = {layer: _hull(mine) for layer, mine in options.items()}
    chosen = {layer: hull[0] for layer, hull in hulls.items()}
    steps = [
        ((new.value - old.value) / (new.cost - old.cost), layer, old, new)
        for layer, hull in hulls.items()
        for old, new in itertools.pairwise(hull)
    ]
    for _, layer, old, new in sorted(steps, key=lambda step: -step[0]):
        if chosen[layer] is old and _total(chosen) - old.cost + new.cost <= budget:
            chosen[layer] = new
    while (better := _best_change(options, chosen, budget)) is not None:
        chosen[better[0]] = better[1]
    return chosen


def choose_evenly(
    options: Mapping[_Layer, Sequence[Option[_What]]], budget: float
) -> dict[_Layer, Option[_What]]:
    """Choose values as equal as the options allow, at a total cost of at most ``budget``.

    Every layer starts with its cheapest option, and the layer whose next option has the least value
    gets it, as long as that is within the budget.

    Args:
        options: the options of each layer.
        budget: the largest total cost, at least :func:`least_cost`.

    Example:
        >>> options = {"a": [Option(1, 1, 0.1), Option(2, 2, 0.2)], "b": [Option(1, 1, 0.3)]}
        >>> {layer: option.what for layer, option in choose_evenly(options, 3).items()}
        {'a': 2, 'b': 1}
    """
    chosen = {layer: min(mine, key=lambda o: o.cost) for layer, mine in options.items()}
    steps = [(option.value, layer, option) for layer, mine in options.items() for option in mine]
    spent = _total(chosen)
    for value, layer, option in sorted(steps, key=lambda step: step[0]):
        cost = spent - chosen[layer].cost + option.cost
        if value > chosen[layer].value and cost <= budget:
            chosen[layer], spent = option, cost
    return chosen


def _total(chosen: Mapping[_Layer, Option[_What]]) -> float:
    return sum(option.cost for option in chosen.values())


def _hull(options: Sequence[Option[_What]]) -> list[Option[_What]]:
    """The options on the upper convex hull, from the cheapest to the most valuable."""
    hull: list[Option[_What]] = []
    for option in sorted(options, key=lambda o: (o.cost, -o.value)):
        if hull and option.value <= hull[-1].value:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(old: Option[_What], new: Option[_What]) -> float:
    return (new.value - old.value) / (new.cost - old.cost)


def _best_change(
    options: Mapping[_Layer, Sequence[Option[_What]]],
    chosen: Mapping[_Layer, Option[_What]],
    budget: float,
) -> tuple[_Layer, Option[_What]] | None:
    """The change of one layer that gains the most value within the budget, if any."""
    room = budget - _total(chosen)
    gains = [
        (option.value - chosen[layer].value, layer, option)
        for layer, mine in options.items()
        for option in mine
        if option.value > chosen[layer].value and option.cost - chosen[layer].cost <= room
    ]
    best = max(gains, key=lambda gain: gain[0], default=None)
    return None if best is None else best[1:]
