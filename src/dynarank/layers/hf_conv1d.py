"""The ``Conv1D`` of transformers' GPT-2 and its kin in the three forms: a linear layer that keeps
its weight as (in, out).

Import this only where transformers is imported already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynarank.forms import FullRank
from dynarank.layers.execution import Call
from dynarank.layers.linear import linear_call
from dynarank.layers.ranked import RankedLayer, effective
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedConv1D"]


class RankedConv1D(RankedLayer, Conv1D):
    """A linear layer of GPT-2 in one of the three forms."""

    plain = Conv1D
    weight = effective("weight")  # type: ignore[assignment]
    __repr__ = nn.Module.__repr__

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """One weight, kept as (in, out)."""
        layer = cast(Any, module)
        return (WeightSpec("weight", (layer.nf, layer.nx), swapped=True),)

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """The input times the weight."""
        return {"weight": [linear_call(module, cast(Tensor, inputs["x"]))]}

    def forward(self, x: Tensor) -> Tensor:
        """``x W + bias`` with the effective weight."""
        if isinstance(self.form, FullRank):
            return super().forward(x)
        spec = self.spec()
        return self.multiply(spec, x, spec.geometry, cast(Any, self).bias)
