"""``nn.Linear`` in the three forms."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dynarank.forms import FullRank
from dynarank.layers.chain import factor_modules
from dynarank.layers.ranked import RankedLayer, effective, read_parameters
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedLinear", "RankedOutputProjection"]


class RankedLinear(RankedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer in one of the three forms."""

    plain = nn.Linear
    weight = effective("weight")  # type: ignore[assignment]

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """One weight, (out, in)."""
        layer = cast(nn.Linear, module)
        return (WeightSpec("weight", (layer.out_features, layer.in_features)),)

    def forward(self, input: Tensor) -> Tensor:
        """``input W' + bias`` with the effective weight."""
        if isinstance(self.form, FullRank):
            return super().forward(input)
        return self.multiply(self.resolved(), input, self.bias)

    def plain_chain(self) -> nn.Sequential:
        """``Linear -> Linear``."""
        weight = self.resolved()
        factors = weight.factors(read_parameters(self))
        return nn.Sequential(*factor_modules(factors, weight.own_stages, self.bias))


class RankedOutputProjection(RankedLinear):
    """The output projection of ``nn.MultiheadAttention``, which uses its weight itself."""

    plain = NonDynamicallyQuantizableLinear
