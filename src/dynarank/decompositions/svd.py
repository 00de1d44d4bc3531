"""The singular value decomposition: W = up @ down, a kernel into r channels, then 1x1 out of them.

Legend: W (n, m) the matricized weight, n = out, m = in * kernel positions; r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynarank.decompositions.base import Decomposition
from dynarank.decompositions.geometry import Factors, Geometry
from dynarank.decompositions.numerics.linalg import (
    as_unfit,
    as_unit,
    balance,
    leading_directions,
    recompress,
)
from dynarank.decompositions.numerics.subspace import follow

__all__ = ["SVD"]


class SVD(Decomposition):
    """``W = up @ down`` with ``down`` (r, in, *kernel) and ``up`` (out, r, 1, ...).

    The truncation of rank r has the least possible Frobenius error, sqrt(sum_{i>r} s_i^2)
    (Eckart and Young 1936). The factors are balanced, ``up' up == down down' == diag(s)``, which is
    the spectral initialization of Khodak et al. (arXiv 2105.01029) when W is an initial weight.
    """

    name = "svd"
    is_pair = True
    truncates_optimally = True

    def limit(self, shape: Sequence[int]) -> int:
        """min(n, m)."""
        return min(shape[0], math.prod(shape[1:]))

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        """``down`` (r, in, *kernel), ``up`` (out, r, 1, ...)."""
        ones = (1,) * (len(shape) - 2)
        return (rank, *shape[1:]), (shape[0], rank, *ones)

    def split(self, weight: Tensor, rank: int, start: Factors | None = None) -> Factors:
        """The best rank-r factors of ``weight``, balanced, in its precision (fp32 at least).

        Args:
            weight: (out, in, *kernel).
            rank: r.
            start: factors of a similar weight, of rank r or more: a step or two of subspace
                iteration from them replace the full decomposition where that is as good.
        """
        matrix = weight.detach().flatten(1)
        if len(matrix) > matrix.shape[1]:  # the transposed problem: it is wide
            rows = None if start is None else start[1].flatten(1).T
            left, right = _split_wide(matrix.T, rank, rows)
            return self._shaped(left.T, right.T, weight.shape)
        rows = None if start is None else start[0].flatten(1)
        up, down = _split_wide(matrix, rank, rows)
        return self._shaped(down, up, weight.shape)

    def refactor(self, factors: Factors, rank: int) -> Factors:
        """Factors of another rank from factors, in product form: O((n + m) r^2)."""
        down, up = factors
        small = recompress(down.detach().flatten(1), up.detach().flatten(1), rank)
        return self._shaped(*small, (up.shape[0], *down.shape[1:]))

    def _shaped(self, down: Tensor, up: Tensor, shape: Sequence[int]) -> Factors:
        shapes = self.shapes(shape, down.shape[0])
        return down.reshape(shapes[0]), up.reshape(shapes[1])

    @as_unfit("the factors cannot be balanced")
    def balanced(self, factors: Factors) -> Factors:
        """``U'U == D D' == diag(s)``, by two QR and one r x r SVD.

        A direction in which the product is zero keeps a live ``up`` and a ``down`` of about zero:
        with both at zero it would never receive a gradient.
        """
        down, up = (factor.flatten(1) for factor in factors)
        left, left_core = torch.linalg.qr(up)  # (n, r), (r, r)
        right, right_core = torch.linalg.qr(down.T)  # (m, r), (r, r)
        a, values, b = torch.linalg.svd(left_core @ right_core.T)
        live = values > torch.finfo(values.dtype).eps * max(len(up), down.shape[1]) * values[0]
        floor = values[live].min() if live.any() else torch.ones_like(values[0])
        root = torch.where(live, values, floor).sqrt()
        new_up, new_down = left @ (a * root), (values / root)[:, None] * b @ right.T
        return new_down.reshape(factors[0].shape), new_up.reshape(factors[1].shape)

    def join(self, factors: Factors) -> Tensor:
        """``up @ down``, in the weight's shape."""
        down, up = factors
        return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])

    def join_flops(self, shape: Sequence[int], rank: int) -> int:
        """2 n m r."""
        return 2 * math.prod(shape) * rank

    def pull_flops(self, shape: Sequence[int], rank: int) -> int:
        """A product for each factor."""
        return 2 * self.join_flops(shape, rank)

    def pull(self, factors: Factors, cotangent: Tensor) -> Factors:
        """``up' G`` and ``G down'``."""
        down, up = factors
        gradient = cotangent.reshape(len(cotangent), -1)  # (n, m); vmap knows no flatten
        pulled = up.flatten(1).T @ gradient, gradient @ down.flatten(1).T
        return pulled[0].reshape(down.shape), pulled[1].reshape(up.shape)

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        """``down`` slides as the weight does; ``up`` is pointwise."""
        return geometry, Geometry.pointwise(len(geometry.stride))

    def energies(self, factors: Factors) -> Factors:
        """``||U_k||^2`` for each row k of ``down``, ``||D_k||^2`` for each column of ``up``."""
        down, up = factors
        rows, columns = up.flatten(1).square().sum(0), down.flatten(1).square().sum(1)
        of_down = rows.view(-1, *(1,) * (down.ndim - 1)).expand_as(down)
        return of_down, columns.view(1, -1, *(1,) * (up.ndim - 2)).expand_as(up)

    def lift(self, factors: Factors, cotangents: Factors) -> Tensor:
        """The least M with ``M down' = C_up`` and ``up' M = C_down``.

        ``M = C_up D+ + U+ C_down - U+ (U' C_up + C_down D') D+ / 2`` with
        ``D+ = (D D')^-1 D`` and ``U+ = U (U' U)^-1``: the projection of the true M on the tangent
        space of the rank-r matrices. What M had outside it was never observed.
        """
        down, up = (factor.flatten(1) for factor in factors)  # (r, m), (n, r)
        c_down, c_up = (cotangent.flatten(1) for cotangent in cotangents)
        d_plus = torch.linalg.pinv(down @ down.T, hermitian=True) @ down  # (r, m)
        u_plus = up @ torch.linalg.pinv(up.T @ up, hermitian=True)  # (n, r)
        core = (up.T @ c_up + c_down @ down.T) / 2  # (r, r)
        lifted = c_up @ d_plus + u_plus @ c_down - u_plus @ core @ d_plus
        return lifted.reshape(up.shape[0], *factors[0].shape[1:])

    def lift_squares(self, factors: Factors, squares: Factors) -> Tensor:
        """An outer product from row and column means, ``v_ij = row_i col_j / mean``.

        ``row_i = mean_k v_up[i, k] / ||D_k||^2``, ``col_j = mean_k v_down[k, j] / ||U_k||^2``:
        exact where the entries of G are uncorrelated and E[G * G] has rank one (Adafactor's
        assumption).
        """
        down, up = (factor.flatten(1) for factor in factors)
        v_down, v_up = (square.flatten(1) for square in squares)
        row = _mean_over_live(v_up, down.square().sum(1))  # (n,)
        col = _mean_over_live(v_down.T, up.square().sum(0))  # (m,)
        if not row.any():
            row = col.mean().expand_as(row)
        if not col.any():
            col = row.mean().expand_as(col)
        mean = (row.mean() * col.mean()).sqrt()
        lifted = torch.outer(row, col) / mean if mean > 0 else torch.outer(row, col)
        return lifted.reshape(up.shape[0], *factors[0].shape[1:])


def _split_wide(matrix: Tensor, rank: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors (n, r), (r, m) of an (n, m) matrix with n <= m, from ``rows`` (k, m) if they help."""
    matrix, scale = as_unit(matrix)
    found = None if rows is None else _from_rows(matrix, rank, rows)
    if found is None:
        basis, _ = leading_directions(matrix, rank)
        found = basis, basis.T @ matrix
    left, right = balance(*found)
    return left * scale.sqrt(), right * scale.sqrt()


def _from_rows(matrix: Tensor, rank: int, rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Directions by subspace iteration from ``rows`` (k, m); None if these are of no use here."""
    fits = rows.shape[1] == matrix.shape[1] and rank <= len(rows) <= len(matrix)
    if not fits or not torch.isfinite(rows.sum()):
        return None
    rows, _ = as_unit(rows.to(matrix.dtype))
    return follow(matrix, rows, rank)


def _mean_over_live(values: Tensor, energy: Tensor) -> Tensor:
    """Mean over k of ``values[:, k] / energy[k]``, leaving out directions without energy."""
    live = energy > torch.finfo(energy.dtype).eps * energy.max()
    if not live.any():
        return values.new_zeros(values.shape[0])
    return (values[:, live] / energy[live]).mean(1)
