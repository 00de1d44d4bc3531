"""Accelerated alternating least squares for a sum of rank-one tensors, with several starts.

Legend: W (n_1, ..., n_N) the tensor, its entries at most 1; one factor (n_j, r) per mode, so that
the outer products of their columns sum to about W; ``error`` the squared norm of the residual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dynarank.decompositions.geometry import Factors
from dynarank.decompositions.numerics.linalg import LinAlgError
from dynarank.decompositions.numerics.multilinear import leading_basis

__all__ = ["fit", "slice_start", "sum_of_products"]

# A sweep that lowers the error by less than this fraction of it is the last one.
GAIN = 1e-5
SWEEPS = 200
TRIAL, FINALISTS = 15, 3  # after TRIAL sweeps only the best FINALISTS starts continue
# Several starts lower the error by up to 1% where there are few entries, and by less than 0.1%
# where there are many (64 x 64 x 3 x 3), where a sweep costs more.
RANDOM_STARTS = 6
FEW = 2**16
TINY = 2**12  # here sweeps are cheap and local minima differ most, so that all starts continue
# A component of more than this many times W's norm must be canceled by another one.
BOUND = 1e3
# How far a sweep starts beyond the last one, at most; and how firmly a factor is held where the
# others leave it undetermined, relative to their Gram matrix.
MOMENTUM = 0.9
HOLD = 1e-8


def fit(tensor: Tensor, rank: int, fine: bool) -> Factors:
    """Fit factors of ``rank`` by alternating least squares, the best of several starts.

    The first start is exact at the largest rank, and no sweeps are needed there. The result is
    always finite and bounded: the starts are, and only better bounded results replace them.

    Args:
        tensor: W, of three modes or more.
        rank: r, at most the number of entries over the largest dimension.
        fine: whether to resolve directions below 1e-8 of the largest.
    """
    total = tensor.double().square().sum().item()
    first = slice_start(tensor, rank, fine)
    left = (tensor - sum_of_products(first)).double().square().sum().item()
    if left <= (10 * torch.finfo(tensor.dtype).eps) ** 2 * total:
        return first
    if tensor.numel() > FEW:
        return _refine(tensor, first, left, SWEEPS, total)[0]
    starts = [(first, left), *((start, math.inf) for start in _other_starts(tensor, rank))]
    trials = [_refine(tensor, *start, TRIAL, total) for start in starts]
    going_on = len(trials) if tensor.numel() <= TINY else FINALISTS
    best = sorted(trials, key=lambda trial: trial[1])[:going_on]
    finals = [_refine(tensor, *trial, SWEEPS - TRIAL, total) for trial in best]
    return min(finals, key=lambda final: final[1])[0]


def sum_of_products(factors: Sequence[Tensor]) -> Tensor:
    """The sum of rank-one tensors, ``W[i, j, ...] = sum_c a[i, c] b[j, c] ...``."""
    first, *others = factors
    sizes = [factor.shape[0] for factor in factors]
    return (first @ _products(others).T).reshape(sizes)


def slice_start(tensor: Tensor, rank: int, fine: bool) -> Factors:
    """A start from the largest singular triplets of W's slices, matrices of the two largest modes.

    The other modes are first rotated to their singular vectors (HOSVD), so that few slices contain
    most of W. Given these vectors in the other modes, no choice of components is better; at rank
    (entries / largest dimension) all triplets are included and the sum is exact.
    """
    large, small, *others = sorted(range(tensor.ndim), key=lambda mode: -tensor.shape[mode])
    rotated, bases = tensor.permute(large, small, *others), list[Tensor]()
    for mode in range(2, tensor.ndim):
        unfolded = rotated.movedim(mode, 0).flatten(1)
        bases.append(leading_basis(unfolded, len(unfolded), fine))
        rotated = (rotated.movedim(mode, -1) @ bases[-1]).movedim(-1, mode)
    slices = rotated.flatten(2).movedim(2, 0)  # (slices, large, small)
    right = _right_vectors(slices, fine)  # (slices, small, triplets)
    left = slices @ right
    count = left.shape[2]
    chosen = left.square().sum(1).flatten().topk(rank).indices
    which, triplet = chosen // count, chosen % count
    factors: dict[int, Tensor] = {
        large: left[which, :, triplet].T,
        small: right[which, :, triplet].T,
    }
    places = torch.unravel_index(which, rotated.shape[2:])
    for mode, basis, place in zip(others, bases, places, strict=True):
        factors[mode] = basis[:, place]
    return tuple(factors[mode] for mode in range(tensor.ndim))


def _right_vectors(slices: Tensor, fine: bool) -> Tensor:
    """The right singular vectors of each slice, from its Gram matrix unless ``fine``."""
    if fine:
        return torch.linalg.svd(slices, full_matrices=False)[2].mT
    return torch.linalg.eigh(slices.mT @ slices)[1]


def _other_starts(tensor: Tensor, rank: int) -> Iterator[Factors]:
    """One start from singular vectors of the unfoldings, padded at random; then random starts."""
    generator = torch.Generator("cpu").manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # as the generator
    for trial in range(1 + RANDOM_STARTS):
        factors = [
            torch.randn(size, rank, generator=generator, **options).to(tensor)
            for size in tensor.shape
        ]
        for mode, factor in enumerate(factors if trial == 0 else []):
            basis = torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False)[0]
            factor[:, : basis.shape[1]] = basis[:, :rank]
        yield tuple(factors)


def _refine(
    tensor: Tensor, start: Factors, error: float, sweeps: int, total: float
) -> tuple[Factors, float]:
    """Sweep from ``start``, whose error is given, while the error falls; also the final error.

    A sweep starts from the extrapolation ``best + momentum (best - previous)``. If the result is
    not better, bounded and finite, the next sweep restarts from the best (Mitchell, Ye and De
    Sterck, arXiv 1810.05846, 2018); if that fails too, the iteration ends.
    """
    best, previous, momentum = start, start, 0.0
    for _ in range(sweeps):
        point = tuple(b + momentum * (b - p) for b, p in zip(best, previous, strict=True))
        try:
            swept, left = _sweep(tensor, point, total)
        except LinAlgError:  # a Gram matrix that is not finite or not positive
            swept, left = point, math.inf
        if left < error:  # false for nan
            gain, error = error - left, left
            previous, best, momentum = best, swept, min(momentum + 0.1, MOMENTUM)
            if gain <= GAIN * error or error <= torch.finfo(torch.float64).eps * total:
                break
        elif previous is best:
            break
        else:
            previous, momentum = best, momentum / 2
    return best, error


def _sweep(tensor: Tensor, factors: Factors, total: float) -> tuple[Factors, float]:
    """Optimize each factor in turn given the others; the error is infinite if unbounded.

    The contraction shared by the small modes is computed once: two products of W's size in all.
    """
    first, second, *small = factors
    over = _products(small)  # (n_3 ... n_N, r)
    matrix = tensor.flatten(1)
    weights = (second[:, None] * over).flatten(0, 1)  # (n_2 n_3 ... n_N, r)
    first, _ = _solve(matrix @ weights, first, [second, *small])
    inner = (matrix.T @ first).unflatten(0, (len(second), -1))  # (n_2, n_3 ... n_N, r)
    second, error = _solve((inner * over).sum(1), second, [first, *small])
    core = (inner * second[:, None]).sum(0).unflatten(0, [len(factor) for factor in small])
    for mode in range(len(small)):
        others = [f for i, f in enumerate(small) if i != mode]
        fibers = core.movedim(mode, 0).reshape(core.shape[mode], -1, core.shape[-1])
        products = (fibers * _products(others)).sum(1) if others else fibers[:, 0]
        small[mode], error = _solve(products, small[mode], [first, second, *others])
    swept = _even((first, second, *small))
    sizes = torch.stack([factor.double().norm(dim=0) for factor in swept]).prod(0)
    bounded = bool((sizes <= BOUND * math.sqrt(total)).all())  # false for nan
    return swept, total + error if bounded else math.inf


def _solve(products: Tensor, old: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Solve the regularized least squares ``X (G + h) = products + h old``; also ``error - total``.

    G is the Gram matrix of the other factors' products. Directions that they do not determine are
    unchanged.
    """
    gram = torch.ones(old.shape[1], old.shape[1], dtype=torch.float64, device=old.device)
    for other in others:
        gram = gram * (other.double().T @ other.double())
    hold = HOLD * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
    held = gram + hold * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    exact = products.double()
    new = torch.cholesky_solve((exact + hold * old.double()).T, torch.linalg.cholesky(held)).T
    error = (gram * (new.T @ new)).sum() - 2 * (exact * new).sum()
    return new.to(old.dtype), error.item()


def _products(factors: Sequence[Tensor]) -> Tensor:
    """The Khatri-Rao product: the flattened outer product of the factors, column by column."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).flatten(0, 1)
    return product


def _even(factors: Factors) -> Factors:
    """Rescale the vectors of each component to equal norms; zero components are unchanged."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])  # (N, r)
    size = norms.log().mean(0).exp()
    scales = torch.where(size > 0, size / norms, 1.0)
    return tuple(factor * scale for factor, scale in zip(factors, scales, strict=True))
