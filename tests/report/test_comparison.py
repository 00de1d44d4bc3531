"""Significant differences, by formula and by published numbers, and the sentences about them."""

from __future__ import annotations

import math
import re
import sys
from statistics import fmean, variance

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dynarank.records import Metric
from dynarank.report.comparison import compare_pairs, compare_scores
from dynarank.sinks.extras import install_command

PERPLEXITY = Metric(name="perplexity", higher_is_better=False, percent=False)
MATTHEWS = Metric(name="Matthews correlation", percent=False)


SCORES = st.lists(st.floats(0, 1).map(lambda x: round(x, 4)), min_size=2, max_size=6)


def welch(a, b, level):
    """t = d / e with e = sqrt(va / na + vb / nb): p, and the interval at a level."""
    parts = [(variance(scores) / len(scores), len(scores) - 1) for scores in (a, b)]
    difference, error = fmean(a) - fmean(b), math.sqrt(sum(part for part, _ in parts))
    freedom = error**4 / sum(part**2 / below for part, below in parts)
    reach = error * stats.t.isf(level / 2, freedom)
    p = 2 * stats.t.sf(abs(difference) / error, freedom)
    return p, difference - reach, difference + reach


@given(a=SCORES, b=SCORES)
def test_one_pair_is_welchs_test(a, b):
    pairs = compare_pairs({"a": a, "b": b})
    if len(set(a)) == len(set(b)) == 1:
        assert pairs == []
        return
    (pair,) = pairs
    p, low, high = welch(a, b, 0.05)
    assert pair.p == pytest.approx(p, rel=1e-7, abs=1e-12)
    assert (pair.low, pair.high) == (pytest.approx(low), pytest.approx(high))


def test_a_published_example():
    """Wikipedia, "Student's t-test", worked example, unequal variances: p = 0.09077, d.f. 7.031."""
    a, b = [30.02, 29.99, 30.11, 29.97, 30.01, 29.99], [29.89, 29.93, 29.72, 29.98, 30.02, 29.98]
    (pair,) = compare_pairs({"a": a, "b": b})
    assert pair.difference == pytest.approx(0.095) and not pair.significant
    assert pair.p == pytest.approx(0.09077, abs=5e-6)


@given(st.lists(SCORES, min_size=3, max_size=5))
def test_holm_and_the_intervals_agree(groups):
    pairs = compare_pairs({f"g{i}": scores for i, scores in enumerate(groups)})
    raw = sorted(welch(groups[int(p.first[1:])], groups[int(p.second[1:])], 0.05)[0] for p in pairs)
    corrected, most = [], 0.0
    for i, p in enumerate(raw):
        most = min(1.0, max(most, (len(raw) - i) * p))
        corrected.append(most)
    assert [pair.p for pair in pairs] == pytest.approx(corrected, rel=1e-7, abs=1e-12)
    for pair in pairs:
        assert pair.significant == (pair.p <= 0.05)
        assert pair.significant == (not pair.low <= 0 <= pair.high)


def test_a_p_below_five_per_cent_is_not_enough_behind_a_failure():
    """Uncorrected, p of a and b, and of b and c, is .036 < .05; Holm holds them against .025."""
    groups = {"a": [0.0, 0.1, 0.2], "b": [0.25, 0.35, 0.45], "c": [0.5, 0.6, 0.7]}
    raw = stats.ttest_ind(groups["a"], groups["b"], equal_var=False).pvalue
    assert 0.025 < raw < 0.05
    assert [pair.significant for pair in compare_pairs(groups)] == [True, False, False]


def test_sentences_of_what_is_and_what_is_not_distinguishable():
    groups = {
        "full-rank": [0.671, 0.664, 0.678],
        "low-rank": [0.669, 0.675, 0.663],
        "none": [0.1, 0.11, 0.12],
    }
    said = compare_scores(groups, Metric())
    assert said[0] == (
        "Test accuracy: full-rank 67.10% ± 0.70 (n = 3), low-rank 66.90% ± 0.60 (n = 3), "
        "none 11.00% ± 1.00 (n = 3)."
    )
    assert said[1].startswith(
        "full-rank is better than none by 56.10 points (interval 53.11 to 59.09, p = "
    )
    assert said[2].startswith("low-rank is better than none by 55.90 points")
    assert said[3].startswith(
        "Statistically indistinguishable at n = 3: "
        "full-rank and low-rank (difference 0.20 points, interval −"
    )
    assert "Holm" in said[4] and "3 pairs" in said[4] and len(said) == 5


def test_lower_is_better_turns_the_sentence():
    groups = {"a": [12.0, 12.1, 12.2], "b": [15.0, 15.1, 15.2]}
    assert "a is better than b by 3 (" in compare_scores(groups, PERPLEXITY)[1]
    assert "b is better than a by 3 (" in compare_scores(groups, MATTHEWS)[1]
    assert "points" not in " ".join(compare_scores(groups, PERPLEXITY))


def test_one_run_cannot_be_compared():
    said = compare_scores({"a": [0.9], "b": [0.1]}, Metric())
    assert said[1].startswith("a and b cannot be compared at n = 1")
    assert len(said) == 2
    assert compare_scores({"a": [0.9]}, Metric()) == ["Test accuracy: a 90.00% (n = 1)."]


def test_scores_that_are_not_finite_are_said_and_compared_with_none():
    said = compare_scores({"a": [0.9, math.nan], "b": [0.1, 0.2], "c": [math.inf]}, MATTHEWS)
    assert "a 0.9 (n = 1, 1 more not finite)" in said[0] and "c not finite (n = 1)" in said[0]
    assert said[1] == "a and c have runs whose score is not finite: not compared."
    assert len(said) == 2


def test_no_spread_is_no_evidence():
    said = compare_scores({"a": [0.9, 0.9], "b": [0.1, 0.1]}, Metric())
    assert "show no spread at all" in said[1] and "better" not in " ".join(said)


def test_nothing_finished():
    assert compare_scores({}, Metric()) == ["No run has finished: there is nothing to compare."]
    assert compare_scores({"a": []}, Metric()) == compare_scores({}, Metric())


def test_many_pairs_make_a_sentence_of_bounded_length():
    groups = {f"schedule-{i}": [0.9, 0.91 + i / 1e4, 0.92] for i in range(12)}
    said = compare_scores(groups, Metric())
    assert "All schedules are statistically indistinguishable at n = 3" in said[1]
    assert "60 more pairs" in said[1]


def test_one_schedule_better_than_several_is_one_sentence():
    groups = {"a": [1.0, 1.01, 1.02], "b": [2.0, 2.01, 2.02], "c": [3.0, 3.01, 3.02]}
    said = compare_scores(groups, PERPLEXITY)
    assert said[1].startswith("a is better than c by 2 (interval 1.97 to 2.03, p = ")
    assert ") and than b by 1 (" in said[1] and said[2].startswith("b is better than c by 1 (")


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=re.escape(install_command("report"))):
        compare_pairs({"a": [0.1, 0.2], "b": [0.3, 0.4]})
