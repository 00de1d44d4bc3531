"""The separable decomposition: a weight as a tensor train of one-dimensional kernels.

As a chain: a 1x1 convolution, a dense one-dimensional kernel per axis, a 1x1 convolution.

Legend: W (in, k_1, ..., k_d, out) the weight as a chain of modes; r_j the rank of the bond after
mode j; d the number of kernel dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dynarank.decompositions.base import Decomposition
from dynarank.decompositions.geometry import Factors, Geometry
from dynarank.decompositions.numerics.multilinear import (
    chain_energies,
    equal_norms,
    leading_basis,
    unit_scale,
)
from dynarank.decompositions.svd import SVD
from dynarank.decompositions.tucker import join_chain

__all__ = ["AXES", "Separable"]

AXES = ((), ("width",), ("height", "width"), ("depth", "height", "width"))
# A sweep that lowers the squared error by less than this fraction of it is the last one.
GAIN = 1e-3
SWEEPS = 10


class Separable(Decomposition):
    """The separable decomposition, a tensor train of dense one-dimensional kernels.

    ``W[o, i, k] = up[o, :] width[k_d] ... height[k_1] down[:, i]``, with the factors
    ``down`` (r_0, in, 1, ...), a dense kernel (r_j, r_j-1, ..., k_j, ...) for each axis j, applied
    with the stride and padding of that axis, and ``up`` (out, r_d, 1, ...). The bond ranks are r,
    clipped to the largest rank of W's unfolding: ``r_j = min(r, in k_1...k_j, k_j+1...k_d out)``.

    The published code of Shin et al. (arXiv 2508.08625) calls this chain CP and applies the stride
    in the last factor, which is not exact at stride 2. A Linear's weight is split by the SVD.

    Example:
        >>> separable = dr.decompositions.get_decomposition("separable")
        >>> separable.shapes((64, 32, 3, 3), 48)
        ((32, 32, 1, 1), (48, 32, 3, 1), (48, 48, 1, 3), (64, 48, 1, 1))
        >>> weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
        >>> torch.allclose(separable.join(separable.split(weight, 18)), weight)
        True
    """

    name = "separable"

    def __init__(self) -> None:
        self._pair = SVD()  # for the weight of a Linear

    def factor_names(self, dims: int) -> tuple[str, ...]:
        """``down``, the spatial axes in order, ``up``."""
        return "down", *AXES[dims], "up"

    def limit(self, shape: Sequence[int]) -> int:
        """The largest bond rank of a weight of this shape."""
        return max(_bonds(shape, math.prod(shape)))

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """``down`` (r_0, in, 1, ...), (r_j, r_j-1, ..., k_j, ...) for each axis, ``up``."""
        bonds, ones = _bonds(shape, rank), (1,) * (len(shape) - 2)
        kernels = [(*ones[:j], size, *ones[j + 1 :]) for j, size in enumerate(shape[2:])]
        between = [(b, a, *k) for (a, b), k in zip(pairwise(bonds), kernels, strict=True)]
        return (bonds[0], shape[1], *ones), *between, (shape[0], bonds[-1], *ones)

    def split(self, weight: Tensor, rank: int) -> Factors:
        """Tensor-train factors by successive SVDs, refined by alternating least squares, in fp64.

        TT-SVD (Oseledets 2011), then sweeps that optimize each factor given the others, until one
        lowers the squared error by less than a relative 1e-3, or for 10 sweeps. The factors are
        scaled to equal Frobenius norms. If the weight is zero, only ``up`` is zero, and can still
        learn: the other factors have orthonormal columns.

        Raises:
            UnfitWeightError: ``weight`` is not finite, or an eigenvalue problem fails.
        """
        if weight.ndim == 2:
            return self._pair.split(weight, rank)
        unit, scale = unit_scale(weight)
        modes = unit.movedim(0, -1)  # (in, *kernel, out)
        cores = _tensor_train(modes, _bonds(weight.shape, rank), weight.dtype == torch.float64)
        shapes = self.shapes(weight.shape, rank)
        # (r_j-1, k_j, r_j) as (r_j, r_j-1, k_j): ``down`` has its inputs where others have k.
        down = cores[0][0].T
        factors = [down, *(core.movedim(2, 0) for core in cores[1:-1]), cores[-1][..., 0].T]
        shaped = [f.reshape(shape) for f, shape in zip(factors, shapes, strict=True)]
        return equal_norms(shaped, scale)

    def join(self, factors: Factors) -> Tensor:
        """The weight: the one-dimensional kernels are joined first, then the channels."""
        down, *kernels, up = factors
        if not kernels:
            return self._pair.join(factors)
        core = kernels[0]
        for kernel in kernels[1:]:
            core = torch.einsum("cb...,ba...->ca...", kernel, core)
        return join_chain(down, core, up)

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        """One-dimensional convolutions along each axis, between pointwise ones."""
        dims = len(geometry.stride)
        pointwise = Geometry.pointwise(dims)
        return pointwise, *(geometry.along(axis) for axis in range(dims)), pointwise

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        """The vjp of ``join``, by automatic differentiation; for a Linear in closed form."""
        return (self._pair if len(factors) == 2 else super()).pull(factors, cotangent)

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """The least-norm lift, by conjugate gradients; for a Linear in closed form."""
        return (self._pair if len(factors) == 2 else super()).lift(factors, cotangents)

    def energies(self, factors: Factors) -> Factors:
        """The exact energies of the entries, from Gram matrices of channels."""
        return chain_energies(factors)


def _bonds(shape: Sequence[int], rank: int) -> list[int]:
    """The bond ranks r_0 ... r_d: the rank, clipped to the dimensions before and after the bond."""
    out, ins, *kernel = shape
    before = [ins * math.prod(kernel[:j]) for j in range(len(kernel) + 1)]
    behind = [out * math.prod(kernel[j:]) for j in range(len(kernel) + 1)]
    return [min(rank, b, a) for b, a in zip(before, behind, strict=True)]


def _tensor_train(modes: Tensor, bonds: list[int], fine: bool) -> list[Tensor]:
    """The cores (r_j-1, size_j, r_j) of the modes in order, all but the last orthonormal."""
    cores: list[Tensor] = []
    rest, before = modes, 1
    for size, bond in zip(modes.shape[:-1], bonds, strict=True):
        rest = rest.reshape(before * size, -1)
        basis = leading_basis(rest, bond, fine)
        cores.append(basis.reshape(before, size, bond))
        rest, before = basis.T @ rest, bond
    cores.append(rest[..., None])
    total, captured = modes.square().sum().item(), rest.square().sum().item()
    for _ in range(SWEEPS):
        error = total - captured
        if error <= torch.finfo(modes.dtype).eps * total:
            break
        refined = _sweep(modes, cores)
        gain = refined[-1].square().sum().item() - captured
        if gain > 0:
            cores, captured = refined, captured + gain
        if gain <= GAIN * error:
            break
    return cores


def _sweep(modes: Tensor, cores: list[Tensor]) -> list[Tensor]:
    """Optimize each core in turn, given the new ones before it and the old ones after it."""
    behind = _bases_behind(cores)
    refined: list[Tensor] = []
    rest, before = modes, 1
    for size, basis in zip(modes.shape[:-1], behind, strict=True):
        rest = rest.reshape(before * size, -1)
        columns = torch.linalg.qr(rest @ basis.T)[0]
        refined.append(columns.reshape(before, size, -1))
        rest, before = columns.T @ rest, columns.shape[1]
    return [*refined, rest[..., None]]


def _bases_behind(cores: list[Tensor]) -> list[Tensor]:
    """For each bond, an orthonormal basis (r_j, size_j+1 ... size_d) of the chain after it."""
    behind: list[Tensor] = []
    carry = torch.eye(1, dtype=cores[0].dtype, device=cores[0].device)
    joined = carry
    for core in reversed(cores[1:]):
        carried = core @ carry  # (r_j-1, size_j, r_j)
        columns, triangle = torch.linalg.qr(carried.flatten(1).T)
        rows = columns.T.reshape(-1, *carried.shape[1:])
        joined = torch.einsum("asb,bt->ast", rows, joined).flatten(1)
        carry = triangle.T
        behind.insert(0, joined)
    return behind
