"""Weight initialization of the networks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["glorot_init_", "published_init_"]


def glorot_init_(model: nn.Module) -> None:
    """Keras's default initialization: independent Glorot-uniform kernels, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def published_init_(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Initialize weights as the method's published ResNet-20 does, including a bug.

    That code uses one initializer with one seed for all layers, restarted at each call, so that all
    kernels of one shape start with identical values (including the factors of low-rank layers). Use
    it to reproduce the published runs, not to train well. Each parameter of two or more dimensions
    is overwritten with uniform values within +- sqrt(6 / (fan_in + fan_out)), with the fans derived
    from its shape ``(out, in, *kernel)``; others (biases, BatchNorm) do not change.

    Args:
        parameters: the parameters of one model, or of several that should start equal; modified in
            place.
        seed: the seed of a private generator; the global random state does not change.

    """
    for parameter in parameters:
        if parameter.ndim < 2:
            continue
        window = math.prod(parameter.shape[2:])
        bound = math.sqrt(6 / (window * (parameter.shape[0] + parameter.shape[1])))
        generator = torch.Generator().manual_seed(seed)  # the bug: restarted for each parameter
        values = torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound
        with torch.no_grad():
            parameter.copy_(values)
