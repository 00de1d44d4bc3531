"""What a problem is: a network, its data, loss, optimizer, learning rate and test.

Batches depend on seed and step only, so that all arms of a seed train on the same ones. Rates are
chosen on the "valid" part of the data, results are on the "test" part.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

Part = Literal["valid", "test"]
Batch = tuple[Any, Tensor]


class Problem(ABC):
    """A network to train for ``steps`` steps; ``layers`` change form.

    Attributes:
        layers: glob patterns of the scheduled layers.
        metric: the result, a key of what :meth:`test` returns.
        higher: whether a larger result is better.
        rate: the learning rate of the usual set-up of full rank; arms multiply it.
        bf16: whether the forward pass is under bf16 autocast.
        narrowable: whether :meth:`network` can make narrower networks.
        calibrated_on: how many batches a calibration takes.
        max_norm: what the norm of all gradients is clipped to; None: to nothing.
    """

    layers: str | list[str]
    metric: str
    higher: bool
    rate: float
    steps: int
    batch_size: int
    bf16 = False
    narrowable = True
    calibrated_on = 32
    max_norm: float | None = None
    weight_decay = 0.05

    @abstractmethod
    def network(self, width: float = 1.0) -> nn.Module:
        """Make the network, or one of this share of its width."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> Batch:
        """The inputs and targets of a step."""

    @abstractmethod
    def held_out(self, part: Part) -> Iterator[Batch]:
        """Batches of the validation or test data."""

    def score(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """The results, from the outputs on all of the data."""
        right = (outputs.argmax(-1) == targets).float().mean().item()
        return {"loss": F.cross_entropy(outputs, targets).item(), "accuracy": 100 * right}

    def model(self, seed: int, width: float = 1.0) -> nn.Module:
        """The initial model of a seed, in training mode."""
        torch.manual_seed(1000 + seed)
        return self.network(width).train()

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """The optimizer."""
        return AdamW(model.parameters(), lr=rate, weight_decay=self.weight_decay, fused=True)

    def factor(self, step: int) -> float:
        """The learning rate of a step, relative to the peak."""
        return self.warmup_then(step, 0.01)

    def warmup_then(self, step: int, last: float) -> float:
        """5% of linear warm-up, then a cosine down to ``last``: a factor of the rate."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / (self.steps - warmup)
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast of a forward pass."""
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()

    def outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """The model's outputs in fp32, one row a target."""
        with self.precision():
            return model(inputs).float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch."""
        return self.loss(self.outputs(model, batch[0]), batch[1])

    def backward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of a batch; its gradients are in the model, clipped."""
        loss = self.training_loss(model, batch)
        loss.backward()
        if self.max_norm is not None:
            clip_grad_norm_(model.parameters(), self.max_norm)
        return loss.detach()

    @torch.no_grad()
    def test(self, model: nn.Module, part: Part) -> dict[str, float]:
        """The results on a part of the data; the mode of the model is given back."""
        was = model.training
        model.eval()
        pairs = [(self.outputs(model, x), y) for x, y in self.held_out(part)]
        model.train(was)
        outputs, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return self.score(outputs, targets)

    def inputs(self, seed: int, batches: int | None = None) -> Iterable[Any]:
        """Inputs of a few training batches, to calibrate on; None: of ``calibrated_on``."""
        return [self.batch(seed, step)[0] for step in range(batches or self.calibrated_on)]
