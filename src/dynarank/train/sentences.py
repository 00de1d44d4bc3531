"""Labeled sentences, or pairs of sentences, before tokenization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SentenceData", "Sentences", "limit_sentences"]

_ORDER_SEED = 0  # the order in which `limit_sentences` takes examples: part of its definition


@dataclass(frozen=True, eq=False)
class Sentences:
    """The examples of one split.

    Args:
        first: one text per example.
        second: the second texts if examples are pairs; else None.
        labels: int64 classes from 0, or float64 scores, ``(N,)``.

    Raises:
        ValueError: if the parts differ in length, or there are no examples.
    """

    first: Sequence[str]
    second: Sequence[str] | None
    labels: NDArray[np.int64] | NDArray[np.float64]

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.first, self.second, self.labels) if part is not None}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"texts and labels must be equally many, at least 1, got {lengths}")

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.labels)

    def texts(self) -> list[str]:
        """All first texts, followed by all second texts."""
        return [*self.first, *(self.second or ())]

    def take(self, rows: NDArray[np.int64]) -> Sentences:
        """The examples at these positions, in this order."""
        chosen: list[int] = rows.tolist()
        second = self.second
        return Sentences(
            [self.first[row] for row in chosen],
            None if second is None else [second[row] for row in chosen],
            self.labels[rows],
        )


@dataclass(frozen=True, eq=False)
class SentenceData:
    """A data set: training and test examples."""

    train: Sentences
    test: Sentences


def limit_sentences(sentences: Sentences, limit: int | None, *, what: str) -> Sentences:
    """Keep ``limit`` examples: classes as balanced as possible, scores at random.

    Examples are taken in a fixed order that alternates between classes, so that smaller subsets are
    contained in larger ones.

    Args:
        sentences: all examples.
        limit: the number of examples to keep; None: all, in their own order.
        what: "training" or "test", for the error message.

    Raises:
        ValueError: if ``limit`` is less than 1 or more than the number of examples.

    Example:
        >>> many = Sentences(list("abcdef"), None, np.array([0, 0, 0, 0, 0, 1]))
        >>> sorted(limit_sentences(many, 2, what="test").labels.tolist())
        [0, 1]
    """
    if limit is None:
        return sentences
    if not 1 <= limit <= len(sentences):
        raise ValueError(
            f"{limit} {what} examples requested, but there are {len(sentences)}; "
            f"request 1 to {len(sentences)}"
        )
    return sentences.take(_dealt_order(sentences.labels)[:limit])


def _dealt_order(labels: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.int64]:
    """A fixed shuffle, then each class's first example, each class's second, ..."""
    order = np.random.default_rng(_ORDER_SEED).permutation(len(labels))
    if labels.dtype.kind == "f":
        return order
    shuffled = labels[order]
    turn = np.empty(len(labels), np.int64)
    for one in np.unique(shuffled):
        members = np.flatnonzero(shuffled == one)
        turn[members] = np.arange(len(members))
    return order[np.argsort(turn, kind="stable")]
