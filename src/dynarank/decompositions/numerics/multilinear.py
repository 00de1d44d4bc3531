"""Multilinear algebra: what decompositions with more than two factors are made of.

Legend: A (n, m) a matrix; Q (n, r) with orthonormal columns; W = join(f) a weight, linear in each
of its factors f; J the derivative of ``join`` at f, from changes of the factors to changes of W;
``pull`` is its transpose J'; c cotangents of the factors, M one of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dynarank.decompositions.geometry import Factors
from dynarank.decompositions.numerics.linalg import LinAlgError, UnfitWeightError, precise

__all__ = [
    "chain_energies",
    "equal_norms",
    "leading_basis",
    "lift",
    "lift_squares",
    "unit_scale",
]

_Join: TypeAlias = Callable[[Factors], Tensor]

# What is left of the normal equations, relative to their right-hand side, and the most steps.
RESIDUAL = {torch.float64: 1e-14}
LESS = 1e-6  # of factors below fp64, whose moments are not known more closely than that
STEPS = 500
# Of a large weight, where a step takes up to half a second (640 x 640 x 3 x 3, one core of an AMD
# EPYC, 2026-11), an average of noisy gradients is not worth more than this.
LARGE = 2**18
FEW_STEPS = 25
ROUGHLY = 1e-3


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


def equal_norms(factors: Sequence[Tensor], scale: float = 1.0) -> Factors:
    """The factors of ``scale`` times the same weight, all of one Frobenius norm.

    Where one is zero the weight is too and nothing need change: the others stay as they are, so
    that the zero one can learn.
    """
    norms = [factor.norm().item() for factor in factors]
    if not all(norms):
        return tuple(factors)
    size = math.exp((math.log(scale) + sum(map(math.log, norms))) / len(norms))
    return tuple(factor * (size / norm) for factor, norm in zip(factors, norms, strict=True))


def lift(join: _Join, factors: Factors, cotangents: Factors) -> Tensor:
    """The least M for which ``J' M`` is nearest to c: ``M = (J')+ c``.

    By conjugate gradients on ``J J' M = J c`` from zero, in fp64, without forming J (Hestenes and
    Stiefel 1952, as CGLS). These equations can always be solved, though the factors' gauge makes
    ``J' J`` singular; and M stays in J's range, which makes it the least one. Steps end when the
    residual is down to 1e-14 (factors in fp64; else 1e-6) of where it began, or after 500; of a
    weight of more than 2^18 entries, at 1e-3 or after 25.
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
        lifted = lifted + step * direction
        missing = tuple(m - step * p for m, p in zip(missing, pulled, strict=True))
        gradient = _push(join, exact, missing)
        before, size = size, gradient.square().sum().item()
        direction = gradient + (size / before) * direction
    return lifted.to(cotangents[0].dtype)


def _push(join: _Join, factors: Factors, changes: Factors) -> Tensor:
    """``J changes``: the join of each change with the other factors, summed (Leibniz)."""
    terms = [join((*factors[:i], d, *factors[i + 1 :])) for i, d in enumerate(changes)]
    return sum(terms[1:], start=terms[0])


def chain_energies(factors: Factors) -> Factors:
    """``||dW/df_e||^2`` for each entry e of each factor of a chain of dense convolutions.

    An entry that leads from channel a to channel b has the energy of what reaches a times that of
    what leaves b, whatever its kernel position: (b, a, 1, ...).
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
    """An estimate of E[M * M]: the product of what each factor says of it.

    If the entries of M are uncorrelated, a factor's entry e has ``E[(J' M)_e^2] = sum_j J_je^2
    E[M_j^2]``, so that its square over its energy ``sum_j J_je^2`` is a mean of E[M * M] over the
    entries of W that depend on e. Each entry of W is given the mean of these ratios over the
    factor's entries it depends on: the factor's *profile* over W. The estimate is the profiles'
    product, each over its mean, times the geometric mean of these. Exact where E[M * M] is constant
    and, for ``up @ down``, where it has rank one (Adafactor's assumption). Entries without energy
    are left out; a profile of which nothing is known is flat.

    Args:
        join: whose terms are products of factors' entries, with no minus.
        energies: each entry's energy, in a shape that broadcasts to its factor's.
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
