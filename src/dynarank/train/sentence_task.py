"""Tasks on tokenized sentences: classification and regression.

Legend: N examples, batches of B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.records import Metric
from dynarank.train.draws import epoch_generator
from dynarank.train.metrics import (
    accuracy,
    f1_score,
    matthews_correlation,
    pearson_correlation,
    spearman_correlation,
)
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.task import Evaluation

__all__ = [
    "ACCURACY",
    "F1",
    "MATTHEWS",
    "PEARSON",
    "SPEARMAN",
    "Batch",
    "ClassificationTask",
    "Examples",
    "Measure",
    "RegressionTask",
]

_ORDER = 0  # a random stream
_TEST_BATCH = 256


@dataclass(frozen=True)
class Measure:
    """A metric and the function that computes it from predictions and labels."""

    metric: Metric
    function: Callable[[Tensor, Tensor], float]


ACCURACY = Measure(Metric(name="accuracy"), accuracy)
F1 = Measure(Metric(name="F1"), f1_score)
MATTHEWS = Measure(Metric(name="Matthews correlation", percent=False), matthews_correlation)
PEARSON = Measure(Metric(name="Pearson correlation", percent=False), pearson_correlation)
SPEARMAN = Measure(Metric(name="Spearman correlation", percent=False), spearman_correlation)


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of one split, on the device.

    Args:
        inputs: the arguments of the model's forward pass, ``(N, length)`` each.
        labels: int64 classes or float32 scores, ``(N,)``.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def rows(self, chosen: Tensor | slice) -> Examples:
        """A selection of examples."""
        return Examples(tuple(part[chosen] for part in self.inputs), self.labels[chosen])

    def to(self, device: torch.device) -> Examples:
        """All examples, moved to a device."""
        return Examples(tuple(part.to(device) for part in self.inputs), self.labels.to(device))


Batch = Examples
"""A batch of examples."""


class _SentenceTask:
    """The base class of both tasks: batches, and evaluation on the test set.

    Args:
        recipe: the recipe, for batch size, shuffling and label smoothing.
        train: the training examples.
        test: the test examples.
        build: a function that makes the network on the CPU.
        measures: the metrics, the main one first.
        seed: the seed of the order.
        facts: further facts about the data to record with the run.

    Raises:
        RecipeError: the training examples do not fill one batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: Examples,
        test: Examples,
        build: Callable[[], nn.Module],
        measures: Sequence[Measure],
        *,
        seed: int,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.train, self.test, self.seed = recipe, train, test, seed
        self.facts = dict(facts or {})
        self.build, self.measures = build, tuple(measures)
        self.metric = measures[0].metric
        self.train_size = len(train.labels)
        self.steps_per_epoch = self.train_size // recipe.batch_size
        if not self.steps_per_epoch:
            raise RecipeError(
                f"{self.train_size} training examples do not fill one batch of "
                f"{recipe.batch_size}; raise --train-limit"
            )

    def model(self) -> nn.Module:
        """A new network on the device of the examples."""
        return self.build().to(self.train.labels.device)

    def sample(self) -> tuple[Tensor, ...]:
        """A batch's arguments of the forward pass."""
        return self.train.rows(slice(self.recipe.batch_size)).inputs

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of the examples in random order; an incomplete last batch is dropped."""
        size, which = self.recipe.batch_size, 0 if self.recipe.shuffle == "once" else epoch
        generator = epoch_generator(self.seed, _ORDER, which)
        order = torch.randperm(self.train_size, generator=generator).to(self.train.labels.device)
        for step in range(start, self.steps_per_epoch):
            yield self.train.rows(order[step * size : (step + 1) * size])

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tokens, and what else the network takes."""
        return batch.inputs

    def loss_terms(self, batch: Batch) -> tuple[int]:
        """The number of examples."""
        return (len(batch.labels),)

    def tensors(self) -> Iterator[Tensor]:
        """The inputs and labels."""
        for part in (self.train, self.test):
            yield from (*part.inputs, part.labels)

    def evaluate(
        self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Evaluation:
        """The mean loss (without label smoothing) and the scores of the test set."""
        outputs: list[Tensor] = []
        for start in range(0, len(self.test.labels), _TEST_BATCH):
            with autocast():
                inputs = self.test.rows(slice(start, start + _TEST_BATCH)).inputs
                outputs.append(model(*inputs).float())
        output, labels = torch.cat(outputs), self.test.labels
        found = self._predictions(output)
        scores = {one.metric.name: one.function(found, labels) for one in self.measures}
        return Evaluation(self._loss(output, labels, 0.0).item(), scores)

    def _loss(self, output: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        raise NotImplementedError

    def _predictions(self, output: Tensor) -> Tensor:
        raise NotImplementedError


class ClassificationTask(_SentenceTask):
    """Classification with cross-entropy; the prediction is the most likely class.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> recipe = load_recipe("imdb-lstm")
        >>> many = Examples((torch.ones(64, 4).long(),), torch.arange(64) % 2)
        >>> task = ClassificationTask(recipe, many, many, nn.Identity, [ACCURACY], seed=0)
        >>> task.metric.name, task.steps_per_epoch
        ('accuracy', 2)
    """

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The cross-entropy with the recipe's label smoothing; the accuracy if it is the metric."""
        output = model(*batch.inputs)
        loss = self._loss(output, batch.labels, self.recipe.label_smoothing)
        if self.measures[0] is not ACCURACY:  # other metrics are not batch means
            return loss, None
        return loss, (output.detach().argmax(1) == batch.labels).float().mean()

    def _loss(self, output: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        return F.cross_entropy(output, labels, label_smoothing=label_smoothing)

    def _predictions(self, output: Tensor) -> Tensor:
        return output.argmax(1)


class RegressionTask(_SentenceTask):
    """Regression with mean squared error; the prediction is the single output.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> recipe = load_recipe("glue-stsb")
        >>> many = Examples((torch.ones(64, 4),), torch.rand(64))
        >>> task = RegressionTask(recipe, many, many, nn.Identity, [SPEARMAN, PEARSON], seed=0)
        >>> task.metric.name, task.metric.percent
        ('Spearman correlation', False)
    """

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, None]:
        """The mean squared error; no score, since a correlation is not a mean over batches."""
        return self._loss(model(*batch.inputs), batch.labels, 0.0), None

    def _loss(self, output: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        return F.mse_loss(output.squeeze(1).float(), labels)

    def _predictions(self, output: Tensor) -> Tensor:
        return output.squeeze(1)
