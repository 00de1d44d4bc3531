"""The CP decomposition: a weight as a sum of r rank-one tensors.

As a chain: a 1x1 convolution into r channels, a depthwise kernel per axis, a 1x1 convolution.

Legend: W (out, in, k_1, ..., k_d) the weight, N = 2 + d its modes; a component is one of the r
rank-one terms, its size the product of its vectors' norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynarank.decompositions.base import Decomposition
from dynarank.decompositions.geometry import Factors, Geometry
from dynarank.decompositions.numerics.als import fit
from dynarank.decompositions.numerics.linalg import as_unfit
from dynarank.decompositions.numerics.multilinear import unit_scale
from dynarank.decompositions.separable import AXES
from dynarank.decompositions.svd import SVD

__all__ = ["CP"]

# An fp32 weight of more entries than this is fitted in fp32, in half the time (640 x 640 x 3 x 3,
# one EPYC core, 2026-11). The residual of such a weight is far above fp32 rounding; the Gram
# matrices and the error are in fp64 anyway.
MANY = 2**20


class CP(Decomposition):
    """The CP decomposition, a weight as a sum of r rank-one tensors.

    ``W[o, i, k] = sum_c up[o, c] width[c, k_d] ... height[c, k_1] down[c, i]``, with the factors
    ``down`` (r, in, 1, ...), a depthwise kernel (r, 1, ..., k_j, ...) for each axis, applied with
    the stride and padding of that axis, and ``up`` (out, r, 1, ...). A Linear's weight is split by
    the SVD. The CP of the published code of Shin et al. (arXiv 2508.08625) is ``separable`` here.

    Source: Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition", arXiv 1412.6553, 2015.

    Example:
        >>> cp = dr.decompositions.get_decomposition("cp")
        >>> cp.shapes((64, 32, 3, 3), 48)
        ((48, 32, 1, 1), (48, 1, 3, 1), (48, 1, 1, 3), (64, 48, 1, 1))
        >>> weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
        >>> torch.allclose(cp.join(cp.split(weight, 54)), weight)
        True
    """

    name = "cp"

    def __init__(self) -> None:
        self._pair = SVD()  # for the weight of a Linear

    def factor_names(self, dims: int) -> tuple[str, ...]:
        """``down``, the spatial axes in order, ``up``."""
        return "down", *AXES[dims], "up"

    def limit(self, shape: Sequence[int]) -> int:
        """The number of entries over the largest dimension: a component for each fiber along it."""
        return math.prod(shape) // max(shape)

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """``down`` (r, in, 1...), (r, 1, ..., k_j, ...) for each axis, ``up`` (out, r, 1...)."""
        ones = (1,) * (len(shape) - 2)
        kernels = [(*ones[:j], size, *ones[j + 1 :]) for j, size in enumerate(shape[2:])]
        between = [(rank, 1, *kernel) for kernel in kernels]
        return (rank, shape[1], *ones), *between, (shape[0], rank, *ones)

    def split(self, weight: Tensor, rank: int) -> Factors:
        """Fit the components by alternating least squares; the vectors of each have equal norms.

        At the limit the components are the singular triplets of W's slices, and the sum is exact;
        below it the sweeps start from these. A weight of at most 2^16 entries has six additional
        random starts and one from HOSVD; after 15 sweeps only the best three continue (all, up to
        2^12 entries). Sweeps end when one lowers the squared error by less than a relative 1e-5, or
        after 200.

        A best rank-r approximation need not exist: components can grow without bound while they
        cancel. A sweep that is not finite, does not lower the error or has a component of more than
        1e3 times W's norm is undone; if this happens to the next one too, the best result so far is
        returned. A component of size (almost) zero has a single zero vector, so that it can still
        learn.

        The result is deterministic, and the global random state is not touched.

        Raises:
            UnfitWeightError: ``weight`` is not finite, or an eigenvalue problem fails, so that
                there is no finite start.
        """
        if weight.ndim == 2:
            return self._pair.split(weight, rank)
        unit, scale = unit_scale(weight)
        fine = weight.dtype == torch.float64
        if not fine and weight.numel() > MANY:
            unit = unit.float()
        with as_unfit(f"the CP decomposition of a weight of shape {tuple(weight.shape)} failed"):
            up, down, *kernels = _even_sizes(fit(unit, rank, fine), scale)
        factors = [down.T, *(kernel.T for kernel in kernels), up]
        shapes = self.shapes(weight.shape, rank)
        return tuple(f.double().reshape(s) for f, s in zip(factors, shapes, strict=True))

    def refactor(self, factors: Factors, rank: int) -> Factors:
        """Refactor through the weight; for a larger rank, append components of size zero."""
        if len(factors) > 2 and rank > factors[0].shape[0]:
            return _extended(factors, rank)
        return super().refactor(factors, rank)

    def join(self, factors: Factors) -> Tensor:
        """``up`` times the elementwise products of ``down`` and the kernels."""
        down, *kernels, up = factors
        products = down
        for kernel in kernels:
            products = products * kernel  # (r, in, ..., k_j, ...)
        return (up.flatten(1) @ products.flatten(1)).reshape(up.shape[0], *products.shape[1:])

    def join_flops(self, shape: Sequence[int], rank: int) -> int:
        """FLOPs of the product with ``up``; the others are elementwise and not counted."""
        return 2 * math.prod(shape) * rank

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        """Depthwise convolutions along each axis, between pointwise ones."""
        dims = len(geometry.stride)
        pointwise = Geometry.pointwise(dims)
        depthwise = [replace(geometry.along(axis), groups=rank) for axis in range(dims)]
        return pointwise, *depthwise, pointwise

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        """The vjp of ``join``, by automatic differentiation; for a Linear in closed form."""
        return (self._pair if len(factors) == 2 else super()).pull(factors, cotangent)

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """The least-norm lift, by conjugate gradients; for a Linear in closed form."""
        return (self._pair if len(factors) == 2 else super()).lift(factors, cotangents)


def _extended(factors: Factors, rank: int) -> Factors:
    """The components with new ones appended: random vectors of the mean norm, and zero in ``up``.

    This keeps the weight exactly; a new fit by least squares would only come within its tolerance.
    """
    *inner, up = (factor.detach() for factor in factors)
    present = up.shape[1]
    generator = torch.Generator("cpu").manual_seed(present)
    extended: list[Tensor] = []
    for factor in inner:
        shape = (rank - present, *factor.shape[1:])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        drawn = drawn.to(factor)
        size = factor.flatten(1).norm(dim=1).mean()
        drawn *= torch.where(size > 0, size, 1.0) / drawn.flatten(1).norm(dim=1).mean()
        extended.append(torch.cat([factor, drawn]))
    zeros = up.new_zeros(up.shape[0], rank - present, *up.shape[2:])
    return *extended, torch.cat([up, zeros], 1)


def _even_sizes(factors: Factors, scale: float) -> Factors:
    """Rescale the vectors of each component to equal norms, and the weight by ``scale``.

    In a component of size zero (up to rounding) the smallest vector keeps the remaining size, and
    the others get the norm of the vectors of the smallest nonzero component.
    """
    norms = torch.stack([factor.norm(dim=0) for factor in factors])  # (N, r)
    sizes = norms.prod(0)
    live = sizes > torch.finfo(norms.dtype).eps * sizes.max()
    modes = len(factors)
    evened = sizes ** (1 / modes)
    floor = evened[live].min() if live.any() else torch.ones_like(sizes[0])
    wanted = torch.where(live, evened, floor).expand(modes, -1).clone()
    least = torch.where(live, sizes / evened ** (modes - 1), sizes / floor ** (modes - 1))
    wanted.scatter_(0, norms.argmin(0, keepdim=True), least[None])
    scales = torch.where(norms > 0, wanted / norms, 0.0) * scale ** (1 / modes)
    return tuple(factor * each for factor, each in zip(factors, scales, strict=True))
