"""The layers that can change form, one plain class each."""

from __future__ import annotations

from torch import nn

from dynarank.layers.attention import RankedMultiheadAttention
from dynarank.layers.conv import (
    RankedConv1d,
    RankedConv2d,
    RankedConv3d,
    RankedConvTranspose1d,
    RankedConvTranspose2d,
    RankedConvTranspose3d,
)
from dynarank.layers.embedding import RankedEmbedding
from dynarank.layers.execution import Call, Execution, Flops, choose_execution, executions
from dynarank.layers.linear import RankedLinear, RankedOutputProjection
from dynarank.layers.ranked import RankedLayer, own_parameters
from dynarank.layers.recurrent.cells import RankedGRUCell, RankedLSTMCell, RankedRNNCell
from dynarank.layers.recurrent.modules import RankedGRU, RankedLSTM, RankedRNN
from dynarank.layers.weight import WeightSpec

__all__ = [
    "Call",
    "Execution",
    "Flops",
    "RankedLayer",
    "WeightSpec",
    "choose_execution",
    "executions",
    "own_parameters",
    "ranked_class",
    "readers",
]

_RANKED: dict[type[nn.Module], type[RankedLayer]] = {
    cls.plain: cls
    for cls in (
        RankedLinear,
        RankedOutputProjection,
        RankedConv1d,
        RankedConv2d,
        RankedConv3d,
        RankedConvTranspose1d,
        RankedConvTranspose2d,
        RankedConvTranspose3d,
        RankedEmbedding,
        RankedMultiheadAttention,
        RankedLSTM,
        RankedGRU,
        RankedRNN,
        RankedLSTMCell,
        RankedGRUCell,
        RankedRNNCell,
    )
}


def ranked_class(kind: type[nn.Module]) -> type[RankedLayer] | None:
    """The ranked class of modules of exactly this class, None if they cannot change form."""
    if issubclass(kind, RankedLayer):
        return kind
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        from dynarank.layers.hf_conv1d import RankedConv1D  # transformers is imported already

        return RankedConv1D
    return _RANKED.get(kind)


def readers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The parent of each module whose weight the parent reads itself (``fused_children``)."""
    kinds = [(module, ranked_class(type(module))) for module in model.modules()]
    return {child: m for m, kind in kinds if kind is not None for child in kind.fused_children(m)}
