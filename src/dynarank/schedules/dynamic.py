"""Dynamic rank: the schedule to use for a total budget, or the paper's low-full-low order.

Fixed low rank is limited by optimization where layers are matrices: there a decay from full rank
gives more at equal cost. In convolutions capacity is what binds, and nothing that was tried gave
more than fixed low rank (``docs/methods/decay.md``). So the member of the family depends on where
most of the scheduled parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from typing import Any

from dynarank.forms import AdaptedExecution, RankLike, Request, Within
from dynarank.schedules.base import Answer, Clock, RankSchedule, Readings, State, When
from dynarank.schedules.lr_aligned import DynamicRank
from dynarank.schedules.options import Ending, share_within
from dynarank.schedules.rank_decay import BUDGET, Decay
from dynarank.schedules.throughout import low_rank

__all__ = ["Budgeted", "dynamic_rank"]


@dataclass(frozen=True)
class Budgeted(RankSchedule):
    """The schedule for a total budget: a decay, or fixed low rank if most weights are kernels.

    Args:
        budget: the training FLOPs of the whole run relative to full rank, a share or a
            :class:`dynarank.Within` of FLOPs.
        fitted: whether it was fitted to a model, by ``fit_schedule``; a resumed run keeps it then.

    Raises:
        ValueError: the budget is not a share of FLOPs.

    Example:
        >>> clock, half = Clock(50, 100), Within(flops=0.5, of="layers")
        >>> Budgeted(half)(clock, Readings({"linear": (64, 64)}))
        {'linear': Within(flops=0.437268, of='layers')}
        >>> Budgeted(half)(clock, Readings({"conv": (64, 64, 3, 3)}))
        {'conv': Within(flops=0.5, of='layers', ranks='uniform')}
    """

    budget: float | Within = BUDGET
    _: KW_ONLY
    fitted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", self._decay.budget)

    @cached_property
    def _decay(self) -> Decay:
        return Decay(total=self.budget)

    @cached_property
    def _low_rank(self) -> RankSchedule:
        return low_rank(budget=self._decay.budget)

    def _member(self, readings: Readings) -> RankSchedule:
        kernels = mostly_kernels(tuple(readings.layers.values()))
        return self._low_rank if kernels else self._decay

    @property
    def stateful(self) -> bool:
        """Whether the decay is stateful."""
        return self._decay.stateful

    def __call__(self, clock: Clock, readings: Readings, /) -> Request:
        """The budget of each layer, if the decay is stateless."""
        if self.stateful:
            return super().__call__(clock, readings)
        return self._member(readings)(clock, readings)

    def start(self) -> State:
        """The initial state of the decay."""
        return self._decay.start()

    def check_state(self, state: State, layers: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError for a state that cannot arise."""
        self._decay.check_state(state, layers)

    def update(self, state: State, clock: Clock, readings: Readings, /) -> Answer:
        """The budget of each layer."""
        return self._member(readings).update(state, clock, readings)


@lru_cache(maxsize=64)  # asked at every step
def mostly_kernels(shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether most parameters of weights (out, in, *kernel) are in kernels larger than 1.

    Example:
        >>> mostly_kernels(((8, 8, 3, 3), (8, 8, 1, 1), (16, 8)))
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
            convolutions, see :class:`Budgeted`. Calibrations before cuts are not in it,
            and :func:`dynarank.estimate` says what they add. With no argument, half of that of the
            layers.
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
        Budgeted(budget=Within(flops=0.5, multiple_of=1), fitted=False)
        >>> type(dynamic_rank(0.5, inflate=0.37, deflate=0.80)).__name__
        'DynamicRank'

    Evidence: ``docs/evidence.md``, beside fixed low rank and the paper's order.
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
