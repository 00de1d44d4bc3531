"""The Tucker-2 decomposition: a smaller convolution between two 1x1 convolutions.

Legend: W (n, m, K) the weight, n = out, m = in, K kernel positions; R (n, r_out) and S (m, r_in)
orthonormal bases of channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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

__all__ = ["Tucker", "join_chain"]

# A sweep that lowers the squared error by less than this fraction of it is the last one: the first
# four digits of the error have converged.
GAIN = 1e-4
SWEEPS = 50


class Tucker(Decomposition):
    """The Tucker-2 decomposition, a core with the kernel of W between two changes of channels.

    ``W[o, i, k] = sum_ab up[o, b] core[b, a, k] down[a, i]``, with the factors
    ``down`` (r_in, in, 1, ...), ``core`` (r_out, r_in, *kernel) and ``up`` (out, r_out, 1, ...),
    r_in = min(r, in) and r_out = min(r, out), as Kim et al. (arXiv 1511.06530, 2016) compress
    convolutions. The published code of Shin et al. (arXiv 2508.08625) does not clip the ranks; this
    makes a difference only for its stem, which has three input channels.

    Example:
        >>> tucker = dr.decompositions.get_decomposition("tucker")
        >>> tucker.shapes((64, 32, 3, 3), 48)
        ((32, 32, 1, 1), (48, 32, 3, 3), (64, 48, 1, 1))
        >>> weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
        >>> torch.allclose(tucker.join(tucker.split(weight, 8)), weight)
        True
    """

    name = "tucker"

    def factor_names(self, dims: int) -> tuple[str, ...]:
        """``down``, ``core`` and ``up``."""
        return "down", "core", "up"

    def limit(self, shape: Sequence[int]) -> int:
        """The larger unfolding rank, max(min(n, m K), min(m, n K)): mostly max(n, m)."""
        out, ins, positions = shape[0], shape[1], math.prod(shape[2:])
        return max(min(out, ins * positions), min(ins, out * positions))

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """``down`` (r_in, in, 1...), ``core`` (r_out, r_in, *kernel), ``up`` (out, r_out, 1...)."""
        ones = (1,) * (len(shape) - 2)
        r_out, r_in = min(rank, shape[0]), min(rank, shape[1])
        return (r_in, shape[1], *ones), (r_out, r_in, *shape[2:]), (shape[0], r_out, *ones)

    def split(self, weight: Tensor, rank: int) -> Factors:
        """Bases by alternating least squares (HOOI), in fp64, and ``core = W x_out R' x_in S'``.

        Each basis starts from its unfolding (HOSVD) and is then optimized given the other, until a
        sweep lowers the squared error by less than a relative 1e-4, or for 50 sweeps (De Lathauwer,
        De Moor and Vandewalle 2000). The factors are scaled to equal Frobenius norms. If the weight
        is zero, only the core is zero, and can still learn.

        Raises:
            UnfitWeightError: ``weight`` is not finite, or an eigenvalue problem fails.
        """
        shapes = self.shapes(weight.shape, rank)
        unit, scale = unit_scale(weight)
        tensor = unit.reshape(*unit.shape[:2], -1)  # (n, m, K)
        fine = weight.dtype == torch.float64
        factors = _alternate(tensor, shapes[2][1], shapes[0][0], fine)
        shaped = [f.reshape(shape) for f, shape in zip(factors, shapes, strict=True)]
        return equal_norms(shaped, scale)

    def join(self, factors: Factors) -> Tensor:
        """``up @ core[k] @ down`` for every kernel position k."""
        down, core, up = factors
        return join_chain(down, core, up)

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        """The core has the geometry of the weight; the others are pointwise."""
        pointwise = Geometry.pointwise(len(geometry.stride))
        return pointwise, geometry, pointwise

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """The least-norm M with ``pull(M) = C``, in closed form from three orthogonal parts.

        With P and Q the projections on the columns of ``up`` and on the rows of ``down``:
        ``P M Q`` follows from the core's cotangent, ``(1 - P) M`` from that of ``up`` and
        ``M (1 - Q)`` from that of ``down``. The rest of M does not affect the factors and is zero.
        If no M matches all cotangents, since they are averages over moving factors, ``P M Q`` is
        taken from the core's.
        """
        down, core, up = _flat(factors)
        c_down, c_core, c_up = _flat(cotangents)
        p, p_inverse = _column_basis(up)
        q, q_inverse = _column_basis(down.T)
        middle = torch.einsum("pb,bak,qa->pqk", p_inverse, c_core, q_inverse)
        lifted = torch.einsum("op,pqk,iq->oik", p, middle, q)
        inner = torch.einsum("bak,ai->bik", core, down).flatten(1)  # (r_out, m K)
        lifted += (_outside(p, c_up) @ _least_rows(inner)).view_as(lifted)
        outer = torch.einsum("ob,bak->aok", up, core).flatten(1)  # (r_in, n K)
        swapped = _outside(q, c_down.T) @ _least_rows(outer)
        lifted += swapped.view(q.shape[0], *lifted.shape[::2]).transpose(0, 1)
        return lifted.reshape(up.shape[0], down.shape[1], *factors[1].shape[2:])

    def energies(self, factors: Factors) -> Factors:
        """The exact energies of the entries, from Gram matrices of channels."""
        return chain_energies(factors)


def join_chain(down: Tensor, core: Tensor, up: Tensor) -> Tensor:
    """The weight (out, in, *kernel) of a Tucker-2 chain, multiplying on the cheaper side first."""
    outer, inner = up.flatten(1), down.flatten(1)  # (out, r_out), (r_in, in)
    if outer.shape[0] * inner.shape[0] <= outer.shape[1] * inner.shape[1]:
        wide = (outer @ core.flatten(1)).reshape(outer.shape[0], *core.shape[1:])
        return torch.einsum("oa...,ai->oi...", wide, inner).contiguous()
    wide = torch.einsum("ba...,ai->bi...", core, inner)
    return (outer @ wide.flatten(1)).reshape(outer.shape[0], *wide.shape[1:])


def _flat(factors: Factors) -> Factors:
    """The factors as (r_in, in), (r_out, r_in, K) and (out, r_out)."""
    down, core, up = factors
    return down.flatten(1), core.reshape(*core.shape[:2], -1), up.flatten(1)


def _column_basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis B of the columns of A (n, r), and the pseudo-inverse of ``A' B``."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    live = values > torch.finfo(values.dtype).eps * max(matrix.shape) * values[:1]
    return left[:, live], right[live] / values[live, None]


def _outside(basis: Tensor, columns: Tensor) -> Tensor:
    """The component of the columns orthogonal to the basis."""
    return columns - basis @ (basis.T @ columns)


def _least_rows(rows: Tensor) -> Tensor:
    """The least-norm X with ``X B' = 1``: ``(B B')^+ B``."""
    return torch.linalg.pinv(rows @ rows.T, hermitian=True) @ rows


def _alternate(tensor: Tensor, r_out: int, r_in: int, fine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``down`` (r_in, m), ``core`` (r_out, r_in, K) and ``up`` (n, r_out) of W (n, m, K)."""
    total = tensor.square().sum().item()
    up = leading_basis(tensor.flatten(1), r_out, fine)
    down = leading_basis(tensor.transpose(0, 1).flatten(1), r_in, fine)
    core = _core(tensor, up, down)
    for _ in range(SWEEPS):
        captured = core.square().sum().item()
        error = total - captured
        if error <= torch.finfo(tensor.dtype).eps * total:
            break
        next_up = leading_basis(_inwards(tensor, down).flatten(1), r_out)
        next_down = leading_basis(_outwards(tensor, next_up).transpose(0, 1).flatten(1), r_in)
        next_core = _core(tensor, next_up, next_down)
        gain = next_core.square().sum().item() - captured
        if gain > 0:
            up, down, core = next_up, next_down, next_core
        if gain <= GAIN * error:
            break
    return down.T, core, up


def _inwards(tensor: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("omk,ma->oak", tensor, down)


def _outwards(tensor: Tensor, up: Tensor) -> Tensor:
    return (up.T @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])


def _core(tensor: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _inwards(_outwards(tensor, up), down)
