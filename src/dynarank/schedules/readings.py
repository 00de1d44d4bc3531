"""Readings of a run as plain data: schedules use them, recorders store them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

__all__ = ["SpectralReading"]


@dataclass(frozen=True)
class SpectralReading:
    """Rank metrics of one layer's effective weight, with singular values s1 >= s2 >= ...

    Args:
        effective_rank: exp of the entropy of ``s / sum s``.
        stable_rank: ``sum s^2 / s1^2``.
        energy_rank: the smallest number of directions with 99% of ``sum s^2``.
        spectral_ratio: lambda at ``rank``: the share of ``sum s`` in the first ``rank`` values.
        rank: the rank at which lambda is taken: the layer's low rank.
        full_rank: the largest rank the weight could have.
        update_rank: the effective rank of the accumulated update ``W - W_0``; None if the initial
            weight is not kept.
        values: the singular values, largest first, if requested; else empty.
    """

    effective_rank: float
    stable_rank: float
    energy_rank: int
    spectral_ratio: float
    rank: int
    full_rank: int
    update_rank: float | None = None
    values: tuple[float, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether every number is finite; a schedule must ignore a reading that is not."""
        numbers = (getattr(self, f.name) for f in fields(self) if f.name != "values")
        return all(math.isfinite(n) for n in (*numbers, *self.values) if n is not None)
