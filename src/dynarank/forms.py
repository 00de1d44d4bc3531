"""The vocabulary: the three forms of a layer's weight, plans and changes. Plain data, no logic.

A layer's weight is always ``base + scale * join(factors)``, either part absent:

====================================  ============  ========  ================
form                                  base          factors   what trains
====================================  ============  ========  ================
``FullRank()``                        yes           none      the base
``LowRank(rank, decomposition)``      none          yes       the factors
``Adapted(rank, decomposition)``      yes, frozen   yes       the factors
====================================  ============  ========  ================

A plan maps a layer's path in the model to a form.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeAlias, get_args

__all__ = [
    "Adapted",
    "Change",
    "Execution",
    "Form",
    "FullRank",
    "LowRank",
    "Plan",
    "Rank",
    "RankLike",
    "execution_of",
    "form_from_data",
    "form_name",
    "form_to_data",
    "rank_limit",
    "resolve_form",
    "resolve_rank",
]


@dataclass(frozen=True)
class Rank:
    """A rank as a share of a layer's size, rounded down, at least 1, at most the layer's limit.

    With m = in * kernel positions and n = out, ``Rank(value, of)`` is ``value`` times

    - ``"out"``: n, as the published code counts;
    - ``"min"``: min(m, n), the largest rank the weight can have;
    - ``"break-even"``: mn / (m + n), where factors cost as much as the weight itself.

    Raises:
        ValueError: the share is not in (0, 1], or ``of`` is not one of the three.

    Example:
        >>> resolve_rank(Rank(0.5, of="min"), (64, 16, 3, 3))
        32
    """

    value: float
    of: Literal["out", "min", "break-even"] = "out"

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not 0 < self.value <= 1:
            raise ValueError(
                f"a rank given as a share must lie in (0, 1], got {self.value!r}; "
                "give an int for a number of directions"
            )
        if self.of not in ("out", "min", "break-even"):
            raise ValueError(f'a rank is a share of "out", "min" or "break-even", got {self.of!r}')


RankLike: TypeAlias = int | float | Rank
Execution: TypeAlias = Literal["auto", "merged", "two-branch"]


@dataclass(frozen=True)
class FullRank:
    """The ordinary layer: its weight is the base, and it trains."""


@dataclass(frozen=True)
class LowRank:
    """The weight is ``join(factors)``; the factors train.

    Args:
        rank: an int, a float (share of the output channels) or a :class:`Rank`.
        decomposition: the name of the decomposition.
    """

    rank: RankLike
    decomposition: str = "svd"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _plain_rank(self.rank))


@dataclass(frozen=True)
class Adapted:
    """The weight is ``base + alpha / rank * join(factors)``; the base is frozen, the factors train.

    Args:
        rank: an int, a float (share of the output channels) or a :class:`Rank`.
        decomposition: the name of the decomposition.
        alpha: the adaptor's weight before division by the rank (16 for SVD in the published code).
        execution: ``"merged"`` adds the adaptor to the base before multiplying, ``"two-branch"``
            multiplies by each and adds the results, as the published code does; ``"auto"`` takes
            the one with fewer training FLOPs (:func:`execution_of`).
    """

    rank: RankLike
    decomposition: str = "svd"
    alpha: float = 16.0
    execution: Execution = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _plain_rank(self.rank))
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}")
        if self.execution not in get_args(Execution):
            known = ", ".join(map(repr, get_args(Execution)))
            raise ValueError(f"execution is one of {known}, got {self.execution!r}")

    @property
    def scale(self) -> float:
        """Alpha / rank; the rank must be resolved."""
        return self.alpha / operator.index(self.rank)  # type: ignore[arg-type]


Form: TypeAlias = FullRank | LowRank | Adapted
Plan: TypeAlias = Mapping[str, Form]


@dataclass(frozen=True)
class Change:
    """What ``apply_plan`` did to one layer.

    Args:
        path: the layer's path in the model.
        before: the form it had.
        after: the form it has now.
        error: ``||W_after - W_before|| / ||W_before||`` (Frobenius): rounding for the changes that
            keep the function, the energy cut off for a truncation.
    """

    path: str
    before: Form
    after: Form
    error: float


_NAMES: dict[str, type[Form]] = {"full-rank": FullRank, "low-rank": LowRank, "adapted": Adapted}


def form_name(form: Form) -> str:
    """The form's one word: ``full-rank``, ``low-rank`` or ``adapted``."""
    return next(name for name, cls in _NAMES.items() if type(form) is cls)


def form_to_data(form: Form) -> dict[str, Any]:
    """The form as plain data, for JSON.

    Example:
        >>> form_to_data(LowRank(8))
        {'form': 'low-rank', 'rank': 8, 'decomposition': 'svd'}
    """
    data = dict(vars(form))
    if isinstance(rank := data.get("rank"), Rank):
        data["rank"] = dict(vars(rank))
    return {"form": form_name(form), **data}


def form_from_data(data: Mapping[str, Any]) -> Form:
    """The inverse of :func:`form_to_data`."""
    fields = dict(data)
    name = fields.pop("form", None)
    if name not in _NAMES:
        raise ValueError(f"unknown form {name!r}; known: {', '.join(_NAMES)}")
    if isinstance(rank := fields.get("rank"), Mapping):
        fields["rank"] = Rank(**rank)
    return _NAMES[name](**fields)


def rank_limit(shape: Sequence[int]) -> int:
    """The largest rank of a weight ``(out, in, *kernel)``: min(out, in * kernel positions)."""
    return min(shape[0], math.prod(shape[1:]))


def resolve_rank(rank: RankLike, shape: Sequence[int]) -> int:
    """The number of directions ``rank`` means for a weight ``(out, in, *kernel)``.

    Raises:
        ValueError: an int above the limit ``min(out, in * kernel positions)``.
    """
    limit, rank = rank_limit(shape), _plain_rank(rank)
    if isinstance(rank, int):
        if rank > limit:
            raise ValueError(
                f"rank {rank} is above the limit {limit} of a weight of shape {tuple(shape)}; "
                f"ask for at most {limit}, or for a share such as 0.5"
            )
        return rank
    share = rank if isinstance(rank, Rank) else Rank(rank)
    n, m = shape[0], math.prod(shape[1:])
    whole = {"out": n, "min": limit, "break-even": m * n / (m + n)}[share.of]
    return min(max(int(share.value * whole), 1), limit)


def execution_of(form: Adapted, shape: Sequence[int], rows: int) -> Execution:
    """How an adapted layer multiplies ``rows`` rows: as its form says, or by the fewest FLOPs.

    Relative to the full-rank layer's training FLOPs, two branches cost 2/3 + k and the merged
    weight 1 + r / rows, with k = r(m + n) / (mn): merging wins where k > 1/3 + r / rows.

    Example:
        >>> [execution_of(Adapted(r), (64, 64, 3, 3), 8192) for r in (16, 32)]
        ['two-branch', 'merged']
    """
    if form.execution != "auto":
        return form.execution
    rank = operator.index(form.rank)  # type: ignore[arg-type]
    n, m = shape[0], math.prod(shape[1:])
    wins = 3 * rank * (m + n) * rows > m * n * (rows + 3 * rank)
    return "merged" if wins else "two-branch"


def resolve_form(form: Form, shape: Sequence[int]) -> Form:
    """The form with its rank as a number of directions for a weight of this shape."""
    if isinstance(form, FullRank):
        return form
    return replace(form, rank=resolve_rank(form.rank, shape))


def _plain_rank(rank: object) -> RankLike:
    """The rank, checked, with other libraries' numbers made Python's."""
    if isinstance(rank, Rank):
        return rank
    if isinstance(rank, SupportsIndex) and not isinstance(rank, bool):
        if (value := operator.index(rank)) < 1:
            raise ValueError(f"a rank must be at least 1, got {value}")
        return value
    if isinstance(rank, SupportsFloat) and not isinstance(rank, bool):
        return Rank(float(rank)).value
    raise TypeError(f"a rank is an int, a float in (0, 1] or a Rank, got {rank!r}")
