"""From what factors knew of a gradient back to the weight's: for any multilinear ``join``.

Legend: J the derivative of ``join`` at the factors f, from changes of factors to changes of W;
``pull`` is its transpose J'; c cotangents of the factors, M one of the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynarank.decompositions.base import Factors, precise

__all__ = ["chain_energies", "lift", "lift_squares"]

# What is left of the normal equations, relative to their right-hand side, and the most steps.
RESIDUAL = {torch.float64: 1e-14}
LESS = 1e-6  # of factors below fp64, whose moments are not known more closely than that
STEPS = 500
# Of a large weight, where a step takes up to half a second (640 x 640 x 3 x 3, one core of an AMD
# EPYC, 2026-11), an average of noisy gradients is not worth more than this.
LARGE = 2**18
FEW_STEPS = 25
ROUGHLY = 1e-3


def lift(join: Callable[[Factors], Tensor], factors: Factors, cotangents: Factors) -> Tensor:
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


def _push(join: Callable[[Factors], Tensor], factors: Factors, changes: Factors) -> Tensor:
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


def lift_squares(energies: Factors, squares: Factors) -> Tensor:
    """An outer product of means over outputs, inputs and kernel positions, ``v = s x_o y_i z_k``.

    If the entries of M are uncorrelated, a factor's entry e has ``E[(J' M)_e^2] = sum_j J_je^2
    E[M_j^2]``, so that its square over its energy ``sum_j J_je^2`` is a mean of E[M * M]. The last
    factor gives the profile over outputs, the first that over inputs, those between over kernel
    positions; s is the geometric mean of the profiles' means. Exact where E[M * M] is constant.
    Entries without energy are left out; a profile of which nothing is known is flat.

    Args:
        energies: each entry's energy, in a shape that broadcasts to its factor's.
        squares: E[(J' M)^2] in the factors' shapes; the first factor and the last pointwise.
    """
    over = [(0,)] + [(0, 1)] * (len(squares) - 2) + [(1,)]
    profiles = [_profile(*each) for each in zip(squares, energies, over, strict=True)]
    known = [profile for profile in profiles if profile.any()]
    lifted = torch.ones_like(sum(profiles[1:], start=profiles[0]))
    if not known:
        return torch.zeros_like(lifted)
    for profile in known:
        lifted = lifted * (profile / profile.mean())
    return lifted * torch.stack([p.mean().log() for p in known]).mean().exp()


def _profile(squares: Tensor, energy: Tensor, over: tuple[int, ...]) -> Tensor:
    """Mean of ``squares / energy`` over channels, without those of no energy; 0 if none has any."""
    live = (energy > torch.finfo(energy.dtype).eps * energy.max()).expand_as(squares)
    ratios = torch.where(live, squares / torch.where(live, energy, 1.0), 0.0)
    return ratios.sum(over, keepdim=True) / live.sum(over, keepdim=True).clamp(min=1)
