"""What is known of a stored tensor before it is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["StoredTensor", "dtype_name"]


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a stored tensor, known before it is read.

    Args:
        shape: its shape.
        dtype: its dtype; None if it is not a floating-point dtype that torch computes with.
        kind: the name of its dtype, such as ``bfloat16`` or ``int8``.
        first: the first name in the file of this very tensor, where tied weights are stored once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str = ""
    first: str = ""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
