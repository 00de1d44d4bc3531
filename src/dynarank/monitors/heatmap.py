"""Heatmaps of weights: mean absolute values of blocks."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["heatmap"]


@torch.no_grad()
def heatmap(weight: Tensor, size: int = 32) -> tuple[tuple[float, ...], ...]:
    """A heatmap of a weight: ``mean |W|`` over blocks of the matrix out x (in * kernel positions).

    Block (i, j) of k x l contains the rows from ``floor(i out / k)`` up to, but not including,
    ``floor((i + 1) out / k)``, and columns in the same way. Every entry is in exactly one block,
    and block sizes differ by at most one row or column.

    Args:
        weight: (out, in, *kernel).
        size: the largest number of blocks along each side.

    Returns:
        min(out, size) rows of min(in * positions, size) values.

    Raises:
        ValueError: fewer than two dimensions, or ``size`` below 1.

    Example:
        >>> heatmap(torch.tensor([[1.0, -3.0, 5.0], [1.0, 3.0, 0.0]]), 2)
        ((1.0, 4.0), (1.0, 1.5))
    """
    if weight.ndim < 2:
        raise ValueError(f"a weight has two or more dimensions, got shape {tuple(weight.shape)}")
    if size < 1:
        raise ValueError(f"a heatmap has 1 or more blocks along a side, got size={size}")
    matrix = weight.detach().flatten(1)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    bands = [band.abs().mean(0, dtype=wide) for band in matrix.split(_sizes(matrix.shape[0], size))]
    if not bands or not matrix.shape[1]:
        return ()
    columns = torch.stack(bands).split(_sizes(matrix.shape[1], size), 1)
    blocks = torch.stack([column.mean(1) for column in columns], 1)
    return tuple(map(tuple, blocks.tolist()))


def _sizes(length: int, size: int) -> list[int]:
    """The lengths of at most ``size`` blocks that cover ``length``."""
    blocks = min(length, size)
    edges = [i * length // blocks for i in range(blocks + 1)] if blocks else [0]
    return [stop - start for start, stop in pairwise(edges)]
