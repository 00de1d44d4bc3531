"""Shapes of inputs while torch traces: symbolic ones, tensors, and none at all."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["input_shape", "is_static"]


def input_shape(x: Any) -> tuple[int, ...]:
    """The shape of an input, by which the execution of a layer is chosen.

    Under ``torch.jit.trace`` it is made of plain numbers instead of tensors: whatever is chosen by
    it computes the same for every shape.

    Raises:
        ValueError: under ``torch.fx.symbolic_trace``, which gives no shapes.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            "torch.fx.symbolic_trace knows no shapes, by which a ranked layer is executed: use "
            "torch.export, keep the layer whole by is_leaf_module of a torch.fx.Tracer, or make a "
            "copy of the model plain first, `dr.merge(copy.deepcopy(model))`"
        )
    if not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return tuple(x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # pyright: ignore
        return tuple(map(int, x.shape))


def is_static(shape: Any) -> bool:
    """Whether a shape is made of plain numbers, by which an execution can be remembered."""
    if torch.compiler.is_compiling() or not isinstance(shape, tuple):
        return False
    return all(type(size) is int for size in shape)  # pyright: ignore[reportUnknownVariableType]
