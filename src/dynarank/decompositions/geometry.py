"""Application of a weight, or of a chain of factors, to an input.

Every weight has the shape (out, in / groups, *kernel) here, regardless of its module; this includes
transposed convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Factors", "Geometry", "apply", "linear_map", "output_shape", "swap_channels"]

Factors: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Geometry:
    """The parameters of a convolution; tuples have an entry per spatial dimension, none if linear.

    Args:
        stride: as in ``nn.Conv2d``.
        padding: zeros on both sides; other padding modes are applied before the convolution.
        dilation: as in ``nn.Conv2d``.
        output_padding: as in ``nn.ConvTranspose2d``; empty if not transposed.
        groups: as in ``nn.Conv2d``.
        transposed: whether it is a transposed convolution.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @staticmethod
    def pointwise(dims: int, groups: int = 1) -> Geometry:
        """The geometry of a kernel of size 1 in ``dims`` spatial dimensions."""
        if groups == 1 and dims < len(_POINTWISE):
            return _POINTWISE[dims]
        return Geometry((1,) * dims, (0,) * dims, (1,) * dims, groups=groups)

    def along(self, axis: int) -> Geometry:
        """This geometry along one spatial axis, and that of a kernel of size 1 along the others.

        Convolving with a product of one-dimensional kernels is the same as convolving with each of
        them in turn, each with the geometry along its own axis.
        """

        def only(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(v if i == axis else other for i, v in enumerate(values))

        return replace(
            self,
            stride=only(self.stride, 1),
            padding=only(self.padding, 0),
            dilation=only(self.dilation, 1),
            output_padding=only(self.output_padding, 0),
        )


_POINTWISE = tuple(Geometry((1,) * dims, (0,) * dims, (1,) * dims) for dims in range(4))


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Convert (out, in / groups, *kernel) to (in, out / groups, *kernel) or back.

    The second layout is that of transposed convolutions in torch. The result is a view if possible.
    """
    ins, out, *kernel = weight.shape[0] // groups, *weight.shape[1:]  # vmap knows no unflatten
    grouped = weight.view(groups, ins, out, *kernel).transpose(1, 2)
    return grouped.reshape(groups * out, ins, *kernel)


def linear_map(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """Apply one stage, ``weight`` (out, in) or (out, in / groups, *kernel), to ``x``."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    g, dims = geometry, weight.ndim - 2
    if g.transposed:
        stored = swap_channels(weight, g.groups)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return convolve(
            x, stored, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation
        )
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolve(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def apply(
    x: Tensor, factors: Factors, stages: Sequence[Geometry], bias: Tensor | None = None
) -> Tensor:
    """Apply a chain of factors to ``x``, one after another, and add the bias last."""
    for factor, geometry in zip(factors[:-1], stages[:-1], strict=True):
        x = linear_map(x, factor, geometry)
    return linear_map(x, factors[-1], stages[-1], bias)


def output_shape(
    shape: Sequence[int], weight_shape: Sequence[int], geometry: Geometry
) -> tuple[int, ...]:
    """The output shape of :func:`linear_map` for an input of ``shape``."""
    if len(weight_shape) == 2:
        return (*shape[:-1], weight_shape[0])
    g, kernel, dims = geometry, weight_shape[2:], len(weight_shape) - 2
    spans = [d * (k - 1) for d, k in zip(g.dilation, kernel, strict=True)]
    sizes = list(zip(shape[-dims:], g.padding, spans, g.stride, strict=True))
    if g.transposed:
        extra = zip(sizes, g.output_padding, strict=True)
        spatial = [(s - 1) * stride - 2 * p + span + o + 1 for (s, p, span, stride), o in extra]
    else:
        spatial = [(s + 2 * p - span - 1) // stride + 1 for s, p, span, stride in sizes]
    return (*shape[: -dims - 1], weight_shape[0], *spatial)
