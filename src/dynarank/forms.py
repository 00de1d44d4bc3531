"""The three forms that a layer's weight can have, ranks, plans and changes: plain data.

A layer's weight is always ``base + scale * join(factors)``, either part absent:

====================================  ============  ========  ================
form                                  base          factors   what trains
====================================  ============  ========  ================
``FullRank()``                        yes           none      the base
``LowRank(rank, decomposition)``      none          yes       the factors
``Adapted(rank, decomposition)``      yes, frozen   yes       the factors
====================================  ============  ========  ================

A plan maps a layer's path in the model to a form. A schedule may answer with a budget in place of
forms, ``Within(flops=0.45)``: the ranks are found for it when the time comes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Literal, SupportsFloat, SupportsIndex, TypeAlias, get_args

__all__ = [
    "Adapted",
    "AdaptedExecution",
    "BudgetKind",
    "Change",
    "Form",
    "FullRank",
    "LowRank",
    "LowRankExecution",
    "Plan",
    "Rank",
    "RankLike",
    "Request",
    "Within",
    "form_name",
    "plain_rank",
    "same_weight",
]


@dataclass(frozen=True)
class Rank:
    """A rank as a share of something, rounded down, at least 1, at most the weight's limit.

    With m = in * kernel positions and n = out, ``Rank(value, of)`` is

    - ``"cost"``: the largest rank whose factors have at most ``value`` times the weight's m n
      parameters; for an SVD, ``value * m n / (m + n)``. A plain float means this;
    - ``"out"``: ``value * n``, as the published code counts;
    - ``"min"``: ``value * min(m, n)``, a share of the largest rank that the weight can have.

    For a grouped convolution, m, n and the rank are those of one group.

    Args:
        value: the share, in (0, 1].
        of: what it is a share of.
        multiple_of: round down to a multiple of this, if the rank is at least that. Multiples of 8
            (16 bytes of bf16) suit most kernels, multiples of 64 the large ones of GPUs.

    Raises:
        ValueError: the share is not in (0, 1], ``of`` is not one of the three, or ``multiple_of``
            is below 1.

    Example:
        >>> dr.factorize(nn.Linear(256, 64), 0.5).form.rank
        25
        >>> dr.factorize(nn.Linear(256, 64), Rank(0.5, of="out")).form.rank
        32
    """

    value: float
    of: Literal["cost", "out", "min"] = "cost"
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not 0 < self.value <= 1:
            raise ValueError(
                f"a rank given as a share must lie in (0, 1], got {self.value!r}; "
                "give an int for a number of directions"
            )
        if self.of not in ("cost", "out", "min"):
            raise ValueError(f'a rank is a share of "cost", "out" or "min", got {self.of!r}')
        if isinstance(self.multiple_of, bool) or operator.index(self.multiple_of) < 1:
            raise ValueError(f"multiple_of is a whole number >= 1, got {self.multiple_of!r}")


RankLike: TypeAlias = int | float | Rank
LowRankExecution: TypeAlias = Literal["auto", "factored", "joined"]
AdaptedExecution: TypeAlias = Literal["auto", "merged", "two-branch"]


@dataclass(frozen=True)
class FullRank:
    """The form of an ordinary layer: its weight is the base, and it trains."""


@dataclass(frozen=True, repr=False)
class _WithFactors:
    """The base class of the two forms with factors."""

    rank: RankLike
    decomposition: str = "svd"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", plain_rank(self.rank))

    def __repr__(self) -> str:
        """How the layer computes and the number of a restart are shown only if set."""
        values = {f: getattr(self, f.name) for f in fields(self)}
        always = ("rank", "decomposition", "alpha")
        shown = [f"{f.name}={v!r}" for f, v in values.items() if f.name in always or v != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def resolved_rank(self) -> int:
        """The rank of a resolved form, which every layer's own form is: an int, never a share."""
        if isinstance(self.rank, int):
            return self.rank
        raise ValueError(
            f"{self} has a share for a rank, which is a number only for a weight of a known shape; "
            "resolve the form with WeightSpec.resolve(form), or read the layer's own form"
        )


@dataclass(frozen=True, repr=False)
class LowRank(_WithFactors):
    """The low-rank form: the weight is ``join(factors)``, and the factors train.

    Args:
        rank: an int, a float (share of the layer's own cost) or a :class:`Rank`.
        decomposition: the name of the decomposition.
        execution: ``"factored"`` multiplies by one factor after the other, ``"joined"`` by their
            product, formed in each forward pass; ``"auto"`` takes the one with fewer FLOPs.
        recompute: recompute the activation between the factors in the backward pass instead of
            saving it: less memory, one more thin product.

    Example:
        >>> LowRank(8)
        LowRank(rank=8, decomposition='svd')
    """

    execution: LowRankExecution = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_execution(self.execution, get_args(LowRankExecution))


@dataclass(frozen=True, repr=False)
class Adapted(_WithFactors):
    """The adapted form: ``base + alpha / rank * join(factors)``, base frozen, factors trainable.

    Args:
        rank: as for :class:`LowRank`.
        decomposition: as for :class:`LowRank`.
        alpha: the adapter's weight before division by the rank (16 for SVD in the published code).
        execution: ``"merged"`` adds the adapter to the base before multiplying, ``"two-branch"``
            multiplies by each and adds the results, as the published code does; ``"auto"`` takes
            the one with fewer FLOPs.
        recompute: recompute the merged weight and the activation between the factors in the
            backward pass instead of saving them.
        restart: how often the adapter has been restarted. When the number changes, the adapter is
            merged into the base and a new one, with zero output, takes its place.

    Example:
        >>> Adapted(8).scale
        2.0
    """

    alpha: float = 16.0
    execution: AdaptedExecution = "auto"
    recompute: bool = False
    restart: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}")
        object.__setattr__(self, "alpha", float(self.alpha))  # plain data, whoever's number it was
        if isinstance(self.restart, bool) or operator.index(self.restart) < 0:
            raise ValueError(f"restart is a whole number >= 0, got {self.restart!r}")
        _check_execution(self.execution, get_args(AdaptedExecution))

    @property
    def scale(self) -> float:
        """Alpha / rank, of a resolved form."""
        return self.alpha / self.resolved_rank


Form: TypeAlias = FullRank | LowRank | Adapted
BudgetKind: TypeAlias = Literal["flops", "params", "bytes"]
Plan: TypeAlias = Mapping[str, Form]


@dataclass(frozen=True)
class Within:
    """A budget, which a schedule may answer with in place of a form: the ranks are found for it.

    All layers with equal budgets in a plan share one: at the transition the rank scheduler measures
    the model on a few batches and finds the ranks that keep the most within it. Exactly one of
    ``flops``, ``params`` and ``bytes`` is given.

    Args:
        flops: training FLOPs: a share of the full-rank ones, a float in (0, 1], or a number for one
            batch (int).
        params: parameters, a share (float) or a number (int).
        bytes: the size of the parameters as they are stored, a share (float) or a number (int).
        of: what a share is a share of: the whole ``"model"``, or only the ``"layers"`` that have
            this budget. A number is the cost of the same.
        ranks: ``"energy"``: the ranks that keep the most of the outputs, measured; ``"uniform"``:
            every layer gets the same share of its own cost, which needs no measurement.
        decomposition: the name of the decomposition, or ``"best"``: for each layer the one that
            keeps most at its cost.
        multiple_of: ranks are multiples of this number, or of less in narrow layers. None: of 8, or
            of less where 8 would leave more than 0.5% of the budget over.

    Raises:
        ValueError: not exactly one budget, one that is not positive, a share above 1, or an unknown
            option.

    Example:
        >>> Within(flops=0.45)
        Within(flops=0.45)
    """

    flops: float | int | None = None
    params: float | int | None = None
    bytes: float | int | None = None
    of: Literal["model", "layers"] = "model"
    ranks: Literal["energy", "uniform"] = "energy"
    decomposition: str = "svd"
    multiple_of: int | None = None

    def __post_init__(self) -> None:
        kinds = get_args(BudgetKind)
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a budget is exactly one of {', '.join(kinds)}, got {', '.join(given) or 'none'}"
            )
        object.__setattr__(self, self.kind, _plain_budget(self.kind, self.amount))
        if self.of not in ("model", "layers"):
            raise ValueError(f'a budget is of the "model" or of its "layers", got {self.of!r}')
        if self.ranks not in ("energy", "uniform"):
            raise ValueError(f'ranks are "energy" or "uniform", got {self.ranks!r}')
        step = 1 if self.multiple_of is None else self.multiple_of
        if isinstance(step, bool) or operator.index(step) < 1:
            raise ValueError(f"multiple_of is a whole number >= 1, got {self.multiple_of!r}")

    @property
    def kind(self) -> BudgetKind:
        """What the budget is of."""
        return next(kind for kind in get_args(BudgetKind) if getattr(self, kind) is not None)

    @property
    def amount(self) -> float | int:
        """A share (float) or a number (int)."""
        return getattr(self, self.kind)

    def __repr__(self) -> str:
        """Only what is set is shown."""
        values = {f: getattr(self, f.name) for f in fields(self)}
        shown = (f"{f.name}={v!r}" for f, v in values.items() if v != f.default)
        return f"Within({', '.join(shown)})"

    def __str__(self) -> str:
        """In words: ``0.45 of the FLOPs``, ``0.45 of the layers' FLOPs``."""
        unit = {"flops": "FLOPs", "params": "parameters", "bytes": "bytes"}[self.kind]
        whose = "layers' " if self.of == "layers" else ""
        if isinstance(self.amount, float):
            return f"{self.amount:.3g} of the {whose}{unit}"
        return f"{self.amount:,} {unit}" + (" of the layers" if whose else "")


def _plain_budget(kind: str, amount: object) -> float | int:
    """The amount of a budget, checked, with other libraries' numbers made Python's."""
    if isinstance(amount, SupportsIndex) and not isinstance(amount, bool):
        with suppress(TypeError):
            if (value := operator.index(amount)) >= 1:
                return value
    elif isinstance(amount, SupportsFloat) and not isinstance(amount, bool):
        if 0 < (value := float(amount)) <= 1:
            return value
    raise ValueError(
        f"a budget of {kind} is a share in (0, 1] (float) or a number of at least 1 (int), got "
        f"{amount!r}"
    )


Request: TypeAlias = Mapping[str, Form | Within]
"""What a schedule answers with: a plan, in which layers may have a budget in place of a form."""


@dataclass(frozen=True)
class Change:
    """What ``apply_plan`` did to the layer at ``path``.

    ``error`` is ``||W_after - W_before|| / ||W_before||`` (Frobenius): rounding where the function
    is kept, the energy cut off where the weight is truncated.

    ``update_error`` is the share of an adapter's update ``W_before - base`` that rounding took when
    it was merged, ``||W_after - W_before|| / ||W_before - base||``. In bf16 that may be most of it,
    however small ``error`` is: a change of an entry by less than 2^-9 of it vanishes. None where no
    adapter was merged.
    """

    path: str
    before: Form
    after: Form
    error: float
    update_error: float | None = None


FORMS: dict[str, type[Form]] = {"full-rank": FullRank, "low-rank": LowRank, "adapted": Adapted}


def form_name(form: Form) -> str:
    """The name of the form, whatever its rank: ``full-rank``, ``low-rank`` or ``adapted``."""
    return next(name for name, cls in FORMS.items() if type(form) is cls)


def same_weight(one: Form, other: Form, *, restarted: bool = False) -> bool:
    """Whether two forms have the same parameters, differing at most in how they compute.

    With ``restarted`` they may also be adapters of which one is a restart of the other.

    Example:
        >>> same_weight(LowRank(8), LowRank(8, execution="joined"))
        True
    """
    free = ("execution", "recompute", "restart") if restarted else ("execution", "recompute")
    values = [{k: v for k, v in vars(form).items() if k not in free} for form in (one, other)]
    return type(one) is type(other) and values[0] == values[1]


def _check_execution(execution: str, known: Sequence[str]) -> None:
    if execution not in known:
        raise ValueError(f"execution is one of {', '.join(map(repr, known))}, got {execution!r}")


def plain_rank(rank: object) -> RankLike:
    """The rank, checked, with other libraries' numbers made Python's.

    Raises:
        ValueError: an int below 1, or a share outside (0, 1].
        TypeError: it is neither a number nor a :class:`Rank`.
    """
    if isinstance(rank, Rank):
        return rank
    # Python's own numbers first: checking a protocol is slow.
    if isinstance(rank, (int, SupportsIndex)) and not isinstance(rank, bool):
        with suppress(TypeError):  # a tensor of a float has __index__ too
            if (value := operator.index(rank)) < 1:
                raise ValueError(f"a rank must be at least 1, got {value}")
            return value
    if isinstance(rank, (float, SupportsFloat)) and not isinstance(rank, bool):
        return Rank(float(rank)).value
    raise TypeError(f"a rank is an int, a float in (0, 1] or a Rank, got {rank!r}")
