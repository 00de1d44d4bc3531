"""What was read of a run: plain data, for whoever decides by it or writes it down."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

__all__ = ["SpectralReading"]


@dataclass(frozen=True)
class SpectralReading:
    """Rank health of one layer's effective weight, of singular values s1 >= s2 >= ...

    Args:
        effective_rank: exp of the entropy of ``s / sum s``.
        stable_rank: ``sum s^2 / s1^2``.
        energy_rank: the fewest directions that hold 99% of ``sum s^2``.
        spectral_ratio: lambda at ``rank``: the first ``rank`` values' share of ``sum s``.
        rank: the rank lambda is taken at, the layer's low rank.
        full_rank: the largest rank the weight could have.
        update_rank: the effective rank of what training has added, ``W - W_0``; None where the
            start is not kept.
        values: the singular values, largest first, where they were asked for.
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
        """Whether every figure is finite: no decision may rest on one that is not."""
        numbers = (getattr(self, f.name) for f in fields(self) if f.name != "values")
        return all(math.isfinite(n) for n in (*numbers, *self.values) if n is not None)
