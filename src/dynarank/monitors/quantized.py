"""Numbers of 4 and 8 bits beside their scales, back to fp32. Pure tensor functions.

Legend: Q (n, m) the stored numbers, S (s0, s1) the scales, b0 x b1 the block that shares a scale:

    W[i, j] = Q[i, j] * S[i // b0, j // b1]

One scale for the whole tensor is b0 x b1 = n x m, one a row 1 x m, one a column n x 1; the last
block of a row or column may be cut. What DeepSeek-V3 calls ``weight_scale_inv`` multiplies too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_scale", "block_of", "multiply_blocks_", "unpack_fp4"]

# The blocks in use, most frequent first: fp8 of DeepSeek-V3 and Qwen3; MX formats; NVFP4; others.
_BLOCKS = (128, 32, 16, 64, 256, 512)
# E2M1 by its four bits: sign, two of exponent, one of mantissa (OCP Microscaling Formats 1.0).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ROWS = 1 << 20  # bytes unpacked at a time


def block_of(
    shape: Sequence[int], scales: Sequence[int], block: Sequence[int] = ()
) -> tuple[int, int] | None:
    """The block (b0, b1) that shares a scale; None if scales of this shape do not fit the weight.

    Args:
        shape: (out, in, *kernel); the matrix is (out, in * kernel positions).
        scales: the shape of the scales.
        block: (b0, b1), if a config tells.

    Example:
        >>> block_of((300, 512), (3, 4)), block_of((64, 48), (64,)), block_of((64, 48), ())
        ((128, 128), (1, 48), (64, 48))
    """
    rows, columns = shape[0], math.prod(shape[1:])
    sizes = _as_matrix(rows, columns, scales)
    told = tuple(block) if len(block) == 2 else (0, 0)
    if sizes is None:
        return None
    found = _side(rows, sizes[0], told[0]), _side(columns, sizes[1], told[1])
    return None if None in found else (found[0] or 1, found[1] or 1)


def _as_matrix(rows: int, columns: int, scales: Sequence[int]) -> tuple[int, int] | None:
    if math.prod(scales) == 1:
        return 1, 1
    if len(scales) == 1:
        return (rows, 1) if scales[0] == rows else (1, columns) if scales[0] == columns else None
    return scales[0], math.prod(scales[1:])


def _side(size: int, count: int, told: int) -> int | None:
    """How many entries of a side share a scale, if it has ``count`` of them."""
    if count in (1, size):
        return size // count
    for width in (told, *_BLOCKS):
        if width and -(-size // width) == count:
            return width
    return size // count if count and size % count == 0 else None


def multiply_blocks_(matrix: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply each block of a matrix (n, m) by its scale, in place.

    Example:
        >>> multiply_blocks_(torch.ones(3, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (2, 2))
        tensor([[1., 1., 2.],
                [1., 1., 2.],
                [3., 3., 4.]])
    """
    rows, columns = block
    scales = scales.reshape(-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns))
    parts = (
        [(matrix, scales)] if rows == 1 else zip(matrix.split(rows), scales.split(1), strict=True)
    )
    for part, of_part in parts:
        whole = part.shape[1] // columns
        if whole:
            blocks = part[:, : whole * columns].unflatten(1, (whole, columns))
            blocks.mul_(of_part[:, :whole, None])
        if whole * columns < part.shape[1]:
            part[:, whole * columns :].mul_(of_part[:, whole:])
    return matrix


def as_scale(stored: Tensor) -> Tensor:
    """Scales in fp32; bytes are exponents, 2^(b - 127), as in the MX formats.

    Example:
        >>> as_scale(torch.tensor([126, 129], dtype=torch.uint8))
        tensor([0.5000, 4.0000])
    """
    return torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()


def unpack_fp4(stored: Tensor) -> Tensor:
    """Two fp4 numbers (E2M1) a byte, the low four bits first: (n, m) bytes to (n, 2 m) in fp32.

    Example:
        >>> unpack_fp4(torch.tensor([[0x21, 0xF0]], dtype=torch.uint8))
        tensor([[ 0.5000,  1.0000,  0.0000, -6.0000]])
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=stored.device)
    numbers = torch.empty(stored.shape[0], 2 * stored.shape[1], device=stored.device)
    rows = max(_ROWS // max(stored.shape[1], 1), 1)
    for into, part in zip(numbers.split(rows), stored.split(rows), strict=True):
        into[:, 0::2] = table[(part & 15).int()]
        into[:, 1::2] = table[(part >> 4).int()]
    return numbers
