"""Subspace iteration: singular vectors of a matrix from those of a similar one, in a few products.

Legend: W (n, m) a matrix, V (k, m) rows near its leading right singular vectors, r <= k the rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynarank.decompositions.numerics.linalg import (
    RESOLVED,
    as_stored,
    gram,
    leading_directions,
    orthonormal,
    precise,
)

__all__ = ["follow", "subspace_iteration"]


def subspace_iteration(
    matrix: Tensor, rows: Tensor, steps: int = 1, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Left singular vectors Q (n, r) and ``Q' W`` (r, m) from approximate right ones V (k, m).

    Repeats ``Q = orth(W V')``, ``V = Q' W``, and then rotates the rows of Q' W to be orthogonal,
    the longest first (Rayleigh-Ritz). Their norms are the singular values. The error of V shrinks
    by s_{r+1} / s_i in each half-step: enough after a matrix has changed by a few percent, but not
    from a random start.

    Args:
        matrix: W (n, m), finite, in fp32 or fp64, with entries whose squares do not overflow.
        rows: V (k, m), r <= k <= n.
        steps: the number of iterations, at least one; each costs two products with W.
        rank: r, the number of directions to keep; None: all k.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness", arXiv 0909.4061, 2009.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 1.0]))
        >>> q, projected = subspace_iteration(w, torch.tensor([[1.0, 0.01]]))
        >>> round(torch.linalg.vector_norm(projected).item(), 3)
        3.0
    """
    basis, projected, _ = _step(matrix, rows)
    for _ in range(steps - 1):
        basis, projected, _ = _step(matrix, projected)
    return _ritz(basis, projected, rank)


def follow(matrix: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """At most two steps of subspace iteration; None if they are not accurate enough.

    They are if the truncation error is within 0.2% of the optimum by the bound of :func:`_excess`.

    Args:
        matrix: W (n, m), finite, in fp32 or fp64, with entries whose squares do not overflow.
        rows: approximate right singular vectors V (k, m), finite, r <= k <= n.
        rank: r.

    Returns:
        Q (n, r) and ``Q' W`` (r, m).
    """
    projected = rows if _orthogonal(rows) else orthonormal(rows.T).T
    energy = _energy(matrix)
    for _ in range(2):  # beyond that, a new decomposition is as fast
        basis, projected, gained = _step(matrix, projected)
        basis, projected = _ritz(basis, projected)
        values = torch.linalg.vector_norm(projected, dim=1)
        beside = len(matrix) - len(values)
        if _excess(gained, energy - _energy(projected), values, beside) <= 0.002:
            return basis[:, :rank], projected[:rank]
    return None


def _excess(gained: Tensor, left_out: Tensor, values: Tensor, beside: int) -> float:
    """A bound on the relative excess of a step's error over the optimum; infinite if unknown.

    ``g (1/2 + 1 / (q - 1))``, where g is the energy that the step gained, as a share of the energy
    left out, and q the square of the smallest kept value over the mean square of those left out,
    which determines the rate of convergence. It was an upper bound in every case tried: spectra i^0
    to i^-1.5, Gaussian, linear, normal and with plateaus, white noise of 1 to 20%, ranks n/8 to
    3n/4.
    """
    if not beside or not left_out > 0 or values[-1] < RESOLVED[values.dtype] * values[0]:
        return math.inf
    faster = float(values[-1].square() * beside / left_out) - 1
    return max(float(gained / left_out), 0.0) * (0.5 + 1 / faster) if faster > 0 else math.inf


def _step(matrix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q (n, k), ``Q' W``, and how much more energy this has than W on the (orthogonal) rows."""
    tiny = torch.finfo(matrix.dtype).tiny
    image = matrix @ rows.T  # (n, k)
    image = image / torch.linalg.vector_norm(rows, dim=1).clamp(min=tiny)
    basis = orthonormal(image / torch.linalg.vector_norm(image, dim=0).clamp(min=tiny))
    projected = basis.T @ matrix  # (k, m)
    return basis, projected, _energy(projected) - _energy(image)


def _orthogonal(rows: Tensor) -> bool:
    """Whether the rows are orthogonal to about 1e-3, as factors from a split are."""
    overlaps = gram(rows).tril()
    norms = overlaps.diagonal().clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
    overlaps = overlaps / norms / norms[:, None]
    return bool(overlaps.tril(-1).abs().max() < 1e-3)


def _ritz(basis: Tensor, projected: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    rotation, _ = leading_directions(projected, len(projected) if rank is None else rank)
    return basis @ rotation, rotation.T @ projected


def _energy(matrix: Tensor) -> Tensor:
    """The sum of squares; row sums are added in fp64, so that differences are accurate."""
    return precise(torch.linalg.vector_norm(as_stored(matrix), dim=1)).square().sum()
