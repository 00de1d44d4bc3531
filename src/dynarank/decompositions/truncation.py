"""Activation-aware truncation: keep the directions in which a weight's outputs have most energy.

Legend: W (n, m) the matricized weight, x its input, y = W x, r the rank; E over calibration data,
C = E[x x']; P_r the projection on the r leading eigenvectors of E[y y'] = W C W'.

The rank-r weight whose outputs are nearest to W's is

    W_r = P_r W,   with   min E ||y - W_r x||^2 = sum_{i>r} eigenvalue_i(E[y y']),

by the principal components of the outputs. It equals the truncated SVD of W L, multiplied by L^-1
with C = L L', as Wang et al. ("SVD-LLM", arXiv 2403.07378) and others compute it, but without an
inverse: W L = U S V' gives (W L)_r L^-1 = U_r U_r' W L L^-1 = P_r W, and U are the eigenvectors of
W C W'. So a singular C (few inputs, or some that are always zero) needs no special treatment.

E[y y'] is measured on the outputs, n x n, for a weight of any width. For a weight with more outputs
than inputs, C is measured on the inputs, m x m, and W C W' is computed from it.

If the layer has a bias, it can compensate the mean of the outputs: with covariances in place of
second moments, P_r W is the best weight together with the best bias, ``b + (I - P_r) E[y]``. Inputs
after a ReLU have large means, which would otherwise dominate the first directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynarank.decompositions.base import Decomposition
from dynarank.decompositions.geometry import Factors
from dynarank.decompositions.numerics.linalg import (
    LinAlgError,
    UnfitWeightError,
    leading_directions,
    precise,
)

__all__ = ["ActivationStats", "output_energies", "project", "split_activation_aware"]


@dataclass(frozen=True)
class ActivationStats:
    """Second moments of a weight's inputs or outputs over calibration data.

    Args:
        side: which vectors v were measured: ``"output"``, y = W x without the bias; ``"input"``, x;
            ``"row"``, the rows looked up in an embedding table W, y = W' e.
        second: E[v v'] of each group, (groups, k, k); the covariance if there is a ``mean``.
        count: the number of vectors averaged.
        mean: E[v], (groups, k), if a bias can compensate it.
    """

    side: Literal["output", "input", "row"]
    second: Tensor
    count: int
    mean: Tensor | None = None

    def check(self, shape: Sequence[int]) -> None:
        """Check that the statistics fit a weight of this shape, (out, in / groups, *kernel).

        Raises:
            ValueError: the sizes differ.
        """
        groups = self.second.shape[0]
        n, m = shape[0] // groups, torch.Size(shape[1:]).numel()
        size = n if self.side == "output" else m
        if self.second.shape[-1] != size:
            raise ValueError(
                f"the calibration is of a weight with {self.second.shape[-1]} {self.side}s per "
                f"group, this one, of shape {tuple(shape)}, has {size}; calibrate this model"
            )

    def uncentered(self) -> ActivationStats:
        """The second moments instead of the covariance, for a layer whose bias must stay."""
        if self.mean is None:
            return self
        mean = self.mean.to(self.second)
        second = self.second + mean[:, :, None] * mean[:, None]
        return ActivationStats(self.side, second, self.count)


def split_activation_aware(
    decomposition: Decomposition, weight: Tensor, rank: int, activity: ActivationStats | None
) -> tuple[Factors, Tensor | None]:
    """Split ``P_r W`` instead of W, if there are statistics and the decomposition is optimal.

    Decompositions that do not truncate optimally split W itself: their best fit to the data is not
    a projection.

    Args:
        decomposition: the decomposition of the factors.
        weight: (out, in / groups, *kernel), in canonical layout.
        rank: the rank of the factors.
        activity: statistics of this weight; None: split W itself.

    Returns:
        The factors, and the change of the bias (out,) or None.

    Raises:
        ValueError: the statistics are of a different weight.
        UnfitWeightError: the weight cannot be decomposed.
    """
    shift = None
    if activity is not None and decomposition.truncates_optimally:
        weight, shift = project(weight, rank, activity)
    return decomposition.split(weight, rank), shift


def project(weight: Tensor, rank: int, activity: ActivationStats) -> tuple[Tensor, Tensor | None]:
    """Project a weight to rank r, ``P_r W``, with the smallest change of its outputs.

    If the outputs have fewer than ``rank`` directions, the rest are the leading directions of the
    remainder of W, so that at full rank ``project(W) == W``.

    Args:
        weight: (out, in / groups, *kernel), in canonical layout.
        rank: r, the rank of each group.
        activity: statistics of this weight.

    Returns:
        The projected weight in its dtype; if the activity has a mean, the bias's change (out,).

    Example:
        >>> from dynarank.decompositions.truncation import ActivationStats, project
        >>> quiet = ActivationStats("input", torch.diag(torch.tensor([0.0, 1.0]))[None], 1)
        >>> project(torch.diag(torch.tensor([3.0, 1.0])), 1, quiet)[0]
        tensor([[0., 0.],
                [0., 1.]])
    """
    activity.check(weight.shape)
    matrices = [(_facing(unit, activity), second) for unit, second in _units(weight, activity)]
    bases = [_basis(matrix, rank, activity.side, second) for matrix, second in matrices]
    done = [b @ (b.T @ matrix) for b, (matrix, _) in zip(bases, matrices, strict=True)]
    transposed = [matrix.T if activity.side == "row" else matrix for matrix in done]
    projected = torch.cat(transposed).reshape(weight.shape).to(weight.dtype)
    if activity.mean is None:
        return projected, None
    means = [precise(mean).to(weight.device) for mean in activity.mean]
    if activity.side == "input":
        means = [matrix @ mean for mean, (matrix, _) in zip(means, matrices, strict=True)]
    lost = [mean - b @ (b.T @ mean) for b, mean in zip(bases, means, strict=True)]
    return projected, torch.cat(lost)


def output_energies(weight: Tensor, activity: ActivationStats | None = None) -> Tensor:
    """The eigenvalues of E[y y'], largest first: (groups or 1, min(n, m)) in fp64.

    Without statistics they are those of W W', the squared singular values, as for white inputs. The
    sum of all but the first r is the output error of a truncation to rank r.
    """
    if activity is None:
        second = torch.eye(weight[0].numel(), dtype=torch.float64, device=weight.device)
        activity = ActivationStats("input", second[None], 0)
    activity.check(weight.shape)
    units = [(_facing(unit, activity), second) for unit, second in _units(weight, activity)]
    limit = min(units[0][0].shape)
    return torch.stack(
        [_principal(matrix, activity.side, second)[1][:limit] for matrix, second in units]
    )


def _units(weight: Tensor, activity: ActivationStats) -> list[tuple[Tensor, Tensor]]:
    """The weight and the second moment of each group."""
    groups = activity.second.shape[0]
    return list(zip(weight.chunk(groups), activity.second.to(weight.device), strict=True))


def _facing(unit: Tensor, activity: ActivationStats) -> Tensor:
    """The matrix that maps to the outputs, in fp64: W, or W' for an embedding table."""
    matrix = precise(unit).flatten(1)
    return matrix.T if activity.side == "row" else matrix


def _basis(matrix: Tensor, rank: int, side: str, second: Tensor) -> Tensor:
    """An orthonormal basis of the kept directions, (n, rank) or fewer."""
    basis, energies = _principal(matrix, side, second)
    # Second moments are sums of fp32 products: eigenvalues below this are rounding errors.
    noise = torch.finfo(torch.float32).eps * len(energies) * energies[:1].clamp(min=0)
    live = int((energies[:rank] > noise).sum())
    kept = basis[:, : min(rank, live)]
    if live >= min(rank, *matrix.shape):
        return kept
    rest = matrix - kept @ (kept.T @ matrix)
    return torch.cat([kept, leading_directions(rest, rank - live)[0].to(kept.dtype)], 1)


def _principal(matrix: Tensor, side: str, second: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions of the outputs (n, k) and their energies (k,), largest first."""
    second = precise(second)
    try:
        if side != "input":
            return _eigen(second)
        if matrix.shape[0] <= matrix.shape[1]:
            return _eigen(matrix @ second @ matrix.T)
        directions, energies = _eigen(second)
        tall = matrix @ (directions * energies.sqrt())  # (n, m), tall tall' = W C W'
        right, energies = _eigen(tall.T @ tall)
        live = energies > 0
        return tall @ (right / torch.where(live, energies, torch.inf).sqrt()), energies
    except LinAlgError as error:
        raise UnfitWeightError(f"the output directions cannot be computed: {error}") from error


def _eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors.flip(-1), values.flip(-1).clamp(min=0)
