"""Singular values of a weight, and the rank metrics computed from them.

Legend: s1 >= s2 >= ... >= sn the singular values of the matricized weight (out, in * positions).

- effective rank: exp(H(s / sum s)), H the entropy (Roy and Vetterli, "The effective rank", 2007);
- stable rank: sum s^2 / s1^2 (Rudelson and Vershynin, 2007);
- energy rank: the smallest r with sum_{i<=r} s_i^2 >= share * sum s^2;
- spectral ratio, lambda_r = sum_{i<=r} s_i / sum s_i. This definition is ours: Shin et al. (arXiv
  2508.08625) plot a "singular-value spectral ratio", large near low rank, whose formula is not
  public.

A zero weight has effective, stable and energy rank 0, and lambda 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynarank.decompositions import LinAlgError, UnfitWeightError, precise
from dynarank.decompositions.numerics.linalg import as_unit, gram

__all__ = [
    "effective_rank",
    "energy_rank",
    "product_singular_values",
    "resolved",
    "singular_values",
    "spectral_ratio",
    "stable_rank",
]


def singular_values(weight: Tensor, *, exact: bool = False) -> Tensor:
    """The singular values of a weight (out, in, *kernel), largest first, in fp64 on its device.

    Computed from the Gram matrix of the shorter side in fp32, if the rank metrics then agree with
    the exact ones within 0.5% (each value is accurate to about 5e-4 of the largest). If too much of
    their sum is in values that rounding affects, the Gram matrix in fp64 is used, accurate to 1e-8
    of the largest. fp64 weights use an SVD.

    Args:
        weight: a weight of two or more dimensions.
        exact: always use the Gram matrix in fp64, at about twice the cost.

    Raises:
        ValueError: fewer than two dimensions.
        UnfitWeightError: a value is not finite, or the decomposition does not converge.

    Example:
        >>> singular_values(torch.diag(torch.tensor([1.0, 3.0]))).tolist()
        [3.0, 1.0]
    """
    matrix, scale = _short_and_wide(weight)
    if 0 in matrix.shape:
        return precise(matrix.new_zeros(0))
    try:
        values = _values(matrix, exact)
    except LinAlgError as error:
        shape = tuple(weight.shape)
        raise UnfitWeightError(f"the SVD of a weight of shape {shape} failed: {error}") from error
    return values * scale


def _short_and_wide(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The matricized weight, scaled and with its shorter side first, and the scale."""
    if weight.ndim < 2:
        raise ValueError(f"a weight has two or more dimensions, got shape {tuple(weight.shape)}")
    matrix, scale = as_unit(weight.detach().flatten(1))
    return (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T), precise(scale)


def _values(matrix: Tensor, exact: bool) -> Tensor:
    if matrix.dtype != torch.float64:
        if not exact:
            try:
                values = _by_gram(matrix)
                if resolved(values):
                    return values
            except LinAlgError:
                pass  # fp64 may converge where fp32 did not
        try:
            values = _by_gram(precise(matrix))
            if torch.isfinite(values).all():
                return values
        except LinAlgError:
            pass
    return torch.linalg.svdvals(precise(matrix).T)  # faster on a tall matrix


def _by_gram(matrix: Tensor) -> Tensor:
    return precise(torch.linalg.eigvalsh(gram(matrix)).clamp(min=0).sqrt().flip(0))


def resolved(values: Tensor) -> bool:
    """Whether the values from a Gram matrix in fp32 give all rank metrics within 0.5%.

    Rounding changes values below 1e-3 of the largest by up to their size. If they can add up to at
    most 0.4% of the sum, the effective rank, the most sensitive metric, changes by less than 0.4%
    (spectra i^0 to i^-3 and of low rank, 64 to 1024 values).
    """
    small = 1e-3 * values[0]
    return bool((values < small).sum() * small <= 4e-3 * values.sum())


def product_singular_values(down: Tensor, up: Tensor) -> Tensor:
    """The singular values of ``up @ down``, computed from the factors in O((n + m) r^2), in fp64.

    With ``up = Q1 R1`` and ``down' = Q2 R2`` they are those of ``R1 R2'``, padded with zeros.

    Args:
        down: the second factor, (r, m).
        up: the first factor, (n, r).

    Returns:
        min(n, m) values, largest first.

    Raises:
        UnfitWeightError: a value is not finite, or the decomposition does not converge.

    Example:
        >>> product_singular_values(torch.ones(1, 4), torch.ones(9, 1)).round().tolist()
        [6.0, 0.0, 0.0, 0.0]
    """
    (down, down_scale), (up, up_scale) = as_unit(down), as_unit(up)
    count = min(up.shape[0], down.shape[1])
    # In fp64: rounding would raise the zeros, and with them the effective rank.
    cores = [torch.linalg.qr(precise(factor), mode="r")[1] for factor in (up, down.T)]
    try:
        values = torch.linalg.svdvals(cores[0] @ cores[1].T)[:count]
    except LinAlgError as error:
        shape = (up.shape[0], down.shape[1])
        raise UnfitWeightError(f"the SVD of a product of shape {shape} failed: {error}") from error
    scaled = values * precise(down_scale) * precise(up_scale)
    return torch.cat([scaled, scaled.new_zeros(count - len(values))])


def effective_rank(values: Tensor) -> float:
    """The effective rank, exp(H(s / sum s)).

    It is n if all n values are equal, and 1 if only one is nonzero.

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
    """The energy rank, the smallest r with ``sum_{i<=r} s_i^2 >= share * sum s^2``.

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
    """The spectral ratio lambda_r = sum_{i<=r} s_i / sum s_i.

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
