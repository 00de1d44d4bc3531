"""The interface between the training loop and a recipe's data, model, loss and metrics.

The loop is independent of images and text: it gets batches from a task, passes each to ``loss``,
and evaluates on the test set at the end of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dynarank.records import Metric

__all__ = ["Evaluation", "Sketch", "Task"]


@dataclass(frozen=True)
class Evaluation:
    """The results on the test set.

    Args:
        loss: the mean loss, without label smoothing.
        scores: the scores by the name of the metric, the main one first.
    """

    loss: float
    scores: Mapping[str, float]


class Task(Protocol):
    """One recipe's data and model on one device, for one seed."""

    metric: Metric
    """The main metric, the first in ``Evaluation.scores``."""
    steps_per_epoch: int
    train_size: int
    """The number of training examples: images, sentences, or tokens per epoch."""

    def model(self) -> nn.Module:
        """A new model on the device, initialized from torch's global random state."""
        ...

    def sample(self) -> Any:
        """A batch's arguments of the forward pass, as ``dynarank.cost.trace`` takes them."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from the one at ``start`` on, a pure function of the seed."""
        ...

    def inputs(self, batch: Any) -> Any:
        """The arguments of the forward pass of a batch of :meth:`epoch`."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """All examples that train and test, by which a data set is recognized."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The loss of a batch, and its mean training score (0-d, on the device) if there is one."""
        ...

    def loss_terms(self, batch: Any) -> tuple[float, ...]:
        """Of how many terms the loss of a batch is the mean; where that is in doubt, each way."""
        ...

    def evaluate(
        self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Evaluation:
        """The scores on the test set; the model is in evaluation mode, without gradients."""
        ...


@dataclass(frozen=True, eq=False)
class Sketch:
    """A recipe's network and one training batch on the meta device.

    Args:
        model: the network.
        sample: a batch's arguments of the forward pass, as ``dynarank.cost.trace`` takes them.
        read: what was read to make it; empty: nothing.
        steps_per_epoch: the number of steps of an epoch, if data was read.
    """

    model: nn.Module
    sample: Any
    read: str = ""
    steps_per_epoch: int | None = None
