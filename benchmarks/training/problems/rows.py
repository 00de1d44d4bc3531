"""Rows of data in memory, in a new order each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.problems.problem import Batch, Part, Problem


class Rows(Problem):
    """Tensors of equally many rows: the inputs, and the targets last.

    Args:
        parts: inputs and targets of "train", "valid" and "test".
        epochs: the length of the training; what does not fill a batch is left out of an epoch.
    """

    metric, higher, batch_size = "accuracy", True, 128

    def __init__(self, parts: Mapping[str, Sequence[Tensor]], epochs: int) -> None:
        self.parts, self.epochs = parts, epochs
        self.epoch_steps = len(parts["train"][-1]) // self.batch_size
        self.steps = epochs * self.epoch_steps

    def indices(self, seed: int, step: int) -> Tensor:
        """The rows of a step's batch."""
        epoch, place = divmod(step, self.epoch_steps)
        order = _order(len(self.parts["train"][-1]), seed * 100_003 + epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of a step."""
        chosen = self.indices(seed, step)
        return _batch([part[chosen] for part in self.parts["train"]])

    def held_out(self, part: Part) -> Iterator[Batch]:
        """Batches of 500."""
        return map(_batch, zip(*(data.split(500) for data in self.parts[part]), strict=True))


def _batch(tensors: Sequence[Tensor]) -> Batch:
    """Inputs, a tuple if there are several, and targets."""
    *inputs, targets = tensors
    return (inputs[0] if len(inputs) == 1 else tuple(inputs)), targets


def fixed_order(rows: int) -> Any:
    """Always the same shuffle, to split rows by."""
    return np.random.default_rng(0).permutation(rows)


@lru_cache(maxsize=2)
def _order(rows: int, seed: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
