"""The example batch that a model is exported with: which dimension of its inputs is the batch."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from dynarank.export.same_outputs import tensors_in
from dynarank.layers.running import forward_arguments

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """A batch of a model, and the dimension of its tensors that may have any size.

    Args:
        example: a tensor, a tuple of positional or a dict of keyword arguments.
        dim: the dimension; None: all sizes are those of the example.

    Raises:
        ValueError: no tensor has this dimension.
    """

    example: Any
    dim: int | None

    def __post_init__(self) -> None:
        if self.dim is not None and not self._sizes():
            shapes = [tuple(x.shape) for _, x in tensors_in(self.example)]
            raise ValueError(
                f"batch_dim={self.dim} is a dimension of the example's tensors, whose shapes are "
                f"{shapes}; batch_dim=None fixes the batch size"
            )
        if self.dim is not None and self.size == 0:
            raise ValueError("the example has no rows: give a batch of at least one")

    def _sizes(self) -> list[int]:
        assert self.dim is not None
        found = [x for _, x in tensors_in(self.example) if x.ndim > self.dim >= 0]
        return [x.shape[self.dim] for x in found]

    @property
    def size(self) -> int:
        """The size of the first tensor that has the dimension: that of the batch."""
        return self._sizes()[0]

    def of_size(self, size: int) -> Batch:
        """The same rows again, until there are so many."""

        def rows(x: Tensor) -> Tensor:
            if not self._is_batch(x):
                return x
            return x.index_select(self.dim or 0, torch.arange(size, device=x.device) % self.size)

        return Batch(tree_map_only(Tensor, rows, self.example), self.dim)

    def _is_batch(self, x: Tensor) -> bool:
        dim = self.dim
        return dim is not None and x.ndim > dim and x.shape[dim] == self.size

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """What a call of the model gets, by the parameters of its forward pass."""
        args, named = forward_arguments(model, self.example)
        return dict(inspect.signature(model.forward).bind(*args, **named).arguments)

    def shapes(self, model: nn.Module) -> Any:
        """The dynamic shapes of the arguments, as ``torch.export`` takes them."""
        if self.dim is None:
            return None
        batch = torch.export.Dim("batch", min=1)
        how = {self.dim: batch}

        def shape(x: object) -> object:
            return how if isinstance(x, Tensor) and self._is_batch(x) else None

        return tree_map(shape, self.arguments(model))
