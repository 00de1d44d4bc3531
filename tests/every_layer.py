"""A model for each kind of layer that is handled, with inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dynarank as dr


@dataclass(frozen=True)
class Kind:
    """A class of layers.

    Args:
        plain: the class.
        arguments: of its constructor.
        shapes: of its inputs; one of no dimensions: indices.
    """

    plain: type[nn.Module]
    arguments: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return self.plain.__name__

    def make(self, kind: Callable[..., nn.Module] | None = None) -> Model:
        torch.manual_seed(0)
        return Model((kind or self.plain)(*self.arguments))

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        if self.plain is nn.Embedding:
            return (torch.randint(0, self.arguments[0], (3, 5), generator=generator),)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)


class Model(nn.Module):
    """A layer in a model; the output is one tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        y = self.layer(*inputs)
        return y[0] if isinstance(y, tuple) else y


KINDS = [
    Kind(nn.Linear, (12, 10), ((2, 3, 12),)),
    Kind(Conv1D, (10, 12), ((2, 3, 12),)),
    Kind(nn.Conv1d, (6, 10, 3), ((2, 6, 9),)),
    Kind(nn.Conv2d, (6, 10, 3, 1, 1, 1, 2), ((2, 6, 7, 7),)),
    Kind(nn.Conv3d, (4, 6, 2), ((2, 4, 4, 4, 4),)),
    Kind(nn.ConvTranspose1d, (6, 10, 3), ((2, 6, 5),)),
    Kind(nn.ConvTranspose2d, (6, 10, 3, 2), ((2, 6, 4, 4),)),
    Kind(nn.ConvTranspose3d, (4, 6, 2), ((2, 4, 3, 3, 3),)),
    Kind(nn.Embedding, (20, 8), ((),)),
    Kind(nn.MultiheadAttention, (12, 3), ((4, 2, 12),) * 3),
    Kind(nn.LSTM, (8, 10), ((4, 2, 8),)),
    Kind(nn.GRU, (8, 10), ((4, 2, 8),)),
    Kind(nn.RNN, (8, 10), ((4, 2, 8),)),
    Kind(nn.LSTMCell, (8, 10), ((3, 8),)),
    Kind(nn.GRUCell, (8, 10), ((3, 8),)),
    Kind(nn.RNNCell, (8, 10), ((3, 8),)),
]

# Ways to a form; a layer may have had another one before.
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "low-rank": lambda m: dr.factorize(m, 2, layers="*"),
    "inflated": lambda m: dr.inflate(dr.factorize(m, 2, layers="*")),
    "adapted": lambda m: dr.deflate(m, 2, layers="*"),
}


def in_form(model: Model, form: str) -> Model:
    """The model in the form, with no parameter left at zero."""
    FORMS[form](model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model
