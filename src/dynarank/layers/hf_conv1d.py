"""The ``Conv1D`` of transformers (GPT-2) in the three forms: a linear layer, W stored (in, out).

Import this module only if transformers is already imported.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynarank.forms import FullRank
from dynarank.layers.chain import factor_modules
from dynarank.layers.ranked import RankedLayer, effective, read_parameters
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedConv1D"]


class RankedConv1D(RankedLayer, Conv1D):
    """A linear layer of GPT-2 in one of the three forms."""

    plain = Conv1D
    weight = effective("weight")  # type: ignore[assignment]
    __repr__ = nn.Module.__repr__

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """One weight, stored as (in, out)."""
        layer = cast(Any, module)
        return (WeightSpec("weight", (layer.nf, layer.nx), swapped=True),)

    def forward(self, x: Tensor) -> Tensor:
        """``x W + bias`` with the effective weight."""
        if isinstance(self.form, FullRank):
            return super().forward(x)
        return self.multiply(self.resolved(), x, cast(Any, self).bias)

    def plain_chain(self) -> nn.Sequential:
        """``Linear -> Linear``."""
        weight, bias = self.resolved(), cast(Any, self).bias
        factors = weight.factors(read_parameters(self))
        return nn.Sequential(*factor_modules(factors, weight.own_stages, bias))
