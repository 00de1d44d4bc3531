"""Decomposition of grouped weights, each group on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynarank.decompositions.base import Decomposition
from dynarank.decompositions.geometry import Factors, Geometry

__all__ = ["Grouped"]


class Grouped(Decomposition):
    """A decomposition applied to each group of a grouped weight; the rank is that of each group.

    A weight (out, in / groups, *kernel) consists of ``groups`` weights
    (out / groups, in / groups, *kernel), stacked along the first dimension. The factors are stacked
    in the same way, and so form a chain of grouped convolutions.

    Args:
        inner: the decomposition of one group.
        groups: the number of groups.
    """

    def __init__(self, inner: Decomposition, groups: int) -> None:
        self.name, self.inner, self.groups = inner.name, inner, groups
        self.is_pair = inner.is_pair
        self.truncates_optimally = inner.truncates_optimally

    def factor_names(self, dims: int) -> tuple[str, ...]:
        """The names of one group's factors."""
        return self.inner.factor_names(dims)

    def limit(self, shape: Sequence[int]) -> int:
        """The largest rank of one group."""
        return self.inner.limit(self._unit(shape))

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """The factor shapes of one group, ``groups`` times along the first dimension."""
        shapes = self.inner.shapes(self._unit(shape), rank)
        return tuple((first * self.groups, *rest) for first, *rest in shapes)

    def split(self, weight: Tensor, rank: int) -> Factors:
        """The factors of each group, stacked."""
        return self._stack([self.inner.split(w, rank) for w in weight.chunk(self.groups)])

    def refactor(self, factors: Factors, rank: int) -> Factors:
        """Computed for each group and stacked."""
        return self._stack([self.inner.refactor(f, rank) for f in self._groups_of(factors)])

    def balanced(self, factors: Factors) -> Factors:
        """Computed for each group and stacked."""
        return self._stack([self.inner.balanced(f) for f in self._groups_of(factors)])

    def join(self, factors: Factors) -> Tensor:
        """The weight of each group, stacked."""
        return torch.cat([self.inner.join(f) for f in self._groups_of(factors)])

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        """The stages of one group, with ``groups`` times as many groups."""
        stages = self.inner.stages(replace(geometry, groups=1), rank)
        return tuple(replace(stage, groups=stage.groups * self.groups) for stage in stages)

    def join_flops(self, shape: Sequence[int], rank: int) -> int:
        """``groups`` times the FLOPs of one group."""
        return self.groups * self.inner.join_flops(self._unit(shape), rank)

    def pull_flops(self, shape: Sequence[int], rank: int) -> int:
        """``groups`` times the FLOPs of one group."""
        return self.groups * self.inner.pull_flops(self._unit(shape), rank)

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        """Computed for each group and stacked."""
        pairs = zip(self._groups_of(factors), cotangent.chunk(self.groups), strict=True)
        return self._stack([self.inner.pull(f, c) for f, c in pairs])

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """Computed for each group and stacked."""
        pairs = zip(self._groups_of(factors), self._groups_of(cotangents), strict=True)
        return torch.cat([self.inner.lift(f, c) for f, c in pairs])

    def energies(self, factors: Factors) -> Factors:
        """Computed for each group and stacked."""
        return self._stack([self.inner.energies(f) for f in self._groups_of(factors)])

    def lift_squares(self, factors: Factors, squares: Factors) -> Tensor:
        """Computed for each group and stacked."""
        pairs = zip(self._groups_of(factors), self._groups_of(squares), strict=True)
        return torch.cat([self.inner.lift_squares(f, s) for f, s in pairs])

    def fit_up(self, factors: Factors, change: Tensor) -> Tensor:
        """Computed for each group and stacked."""
        pairs = zip(self._groups_of(factors), change.chunk(self.groups), strict=True)
        return torch.cat([self.inner.fit_up(f, c) for f, c in pairs])

    def _unit(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0] // self.groups, *shape[1:])

    def _groups_of(self, factors: Factors) -> list[Factors]:
        chunks = [factor.chunk(self.groups) for factor in factors]
        return list(zip(*chunks, strict=True))

    def _stack(self, groups: list[Factors]) -> Factors:
        return tuple(torch.cat(parts) for parts in zip(*groups, strict=True))
