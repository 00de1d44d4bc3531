"""Tucker-2: W = core x_out up x_in down, a small kernel between two changes of channels.

Legend: W (n, m, K) the weight, n = out, m = in, K kernel positions; R (n, r_out) and S (m, r_in)
orthonormal bases of channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynarank.decompositions.base import Factors, Geometry, pull_back
from dynarank.decompositions.lifting import chain_energies, lift, lift_squares
from dynarank.decompositions.subspaces import equal_norms, leading_basis, unit_scale

__all__ = ["Tucker", "join_chain"]

# A sweep that lowers the squared error by less than this fraction of it is the last one. Of a
# smaller fraction nothing remains in the error's first four digits.
GAIN = 1e-4
SWEEPS = 50


class Tucker:
    """``W[o, i, k] = sum_ab up[o, b] core[b, a, k] down[a, i]``; the core slides as W does.

    ``down`` (r_in, in, 1, ...), ``core`` (r_out, r_in, *kernel), ``up`` (out, r_out, 1, ...) with
    r_in = min(r, in) and r_out = min(r, out), as Kim et al. (arXiv 1511.06530, 2016) compress
    convolutions. The published code of Shin et al. (arXiv 2508.08625) does not clip the ranks; that
    differs only for its stem, of three input channels.

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
        """The larger of the unfoldings' ranks, max(min(n, m K), min(m, n K)): mostly max(n, m)."""
        out, ins, positions = shape[0], shape[1], math.prod(shape[2:])
        return max(min(out, ins * positions), min(ins, out * positions))

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """``down`` (r_in, in, 1...), ``core`` (r_out, r_in, *kernel), ``up`` (out, r_out, 1...)."""
        ones = (1,) * (len(shape) - 2)
        r_out, r_in = min(rank, shape[0]), min(rank, shape[1])
        return (r_in, shape[1], *ones), (r_out, r_in, *shape[2:]), (shape[0], r_out, *ones)

    def split(self, weight: Tensor, rank: int) -> Factors:
        """``core = W x_out R' x_in S'``, the bases by alternating least squares (HOOI), in fp64.

        Each basis starts from its unfolding (HOSVD) and is then the best one given the other, until
        a sweep lowers the squared error by less than 1e-4 of it, or for 50 sweeps (De Lathauwer,
        De Moor and Vandewalle 2000). The factors are scaled to one Frobenius norm. Only the core
        can be zero, with the weight: it still learns, for the bases are not.

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
        """The core slides as the weight does; the others are pointwise."""
        pointwise = Geometry.pointwise(len(geometry.stride))
        return pointwise, geometry, pointwise

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        """By automatic differentiation."""
        return pull_back(self, factors, cotangent)

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """The pseudo-inverse of ``pull``, by conjugate gradients."""
        return lift(self.join, factors, cotangents)

    def lift_squares(self, factors: Factors, squares: Factors) -> Tensor:
        """An outer product over outputs, inputs and kernel positions."""
        return lift_squares(chain_energies(factors), squares)


def join_chain(down: Tensor, core: Tensor, up: Tensor) -> Tensor:
    """``sum_ab up[o, b] core[b, a, k] down[a, i]``, the cheaper side first: (out, in, *kernel)."""
    outer, inner = up.flatten(1), down.flatten(1)  # (out, r_out), (r_in, in)
    if outer.shape[0] * inner.shape[0] <= outer.shape[1] * inner.shape[1]:
        wide = (outer @ core.flatten(1)).reshape(outer.shape[0], *core.shape[1:])
        return torch.einsum("oa...,ai->oi...", wide, inner).contiguous()
    wide = torch.einsum("ba...,ai->bi...", core, inner)
    return (outer @ wide.flatten(1)).reshape(outer.shape[0], *wide.shape[1:])


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
