"""Leading subspaces and sizes: what the decompositions of higher order are made of.

Legend: A (n, m) a matrix; Q (n, r) with orthonormal columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynarank.decompositions.base import Factors, LinAlgError, UnfitWeightError, precise

__all__ = ["equal_norms", "leading_basis", "unit_scale"]


def leading_basis(matrix: Tensor, rank: int, fine: bool = False) -> Tensor:
    """Q whose span holds the most of A: its first r left singular vectors, r <= min(n, m).

    From the smaller Gram matrix, which resolves directions down to 1e-8 of the largest (in fp64)
    and costs a fraction of an SVD.

    Args:
        matrix: (n, m), in the precision to compute in.
        rank: r.
        fine: by an SVD, where smaller directions than 1e-8 count.

    Raises:
        UnfitWeightError: the eigenvalues do not converge.
    """
    try:
        if fine:
            return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
        if matrix.shape[0] <= matrix.shape[1]:
            return torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
        right = torch.linalg.eigh(matrix.T @ matrix)[1].flip(1)[:, :rank]
        return torch.linalg.qr(matrix @ right)[0]
    except LinAlgError as error:
        shape = tuple(matrix.shape)
        raise UnfitWeightError(
            f"the singular vectors of an unfolding of shape {shape} failed: {error}"
        ) from error


def unit_scale(weight: Tensor) -> tuple[Tensor, float]:
    """The weight over its largest entry, in fp64, and that entry (1 if all are zero).

    Raises:
        UnfitWeightError: it is not finite.
    """
    scale = precise(weight).abs().max().item()
    if not math.isfinite(scale):
        raise UnfitWeightError(
            f"a weight of shape {tuple(weight.shape)} has entries that are not finite"
        )
    scale = scale or 1.0
    return precise(weight) / scale, scale


def equal_norms(factors: Sequence[Tensor], scale: float) -> Factors:
    """The factors of ``scale`` times the same weight, all of one Frobenius norm.

    Where one is zero the weight is too and nothing need change: the others stay as they are, so
    that the zero one can learn.
    """
    norms = [factor.norm().item() for factor in factors]
    if not all(norms):
        return tuple(factors)
    size = math.exp((math.log(scale) + sum(map(math.log, norms))) / len(norms))
    return tuple(factor * (size / norm) for factor, norm in zip(factors, norms, strict=True))
