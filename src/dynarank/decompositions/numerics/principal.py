"""The principal directions of a matrix's outputs, from second moments of its outputs or inputs.

Legend: W (n, m) a matrix, y = W x, C = E[x x'], so that E[y y'] = W C W'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynarank.decompositions.numerics.linalg import as_unit, orthonormal, precise

__all__ = ["Principal", "principal_of_inputs", "principal_of_outputs"]


class Principal(NamedTuple):
    """Orthonormal directions (n, k) of the outputs and their energies (k,), largest first."""

    basis: Tensor
    energies: Tensor

    def resolves(self, rank: int, smallest: float) -> bool:
        """Whether the first ``rank`` energies are finite and above ``smallest`` of the first."""
        first, last = self.energies[0], self.energies[rank - 1]
        return bool(torch.isfinite(self.energies.sum()) and last >= smallest * first)


def principal_of_outputs(second: Tensor, dtype: torch.dtype) -> Principal:
    """The eigenvectors and eigenvalues of E[y y'] (n, n), computed in ``dtype``.

    Raises:
        LinAlgError: they do not converge.
    """
    unit, scale = as_unit(second)
    return _scaled(_eigen(unit.to(dtype)), scale)


def principal_of_inputs(matrix: Tensor, second: Tensor) -> Principal:
    """The principal directions of W x, from W (n, m) and E[x x'] (m, m), k = min(n, m).

    Computed in the precision of W. Those of a tall ``W = Q R`` are ``Q V``, with V those of R x:
    whatever the rank of W and C, the problem is of size m, and the directions are orthonormal.

    Raises:
        LinAlgError: they do not converge.
    """
    (matrix, size), (second, scale) = as_unit(matrix), as_unit(second)
    second = second.to(matrix.dtype)
    if len(matrix) <= matrix.shape[1]:
        found = _eigen(matrix @ second @ matrix.T)
    else:
        basis = orthonormal(matrix)
        core = basis.T @ matrix
        small = _eigen(core @ second @ core.T)
        found = Principal(basis @ small.basis, small.energies)
    return _scaled(found, precise(size).square() * scale)


def _eigen(symmetric: Tensor) -> Principal:
    values, vectors = torch.linalg.eigh(symmetric)
    return Principal(vectors.flip(-1), values.flip(-1).clamp(min=0))


def _scaled(found: Principal, scale: Tensor) -> Principal:
    """With energies in fp64, which holds what was scaled."""
    return Principal(found.basis, precise(found.energies) * scale)
