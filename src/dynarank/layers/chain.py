"""Plain modules that apply the factors of a layer: ``Linear -> Linear``, ``Conv -> Conv``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import Factors, Geometry
from dynarank.decompositions.geometry import swap_channels

__all__ = ["factor_modules", "parameter_like"]


def factor_modules(
    factors: Factors,
    stages: Sequence[Geometry],
    bias: Parameter | None,
    padding_mode: str = "zeros",
) -> list[nn.Module]:
    """A module for each factor, from input to output; the last one adds the bias.

    A factor that is a Parameter, and laid out as the module stores it, stays this object: what is
    tied stays tied.

    Args:
        factors: each a weight (out, in / groups, *kernel).
        stages: how each slides, from ``Decomposition.stages``.
        bias: (out,) or None.
        padding_mode: how the first one pads.

    Example:
        >>> down, up = torch.randn(2, 8), torch.randn(4, 2)
        >>> [str(one) for one in factor_modules((down, up), [Geometry()] * 2, None)]
        ['Linear(in_features=8, out_features=2, bias=False)', \
'Linear(in_features=2, out_features=4, bias=False)']
    """
    last = len(factors) - 1
    return [
        _module(factor, stage, bias if i == last else None, "zeros" if i else padding_mode)
        for i, (factor, stage) in enumerate(zip(factors, stages, strict=True))
    ]


def _module(
    factor: Tensor, stage: Geometry, bias: Parameter | None, padding_mode: str
) -> nn.Module:
    options: dict[str, Any] = {"bias": bias is not None, "device": "meta"}  # nothing is drawn
    if factor.ndim == 2:
        module = nn.Linear(factor.shape[1], factor.shape[0], **options)
    else:
        module = _convolution(factor, stage, {**options, "padding_mode": padding_mode})
        factor = swap_channels(factor, stage.groups) if stage.transposed else factor
    module.weight = parameter_like(factor)
    if bias is not None:
        module.bias = bias
    return module


def _convolution(factor: Tensor, g: Geometry, options: dict[str, Any]) -> Any:
    out, ins, *kernel = factor.shape
    if g.transposed:
        options = {**options, "output_padding": g.output_padding}
    kind = getattr(nn, f"Conv{'Transpose' * g.transposed}{len(kernel)}d")
    return kind(
        ins * g.groups,
        out,
        tuple(kernel),
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=g.groups,
        **options,
    )


def parameter_like(value: Tensor) -> Parameter:
    """The value as a parameter that trains if it does; a Parameter is returned itself."""
    if isinstance(value, Parameter):
        return value
    whole = value.detach().clone(memory_format=torch.contiguous_format)  # for safetensors
    return Parameter(whole, value.requires_grad)
