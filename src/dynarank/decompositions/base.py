"""What a decomposition is, and how a chain of factors is applied. Pure tensor functions.

Legend: ``W`` a weight (out, in, *kernel); n = out, m = in * kernel positions, r the rank.

A decomposition writes W as a chain of smaller weights, each a linear map or a convolution of its
own. It says which shapes they have (``shapes``), how W becomes factors (``split``) and back
(``join``), and how each factor slides when W does (``stages``). Applying the chain, differentiating
it and costing it follow from these and are written once, here, in ``products``, ``transport`` and
``cost``.

Whatever module it comes from, a weight is (out, in, *kernel) here: one of a transposed convolution
too. Groups are the business of :class:`dynarank.decompositions.grouped.Grouped`: a decomposition
sees one group's weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    "pull_back",
    "refactor_joined",
    "swap_channels",
]

Factors: TypeAlias = tuple[Tensor, ...]
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


class UnfitWeightError(ValueError):
    """A weight whose values do not allow the change: not finite, or its decomposition fails."""


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


class Decomposition(Protocol):
    """W (out, in, *kernel) as a chain of factors.

    Law: ``join(split(W, limit(shape))) == W``, and ``apply(x, factors, stages) == layer(x,
    join(factors))``. All but ``split`` and the lifts are differentiable.
    """

    name: str

    def factor_names(self, dims: int) -> tuple[str, ...]:
        """The factors' names for a weight with ``dims`` kernel dimensions, as the input meets them.

        The first is ``down`` and the last ``up``, so that one can tell factors from other weights.
        """
        ...

    def limit(self, shape: Sequence[int]) -> int:
        """The least rank at which every weight of this shape is met exactly; none above it."""
        ...

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """The factors' shapes; each is a weight (out, in / its stage's groups, *kernel)."""
        ...

    def split(self, weight: Tensor, rank: int) -> Factors:
        """Good factors of this rank, balanced; ``weight`` finite, in fp32 or fp64.

        Raises:
            UnfitWeightError: it cannot be decomposed.
        """
        ...

    def refactor(self, factors: Factors, rank: int) -> Factors:
        """``split(join(factors), rank)``, without forming the weight where that can be avoided.

        Raises:
            UnfitWeightError: a factor is not finite, or no method converges.
        """
        ...

    def join(self, factors: Factors) -> Tensor:
        """The weight that the factors stand for."""
        ...

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        """How each factor slides where the weight slides by ``geometry`` (of one group)."""
        ...

    def join_flops(self, shape: Sequence[int], rank: int) -> int:
        """FLOPs of ``join``, exactly as FlopCounterMode counts them."""
        ...

    def pull_flops(self, shape: Sequence[int], rank: int) -> int:
        """FLOPs of ``pull``, likewise."""
        ...

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        """The vjp of ``join``: dL/df from dL/dW."""
        ...

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """The least M whose ``pull`` at ``factors`` is ``cotangents``."""
        ...

    def lift_squares(self, factors: Factors, squares: Factors) -> Tensor:
        """An estimate of E[M * M] from the factors' E[pull(M) * pull(M)]."""
        ...


def pull_back(decomposition: Decomposition, factors: Factors, cotangent: Tensor) -> Factors:
    """``pull`` by automatic differentiation, for a decomposition without a formula of its own."""
    pull = torch.func.vjp(lambda *f: decomposition.join(f), *factors)[1]
    return pull(cotangent)


def refactor_joined(decomposition: Decomposition, factors: Factors, rank: int) -> Factors:
    """``refactor`` through the weight, for a decomposition without a shorter way."""
    return decomposition.split(decomposition.join(factors).detach(), rank)


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


def precise(tensor: Tensor) -> Tensor:
    """The tensor detached and in fp64 (fp32 where the device has no fp64), to compute in."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)
