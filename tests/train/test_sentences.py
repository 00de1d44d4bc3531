"""Splits of sentences, limits, and numbered words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynarank.train.sentences import Sentences, limit_sentences


def make(labels: list[int] | list[float], kind: type = np.int64) -> Sentences:
    names = [f"{i}" for i in range(len(labels))]
    return Sentences(names, [f"{name}b" for name in names], np.array(labels, kind))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=50), st.data())
def test_limits_are_balanced_and_nested(labels: list[int], data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, len(labels)))
    kept = limit_sentences(make(labels), limit, what="test")
    more = limit_sentences(make(labels), len(labels), what="test")
    assert list(kept.first) == list(more.first)[:limit]
    assert kept.second == [f"{name}b" for name in kept.first]
    assert all(labels[int(n)] == y for n, y in zip(kept.first, kept.labels, strict=True))
    there, got = np.bincount(labels, minlength=4), np.bincount(kept.labels, minlength=4)
    # No class has less than another unless it has no more to give.
    assert all(got[a] >= got.max() - 1 or got[a] == there[a] for a in range(4))


def test_scores_are_kept_at_random() -> None:
    scores = np.linspace(0, 5, 400).tolist()
    kept = limit_sentences(make(scores, np.float64), 100, what="training")
    assert len(kept) == 100 and 2 < kept.labels.mean() < 3
    again = limit_sentences(make(scores, np.float64), 100, what="training")
    assert kept.labels.tolist() == again.labels.tolist()


def test_no_limit_keeps_the_order() -> None:
    assert limit_sentences(many := make([1, 0, 1]), None, what="test") is many


@pytest.mark.parametrize("limit", [0, 4])
def test_a_limit_beyond_what_there_is(limit: int) -> None:
    with pytest.raises(ValueError, match=f"{limit} test examples requested, but there are 3"):
        limit_sentences(make([1, 0, 1]), limit, what="test")


def test_parts_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many, at least 1"):
        Sentences(["a"], ["b", "c"], np.array([1]))
    with pytest.raises(ValueError, match="equally many, at least 1"):
        Sentences([], None, np.array([], np.int64))
