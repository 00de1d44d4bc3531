"""CP: W a sum of r products of vectors, 1x1 into r channels, a depthwise kernel an axis, 1x1 out.

Legend: W (out, in, k_1, ..., k_d) the weight, N = 2 + d its modes; a component is one of the r
products, its size the product of its vectors' norms.
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
from dynarank.decompositions.numerics.linalg import LinAlgError, UnfitWeightError
from dynarank.decompositions.numerics.multilinear import unit_scale
from dynarank.decompositions.separable import AXES
from dynarank.decompositions.svd import SVD

__all__ = ["CP"]

# An fp32 weight of more entries than this is fitted in fp32, in half the time (640 x 640 x 3 x 3,
# one EPYC core, 2026-11). What is left of such a weight is far above fp32's rounding; the Gram
# matrices and the error are in fp64 all the same.
MANY = 2**20


class CP(Decomposition):
    """``W[o, i, k] = sum_c up[o, c] width[c, k_d] ... height[c, k_1] down[c, i]``.

    ``down`` (r, in, 1, ...), for each axis a depthwise kernel (r, 1, ..., k_j, ...) that slides by
    the geometry along it, ``up`` (out, r, 1, ...): Lebedev et al. (arXiv 1412.6553, 2015). What the
    published code of Shin et al. (arXiv 2508.08625) calls CP is ``separable`` here. A Linear's
    weight is split by the SVD.

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
        self._pair = SVD()  # what it is for a Linear

    def factor_names(self, dims: int) -> tuple[str, ...]:
        """``down``, the spatial axes from the first to the last, ``up``."""
        return "down", *AXES[dims], "up"

    def limit(self, shape: Sequence[int]) -> int:
        """Entries over the largest dimension: a component for each fiber along that."""
        return math.prod(shape) // max(shape)

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """``down`` (r, in, 1...), (r, 1, ..., k_j, ...) for each axis, ``up`` (out, r, 1...)."""
        ones = (1,) * (len(shape) - 2)
        kernels = [(*ones[:j], size, *ones[j + 1 :]) for j, size in enumerate(shape[2:])]
        between = [(rank, 1, *kernel) for kernel in kernels]
        return (rank, shape[1], *ones), *between, (shape[0], rank, *ones)

    def split(self, weight: Tensor, rank: int) -> Factors:
        """Components by alternating least squares, their vectors of one norm each.

        At the limit the components are singular triplets of W's slices and the sum is exact; below
        it they are where the sweeps start. A weight of at most 2^16 entries has six random starts
        more and one from HOSVD; after 15 sweeps the best three go on (all, up to 2^12 entries).
        Sweeps end when one lowers the squared error by less than 1e-5 of it, or after 200.

        The best rank-r sum need not exist: components can grow without bound while they cancel. A
        sweep that is not finite, does not lower the error or has a component of more than 1e3 times
        W's norm is undone; if the next one is too, the best one before is the result. Of a
        component of size (almost) zero one vector is, and can still learn.

        Always the same result for the same weight; the global random state is not touched.

        Raises:
            UnfitWeightError: ``weight`` is not finite, or an eigenvalue problem fails: there is no
                finite sum to begin with.
        """
        if weight.ndim == 2:
            return self._pair.split(weight, rank)
        unit, scale = unit_scale(weight)
        fine = weight.dtype == torch.float64
        if not fine and weight.numel() > MANY:
            unit = unit.float()
        try:
            up, down, *kernels = _even_sizes(fit(unit, rank, fine), scale)
        except LinAlgError as error:
            raise UnfitWeightError(
                f"the CP decomposition of a weight of shape {tuple(weight.shape)} failed: {error}"
            ) from error
        factors = [down.T, *(kernel.T for kernel in kernels), up]
        shapes = self.shapes(weight.shape, rank)
        return tuple(f.double().reshape(s) for f, s in zip(factors, shapes, strict=True))

    def refactor(self, factors: Factors, rank: int) -> Factors:
        """By way of the weight; for a larger rank the same components and new ones of size zero."""
        if len(factors) > 2 and rank > factors[0].shape[0]:
            return _extended(factors, rank)
        return super().refactor(factors, rank)

    def join(self, factors: Factors) -> Tensor:
        """``up @`` the products of ``down`` and the kernels."""
        down, *kernels, up = factors
        products = down
        for kernel in kernels:
            products = products * kernel  # (r, in, ..., k_j, ...)
        return (up.flatten(1) @ products.flatten(1)).reshape(up.shape[0], *products.shape[1:])

    def join_flops(self, shape: Sequence[int], rank: int) -> int:
        """One product, of ``up``; the others are elementwise and are not counted."""
        return 2 * math.prod(shape) * rank

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        """Each kernel slides depthwise by the geometry along its axis; the others are pointwise."""
        dims = len(geometry.stride)
        pointwise = Geometry.pointwise(dims)
        depthwise = [replace(geometry.along(axis), groups=rank) for axis in range(dims)]
        return pointwise, *depthwise, pointwise

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        """By automatic differentiation; a Linear's in closed form."""
        return (self._pair if len(factors) == 2 else super()).pull(factors, cotangent)

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """By conjugate gradients; a Linear's in closed form."""
        return (self._pair if len(factors) == 2 else super()).lift(factors, cotangents)


def _extended(factors: Factors, rank: int) -> Factors:
    """The components, and new ones: vectors drawn, of the mean norm, but for ``up``, which is zero.

    Least squares would find the same sum again only to within the error at which its sweeps end.
    """
    *inner, up = (factor.detach() for factor in factors)
    present = up.shape[1]
    generator = torch.Generator().manual_seed(present)
    extended: list[Tensor] = []
    for factor in inner:
        shape = (rank - present, *factor.shape[1:])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(factor)
        size = factor.flatten(1).norm(dim=1).mean()
        drawn *= torch.where(size > 0, size, 1.0) / drawn.flatten(1).norm(dim=1).mean()
        extended.append(torch.cat([factor, drawn]))
    zeros = up.new_zeros(up.shape[0], rank - present, *up.shape[2:])
    return *extended, torch.cat([up, zeros], 1)


def _even_sizes(factors: Factors, scale: float) -> Factors:
    """Each component's size shared equally by its vectors, of ``scale`` times the same weight.

    Of a component of size zero (to rounding) the least vector takes what there is and the others
    get the norm of the smallest live one's.
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
