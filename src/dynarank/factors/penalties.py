"""Gradients of penalties on factors, in closed form. Pure tensor functions.

Legend: W (n, m) = U D, D = down (r, m), U = up (n, r); F a factor as a tall matrix (..., m, r).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynarank.decompositions import Decomposition, Factors

__all__ = [
    "frobenius_gradients",
    "orthogonality_gradient",
    "srip_gradient",
    "tall_matrices",
    "through_norms",
]


def frobenius_gradients(decomposition: Decomposition, factors: Factors) -> Factors:
    """The gradients of ``1/2 ||join(factors)||_F^2``: ``pull(factors, join(factors))``.

    For an SVD pair ``(U'U) D`` and ``U (D D')``: 2 r^2 (m + n) multiplications, W never formed.
    """
    if not decomposition.is_pair:
        return decomposition.pull(factors, decomposition.join(factors))
    down, up = (f.flatten(1).unflatten(0, (decomposition.groups, -1)) for f in factors)
    pulled = (up.mT @ up) @ down, up @ (down @ down.mT)
    return tuple(g.reshape(f.shape) for g, f in zip(pulled, factors, strict=True))


def orthogonality_gradient(tall: Tensor) -> Tensor:
    """``4 F (F'F - I)``, the gradient of ``||F'F - I||_F^2``; F (..., m, r)."""
    return 4 * tall @ _excess(tall)


def srip_gradient(tall: Tensor, iterations: int = 10) -> Tensor:
    """``2 sign(mu) F v v'`` with the top eigenpair (mu, v) of ``F'F - I``; F (..., m, r)."""
    excess = _excess(tall)  # (..., r, r)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(tall.shape[-1], 1, generator=generator, dtype=torch.float64)
    vector = start.to(tall).expand(*tall.shape[:-2], -1, -1)
    tiny = torch.finfo(tall.dtype).tiny
    for _ in range(iterations):
        vector = excess @ vector
        vector = vector / vector.norm(dim=-2, keepdim=True).clamp(min=tiny)
    value = vector.mT @ excess @ vector  # (..., 1, 1)
    return 2 * value.sign() * (tall @ vector) @ vector.mT


def tall_matrices(decomposition: Decomposition, factors: Factors) -> tuple[Tensor, Tensor]:
    """The first factor transposed (groups, m, r) and the last (groups, n, r), as matrices."""
    ends, groups = (factors[0], factors[-1]), decomposition.groups
    first, last = (f.flatten(1).unflatten(0, (groups, -1)) for f in ends)
    return first.mT, last


def through_norms(rule: Callable[[Tensor], Tensor], tall: Tensor) -> Tensor:
    """The gradient by F where ``rule`` is that by N = F with columns of norm 1; 0 where F is 0."""
    norms = tall.norm(dim=-2, keepdim=True)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    unit = tall * inverse
    gradient = rule(unit)
    return (gradient - unit * (unit * gradient).sum(-2, keepdim=True)) * inverse


def _excess(tall: Tensor) -> Tensor:
    gram = tall.mT @ tall
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
