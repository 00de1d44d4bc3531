"""Multilinear algebra for decompositions with more than two factors.

Legend: A (n, m) a matrix; Q (n, r) with orthonormal columns; W = join(f) a weight, linear in each
of its factors f; J the Jacobian of ``join`` at f, from changes of the factors to changes of W;
``pull`` is its transpose J'; c cotangents of the factors, M one of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dynarank.decompositions.geometry import Factors
from dynarank.decompositions.numerics.linalg import UnfitWeightError, as_unfit, precise

__all__ = [
    "chain_energies",
    "equal_norms",
    "leading_basis",
    "lift",
    "lift_squares",
    "nearest_changes",
    "unit_scale",
]

_Join: TypeAlias = Callable[[Factors], Tensor]

# The residual of the normal equations at which to stop, relative to their right-hand side, and the
# largest number of steps.
RESIDUAL = {torch.float64: 1e-14}
LESS = 1e-6  # for factors below fp64, whose moments are no more accurate than that
STEPS = 500
# For a large weight, where a step takes up to half a second (640 x 640 x 3 x 3, one core of an AMD
# EPYC, 2026-11), an average of noisy gradients does not justify more than this.
LARGE = 2**18
FEW_STEPS = 25
ROUGHLY = 1e-3


def leading_basis(matrix: Tensor, rank: int, fine: bool = False) -> Tensor:
    """The first r left singular vectors Q of A, r <= min(n, m).

    Computed from the smaller Gram matrix, which resolves directions down to 1e-8 of the largest (in
    fp64) at a fraction of the cost of an SVD.

    Args:
        matrix: A (n, m), in the precision to compute in.
        rank: r.
        fine: use an SVD instead, if directions below 1e-8 of the largest matter.

    Raises:
        UnfitWeightError: the eigenvalues do not converge.
    """
    with as_unfit(f"the singular vectors of an unfolding of shape {tuple(matrix.shape)} failed"):
        if fine:
            return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
        if matrix.shape[0] <= matrix.shape[1]:
            return torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
        right = torch.linalg.eigh(matrix.T @ matrix)[1].flip(1)[:, :rank]
        return torch.linalg.qr(matrix @ right)[0]


def unit_scale(weight: Tensor) -> tuple[Tensor, float]:
    """The weight over its largest absolute entry, in fp64, and that entry (1 if all are zero).

    Raises:
        UnfitWeightError: ``weight`` is not finite.
    """
    scale = precise(weight).abs().max().item()
    if not math.isfinite(scale):
        raise UnfitWeightError(
            f"a weight of shape {tuple(weight.shape)} has entries that are not finite"
        )
    scale = scale or 1.0
    return precise(weight) / scale, scale


def equal_norms(factors: Sequence[Tensor], scale: float = 1.0) -> Factors:
    """Rescale the factors to equal Frobenius norms, and their weight by ``scale``.

    If a factor is zero, so is the weight, and the factors are unchanged: the others stay nonzero,
    so that the zero one can learn.
    """
    norms = [factor.norm().item() for factor in factors]
    if not all(norms):
        return tuple(factors)
    size = math.exp((math.log(scale) + sum(map(math.log, norms))) / len(norms))
    return tuple(factor * (size / norm) for factor, norm in zip(factors, norms, strict=True))


def lift(join: _Join, factors: Factors, cotangents: Factors, most: float = math.inf) -> Tensor:
    """The least-norm solution M of the least-squares problem ``J' M = c``: ``M = (J')+ c``.

    By conjugate gradients on ``J J' M = J c`` from zero, in fp64, without forming J (CGLS, Hestenes
    and Stiefel 1952). These equations always have a solution, though the gauge freedom of the
    factors makes ``J' J`` singular; M stays in the range of J, so that its norm is the least.
    Iterations end at a relative residual of 1e-14 (factors in fp64; else 1e-6), or after 500; for a
    weight of more than 2^18 entries, at 1e-3 or after 25. Or before M's norm exceeds ``most``: it
    grows with every iteration, the small directions of J coming last.
    """
    exact = tuple(precise(factor) for factor in factors)
    missing = tuple(precise(cotangent) for cotangent in cotangents)
    pull = torch.func.vjp(lambda *f: join(f), *exact)[1]
    gradient = _push(join, exact, missing)
    direction, lifted = gradient, torch.zeros_like(gradient)
    size = first = gradient.square().sum().item()
    large = gradient.numel() > LARGE
    enough = first * (ROUGHLY if large else RESIDUAL.get(factors[0].dtype, LESS)) ** 2
    for _ in range(FEW_STEPS if large else STEPS):
        pulled: Factors = pull(direction)
        curvature = sum(part.square().sum().item() for part in pulled)
        if size <= enough or curvature == 0:
            break
        step = size / curvature
        further = lifted + step * direction
        if not further.norm() <= most:
            break
        lifted = further
        missing = tuple(m - step * p for m, p in zip(missing, pulled, strict=True))
        gradient = _push(join, exact, missing)
        before, size = size, gradient.square().sum().item()
        direction = gradient + (size / before) * direction
    return lifted.to(cotangents[0].dtype)


def nearest_changes(join: _Join, factors: Factors, change: Tensor) -> Factors:
    """The least-norm solution d of the least-squares problem ``J d = D``, in fp64.

    The counterpart of :func:`lift`, by conjugate gradients on ``J' J d = J' D`` (CGLS), with the
    same limits. What is left, r = D - J d, need not be small, so iterations also end where ``J' r``
    is rounding, below 1e-13 of ``|J| |r|``; |J| is the largest ``|J d| / |d|`` seen.
    """
    exact, missing = tuple(precise(factor) for factor in factors), precise(change)
    pull = torch.func.vjp(lambda *f: join(f), *exact)[1]
    gradient: Factors = pull(missing)
    direction, found = gradient, tuple(map(torch.zeros_like, exact))
    size = first = _energy(gradient)
    large, gain = missing.numel() > LARGE, 0.0
    enough = ROUGHLY if large else RESIDUAL[torch.float64]
    for _ in range(FEW_STEPS if large else STEPS):
        pushed = _push(join, exact, direction)
        curvature = pushed.square().sum().item()
        if size <= enough**2 * first or curvature == 0:
            break
        gain = max(gain, curvature / _energy(direction))
        if size <= 1e-26 * gain * missing.square().sum().item():
            break
        found = tuple(f + (size / curvature) * d for f, d in zip(found, direction, strict=True))
        missing = missing - (size / curvature) * pushed
        gradient = pull(missing)
        before, size = size, _energy(gradient)
        pairs = zip(gradient, direction, strict=True)
        direction = tuple(g + (size / before) * d for g, d in pairs)
    return found


def _energy(parts: Factors) -> float:
    return sum(part.square().sum().item() for part in parts)


def _push(join: _Join, factors: Factors, changes: Factors) -> Tensor:
    """``J changes``: the sum of the joins of each change with the other factors (product rule)."""
    terms = [join((*factors[:i], d, *factors[i + 1 :])) for i, d in enumerate(changes)]
    return sum(terms[1:], start=terms[0])


def chain_energies(factors: Factors) -> Factors:
    """The energies ``||dW/df_e||^2`` of the entries e of a chain of dense convolutions.

    The energy of an entry from channel a to channel b is that of the chain before a times that of
    the chain after b, at every kernel position: (b, a, 1, ...).
    """
    slices = [factor.flatten(2) if factor.ndim > 2 else factor[..., None] for factor in factors]
    reach, leave = [_eye(slices[0], 1)], [_eye(slices[-1], 0)]  # Gram matrices between the factors
    for factor in slices[:-1]:
        reach.append(torch.einsum("bak,ac,dck->bd", factor, reach[-1], factor))
    for factor in reversed(slices[1:]):
        leave.insert(0, torch.einsum("bak,bd,dck->ac", factor, leave[0], factor))
    return tuple(
        torch.outer(after.diagonal(), before.diagonal()).view(*f.shape[:2], *(1,) * (f.ndim - 2))
        for f, before, after in zip(factors, reach, leave, strict=True)
    )


def _eye(slices: Tensor, side: int) -> Tensor:
    return torch.eye(slices.shape[side], dtype=slices.dtype, device=slices.device)


def lift_squares(join: _Join, energies: Factors, squares: Factors) -> Tensor:
    """An estimate of the second moment E[M * M] of the weight from those of the factors.

    If the entries of M are uncorrelated, an entry e of a factor has ``E[(J' M)_e^2] = sum_j J_je^2
    E[M_j^2]``, so that its square over its energy ``sum_j J_je^2`` is a mean of E[M * M] over the
    entries of W that depend on e. The *profile* of a factor over W is, for each entry of W, the
    mean of these ratios over the factor's entries it depends on. The estimate is the product of the
    profiles, each divided by its mean, times the geometric mean of these means. It is exact if
    E[M * M] is constant and, for ``up @ down``, if it has rank one (as in Adafactor). Entries
    without energy are ignored; a profile without information is flat.

    Args:
        join: a function whose terms are products of the factors' entries, all with positive sign.
        energies: the energy of each entry, in a shape that broadcasts to its factor's.
        squares: E[(J' M)^2] in the factors' shapes.
    """
    ones = tuple(torch.ones_like(square) for square in squares)
    flat = torch.ones_like(join(ones))
    lifted, means = flat, list[Tensor]()
    for i, (square, energy) in enumerate(zip(squares, energies, strict=True)):
        live = (energy > torch.finfo(energy.dtype).eps * energy.max()).expand_as(square)
        ratios = torch.where(live, square / torch.where(live, energy, 1.0), 0.0)
        total, count = (
            join((*ones[:i], each, *ones[i + 1 :])) for each in (ratios, live.to(square.dtype))
        )
        profile = torch.where(count > 0, total / count, 0.0)
        if profile.any():
            means.append(profile.mean())
            lifted = lifted * (profile / means[-1])
    return lifted * torch.stack(means).log().mean().exp() if means else 0 * flat
