"""How a weight is applied to an input, and a chain of factors one after another.

Whatever module it comes from, a weight is (out, in / groups, *kernel) here, that of a transposed
convolution included.
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
    """How a kernel slides over its input, an entry for each spatial dimension; none if linear.

    Args:
        stride: as ``nn.Conv2d``'s.
        padding: zeros on both sides; other paddings are done before the kernel slides.
        dilation: as ``nn.Conv2d``'s.
        output_padding: as ``nn.ConvTranspose2d``'s; empty if not transposed.
        groups: as ``nn.Conv2d``'s.
        transposed: whether the convolution is a transposed one.
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
        """This geometry in one spatial dimension, that of a kernel of size 1 in the others.

        A kernel that is a product of one-dimensional ones slides by its geometry exactly if each
        of them slides by the geometry along its own axis.
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
    """(out, in / groups, *kernel) as (in, out / groups, *kernel), and back; a view if it can be.

    This is how transposed convolutions keep a weight.
    """
    grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2)  # (groups, in, out, *kernel)
    return grouped.flatten(0, 1)


def linear_map(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """One stage: ``weight`` (out, in) or (out, in / groups, *kernel) applied to ``x``."""
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
    """The chain: each factor applied to what the one before it gave, the bias last."""
    for factor, geometry in zip(factors[:-1], stages[:-1], strict=True):
        x = linear_map(x, factor, geometry)
    return linear_map(x, factors[-1], stages[-1], bias)


def output_shape(
    shape: Sequence[int], weight_shape: Sequence[int], geometry: Geometry
) -> tuple[int, ...]:
    """The shape of ``linear_map``'s result for an input of ``shape``."""
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
