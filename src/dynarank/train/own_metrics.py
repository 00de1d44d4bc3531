"""The named metrics for own data, and the one that suits a loss.

Legend: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dynarank.records import Metric
from dynarank.train.losses import LOSSES, align, class_scores
from dynarank.train.metrics import (
    f1_score,
    matthews_correlation,
    pearson_correlation,
    spearman_correlation,
)

__all__ = ["METRICS", "Score", "default_metric"]


@dataclass(frozen=True)
class Score:
    """A metric and the function that computes it.

    Args:
        metric: its name and direction.
        function: ``(output, target) -> scalar``; None: the metric is the loss.
        is_mean: whether that of the test set is the mean of those of its examples; otherwise it is
            computed from all outputs at once.
    """

    metric: Metric
    function: Callable[[Any, Any], Any] | None
    is_mean: bool = False


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The share of correct predictions, of those that are not ignored (-100)."""
    found = _predicted(output, target)
    counted = target != -100
    return (found == target)[counted].float().mean()


def _predicted(output: Tensor, target: Tensor) -> Tensor:
    """The most likely class of each example; with one logit each, whether it is positive."""
    if output.shape in (target.shape, (*target.shape, 1)):
        return (align(output, target)[0] > 0).to(target.dtype)
    return class_scores(output, target).argmax(1)


def _of_classes(function: Callable[[Tensor, Tensor], float]) -> Callable[[Any, Any], Any]:
    return lambda output, target: function(_predicted(output, target), target.long())


def _of_numbers(function: Callable[[Tensor, Tensor], float]) -> Callable[[Any, Any], Any]:
    return lambda output, target: function(*(x.flatten() for x in align(output, target)))


def _score(
    name: str, function: Any, *, up: bool, percent: bool = False, mean: bool = False
) -> Score:
    return Score(Metric(name=name, higher_is_better=up, percent=percent), function, mean)


METRICS: dict[str, Score] = {
    "accuracy": _score("accuracy", _accuracy, up=True, percent=True, mean=True),
    "f1": _score("F1", _of_classes(f1_score), up=True, percent=True),
    "matthews": _score("Matthews correlation", _of_classes(matthews_correlation), up=True),
    "pearson": _score("Pearson correlation", _of_numbers(pearson_correlation), up=True),
    "spearman": _score("Spearman correlation", _of_numbers(spearman_correlation), up=True),
    "mse": _score("mean squared error", LOSSES["mse"], up=False, mean=True),
    "l1": _score("mean absolute error", LOSSES["l1"], up=False, mean=True),
    "loss": _score("loss", None, up=False),
}
"""The named metrics."""


def default_metric(loss: str | None) -> str:
    """The metric that suits a loss; None: one of a user's own, or the model's.

    Example:
        >>> default_metric("cross-entropy"), default_metric("mse"), default_metric(None)
        ('accuracy', 'mse', 'loss')
    """
    found = {"cross-entropy": "accuracy", "bce": "accuracy", "mse": "mse", "l1": "l1"}
    return found.get(loss or "", "loss")
