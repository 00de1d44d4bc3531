"""What a decomposition is, and how a chain of factors is applied. Pure tensor functions.

Legend: ``W`` a weight (out, in, *kernel); n = out, m = in * kernel positions, r the rank.

A decomposition writes W as a chain of smaller weights, each a linear map or a convolution of its
own. It says which shapes they have (``shapes``), how W becomes factors (``split``) and back
(``join``), and how each factor slides when W does (``stages``). Applying the chain, differentiating
it and costing it follow from these and are written once, here and in ``transport`` and ``cost``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Decomposition",
    "Factors",
    "Geometry",
    "LinAlgError",
    "UnfitWeightError",
    "apply",
    "linear_map",
    "output_shape",
    "precise",
]

Factors: TypeAlias = tuple[Tensor, ...]
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


class UnfitWeightError(ValueError):
    """A weight whose values do not allow the change: not finite, or its decomposition fails."""


@dataclass(frozen=True)
class Geometry:
    """How a kernel slides over its input, an entry for each spatial dimension; none if linear."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()

    @staticmethod
    def pointwise(dims: int) -> Geometry:
        """The geometry of a kernel of size 1."""
        return Geometry((1,) * dims, (0,) * dims, (1,) * dims)


class Decomposition(Protocol):
    """W (out, in, *kernel) as a chain of factors.

    Law: ``join(split(W, limit)) == W``, and ``apply(x, factors) == layer(x, join(factors))``.
    """

    name: str
    factor_names: tuple[str, ...]

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """The factors' shapes, in the order the input meets them."""
        ...

    def split(self, weight: Tensor, rank: int) -> Factors:
        """The best factors of this rank, balanced; ``weight`` finite, in fp32 or fp64."""
        ...

    def join(self, factors: Factors) -> Tensor:
        """The weight that the factors stand for."""
        ...

    def stages(self, geometry: Geometry) -> tuple[Geometry, ...]:
        """How each factor slides where the weight slides by ``geometry``."""
        ...

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """The least M whose vjp through ``join`` at ``factors`` is ``cotangents``."""
        ...

    def lift_squares(self, factors: Factors, squares: Factors) -> Tensor:
        """An estimate of E[M * M] from the factors' E[vjp(M) * vjp(M)]."""
        ...


def linear_map(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """One stage: ``weight`` (out, in) or (out, in, *kernel) applied to ``x``."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return convolve(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)


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
    dims = len(weight_shape) - 2
    kernel = weight_shape[2:]
    spans = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
    padding = geometry.padding
    if isinstance(padding, str):
        total = spans if padding == "same" else [0] * dims
    else:
        total = [2 * p for p in padding]
    sizes = zip(shape[-dims:], total, spans, geometry.stride, strict=True)
    spatial = tuple((size + pad - span - 1) // stride + 1 for size, pad, span, stride in sizes)
    return (*shape[: -dims - 1], weight_shape[0], *spatial)


def precise(tensor: Tensor) -> Tensor:
    """The tensor detached and in fp64 (fp32 where the device has no fp64), to compute in."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)
