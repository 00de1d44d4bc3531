"""The layers that can change form, one plain class each."""

from __future__ import annotations

from torch import nn

from dynarank.layers.conv import RankedConv2d
from dynarank.layers.linear import RankedLinear
from dynarank.layers.ranked import (
    RankedLayer,
    effective_weight,
    own_parameters,
    parameter_names,
)

__all__ = [
    "RANKED",
    "RankedConv2d",
    "RankedLayer",
    "RankedLinear",
    "effective_weight",
    "own_parameters",
    "parameter_names",
]

RANKED: dict[type[nn.Module], type[RankedLayer]] = {
    cls.plain: cls for cls in (RankedLinear, RankedConv2d)
}
