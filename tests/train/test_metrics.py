"""The measures of text against scikit-learn's and scipy's, also of constant predictions."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference
from torch import Tensor

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
def test_classes_as_scikit_learn_counts_them(pairs: list[tuple[int, int]]) -> None:
    found, labels = (torch.tensor(side) for side in zip(*pairs, strict=True))
    assert accuracy(found, labels) == pytest.approx(reference.accuracy_score(labels, found))
    wanted = reference.f1_score(labels, found, zero_division=0.0)
    assert f1_score(found, labels) == pytest.approx(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn remarks on a single class
        wanted = reference.matthews_corrcoef(labels, found)
    assert matthews_correlation(found, labels) == pytest.approx(wanted, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9, width=32)), min_size=3, max_size=60))
def test_correlations_as_scipy_computes_them(pairs: list[tuple[int, float]]) -> None:
    found, scores = (torch.tensor(side).double() for side in zip(*pairs, strict=True))
    if len(found.unique()) == 1 or len(scores.unique()) == 1:
        assert pearson_correlation(found, scores) == spearman_correlation(found, scores) == 0
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant sides
        linear, ranked = stats.pearsonr(found, scores), stats.spearmanr(found, scores)
    if scores.std() > 1e-6:
        assert pearson_correlation(found, scores) == pytest.approx(linear.statistic, abs=1e-6)
    assert spearman_correlation(found, scores) == pytest.approx(ranked.statistic, abs=1e-9)


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


@pytest.mark.parametrize("measure", PAIRED)
@pytest.mark.parametrize(
    ("found", "labels"),
    [(torch.zeros(3), torch.zeros(2)), (torch.zeros(0), torch.zeros(0)), (torch.zeros(2, 2),) * 2],
)
def test_shapes_that_do_not_fit_are_refused(measure, found: Tensor, labels: Tensor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        measure(found, labels)


def test_other_classes_than_two_are_refused() -> None:
    with pytest.raises(ValueError, match="labels must be 0 or 1, but one of them is 2"):
        f1_score(torch.tensor([0, 1]), torch.tensor([0, 2]))
