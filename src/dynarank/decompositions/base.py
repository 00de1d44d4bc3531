"""What a decomposition is: a weight as a chain of smaller weights. Pure tensor functions.

Legend: ``W`` a weight (out, in, *kernel); n = out, m = in * kernel positions, r the rank.

Each factor is a linear map or a convolution of its own, and ``join`` multiplies them: it is linear
in each factor. A decomposition sees the weight of one group; several groups are handled by
:class:`dynarank.decompositions.grouped.Grouped`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)

from dynarank.decompositions.geometry import Factors, Geometry
from dynarank.decompositions.numerics.linalg import precise
from dynarank.decompositions.numerics.multilinear import (
    equal_norms,
    lift,
    lift_squares,
    nearest_changes,
)
from dynarank.forms import Rank, RankLike, plain_rank

__all__ = ["Decomposition"]

# The factors of a direction are balanced, so it is 1e-6 of the weight's largest: near the rounding
# of fp32, where a quotient is noise.
FAINT = 1e-3


class Decomposition(ABC):
    """The base class of decompositions: W (out, in, *kernel) as a chain of factors.

    Laws: ``join(split(W, limit(shape))) == W``, and ``apply(x, factors, stages) == layer(x,
    join(factors))``. A new decomposition needs a name and five methods: ``limit``, ``shapes``,
    ``split``, ``join`` and ``stages`` (and ``factor_names`` if there are not two factors). The
    others have defaults made of these; override one where there is a faster formula. See
    ``examples/05_custom_decomposition.py``.
    """

    name: str
    groups: int = 1
    is_pair: bool = False
    """Whether W, as an (n, m) matrix, is ``up @ down``; of a grouped weight, each group's."""
    truncates_optimally: bool = False
    """Whether ``split`` leaves the least error there is, ``sqrt(sum_{i>r} s_i^2)``."""

    def factor_names(self, dims: int) -> tuple[str, ...]:
        """The factors' names for a weight with ``dims`` kernel dimensions, from input to output.

        The first is ``down`` and the last ``up``, which tells factors from other weights.
        """
        return "down", "up"

    @abstractmethod
    def limit(self, shape: Sequence[int]) -> int:
        """The smallest rank at which every weight of this shape is exact; none above is allowed."""

    @abstractmethod
    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """The factors' shapes; each is a weight (out, in / its stage's groups, *kernel)."""

    def size(self, shape: Sequence[int], rank: int) -> int:
        """The number of the factors' parameters."""
        return sum(map(math.prod, self.shapes(shape, rank)))

    def resolve_rank(self, rank: RankLike, shape: Sequence[int]) -> int:
        """The number that ``rank`` means for a weight of this shape.

        Args:
            rank: an int, a share or a :class:`Rank`.
            shape: (out, in, *kernel).

        Raises:
            ValueError: an int above the limit.

        Example:
            >>> svd = dr.decompositions.get_decomposition("svd")
            >>> svd.resolve_rank(0.5, (64, 64)), svd.resolve_rank(dr.Rank(0.5, "out"), (64, 64))
            (16, 32)
        """
        limit, rank = self.limit(shape), plain_rank(rank)
        if isinstance(rank, int):
            if rank > limit:
                raise ValueError(
                    f"rank {rank} is above the limit {limit} of a weight of shape {tuple(shape)}; "
                    f"ask for at most {limit}, or for a share such as 0.5"
                )
            return rank
        share = rank if isinstance(rank, Rank) else Rank(rank)
        wanted = min(max(self._rank_for(share, shape), 1), limit)
        return wanted - wanted % share.multiple_of if wanted >= share.multiple_of else wanted

    def _rank_for(self, share: Rank, shape: Sequence[int]) -> int:
        """The rank for a share, which may be 0 or above the limit."""
        n, m = shape[0] // self.groups, math.prod(shape[1:])
        if share.of == "cost":
            ranks, most = range(1, self.limit(shape) + 1), share.value * math.prod(shape)
            return bisect_right(ranks, most, key=lambda rank: self.size(shape, rank))
        return int(share.value * (n if share.of == "out" else min(m, n)))

    @abstractmethod
    def split(self, weight: Tensor, rank: int) -> Factors:
        """Good factors of this rank, balanced; ``weight`` in fp32 or fp64.

        Raises:
            UnfitWeightError: it is not finite or cannot be decomposed.
        """

    @abstractmethod
    def join(self, factors: Factors) -> Tensor:
        """The weight that the factors stand for; differentiable, and linear in each factor."""

    @abstractmethod
    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        """How each factor slides where the weight slides by ``geometry`` (of one group)."""

    def refactor(self, factors: Factors, rank: int) -> Factors:
        """``split(join(factors), rank)``.

        Raises:
            UnfitWeightError: a factor is not finite, or no method converges.
        """
        return self.split(self.join(factors).detach(), rank)

    def balanced(self, factors: Factors) -> Factors:
        """Factors with the same join, of equal Frobenius norm.

        As they are if one is zero, for no scale brings that one up.
        """
        return equal_norms(factors)

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        """The vjp of ``join``: dL/df from dL/dW. By automatic differentiation."""
        pull = torch.func.vjp(lambda *f: self.join(f), *factors)[1]
        return pull(cotangent)

    def join_flops(self, shape: Sequence[int], rank: int) -> int:
        """FLOPs of ``join``, as FlopCounterMode counts them: counted on the meta device."""
        return _counted(self, "join", tuple(shape), rank)

    def pull_flops(self, shape: Sequence[int], rank: int) -> int:
        """FLOPs of ``pull``, exactly as FlopCounterMode counts them."""
        return _counted(self, "pull", tuple(shape), rank)

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """The least M whose ``pull`` at ``factors`` is ``cotangents``. By conjugate gradients."""
        return lift(self.join, factors, cotangents)

    def energies(self, factors: Factors) -> Factors:
        """``||dW/df_e||^2`` of each entry e of each factor f, in shapes that broadcast to theirs.

        The pull of ones at the squared factors: exact where an entry of W depends on e by a single
        product of other entries; where it is a sum of such products, their cross terms are left
        out, which is right on average over the other entries' signs.
        """
        squares = tuple(factor.square() for factor in factors)
        return self.pull(squares, torch.ones_like(self.join(squares)))

    def lift_squares(self, factors: Factors, squares: Factors) -> Tensor:
        """An estimate of E[M * M] from the factors' ``E[pull(M) * pull(M)]``."""
        return lift_squares(self.join, self.energies(factors), squares)

    def fit_up(self, factors: Factors, change: Tensor) -> Tensor:
        """The change of ``up`` alone that changes W by this, as nearly as it can; in fp64.

        ``D R^+``, where ``W = up R``: R is the join of the other factors with a unit ``up``. What
        is below ``FAINT`` times the largest direction of R is left out.
        """
        *others, up = map(precise, factors)
        change, size = precise(change), up[0].numel()
        units = torch.eye(size, dtype=up.dtype, device=up.device).reshape(size, *up.shape[1:])
        with suppress(RuntimeError):  # of a user's decomposition, whose rows of up are no outputs
            rows = self.join((*others, units)).flatten(1)
            if torch.allclose(up.flatten(1) @ rows, self.join((*others, up)).flatten(1)):
                return (change.flatten(1) @ torch.linalg.pinv(rows, rtol=FAINT)).reshape(up.shape)
        return nearest_changes(lambda f: self.join((*others, *f)), (up,), change)[0]


def _counted(decomposition: Decomposition, method: str, shape: tuple[int, ...], rank: int) -> int:
    return _count(decomposition, method, shape, rank)


# What torch.compiler.assume_constant_result sets, whose own import loads all of torch.compile.
_counted._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _count(decomposition: Decomposition, method: str, shape: tuple[int, ...], rank: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with _disable_current_modes(), FlopCounterMode(display=False) as counter:  # not in another one
        factors = tuple(torch.empty(s, device="meta") for s in decomposition.shapes(shape, rank))
        if method == "join":
            decomposition.join(factors)
        else:
            decomposition.pull(factors, torch.empty(shape, device="meta"))
    return counter.get_total_flops()
