"""Merged execution of adapters: one multiplication by ``W = base + scale * join(factors)``.

Legend: ``x`` the input, ``dy`` the gradient of the output, N rows, W (n, m), r the rank.

Autograd on ``linear_map(x, base + scale * join(factors))`` would first form ``G = dy' x``, the
gradient of the whole weight (2Nmn FLOPs), and project it onto the factors. The factors' gradients
can also be computed without G, as those of the chain ``x -> factors -> dy`` (4Nr(m + n) for an
SVD). :class:`MergedProduct` does either; it saves the input and, if asked, the merged weight, and
nothing else that grows with the batch. The base is frozen. Its backward pass can be differentiated
again; under ``torch.func`` and in forward mode, autograd's own operations run instead of it.

This works for any decomposition and for convolutions too, where merging in weight space replaces
whole feature maps by one small sum (Cherniuk et al., RunLoRA, arXiv 2312.03415, for linear layers).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynarank.decompositions import Decomposition, Factors, Geometry
from dynarank.decompositions.geometry import linear_map, swap_channels
from dynarank.layers.transforms import is_transformed

__all__ = ["MergedProduct", "Merging", "input_gradient", "merged_product", "weight_gradient"]


@dataclass(frozen=True)
class Merging:
    """The options of a merged product and its backward pass.

    Args:
        decomposition: the decomposition of the factors.
        scale: the adapter's scale.
        geometry: the geometry of the weight.
        stages: the geometries of the factors.
        thin: compute the factors' gradients by the chain (True) or from the whole weight gradient.
        keep: save the merged weight for the backward pass; else it is formed again there.
    """

    decomposition: Decomposition
    scale: float
    geometry: Geometry
    stages: tuple[Geometry, ...]
    thin: bool
    keep: bool

    def weight(self, base: Tensor, factors: Factors) -> Tensor:
        """``base + scale * join(factors)`` in the factors' dtype and in canonical layout."""
        joined = self.decomposition.join(factors)
        if joined.dtype != base.dtype:
            return torch.add(base, joined, alpha=self.scale).to(joined.dtype)
        if joined.requires_grad or is_transformed():
            return joined.mul(self.scale).add(base)  # torch 2.13's inductor loses alpha here
        return joined.mul_(self.scale).add_(base)  # in place: half the memory traffic


def merged_product(
    x: Tensor, base: Tensor, factors: Factors, bias: Tensor | None, how: Merging
) -> Tensor:
    """The merged product ``linear_map(x, base + scale * join(factors)) + bias``.

    Args:
        x: (..., in), (batch, in, *positions) or, for a convolution, (in, *positions).
        base: the frozen weight, (out, in / groups, *kernel), in canonical layout.
        factors: the factors, with the dtype of ``x``; under autocast both are cast.
        bias: (out,) or None.
        how: the options.
    """
    if base.ndim > 2 and x.ndim == base.ndim - 1:
        return merged_product(x.unsqueeze(0), base, factors, bias, how).squeeze(0)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, factors = x.to(dtype), tuple(f.to(dtype) for f in factors)
        bias = None if bias is None else bias.to(dtype)
    if is_transformed():
        return linear_map(x, how.weight(base, factors), how.geometry, bias)
    kept = how.weight(base, tuple(f.detach() for f in factors))
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors))):
        return linear_map(x, kept, how.geometry, bias)  # autograd functions have an overhead
    return MergedProduct.apply(x, kept, base, bias, how, *factors)  # type: ignore[no-any-return]


class MergedProduct(torch.autograd.Function):
    """The autograd function of :func:`merged_product`; ``weight`` is the merged weight."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, base: Tensor, bias: Tensor | None, how: Merging, *factors: Tensor
    ) -> Tensor:
        """One multiplication by the merged weight."""
        y = linear_map(x, weight, how.geometry, bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # no view, so it may be written to in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the input, the parameters and, if asked, the merged weight."""
        x, weight, base, bias, how, *factors = inputs
        ctx.how, ctx.has_bias = how, bias is not None
        kept = weight if how.keep and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, kept, base, *factors)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the input, by the merged weight, and of the factors."""
        (dy,) = grads
        x, weight, base, *parts = ctx.saved_tensors
        how, factors = ctx.how, tuple(parts)
        dx = db = None
        dfactors: tuple[Tensor | None, ...] = (None,) * len(factors)
        if ctx.needs_input_grad[0]:
            if weight is None or torch.is_grad_enabled():  # the one kept knows no factors
                weight = how.weight(base, factors)
            dx = input_gradient(dy, weight, how.geometry, x)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            db = _sum_rows(dy, base.ndim)
        if any(ctx.needs_input_grad[5:]):
            dfactors = _gradients(x, dy, base, factors, how)
        return dx, None, None, db, None, *dfactors


# Torch binds the arguments at each call; a cached signature spares it from inspecting the function.
MergedProduct.forward.__signature__ = inspect.signature(MergedProduct.forward)  # type: ignore[attr-defined]


def _gradients(x: Tensor, dy: Tensor, base: Tensor, factors: Factors, how: Merging) -> Factors:
    if how.thin:
        return _thin(x, dy, factors, how)
    return _projected(x, dy, dy.new_empty(base.shape), factors, how)  # only its shape matters


def _thin(x: Tensor, dy: Tensor, factors: Factors, how: Merging) -> Factors:
    """The factors' gradients by the chain: forward to each factor's input, back from ``dy``."""
    inputs = [x]
    for factor, stage in zip(factors[:-1], how.stages[:-1], strict=True):
        inputs.append(linear_map(inputs[-1], factor, stage))
    gradients: list[Tensor] = []
    for i in reversed(range(len(factors))):
        gradients.append(weight_gradient(inputs[i], dy, how.stages[i], factors[i]).mul_(how.scale))
        if i:
            dy = input_gradient(dy, factors[i], how.stages[i], inputs[i])
    return tuple(reversed(gradients))


def _projected(x: Tensor, dy: Tensor, whole: Tensor, factors: Factors, how: Merging) -> Factors:
    """The factors' gradients ``scale * pull(G)``, with G the gradient of the merged weight."""
    gradient = weight_gradient(x, dy, how.geometry, whole)
    return how.decomposition.pull(factors, gradient.mul_(how.scale))


def input_gradient(dy: Tensor, weight: Tensor, geometry: Geometry, x: Tensor) -> Tensor:
    """The gradient of ``linear_map``'s input, in the shape of ``x``, from that of its output."""
    if weight.ndim == 2:
        return dy @ weight
    return _convolution_backward(dy, x, weight, geometry, (True, False))[0]


def weight_gradient(x: Tensor, dy: Tensor, geometry: Geometry, weight: Tensor) -> Tensor:
    """The gradient of ``linear_map``'s weight, in the shape of ``weight``, from its output's."""
    if weight.ndim == 2:
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if dy.shape[1] > x.shape[1]:  # a wide product takes 10% less time than a tall one
            return (x.T @ dy).T
        return dy.T @ x
    return _convolution_backward(dy, x, weight, geometry, (False, True))[1]


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of input and weight by torch's own kernel."""
    stored = swap_channels(weight, g.groups) if g.transposed else weight
    output_padding: Sequence[int] = g.output_padding or (0,) * (weight.ndim - 2)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, stored, None, g.stride, g.padding, g.dilation, g.transposed, output_padding,
        g.groups, (*wanted, False),
    )  # fmt: skip
    return dx, swap_channels(dw, g.groups) if g.transposed and wanted[1] else dw


def _sum_rows(dy: Tensor, weight_dims: int) -> Tensor:
    """The gradient of the bias: ``dy`` summed over all but the channels."""
    if weight_dims == 2:
        return dy.sum(tuple(range(dy.ndim - 1))) if dy.ndim > 1 else dy
    return dy.sum((0, *range(2, dy.ndim)))
