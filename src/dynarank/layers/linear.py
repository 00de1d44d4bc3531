"""``nn.Linear`` in the three forms."""

from __future__ import annotations

from torch import nn

from dynarank.decompositions import Geometry
from dynarank.layers.ranked import RankedLayer

__all__ = ["RankedLinear"]


class RankedLinear(RankedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer in one of the three forms."""

    plain = nn.Linear

    @property
    def geometry(self) -> Geometry:
        """A linear layer does not slide."""
        return Geometry()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.out_features, self.in_features
