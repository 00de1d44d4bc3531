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
        first: one text an example.
        second: the other texts, where examples are pairs; else None.
        labels: int64 classes from 0, or float64 scores, ``(N,)``.

    Raises:
        ValueError: if the parts differ in length, or there is no example.
    """

    first: Sequence[str]
    second: Sequence[str] | None
    labels: NDArray[np.int64] | NDArray[np.float64]

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.first, self.second, self.labels) if part is not None}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"texts and labels must be as many and at least 1, got {lengths}")

    def __len__(self) -> int:
        """Count the examples."""
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

    They are the first of a fixed order which deals the classes out in turn, so that a smaller
    limit's examples are among a larger one's.

    Args:
        sentences: all examples.
        limit: how many to keep; None: all, in their own order.
        what: "training" or "test", for the message.

    Raises:
        ValueError: if ``limit`` is less than 1 or more than there are.

    Example:
        >>> many = Sentences(list("abcdef"), None, np.array([0, 0, 0, 0, 0, 1]))
        >>> sorted(limit_sentences(many, 2, what="test").labels.tolist())
        [0, 1]
    """
    if limit is None:
        return sentences
    if not 1 <= limit <= len(sentences):
        raise ValueError(
            f"{limit} {what} examples were asked for; there are {len(sentences)}: "
            f"ask for 1 to {len(sentences)}"
        )
    return sentences.take(_dealt_order(sentences.labels)[:limit])


def _dealt_order(labels: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.int64]:
    """Shuffle deterministically; then take each class's first, each class's second, ..."""
    order = np.random.default_rng(_ORDER_SEED).permutation(len(labels))
    if labels.dtype.kind == "f":
        return order
    shuffled = labels[order]
    turn = np.empty(len(labels), np.int64)
    for one in np.unique(shuffled):
        members = np.flatnonzero(shuffled == one)
        turn[members] = np.arange(len(members))
    return order[np.argsort(turn, kind="stable")]
