"""What a budget leaves for the layers that share it, and the uniform ranks that meet it.

Legend: c(W, form) the cost of a weight in a form, in the unit of the budget; B the budget as a
number: the amount itself, or a share of the cost at full rank.

The layers of a budget of the model may cost ``B - c(rest) - sum of c`` of all other weights in the
forms that they will have; those of a budget of their own layers, B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynarank.cost.flops import Flops, LayerUse, ModelUse
from dynarank.decompositions import Decomposition
from dynarank.forms import Form, FullRank, LowRank, Plan, Rank, RankLike, Request, Within
from dynarank.schedules.budget_error import BudgetError

__all__ = [
    "Room",
    "below_least",
    "check_request",
    "estimated",
    "rank_step",
    "rounded_up",
    "shared_budgets",
    "stand_in",
    "uniform_plan",
]

_BISECTIONS = 40
_PLACES = 10_000
_CHOICES = 8  # ranks that a weight can have at least, if its size allows


def shared_budgets(request: Request) -> dict[Within, tuple[str, ...]]:
    """The layers of each budget in a schedule's answer.

    Raises:
        ValueError: two budgets of the model in one answer, which would each count the other's
            layers.

    Example:
        >>> half = Within(params=0.5)
        >>> list(shared_budgets({"a": half, "b": FullRank(), "c": half}).values())
        [('a', 'c')]
    """
    found: dict[Within, list[str]] = {}
    for path, answer in request.items():
        if isinstance(answer, Within):
            found.setdefault(answer, []).append(path)
    if len(of_model := [one for one in found if one.of == "model"]) > 1:
        raise ValueError(
            f"a plan has one budget of the model, got {' and '.join(map(repr, of_model))}; give "
            'all their layers one budget, or budgets of="layers"'
        )
    return {budget: tuple(paths) for budget, paths in found.items()}


@dataclass(frozen=True)
class Room:
    """The cost that the layers of a budget may have together.

    Args:
        budget: the budget.
        layers: their uses, by path.
        allowed: what they may cost, in the unit of the budget.
        full: what the share is a share of: the cost at full rank of the model or of the layers.
        outside: the cost of everything else that the budget counts.
    """

    budget: Within
    layers: Mapping[str, LayerUse]
    allowed: float
    full: float
    outside: float

    @classmethod
    def of(cls, use: ModelUse, budget: Within, paths: Sequence[str], planned: Plan) -> Room:
        """The room of a budget for the layers at ``paths``.

        Args:
            use: the trace of the model.
            budget: the budget.
            paths: the layers that share it.
            planned: the forms that other layers will have; without one, a layer keeps its form.
        """
        layers, kind = {path: use.layers[path] for path in paths}, budget.kind
        mine = sum(one.cost(kind, FullRank()) for one in layers.values())
        full, outside = mine, 0.0
        if budget.of == "model":
            others = {path: one for path, one in use.layers.items() if path not in layers}
            rest = use.rest_cost(kind)
            full = rest + mine + sum(one.cost(kind, FullRank()) for one in others.values())
            now = (one.cost(kind, planned.get(path, one.form)) for path, one in others.items())
            outside = rest + sum(now)
        amount = budget.amount
        limit = amount * full if isinstance(amount, float) else amount
        return cls(budget, layers, limit - outside, full, outside)

    def cost(self, plan: Plan) -> float:
        """The cost of its layers under a plan."""
        kind = self.budget.kind
        return sum(one.cost(kind, plan[path]) for path, one in self.layers.items())

    def check(self) -> None:
        """Raise ValueError if the layers may not cost as little as the smallest ranks do."""
        least = self.cost(_at_share(self, 0.0))
        if least > self.allowed:
            unit = {"flops": "training FLOPs", "params": "parameters", "bytes": "bytes"}
            asked, (kind, of) = self.budget.amount, (self.budget.kind, self.budget.of)
            raise BudgetError(below_least(asked, unit[kind], of, self.full, self.outside, least))


def below_least(asked: float, unit: str, of: str, full: float, outside: float, least: float) -> str:
    """Why a budget is too small, and the smallest one that is not.

    Args:
        asked: a share (float) or a number (int).
        unit: what is counted.
        of: ``"model"`` or ``"layers"``.
        full: the cost of what the budget is of, at full rank.
        outside: the cost of what it is of, besides the layers that share it.
        least: the cost of these layers at the smallest ranks.

    Example:
        >>> below_least(0.2, "bytes", "model", 3000, 700, 50)
        'a budget of 0.2 of the bytes at full rank is below the cost of the smallest ranks, 0...'
    """
    whole, whose = outside + least, "layers' " if of == "layers" else ""
    if isinstance(asked, float):
        share = rounded_up(whole / full, lambda share: share * full - outside >= least)
        told = f"{asked!r} of the {whose}{unit} at full rank", f"{share}"
    else:
        told = f"{asked:,} {whose}{unit}", f"{math.ceil(whole):,}"
    return (
        f"a budget of {told[0]} is below the cost of the smallest ranks, {told[1]} "
        f"({whole:,.0f} of {full:,.0f} {unit}); allow that much, or include more layers"
    )


def rounded_up(share: float, enough: Callable[[float], bool]) -> float:
    """A share to four digits: the smallest from this one on that is enough.

    Example:
        >>> rounded_up(0.12341, lambda share: share >= 0.12341)
        0.1235
    """
    places = math.ceil(share * _PLACES)
    while not enough(places / _PLACES):
        places += 1
    return places / _PLACES


def uniform_plan(room: Room) -> dict[str, Form]:
    """Ranks that are the same share of each layer's own cost, as large as the budget allows.

    A layer that is not cheaper at its rank is full-rank. What rounding leaves goes to single
    directions, those layers first that have most left.

    Raises:
        ValueError: the smallest ranks cost more than the budget allows.

    Example:
        >>> import torch
        >>> from dynarank.cost.flops import trace
        >>> use = trace(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.ones(8, 64))
        >>> uniform_plan(Room.of(use, Within(flops=0.5, of="layers"), ["0"], {}))
        {'0': LowRank(rank=12, decomposition='svd')}
    """
    everywhere: dict[str, Form] = dict.fromkeys(room.layers, FullRank())
    if room.cost(everywhere) <= room.allowed:
        return everywhere
    room.check()
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = room.cost(_at_share(room, middle)) <= room.allowed
        low, high = (middle, high) if fits else (low, middle)
    return _topped_up(room, _at_share(room, low))


def estimated(use: ModelUse, request: Request) -> tuple[Plan, Flops]:
    """A schedule's answer with uniform ranks in place of budgets, and the FLOPs of a step.

    The ranks are an estimate, since they are measured at the transition; a budget of FLOPs is what
    the step will cost.

    Raises:
        ValueError: the smallest ranks cost more than a budget allows.
    """
    plan = {path: one for path, one in request.items() if not isinstance(one, Within)}
    missing = 0.0
    for budget, paths in sorted(shared_budgets(request).items(), key=lambda one: one[0].of):
        room = Room.of(use, budget, paths, plan)  # of="layers" first
        plan |= uniform_plan(room)
        if budget.kind == "flops":
            missing += min(room.allowed, room.cost(dict.fromkeys(paths, FullRank())))
            missing -= room.cost(plan)
    flops = use.flops(plan)
    return plan, Flops(flops.forward, flops.training + round(missing))


def check_request(use: ModelUse, request: Request) -> None:
    """Raise BudgetError if the smallest ranks cost more than a budget in a schedule's answer."""
    for budget, paths in shared_budgets(request).items():
        Room.of(use, budget, paths, stand_in(request)).check()


def stand_in(request: Request) -> Plan:
    """The plan with the smallest rank in place of each budget, for checks before it is measured."""
    return {
        path: LowRank(1, _name(one)) if isinstance(one, Within) else one
        for path, one in request.items()
    }


def rank_step(decomposition: Decomposition, shape: Sequence[int], multiple_of: int) -> int:
    """The number of which a weight's ranks are multiples: halved until there are eight choices.

    Example:
        >>> from dynarank.decompositions import get_decomposition
        >>> [rank_step(get_decomposition("svd"), (n, n), 8) for n in (32, 64, 256)]
        [2, 4, 8]
    """
    most = decomposition.resolve_rank(Rank(1.0), tuple(shape))  # with no more parameters
    step = multiple_of
    while step > 1 and most // step < _CHOICES:
        step //= 2
    return step


def _at_share(room: Room, share: float) -> dict[str, Form]:
    """The forms at a share of each layer's own cost; the smallest ranks at 0."""
    forms: dict[str, Form] = {}
    for path, use in room.layers.items():
        rank = Rank(share) if share > 0 else _smallest(use, room.budget)
        forms[path] = _cheaper(use, room.budget, rank)
    return forms


def _smallest(use: LayerUse, budget: Within) -> int:
    if budget.ranks == "uniform" or budget.multiple_of is None:
        return 1
    decomposition = use.spec.decomposition(LowRank(1, _name(budget)))
    return rank_step(decomposition, use.shape, budget.multiple_of)


def _name(budget: Within) -> str:
    """The decomposition; which is best is measured, and without a measurement it is an SVD."""
    return "svd" if budget.decomposition == "best" else budget.decomposition


def _cheaper(use: LayerUse, budget: Within, rank: RankLike) -> Form:
    """The layer at this rank, or full-rank if that is not more expensive."""
    form, full = use.spec.resolve(LowRank(rank, _name(budget))), FullRank()
    return form if use.cost(budget.kind, form) < use.cost(budget.kind, full) else full


def _topped_up(room: Room, plan: dict[str, Form]) -> dict[str, Form]:
    """The plan with one direction more wherever that still fits."""
    left = room.allowed - room.cost(plan)
    spare = {
        path: room.layers[path].spec.decomposition(form).limit(use.shape) - form.resolved_rank
        for path, use in room.layers.items()
        if isinstance(form := plan[path], LowRank)
    }
    for path in sorted(spare, key=lambda path: -spare[path]):
        use, form, kind = room.layers[path], plan[path], room.budget.kind
        if isinstance(form, LowRank) and spare[path]:
            more = _cheaper(use, room.budget, form.resolved_rank + 1)
            if (costs := use.cost(kind, more) - use.cost(kind, form)) <= left:
                plan[path], left = more, left - costs
    return plan
