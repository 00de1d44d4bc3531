"""Convolutions in the three forms: any stride, padding, dilation, padding mode and groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.decompositions import Geometry
from dynarank.forms import FullRank
from dynarank.layers.chain import factor_modules
from dynarank.layers.execution import Call
from dynarank.layers.ranked import RankedLayer, effective, one_call, read_parameters
from dynarank.layers.weight import WeightSpec

__all__ = [
    "RankedConv1d",
    "RankedConv2d",
    "RankedConv3d",
    "RankedConvTranspose1d",
    "RankedConvTranspose2d",
    "RankedConvTranspose3d",
]


class _RankedConv(RankedLayer):
    """The base class of ranked convolutions."""

    weight = effective("weight")

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """One weight, (out, in / groups, *kernel)."""
        conv = cast(Any, module)
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        return (WeightSpec("weight", shape, _geometry(conv), swapped=conv.transposed),)

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """One multiplication of the padded input by the kernel."""
        return {"weight": [one_call(module, *cls.padded(module, inputs))]}

    @classmethod
    def padded(cls, module: nn.Module, inputs: Mapping[str, object]) -> tuple[Tensor, Geometry]:
        """The input, padded unless the kernel pads it with zeros itself, and the geometry."""
        conv, x = cast(Any, module), cast(Tensor, inputs["input"])
        geometry = _geometry(conv)
        if _pads_itself(conv):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
            geometry = replace(geometry, padding=(0,) * len(geometry.stride))
        return x, geometry

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the effective weight."""
        if isinstance(self.form, FullRank):
            return cast(Tensor, self.plain.forward(self, input))
        x, geometry = type(self).padded(self, {"input": input})
        return self.multiply(self.resolved(), x, cast(Any, self).bias, geometry)

    def plain_chain(self) -> nn.Sequential:
        """``Conv -> Conv``; a padding mode, or uneven padding, comes first."""
        conv, weight = cast(Any, self), self.resolved()
        factors = weight.factors(read_parameters(self))
        if not _pads_itself(conv):
            return nn.Sequential(*factor_modules(factors, weight.own_stages, conv.bias))
        geometry = replace(weight.spec.geometry, padding=(0,) * len(conv.kernel_size))
        stages, sides = weight.stages(geometry), conv._reversed_padding_repeated_twice
        if sides[::2] != sides[1::2]:
            modules = factor_modules(factors, stages, conv.bias)
            return nn.Sequential(_padding(conv.padding_mode, sides), *modules)
        stages = (replace(stages[0], padding=tuple(sides[::-2])), *stages[1:])
        return nn.Sequential(*factor_modules(factors, stages, conv.bias, conv.padding_mode))


class _RankedTransposed(_RankedConv):
    """The base class of ranked transposed convolutions."""

    @classmethod
    def padded(cls, module: nn.Module, inputs: Mapping[str, object]) -> tuple[Tensor, Geometry]:
        """The input, and the geometry that gives the requested output size."""
        conv, x = cast(Any, module), cast(Tensor, inputs["input"])
        g = _geometry(conv)
        size = inputs.get("output_size")
        extra = conv._output_padding(
            x, size, list(g.stride), list(g.padding), conv.kernel_size, len(g.stride), g.dilation
        )
        return x, replace(g, output_padding=tuple(extra))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution with the effective weight."""
        if isinstance(self.form, FullRank):
            return cast(Tensor, self.plain.forward(self, input, output_size))
        x, geometry = type(self).padded(self, {"input": input, "output_size": output_size})
        return self.multiply(self.resolved(), x, cast(Any, self).bias, geometry)


class RankedConv1d(_RankedConv, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A one-dimensional convolution in one of the three forms."""

    plain = nn.Conv1d


class RankedConv2d(_RankedConv, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A two-dimensional convolution in one of the three forms."""

    plain = nn.Conv2d


class RankedConv3d(_RankedConv, nn.Conv3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A three-dimensional convolution in one of the three forms."""

    plain = nn.Conv3d


class RankedConvTranspose1d(_RankedTransposed, nn.ConvTranspose1d):  # pyright: ignore
    """A one-dimensional transposed convolution in one of the three forms."""

    plain = nn.ConvTranspose1d


class RankedConvTranspose2d(_RankedTransposed, nn.ConvTranspose2d):  # pyright: ignore
    """A two-dimensional transposed convolution in one of the three forms."""

    plain = nn.ConvTranspose2d


class RankedConvTranspose3d(_RankedTransposed, nn.ConvTranspose3d):  # pyright: ignore
    """A three-dimensional transposed convolution in one of the three forms."""

    plain = nn.ConvTranspose3d


def _pads_itself(conv: Any) -> bool:
    """Whether it pads its input before the kernel slides over it: by a mode, or unevenly."""
    sides = conv._reversed_padding_repeated_twice
    return conv.padding_mode != "zeros" or (conv.padding == "same" and sides[::2] != sides[1::2])


def _padding(mode: str, sides: list[int]) -> nn.Module:
    """A module that pads; ``sides`` as of ``F.pad``."""
    names = {"zeros": "Zero", "circular": "Circular", "reflect": "Reflection"}
    kind = f"{names.get(mode, 'Replication')}Pad{len(sides) // 2}d"
    return cast(nn.Module, getattr(nn, kind)(tuple(sides)))


def _geometry(conv: Any) -> Geometry:
    """The convolution's geometry, without asymmetric padding: that is done beforehand."""
    dims = len(conv.kernel_size)
    padding = conv.padding
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        padding = tuple(s // 2 for s in spans) if padding == "same" else (0,) * dims
    extra = tuple(conv.output_padding) if conv.transposed else ()
    stride, padding, dilation = map(tuple, (conv.stride, padding, conv.dilation))
    return Geometry(stride, padding, dilation, extra, conv.groups, conv.transposed)
