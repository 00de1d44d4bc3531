"""The merged adapter: one multiplication by ``W = base + scale * join(factors)``, base frozen.

Legend: ``x`` the input, ``dy`` the gradient of the output, N rows, W (n, m), r the rank.

Autograd on ``linear_map(x, base + scale * join(factors))`` first forms ``G = dy' x``, the gradient
of the whole weight (2Nmn FLOPs), and projects it on the factors. The factors' gradients can also be
computed without G: they are those of the chain ``x -> factors -> dy`` (4Nr(m + n) for an SVD).
:class:`MergedProduct` does either; it saves the input and, if asked, the merged weight, and nothing
else that grows with the batch.

The same for any decomposition, and for convolutions, where merging in weight space replaces whole
feature maps by one small sum (Cherniuk et al., RunLoRA, arXiv 2312.03415, for linear layers).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynarank.decompositions import Decomposition, Factors, Geometry
from dynarank.decompositions.geometry import linear_map, swap_channels

__all__ = ["MergedProduct", "Merging", "input_gradient", "merged_product", "weight_gradient"]


@dataclass(frozen=True)
class Merging:
    """How a merged product is computed and differentiated.

    Args:
        decomposition: of the factors.
        scale: of the adapter.
        geometry: how the weight slides.
        stages: how the factors slide.
        thin: gradients of the factors by the chain (True) or from the whole gradient.
        keep: keep the merged weight for the backward pass; else it is formed again there.
    """

    decomposition: Decomposition
    scale: float
    geometry: Geometry
    stages: tuple[Geometry, ...]
    thin: bool
    keep: bool

    def weight(self, base: Tensor, factors: Factors) -> Tensor:
        """``base + scale * join(factors)`` in the factors' dtype, canonical."""
        joined = self.decomposition.join(factors)
        if joined.dtype == base.dtype:
            return joined.mul_(self.scale).add_(base)  # in place: half the memory traffic
        return torch.add(base, joined, alpha=self.scale).to(joined.dtype)


def merged_product(
    x: Tensor, base: Tensor, factors: Factors, bias: Tensor | None, how: Merging
) -> Tensor:
    """``linear_map(x, base + scale * join(factors)) + bias``; base gets no gradient.

    Args:
        x: (..., in), (batch, in, *positions) or, of a convolution, (in, *positions).
        base: (out, in / groups, *kernel), canonical.
        factors: in one dtype with ``x``, but for autocast, which casts both to its own.
        bias: (out,) or None.
        how: how it is computed.

    Not differentiable twice: use two branches for that.
    """
    if base.ndim > 2 and x.ndim == base.ndim - 1:
        return merged_product(x.unsqueeze(0), base, factors, bias, how).squeeze(0)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, factors = x.to(dtype), tuple(f.to(dtype) for f in factors)
        bias = None if bias is None else bias.to(dtype)
    kept = how.weight(base.detach(), tuple(f.detach() for f in factors))
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors))):
        return linear_map(x, kept, how.geometry, bias)  # an autograd function costs time to enter
    return MergedProduct.apply(x, kept, base.detach(), bias, how, *factors)  # type: ignore[no-any-return]


class MergedProduct(torch.autograd.Function):
    """See the module; ``weight`` is the merged weight, ``base`` what it is made from."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, base: Tensor, bias: Tensor | None, how: Merging, *factors: Tensor
    ) -> Tensor:
        """One multiplication by the merged weight."""
        return linear_map(x, weight, how.geometry, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the input, the parameters and, if asked, the merged weight."""
        x, weight, base, bias, how, *factors = inputs
        ctx.how, ctx.has_bias = how, bias is not None
        kept = weight if how.keep and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, kept, base, *factors)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The input's gradient by the merged weight, the factors' as ``how`` says."""
        (dy,) = grads
        x, weight, base, *parts = ctx.saved_tensors
        how, factors = ctx.how, tuple(parts)
        dx = db = None
        dfactors: tuple[Tensor | None, ...] = (None,) * len(factors)
        if ctx.needs_input_grad[0]:
            weight = how.weight(base, factors) if weight is None else weight
            dx = input_gradient(dy, weight, how.geometry, x)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            db = _sum_rows(dy, base.ndim)
        if any(ctx.needs_input_grad[5:]):
            dfactors = _gradients(x, dy, base, factors, how)
        return dx, None, None, db, None, *dfactors


# Torch binds the arguments at each call; kept here, it need not read them from the code each time.
MergedProduct.forward.__signature__ = inspect.signature(MergedProduct.forward)  # type: ignore[attr-defined]


def _gradients(x: Tensor, dy: Tensor, base: Tensor, factors: Factors, how: Merging) -> Factors:
    if how.thin:
        return _thin(x, dy, factors, how)
    return _projected(x, dy, dy.new_empty(base.shape), factors, how)  # only its shape matters


def _thin(x: Tensor, dy: Tensor, factors: Factors, how: Merging) -> Factors:
    """Gradients of the chain's factors: forward to each factor's input, then back from ``dy``."""
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
    """``scale * pull(G)`` with G the gradient of the merged weight."""
    gradient = weight_gradient(x, dy, how.geometry, whole)
    return how.decomposition.pull(factors, gradient.mul_(how.scale))


def input_gradient(dy: Tensor, weight: Tensor, geometry: Geometry, x: Tensor) -> Tensor:
    """The gradient of ``linear_map``'s input (of ``x``'s shape) from that of its output."""
    if weight.ndim == 2:
        return dy @ weight
    return _convolution_backward(dy, x, weight, geometry, (True, False))[0]


def weight_gradient(x: Tensor, dy: Tensor, geometry: Geometry, weight: Tensor) -> Tensor:
    """The gradient of ``linear_map``'s weight (of ``weight``'s shape) from that of its output."""
    if weight.ndim == 2:
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if dy.shape[1] > x.shape[1]:  # a wide product takes a tenth less than a tall one
            return (x.T @ dy).T
        return dy.T @ x
    return _convolution_backward(dy, x, weight, geometry, (False, True))[1]


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, g: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Torch's own kernel for either gradient."""
    stored = swap_channels(weight, g.groups) if g.transposed else weight
    output_padding: Sequence[int] = g.output_padding or (0,) * (weight.ndim - 2)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, stored, None, g.stride, g.padding, g.dilation, g.transposed, output_padding,
        g.groups, (*wanted, False),
    )  # fmt: skip
    return dx, swap_channels(dw, g.groups) if g.transposed and wanted[1] else dw


def _sum_rows(dy: Tensor, weight_dims: int) -> Tensor:
    """The gradient of the bias: summed over all but the channels."""
    if weight_dims == 2:
        return dy.sum(tuple(range(dy.ndim - 1))) if dy.ndim > 1 else dy
    return dy.sum((0, *range(2, dy.ndim)))
