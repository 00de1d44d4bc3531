"""Derivatives that autograd's graph does not hold: of ``torch.func`` and of forward mode."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["is_transformed"]


def is_transformed() -> bool:
    """Whether ``torch.func`` transforms what runs now, or forward mode carries tangents along.

    ``requires_grad`` says nothing of such derivatives, and ``detach()`` ends them.

    Example:
        >>> torch.func.vmap(lambda x: x + is_transformed())(torch.zeros(2)), is_transformed()
        (tensor([1., 1.]), False)
    """
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
        return True
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


# What torch.compiler.assume_constant_result sets; a graph is compiled for one stack of transforms.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
