"""Metrics of text models: accuracy, F1, correlations, bits per byte.

F1 and Matthews correlation are scikit-learn's, Pearson and Spearman correlation scipy's. A
correlation that is undefined because the predictions or the labels are constant is 0, as in GLUE's
own evaluation.

Legend: p the predictions, y the labels, one per example; TP, FP, FN, TN the numbers of true
positives, false positives, false negatives and true negatives.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dynarank.sinks.extras import import_extra

__all__ = [
    "accuracy",
    "bits_per_byte",
    "f1_score",
    "matthews_correlation",
    "pearson_correlation",
    "perplexity",
    "spearman_correlation",
]


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of correct predictions: mean(p = y).

    Args:
        predicted: classes, ``(N,)``.
        labels: classes, ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, or are empty.

    Example:
        >>> accuracy(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 1]))
        0.75
    """
    _check(predicted, labels)
    return (predicted == labels).double().mean().item()


def f1_score(predicted: Tensor, labels: Tensor) -> float:
    """The harmonic mean of precision and recall of class 1: 2 TP / (2 TP + FP + FN); 0 if 0 / 0.

    Args:
        predicted: 0 or 1, ``(N,)``.
        labels: 0 or 1, ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, are empty, or contain values other than 0 and 1.
        ImportError: if scikit-learn is not installed.

    Example:
        >>> f1_score(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0]))
        0.5
    """
    _check_binary(predicted, labels)
    metrics = _library("sklearn.metrics")
    return float(metrics.f1_score(_array(labels), _array(predicted), zero_division=0.0))


def matthews_correlation(predicted: Tensor, labels: Tensor) -> float:
    """The Matthews correlation of two binary labels, from -1 to 1; chance level is 0.

    ``(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))``, or 0 for 0 / 0

    Args:
        predicted: 0 or 1, ``(N,)``.
        labels: 0 or 1, ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, are empty, or contain values other than 0 and 1.
        ImportError: if scikit-learn is not installed.

    Example:
        >>> found, labels = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0])
        >>> round(matthews_correlation(found, labels), 4)
        0.5774

    Reference:
        Matthews, Comparison of the predicted and observed secondary structure of T4 phage
        lysozyme, Biochimica et Biophysica Acta 405, 1975.
    """
    _check_binary(predicted, labels)
    if _constant(predicted) or _constant(labels):
        return 0.0
    metrics = _library("sklearn.metrics")
    return float(metrics.matthews_corrcoef(_array(labels), _array(predicted)))


def pearson_correlation(predicted: Tensor, labels: Tensor) -> float:
    """The Pearson correlation: cov(p, y) / sqrt(var p var y); 0 if either is constant.

    Args:
        predicted: ``(N,)``.
        labels: ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, or are empty.
        ImportError: if scipy is not installed.

    Example:
        >>> found, labels = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])
        >>> round(pearson_correlation(found, labels), 6)
        1.0
    """
    return _correlation("pearsonr", predicted, labels)


def spearman_correlation(predicted: Tensor, labels: Tensor) -> float:
    """The Spearman correlation: Pearson's of the ranks; ties share the mean of their ranks.

    Args:
        predicted: ``(N,)``.
        labels: ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, or are empty.
        ImportError: if scipy is not installed.

    Example:
        >>> found, labels = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3])
        >>> round(spearman_correlation(found, labels), 6)
        1.0
    """
    return _correlation("spearmanr", predicted, labels)


def bits_per_byte(loss: float) -> float:
    """The code length in bits per byte: the mean cross-entropy in nats per byte, over ln 2.

    Example:
        >>> bits_per_byte(math.log(256))
        8.0
    """
    return loss / math.log(2)


def perplexity(loss: float) -> float:
    """The perplexity: exp(mean cross-entropy in nats).

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _correlation(name: str, predicted: Tensor, labels: Tensor) -> float:
    """A correlation by ``scipy.stats``, or 0 where it is undefined."""
    _check(predicted, labels)
    if predicted.isnan().any() or labels.isnan().any():
        return math.nan
    if _constant(predicted) or _constant(labels):
        return 0.0
    function = getattr(_library("scipy.stats"), name)
    with np.errstate(invalid="ignore"):  # infinite predictions give a Pearson correlation of NaN
        return float(function(_array(predicted), _array(labels)).statistic)


def _library(module: str) -> Any:
    return import_extra(module, "text", "a GLUE metric")


def _array(values: Tensor) -> NDArray[Any]:
    return values.double().cpu().numpy() if values.is_floating_point() else values.cpu().numpy()


def _check_binary(predicted: Tensor, labels: Tensor) -> None:
    _check(predicted, labels)
    for name, side in (("predictions", predicted), ("labels", labels)):
        other = side[(side != 0) & (side != 1)]
        if len(other):
            raise ValueError(f"{name} must be 0 or 1, got {other[0].item()}")


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _check(predicted: Tensor, labels: Tensor) -> None:
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(
            "predictions and labels must be (N,) with N >= 1, one per example, but they are "
            f"{tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
