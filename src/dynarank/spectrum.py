"""Singular values of a weight, and the measures of rank made from them.

Legend: s1 >= s2 >= ... >= sn the singular values of the matricised weight (out, in * positions).

- effective rank: exp(H(s / sum s)), H the entropy (Roy and Vetterli, "The effective rank", 2007);
- stable rank: sum s^2 / s1^2 (Rudelson and Vershynin, 2007);
- energy rank: the least r with sum_{i<=r} s_i^2 >= share * sum s^2;
- spectral ratio, lambda_r = sum_{i<=r} s_i / sum s_i. This definition is ours: Shin et al. (arXiv
  2508.08625) plot a "singular-value spectral ratio", large near low rank, whose formula is not
  public.

A weight of zeros has effective, stable and energy rank 0 and lambda 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynarank.decompositions import LinAlgError, UnfitWeightError, precise

__all__ = [
    "effective_rank",
    "energy_rank",
    "singular_values",
    "spectral_ratio",
    "stable_rank",
]


def singular_values(weight: Tensor) -> Tensor:
    """The singular values of a weight (out, in, *kernel), largest first, in fp64 on its device.

    For fp64 weights by an SVD, else from the Gram matrix of the shorter side in fp64, which is
    exact to 1e-8 of the largest value and several times cheaper.

    Raises:
        ValueError: fewer than two dimensions.
        UnfitWeightError: a value is not finite, or the decomposition does not converge.

    Example:
        >>> singular_values(torch.diag(torch.tensor([1.0, 3.0]))).tolist()
        [3.0, 1.0]
    """
    if weight.ndim < 2:
        raise ValueError(f"a weight has two or more dimensions, got shape {tuple(weight.shape)}")
    matrix = precise(weight).flatten(1)
    if not torch.isfinite(matrix).all():
        raise UnfitWeightError("the weight holds NaN or infinite values")
    if 0 in matrix.shape:
        return matrix.new_zeros(0)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    try:
        if weight.dtype == torch.float64:
            return torch.linalg.svdvals(matrix)
        return torch.linalg.eigvalsh(matrix @ matrix.T).clamp(min=0).sqrt().flip(0)
    except LinAlgError as error:
        shape = tuple(weight.shape)
        raise UnfitWeightError(f"the SVD of a weight of shape {shape} failed: {error}") from error


def effective_rank(values: Tensor) -> float:
    """The effective rank, exp(H(s / sum s)).

    It is n if all n values are equal, and 1 if only one is not zero.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
        3.0
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()


def stable_rank(values: Tensor) -> float:
    """The stable rank, sum s^2 / s1^2.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 0.0]))
        1.25
    """
    if not values.numel() or not values[0] > 0:
        return 0.0
    return (values / values[0]).square().sum().item()


def energy_rank(values: Tensor, share: float = 0.99) -> int:
    """The least r with ``sum_{i<=r} s_i^2 >= share * sum s^2``.

    Raises:
        ValueError: ``share`` is not in (0, 1].

    Example:
        >>> energy_rank(torch.tensor([3.0, 1.0, 0.1]), 0.99)
        2
    """
    if not 0 < share <= 1:
        raise ValueError(f"an energy share must lie in (0, 1], got {share!r}")
    energy = values.square().cumsum(0)
    if not values.numel() or not energy[-1] > 0:
        return 0
    return min(int((energy < share * energy[-1]).sum().item()) + 1, len(values))


def spectral_ratio(values: Tensor, rank: int) -> float:
    """Lambda_r = sum_{i<=r} s_i / sum s_i.

    It is 1 for a weight of rank r, and r / n for a flat spectrum.

    Raises:
        ValueError: ``rank`` is below 1.

    Example:
        >>> spectral_ratio(torch.tensor([3.0, 1.0]), 1)
        0.75
    """
    if rank < 1:
        raise ValueError(f"lambda needs a rank of at least 1, got {rank}")
    total = values.sum()
    return (values[:rank].sum() / total).item() if total > 0 else 1.0
