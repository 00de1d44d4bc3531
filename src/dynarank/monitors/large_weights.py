"""Singular values of weights that are in memory once, as stored, and never as a whole in fp64.

The Gram matrix of the shorter side is the sum of those of blocks of columns, each converted to fp64
alone; the weight itself is gone before the eigenvalues are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dynarank.decompositions import LinAlgError, UnfitWeightError, precise
from dynarank.monitors.singular_values import resolved, singular_values

__all__ = ["large_singular_values"]

_BLOCK = 1 << 22  # values converted at a time: 32 MiB in fp64
_CHUNKS = 8  # of rows, up to the diagonal of the Gram matrix: 9/16 of its FLOPs


def large_singular_values(
    read: Callable[[], Tensor], device: torch.device, room: int, block: int = _BLOCK
) -> Tensor:
    """The singular values of a weight (out, in, *kernel), largest first, in fp64 on the CPU.

    As :func:`singular_values` with ``exact``; but where the Gram matrix in fp64 and the copy that
    its eigenvalues need do not fit in ``room``, it is one in fp32 first, which is as accurate as
    that function without ``exact``: rank metrics within 0.5%.

    Args:
        read: reads the weight; called again if the first method does not resolve it.
        device: where to compute.
        room: bytes of memory.
        block: weights of at most so many values are converted at once, larger ones in blocks.

    Raises:
        UnfitWeightError: a value is not finite, or the decomposition does not converge.

    Example:
        >>> weight = torch.diag(torch.tensor([1.0, 3.0]))
        >>> large_singular_values(lambda: weight, torch.device("cpu"), 0, block=2).tolist()
        [3.0, 1.0]
    """
    held = [read()]
    if held[0].numel() <= block or held[0].dtype == torch.float64:
        return singular_values(held[0].to(device), exact=True).cpu()
    side = min(held[0].shape[0], held[0][0].numel())

    def take() -> Tensor:  # the only reference to it
        return held.pop() if held else read()

    dtypes = (torch.float64,) if 16 * side * side <= room else (torch.float32, torch.float64)
    for dtype in dtypes if device.type != "mps" else (torch.float32,):
        try:
            values = _by_blocks(take, dtype, device, block)
        except LinAlgError:
            continue
        if torch.isfinite(values).all() and (dtype == torch.float64 or resolved(values)):
            return values
    return singular_values(read().to(device), exact=True).cpu()


def _by_blocks(
    take: Callable[[], Tensor], dtype: torch.dtype, device: torch.device, block: int
) -> Tensor:
    gram, scale = _gram(take(), dtype, device, block)
    return precise(torch.linalg.eigvalsh(gram)).clamp(min=0).sqrt().flip(0).cpu() * scale


def _gram(
    weight: Tensor, dtype: torch.dtype, device: torch.device, block: int
) -> tuple[Tensor, float]:
    """The lower triangle of the Gram matrix of the shorter side, scaled by 4^-k, and 2^k."""
    matrix = weight.flatten(1)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    scale = _power_of_two(matrix)
    side = matrix.shape[0]
    lower = torch.zeros(side, side, dtype=dtype, device=device)
    for part in matrix.split(max(block // side, 1), dim=1):
        part = part.to(device).to(dtype)
        if scale != 1:
            part /= scale
        for i in range(_CHUNKS):
            rows, end = (
                slice(i * side // _CHUNKS, (i + 1) * side // _CHUNKS),
                (i + 1) * side // _CHUNKS,
            )
            lower[rows, :end].addmm_(part[rows], part[:end].T)
    return lower, scale


def _power_of_two(matrix: Tensor) -> float:
    """Of the largest value, if squares of the values could overflow or vanish; else 1."""
    stored = matrix.T if matrix.T.is_contiguous() else matrix
    largest = max(abs(float(end)) for end in torch.aminmax(stored))
    if not math.isfinite(largest):
        raise UnfitWeightError("the weight has NaN or infinite values")
    return 1.0 if largest == 0 or 1e-12 < largest < 1e12 else 2.0 ** (math.frexp(largest)[1] - 1)
