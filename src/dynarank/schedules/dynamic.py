"""Dynamic rank: the schedule to use for a total budget, or the paper's low-full-low order.

Fixed low rank is limited by optimization where layers are matrices: there a decay from full rank
gives more at equal cost. In convolutions capacity is what binds, and nothing that was tried gave
more than fixed low rank (``docs/methods/decay.md``). So the member of the family depends on where
most of the scheduled parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dynarank.forms import AdaptedExecution, RankLike, Request, Within
from dynarank.schedules.base import Answer, Clock, RankSchedule, Readings, State, When
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.schedules.options import Ending, share_within
from dynarank.schedules.rank_decay import BUDGET, Decay
from dynarank.schedules.state_rules import Rule, check_fields, is_number
from dynarank.schedules.throughout import low_rank

__all__ = ["Budgeted", "dynamic_rank"]


@dataclass(frozen=True)
class Budgeted(RankSchedule):
    """The schedule for a total budget: a decay, or fixed low rank if most weights are kernels.

    Args:
        budget: the training FLOPs of the whole run relative to full rank, a share or a
            :class:`dynarank.Within` of FLOPs.

    Raises:
        ValueError: the budget is not a share of FLOPs.

    A total of the model is translated to one of the layers as soon as a batch has shown what
    everything else costs, so that the decay falls evenly in the layers' own cost.

    Example:
        >>> clock, half = Clock(50, 100), Within(flops=0.5, of="layers")
        >>> Budgeted(half)(clock, Readings({"linear": (64, 64)}))
        {'linear': Within(flops=0.437268, of='layers')}
        >>> Budgeted(half)(clock, Readings({"conv": (64, 64, 3, 3)}))
        {'conv': Within(flops=0.5, of='layers', ranks='uniform')}
    """

    budget: float | Within = BUDGET

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Decay(total=self.budget).budget)

    @property
    def stateful(self) -> bool:
        """Whether the budget is of the model, whose other FLOPs are known from the first batch."""
        return self._total.of == "model"

    def __call__(self, clock: Clock, readings: Readings, /) -> Request:
        """The budget of each layer, of a total for the layers."""
        if self.stateful:
            return super().__call__(clock, readings)
        return _member(self._total, tuple(readings.layers.values()), None)(clock, readings)

    def start(self) -> State:
        """The initial state: the FLOPs of the layers and of everything else, unknown."""
        return {"flops": None} if self.stateful else {}

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        rules: dict[str, Rule] = {"flops": _is_shares_or_none}
        check_fields(state, rules if self.stateful else {})

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The budget of each layer; what the first batch cost holds for the whole run."""
        if not self.stateful:
            return Answer(self(clock, readings), state)
        flops = state["flops"] or (readings.flops and list(readings.flops))
        known = tuple(flops) if flops else None
        member = _member(self._total, tuple(readings.layers.values()), known)
        return Answer(member(clock, readings), {"flops": flops})

    @property
    def _total(self) -> Within:
        assert isinstance(self.budget, Within)
        return self.budget


@lru_cache(maxsize=64)  # asked at every step
def _member(
    total: Within, shapes: tuple[tuple[int, ...], ...], flops: tuple[float, float] | None
) -> RankSchedule:
    """The schedule for layers of these shapes; ``flops`` as in the readings."""
    if mostly_kernels(shapes):
        return low_rank(budget=total)
    return Decay(total=total if flops is None else _of_layers(total, *flops))


def _of_layers(total: Within, own: float, rest: float) -> Within:
    """A total of the model as one of its layers, where a decay falls evenly.

    Raises:
        ValueError: everything else costs more than the total.
    """
    share = (total.amount - rest) / own
    if share <= 0:
        raise ValueError(
            f"a total of {total} cannot be met: everything but the scheduled layers costs "
            f"{rest:.4f}; allow more than that, or schedule more layers"
        )
    return replace(total, flops=min(share, 1.0), of="layers")


def _is_shares_or_none(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value))


def mostly_kernels(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether most parameters of weights (out, in, *kernel) are in kernels larger than 1.

    Example:
        >>> mostly_kernels([(8, 8, 3, 3), (8, 8, 1, 1), (16, 8)])
        True
    """
    sizes = [math.prod(shape) for shape in shapes]
    kernels = [n for n, shape in zip(sizes, shapes, strict=True) if math.prod(shape[2:]) > 1]
    return 2 * sum(kernels) > sum(sizes)


def dynamic_rank(
    rank: RankLike | None = None,
    *,
    budget: float | Within | None = None,
    inflate: When | None = None,
    deflate: When | None = None,
    to: Ending | None = None,
    length: float | None = None,
    decomposition: str | None = None,
    alpha: float | None = None,
    execution: AdaptedExecution | None = None,
) -> RankSchedule:
    """The best known schedule for a budget; or, with a rank or times, the paper's low-full-low.

    Args:
        rank: the paper's order at this rank: :class:`~dynarank.schedules.lr_aligned.DynamicRank`.
        budget: the training FLOPs of the whole run relative to full rank, a share in (0, 1] or a
            :class:`dynarank.Within`: a decay from full rank, or fixed low rank if most weights are
            convolutions, see :class:`Budgeted`. With no argument, half of that of the layers.
        inflate: when to inflate, in the paper's order.
        deflate: when to deflate.
        to: the ending, ``"adapted"`` or ``"low-rank"``.
        length: the length of a computed full-rank phase.
        decomposition: the decomposition's name, for a budget and for the paper's order.
        alpha: the adapter's scale is ``alpha / rank``.
        execution: how the adapted form multiplies.

    Raises:
        ValueError: a budget together with arguments of the paper's order, or an impossible value.

    Example:
        >>> dynamic_rank(budget=0.5)
        Budgeted(budget=Within(flops=0.5, multiple_of=1))
        >>> type(dynamic_rank(0.5, inflate=0.37, deflate=0.80)).__name__
        'DynamicRank'
    """
    given: dict[str, Any] = dict(
        rank=rank, inflate=inflate, deflate=deflate, to=to, length=length, alpha=alpha,
        execution=execution,
    )  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        budget = BUDGET if budget is None else budget
        return Budgeted(share_within("budget", budget, decomposition))
    if budget is not None:
        raise ValueError(
            f"with a budget the ranks and times are found for it, got budget={budget!r} and "
            f"{', '.join(f'{name}={value!r}' for name, value in given.items())}; leave out one or "
            "the other"
        )
    return DynamicRank(**given, decomposition=decomposition or "svd")
