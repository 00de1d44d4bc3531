"""The metrics of text by formula and by published numbers, also of constant predictions."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynarank.sinks.extras import install_command
from dynarank.train.metrics import (
    accuracy,
    bits_per_byte,
    f1_score,
    matthews_correlation,
    pearson_correlation,
    perplexity,
    spearman_correlation,
)

PAIRED = [accuracy, f1_score, matthews_correlation, pearson_correlation, spearman_correlation]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60))
def test_classes_by_their_formulas(pairs: list[tuple[int, int]]) -> None:
    found, labels = (torch.tensor(side) for side in zip(*pairs, strict=True))
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    assert accuracy(found, labels) == pytest.approx((tp + tn) / len(pairs))
    f1 = 2 * tp / (2 * tp + fp + fn) if tp else 0
    assert f1_score(found, labels) == pytest.approx(f1)
    scale = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    matthews = (tp * tn - fp * fn) / math.sqrt(scale) if scale else 0
    assert matthews_correlation(found, labels) == pytest.approx(matthews, abs=1e-12)


def ranks(values: list[float]) -> list[float]:
    """From 1, equal values with the mean of theirs."""
    return [sum(b < a for b in values) + (values.count(a) + 1) / 2 for a in values]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9, width=32)), min_size=3, max_size=60))
def test_correlations_by_their_formulas(pairs: list[tuple[int, float]]) -> None:
    found, scores = (torch.tensor(side).double() for side in zip(*pairs, strict=True))
    if len(found.unique()) == 1 or len(scores.unique()) == 1:
        assert pearson_correlation(found, scores) == spearman_correlation(found, scores) == 0
        return
    if scores.std() > 1e-6:
        linear = np.corrcoef(found, scores)[0, 1]
        assert pearson_correlation(found, scores) == pytest.approx(linear, abs=1e-6)
    ranked = np.corrcoef(ranks(found.tolist()), ranks(scores.tolist()))[0, 1]
    assert spearman_correlation(found, scores) == pytest.approx(ranked, abs=1e-9)


def test_published_correlations() -> None:
    """Anscombe, Graphs in Statistical Analysis, 1973, sets 1 and 4; Wikipedia's of Spearman."""
    x = torch.tensor([10.0, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5])
    y = torch.tensor([8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68])
    assert pearson_correlation(x, y) == pytest.approx(0.816, abs=5e-4)
    x = torch.tensor([8.0, 8, 8, 8, 8, 8, 8, 19, 8, 8, 8])
    y = torch.tensor([6.58, 5.76, 7.71, 8.84, 8.47, 7.04, 5.25, 12.50, 5.56, 7.91, 6.89])
    assert pearson_correlation(x, y) == pytest.approx(0.817, abs=5e-4)
    iq = torch.tensor([106, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    television = torch.tensor([7, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert spearman_correlation(iq, television) == pytest.approx(-29 / 165)


def test_ties_share_the_mean_of_their_ranks() -> None:
    found, scores = torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 2.0, 2.0])
    wanted = np.corrcoef([1.5, 1.5, 3, 4], [1, 3, 3, 3])[0, 1]
    assert spearman_correlation(found, scores) == pytest.approx(wanted)


@pytest.mark.parametrize("constant", [0, 1])
def test_a_constant_prediction_is_worth_nothing(constant: int) -> None:
    found, labels = torch.full((100,), constant), (torch.arange(100) % 3 == 0).long()
    assert matthews_correlation(found, labels) == 0
    assert matthews_correlation(labels, found) == 0
    assert f1_score(torch.zeros(100), labels) == 0
    scores = torch.linspace(0, 5, 100)
    # A tenth has no exact binary form: centring a constant by its mean leaves rounding behind.
    assert pearson_correlation(torch.full((100,), 0.1), scores) == 0
    assert spearman_correlation(scores, torch.full((100,), 0.1)) == 0


def test_the_majority_class_of_mrpc_has_a_high_f1() -> None:
    labels = torch.tensor([1] * 279 + [0] * 129)
    everything = torch.ones(408)
    assert f1_score(everything, labels) == pytest.approx(0.8122, abs=1e-4)
    assert accuracy(everything, labels) == pytest.approx(0.6838, abs=1e-4)


def test_large_counts_and_values_do_not_overflow() -> None:
    labels = torch.arange(200_000) % 2
    assert matthews_correlation(labels, labels) == 1
    assert matthews_correlation(1 - labels, labels) == -1
    x = torch.linspace(-1, 1, 50).double() * 1e200
    assert pearson_correlation(x, -x) == pytest.approx(-1)


def test_bits_and_perplexity() -> None:
    assert bits_per_byte(math.log(2)) == pytest.approx(1)
    assert perplexity(math.log(256)) == pytest.approx(256)
    assert perplexity(1000.0) == math.inf and math.isnan(perplexity(math.nan))


def test_a_correlation_with_nan_is_nan() -> None:
    broken, scores = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    assert math.isnan(pearson_correlation(broken, scores))
    assert math.isnan(spearman_correlation(broken, scores))
    endless = torch.tensor([1.0, math.inf, 2.0])
    assert math.isnan(pearson_correlation(endless, scores))
    assert spearman_correlation(endless, scores) == pytest.approx(0.5)


@pytest.mark.parametrize("measure", PAIRED)
@pytest.mark.parametrize(
    ("found", "labels"),
    [(torch.zeros(3), torch.zeros(2)), (torch.zeros(0), torch.zeros(0)), (torch.zeros(2, 2),) * 2],
)
def test_shapes_that_do_not_fit_are_refused(measure, found: Tensor, labels: Tensor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        measure(found, labels)


def test_other_classes_than_two_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must be 0 or 1, got 2"):
        f1_score(torch.tensor([0, 1]), torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("measure", "module"),
    [(f1_score, "sklearn.metrics"), (matthews_correlation, "sklearn.metrics"),
     (pearson_correlation, "scipy.stats"), (spearman_correlation, "scipy.stats")],
)  # fmt: skip
def test_without_the_library_the_extra_is_named(measure, module, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(install_command("text"))):
        measure(torch.tensor([0, 1]), torch.tensor([0, 1]))
