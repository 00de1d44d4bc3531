"""How the networks' weights begin."""

from __future__ import annotations

from torch import nn

__all__ = ["glorot_init_"]


def glorot_init_(model: nn.Module) -> None:
    """Keras's default: kernels uniform (Glorot), each drawn for itself; biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
