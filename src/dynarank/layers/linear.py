"""``nn.Linear`` in the three forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dynarank.decompositions import Geometry
from dynarank.forms import FullRank
from dynarank.layers.execution import Call
from dynarank.layers.ranked import RankedLayer, effective, own_parameters
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedLinear", "RankedOutputProjection", "linear_call"]


def linear_call(module: nn.Module, x: Tensor) -> Call:
    """One use of a linear layer's weight."""
    own = own_parameters(module).items()
    trains = any(p is not None and p.requires_grad and name != "bias" for name, p in own)
    return Call(tuple(x.shape), Geometry(), x.requires_grad, trains)


class RankedLinear(RankedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer in one of the three forms."""

    plain = nn.Linear
    weight = effective("weight")  # type: ignore[assignment]

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """One weight, (out, in)."""
        layer = cast(nn.Linear, module)
        return (WeightSpec("weight", (layer.out_features, layer.in_features)),)

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """The input times the weight."""
        return {"weight": [linear_call(module, cast(Tensor, inputs["input"]))]}

    def forward(self, input: Tensor) -> Tensor:
        """``input W' + bias`` with the effective weight."""
        if isinstance(self.form, FullRank):
            return super().forward(input)
        spec = self.spec()
        return self.multiply(spec, input, spec.geometry, self.bias)


class RankedOutputProjection(RankedLinear):
    """The output projection of ``nn.MultiheadAttention``, which reads its weight itself."""

    plain = NonDynamicallyQuantizableLinear
