"""Factors whose join is zero: what a new adapter starts with, as in LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dynarank.decompositions.geometry import Factors

__all__ = ["zero_join_factors"]


def zero_join_factors(shapes: Sequence[tuple[int, ...]], seed: int) -> Factors:
    """Glorot-uniform factors, the last one zero, so that ``join(factors) == 0``; in fp64.

    The draws come from a generator of their own: the global random state is untouched.

    Args:
        shapes: of the factors, each (out, in, *kernel).
        seed: of the draws.

    Example:
        >>> down, up = zero_join_factors([(2, 8), (4, 2)], seed=0)
        >>> down.shape, up.any()
        (torch.Size([2, 8]), tensor(False))

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, 2021.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = [_glorot(shape, generator) for shape in shapes[:-1]]
    return (*drawn, torch.zeros(shapes[-1], dtype=torch.float64, device="cpu"))


def _glorot(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    positions = math.prod(shape[2:])
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * positions))
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (2 * drawn - 1) * bound
