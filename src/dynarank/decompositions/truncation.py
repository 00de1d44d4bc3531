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
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dynarank.decompositions.base import Decomposition
from dynarank.decompositions.geometry import Factors
from dynarank.decompositions.numerics.linalg import (
    RESOLVED,
    as_unfit,
    leading_directions,
    precise,
)
from dynarank.decompositions.numerics.principal import (
    Principal,
    principal_of_inputs,
    principal_of_outputs,
)

__all__ = ["ActivationStats", "output_energies", "project", "split_activation_aware"]


@dataclass(frozen=True)
class ActivationStats:
    """Second moments of a weight's inputs or outputs over calibration data.

    They remember the principal directions that were last computed from them, of whichever weight:
    ranks are chosen by their energies, and the weight is then projected on them.

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
    _memory: dict[str, Any] = field(
        default_factory=dict[str, Any], init=False, repr=False, compare=False
    )

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
        if "uncentered" in self._memory:
            return self._memory["uncentered"]
        mean = self.mean.to(self.second)
        second = self.second + mean[:, :, None] * mean[:, None]
        return self._memory.setdefault("uncentered", ActivationStats(self.side, second, self.count))


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
    if activity is None or not decomposition.truncates_optimally:
        return decomposition.split(weight, rank), None
    cuts = _cut(weight, rank, activity)
    if not decomposition.is_pair:
        return decomposition.split(_joined(cuts, weight), rank), _shift(cuts, activity)
    down, up = (torch.cat(parts) for parts in zip(*((c.down, c.up) for c in cuts), strict=True))
    shapes = decomposition.shapes(weight.shape, rank)
    factors = decomposition.balanced((down.reshape(shapes[0]), up.reshape(shapes[1])))
    return factors, _shift(cuts, activity)


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
        >>> project(torch.diag(torch.tensor([3.0, 1.0])), 1, quiet)[0].abs()
        tensor([[0., 0.],
                [0., 1.]])
    """
    cuts = _cut(weight, rank, activity)
    return _joined(cuts, weight), _shift(cuts, activity)


def output_energies(weight: Tensor, activity: ActivationStats | None = None) -> Tensor:
    """The eigenvalues of E[y y'], largest first: (groups or 1, min(n, m)) in fp64.

    Without statistics they are those of W W', the squared singular values, as for white inputs. The
    sum of all but the first r is the output error of a truncation to rank r.
    """
    if activity is None:
        matrix = precise(weight).flatten(1)
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        with as_unfit("the singular values cannot be computed"):
            return principal_of_outputs(matrix @ matrix.T, matrix.dtype).energies[None]
    activity.check(weight.shape)
    limit = min(weight.shape[0] // len(activity.second), weight[0].numel())
    return torch.stack([found.energies[:limit] for found in _principal(weight, activity)])


class _Cut(NamedTuple):
    """A group's weight ``up @ down`` after truncation, and the basis (n, r) of its outputs."""

    up: Tensor
    down: Tensor
    basis: Tensor
    matrix: Tensor  # the weight before, which maps to the outputs


def _cut(weight: Tensor, rank: int, activity: ActivationStats) -> list[_Cut]:
    """``P_r W`` of each group, in fp64 if the weight is, else in fp32."""
    activity.check(weight.shape)
    directions = _principal(weight, activity)
    smallest = RESOLVED[torch.float32] ** 2
    if rank and not all(found.resolves(rank, smallest) for found in directions):
        directions = _principal(weight, activity, torch.float64)
    cuts: list[_Cut] = []
    for found, matrix in zip(directions, _matrices(weight, activity), strict=True):
        basis = _kept(found, matrix, rank)
        down = basis.T @ matrix
        up, down = (down.T, basis.T) if activity.side == "row" else (basis, down)
        cuts.append(_Cut(up, down, basis, matrix))
    return cuts


def _joined(cuts: Sequence[_Cut], weight: Tensor) -> Tensor:
    """The truncated weight, as the weight is stored."""
    return torch.cat([cut.up @ cut.down for cut in cuts]).reshape(weight.shape).to(weight.dtype)


def _shift(cuts: Sequence[_Cut], activity: ActivationStats) -> Tensor | None:
    """The change of the bias (out,) in fp64, ``(I - P_r) E[y]``."""
    if activity.mean is None:
        return None
    lost: list[Tensor] = []
    for cut, mean in zip(cuts, activity.mean, strict=True):
        basis, mean = precise(cut.basis), precise(mean).to(cut.basis.device)
        mean = precise(cut.matrix) @ mean if activity.side == "input" else mean
        lost.append(mean - basis @ (basis.T @ mean))
    return torch.cat(lost)


def _matrices(
    weight: Tensor, activity: ActivationStats, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The matrix of each group that maps to the outputs: W, or W' for an embedding table."""
    units = weight.detach().to(dtype or _working(weight)).chunk(len(activity.second))
    return [unit.T if activity.side == "row" else unit.flatten(1) for unit in units]


def _working(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


class _Known(NamedTuple):
    """The principal directions of each group, and what they were computed from."""

    groups: list[Principal]
    dtype: torch.dtype
    written: int | None  # how often the statistics had been written to
    weight: Tensor | None  # none where the outputs were measured

    def fit(self, weight: Tensor, activity: ActivationStats, dtype: torch.dtype) -> bool:
        """Whether they are those of this weight and these statistics, at least as precise."""
        here = self.groups[0].basis.device == weight.device
        same = here and self.written == _written(activity.second)
        enough = self.dtype in (dtype, torch.float64)
        return same and enough and (self.weight is None or torch.equal(self.weight, weight))


def _written(tensor: Tensor) -> int | None:
    """The number of in-place writes to a tensor, as far as torch counts them."""
    return None if tensor.is_inference() else tensor._version


def _principal(
    weight: Tensor, activity: ActivationStats, dtype: torch.dtype | None = None
) -> list[Principal]:
    """The principal directions of each group's outputs, remembered by the statistics."""
    weight, dtype = weight.detach(), dtype or _working(weight)
    known: _Known | None = activity._memory.get("principal")  # pyright: ignore[reportPrivateUsage]
    if known is not None and known.fit(weight, activity, dtype):
        return known.groups
    seconds = activity.second.to(weight.device)
    with as_unfit("the output directions cannot be computed"):
        if activity.side == "input":
            pairs = zip(_matrices(weight, activity, dtype), seconds, strict=True)
            groups = [principal_of_inputs(matrix, second) for matrix, second in pairs]
        else:
            groups = [principal_of_outputs(second, dtype) for second in seconds]
    copy = weight.clone() if activity.side == "input" else None
    found = _Known(groups, dtype, _written(activity.second), copy)
    activity._memory["principal"] = found  # pyright: ignore[reportPrivateUsage]
    return groups


def _kept(found: Principal, matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis of the kept directions, (n, rank)."""
    # Second moments are sums of fp32 products: eigenvalues below this are rounding errors.
    noise = torch.finfo(torch.float32).eps * found.energies.sum()
    live = int((found.energies[:rank] > noise).sum())
    kept = found.basis[:, : min(rank, live)].to(matrix.dtype)
    if live >= min(rank, *matrix.shape):
        return kept
    rest = matrix - kept @ (kept.T @ matrix)
    return torch.cat([kept, leading_directions(rest, rank - live)[0].to(kept.dtype)], 1)
