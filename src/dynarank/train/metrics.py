"""What models of text are judged by: accuracy, F1, correlations, bits per byte.

Legend: p are predictions, y what is true, one an example; TP, FP, FN, TN count the examples that
are truly or falsely called positive or negative. Where a measure is undefined because one of the
two sides is constant, it is 0, as in GLUE's own evaluation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    """Share of the examples that are right: mean(p = y).

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
    """Harmonic mean of precision and recall of class 1: 2 TP / (2 TP + FP + FN), or 0.

    Args:
        predicted: 0 or 1, ``(N,)``.
        labels: 0 or 1, ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, are empty, or hold anything but 0 and 1.

    Example:
        >>> f1_score(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0]))
        0.5
    """
    true_positive, false_positive, false_negative, _ = _confusion(predicted, labels)
    wrong = false_positive + false_negative
    return 2 * true_positive / (2 * true_positive + wrong) if true_positive else 0.0


def matthews_correlation(predicted: Tensor, labels: Tensor) -> float:
    """Correlation of two binary labels, from -1 to 1; chance is 0.

    ``(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))``, or 0

    Args:
        predicted: 0 or 1, ``(N,)``.
        labels: 0 or 1, ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, are empty, or hold anything but 0 and 1.

    Example:
        >>> found, labels = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0])
        >>> round(matthews_correlation(found, labels), 4)
        0.5774

    Reference:
        Matthews, Comparison of the predicted and observed secondary structure of T4 phage
        lysozyme, Biochimica et Biophysica Acta 405, 1975.
    """
    tp, fp, fn, tn = _confusion(predicted, labels)
    scale = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(scale) if scale else 0.0


def pearson_correlation(predicted: Tensor, labels: Tensor) -> float:
    """Linear correlation: cov(p, y) / sqrt(var p var y), or 0 where either is constant.

    Args:
        predicted: ``(N,)``.
        labels: ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, or are empty.

    Example:
        >>> found, labels = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])
        >>> round(pearson_correlation(found, labels), 6)
        1.0
    """
    _check(predicted, labels)
    if _constant(predicted) or _constant(labels):  # rounding would leave noise to be correlated
        return 0.0
    x, y = (_unit(side.double() - side.double().mean()) for side in (predicted, labels))
    return float((x @ y).clamp(-1, 1))


def spearman_correlation(predicted: Tensor, labels: Tensor) -> float:
    """Pearson correlation of the ranks; equal values share the mean of their ranks.

    Args:
        predicted: ``(N,)``.
        labels: ``(N,)``.

    Raises:
        ValueError: if the two differ in shape, or are empty.

    Example:
        >>> found, labels = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3])
        >>> round(spearman_correlation(found, labels), 6)
        1.0
    """
    _check(predicted, labels)
    if predicted.isnan().any() or labels.isnan().any():  # they have no rank
        return math.nan
    return pearson_correlation(_ranks(predicted), _ranks(labels))


def bits_per_byte(loss: float) -> float:
    """Code length of a byte: the mean cross-entropy in nats a byte, over ln 2.

    Example:
        >>> bits_per_byte(math.log(256))
        8.0
    """
    return loss / math.log(2)


def perplexity(loss: float) -> float:
    """How many equally likely symbols it comes to: exp(mean cross-entropy in nats).

    Example:
        >>> perplexity(0.0), perplexity(1e6)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _confusion(predicted: Tensor, labels: Tensor) -> tuple[int, int, int, int]:
    """TP, FP, FN, TN, as Python's integers: their products do not overflow."""
    _check(predicted, labels)
    for name, side in (("predictions", predicted), ("labels", labels)):
        other = side[(side != 0) & (side != 1)]
        if len(other):
            raise ValueError(f"{name} must be 0 or 1, but one of them is {other[0].item()}")
    p, y = predicted.bool(), labels.bool()
    counts = torch.stack([(p & y).sum(), (p & ~y).sum(), (~p & y).sum(), (~p & ~y).sum()])
    tp, fp, fn, tn = counts.tolist()
    return tp, fp, fn, tn


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 to N; equal values get the mean of theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


def _unit(centered: Tensor) -> Tensor:
    """Divided by the largest entry before the norm, so that no square overflows or vanishes."""
    scaled = centered / centered.abs().max()
    return scaled / scaled.norm()


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _check(predicted: Tensor, labels: Tensor) -> None:
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(
            "predictions and labels must be (N,) with N >= 1, one an example, but they are "
            f"{tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
