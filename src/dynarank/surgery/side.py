"""A weight in one form, and how moments move between the weight and its parameters.

Legend: W the effective weight, G its gradient; f the parameters of a form (W itself, or factors),
J = vjp of ``scale * join`` at f, so that dL/df = J(G); J+ its least-norm right inverse (the
decomposition's ``lift``).

Note [Limit]
J+ divides by the factors as they are now, but a moment is an average over factors as they were.
Where a direction of a factor has become small since (a unit died, a user rescaled it, it began at
zero), the quotient is of no gradient: 0.001 times a direction made the momentum 1,000 times too
large there, and dead units took a loss from 2.1 to 23 in a step. So a lifted M has to be of a
plausible size. Moments c_i of factor i would come from a gradient of W with entries of the root
mean square ``|c_i| / |J_i|`` (Frobenius norms), were it spread evenly; we take the least of these
of all factors with a moment, since the factors that became small are those that exaggerate. The
lifted M was 0.1 to 1.8 times as large in ordinary runs of SVD factors (MLPs, low-rank and adapted,
SGD and AdamW, 1 to 100 steps), up to 12 times for Tucker adapters, whose three factors start far
apart, and 5 to 5,000 times where factors had been spoiled. Above LIMIT, M comes
from conjugate gradients, stopped at that size as in trust-region methods (Steihaug 1983): they
find first what the large directions of the factors tell, which is what can be trusted. A lifted
second moment has the mean LIMIT^2 times such a mean square at most: with more, Adam's steps all
but end. Factors that became small all at once agree with each other. So where that made J+ more
than SHRUNK times what it was when a change made them, their norms at that time are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynarank.decompositions import Decomposition, Factors, precise
from dynarank.decompositions.numerics.multilinear import lift, nearest_changes
from dynarank.forms import Adapted, Form, FullRank
from dynarank.layers import WeightSpec

__all__ = ["SHRUNK", "Side"]

LIMIT = 3.0
SHRUNK = 100.0  # far more than training shrinks the factors of a layer that is alive


class _Whole:
    """A full-rank weight as its own only factor, between its layout and the canonical one."""

    def __init__(self, spec: WeightSpec) -> None:
        self.spec = spec

    def join(self, factors: Factors) -> Tensor:
        return self.spec.to_canonical(factors[0])

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        return (self.spec.from_canonical(cotangent),)

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        return self.spec.to_canonical(cotangents[0])

    lift_squares = lift

    def energies(self, factors: Factors) -> Factors:
        return (torch.ones_like(factors[0]),)


@dataclass(frozen=True)
class Side:
    """A weight in one form, and the maps between moments of W (canonical) and its parameters'."""

    parameters: Factors  # those that train
    scale: float
    _maps: Decomposition | _Whole

    @staticmethod
    def of(
        spec: WeightSpec, form: Form, parameters: Mapping[str, Tensor], began: Sequence[float] = ()
    ) -> Side:
        """The side of these parameters, in their dtype; ``began``: the factors' norms when made."""
        if isinstance(form, FullRank):
            return Side(tuple(parameters.values()), 1.0, _Whole(spec))
        scale = form.scale if isinstance(form, Adapted) else 1.0
        factors = spec.factors(form, parameters)
        return Side(_unshrunk(factors, began), scale, spec.decomposition(form))

    def to(self, dtype: torch.dtype) -> Side:
        """The same, computing in ``dtype``."""
        return replace(self, parameters=tuple(p.to(dtype) for p in self.parameters))

    def pull(self, moment: Tensor) -> Factors:
        """J: a moment of the parameters from one of W."""
        moment = moment if self.scale == 1 else self.scale * moment
        return self._maps.pull(self.parameters, moment)

    def lift(self, moments: Factors) -> Tensor:
        """J+: the least moment of W that pulls to these."""
        lifted = self._maps.lift(self.parameters, moments)
        return lifted if self.scale == 1 else lifted / self.scale

    def toward(self, change: Tensor) -> Factors:
        """The least changes of the parameters that change W by this, as nearly as they can."""
        if isinstance(self._maps, _Whole):
            return self._maps.pull(self.parameters, change)
        return nearest_changes(self._maps.join, self.parameters, change / self.scale)

    def even(self, squares: Factors) -> float:
        """The mean square of W's entries that these of its parameters mean, see Note [Limit].

        Args:
            squares: of the moments of the parameters, or their second moments.
        """
        energies = zip(self._maps.energies(self.parameters), self.parameters, strict=True)
        gains = [float(e.expand_as(p).sum()) for e, p in energies]
        sums = zip(squares, gains, strict=True)
        ratios = [
            float(s.sum()) / gain * (1 + 30 / s.numel() ** 2) if gain > 0 else math.inf
            for s, gain in sums
            if s.any()
        ]  # the sum of a few squares may be small by chance: up to 31 times for a single one
        return min(ratios, default=0.0) / self.scale**2

    def limited(self, lifted: Tensor, moments: Factors, decay: float = 0.0) -> Tensor:
        """The lift of these moments, of a plausible size; see Note [Limit].

        Args:
            lifted: ``self.lift(moments)``, which is returned unless it is too large.
            moments: of the parameters.
            decay: the largest share of a parameter in its moment that may be weight decay; a
                moment no larger than that tells nothing of the gradient's size.
        """
        if isinstance(self._maps, _Whole):
            return lifted  # a moment of W itself
        pairs = zip(moments, self.parameters, strict=True)
        told = [bool(m.norm() > decay * p.norm()) for m, p in pairs]
        told = told if any(told) else [True] * len(told)
        squares = tuple(precise(m).square() * t for m, t in zip(moments, told, strict=True))
        most = LIMIT * math.sqrt(self.even(squares) * lifted.numel())
        if float(lifted.norm()) <= most:
            return lifted
        return lift(self._maps.join, self.parameters, moments, most * abs(self.scale)) / self.scale

    def pull_squares(self, square: Tensor) -> Factors:
        """Variances of the parameters from those of W, its entries independent."""
        squares = tuple(p.square() for p in self.parameters)
        square = square if self.scale == 1 else self.scale**2 * square
        return self._maps.pull(squares, square)

    def lift_squares(self, squares: Factors) -> Tensor:
        """An estimate of W's variances from its parameters', within the limit."""
        if isinstance(self._maps, _Whole):
            return self._maps.lift_squares(self.parameters, squares)
        lifted = self._maps.lift_squares(self.parameters, squares) / self.scale**2
        most, mean = LIMIT**2 * self.even(squares), float(lifted.mean())
        return lifted if mean <= most else lifted * (most / mean)


def _unshrunk(factors: Factors, began: Sequence[float]) -> Factors:
    """Factors as large as they began, if they became so small that J+ exaggerates."""
    norms = [float(factor.norm()) for factor in factors]
    by = [max(1.0, size / now) if now > 0 else 1.0 for size, now in zip(began, norms, strict=False)]
    if not by or math.prod(by) <= SHRUNK * min(by):
        return factors
    return tuple(factor * one for factor, one in zip(factors, by, strict=True))
