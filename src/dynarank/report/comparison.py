"""Which schedules differ significantly at this number of runs, and which do not, in sentences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev, variance
from typing import Any

from dynarank.records import Metric
from dynarank.report.formats import difference_text, joined, number, plural, score_text, spread_text
from dynarank.sinks.extras import import_extra

__all__ = ["Pair", "compare_pairs", "compare_scores", "interval_text", "require_scipy"]

_MOST_PAIRS = 6  # a sentence of more would not be read


@dataclass(frozen=True)
class Pair:
    """The comparison of two groups of scores.

    Args:
        first: the name of the first group.
        second: the name of the second group.
        difference: mean of the first minus mean of the second.
        low: the lower end of the confidence interval of the difference.
        high: its upper end.
        p: two-sided p-value of Welch's t-test, with Holm's correction for the number of pairs.
        significant: whether the two differ significantly.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    significant: bool


def require_scipy() -> Any:
    """Import ``scipy.stats``. Call it before training the runs to be compared.

    Raises:
        ImportError: it is not installed.
    """
    return import_extra("scipy.stats", "report", "a comparison of schedules")


def compare_pairs(groups: Mapping[str, Sequence[float]], error: float = 0.05) -> list[Pair]:
    """Compare every pair by Welch's t-test, with Holm's correction at family-wise ``error``.

    ``t = (a - b) / sqrt(va / na + vb / nb)`` with Welch's degrees of freedom. By Holm's procedure
    the i-th smallest p of m is compared with ``error / (m - i + 1)``, up to the first that fails;
    its level is that of all that follow. Intervals are at each pair's level, so that an interval
    excludes zero exactly if its pair is significant. Skipped: groups with fewer than two scores or
    with a score that is not finite, and pairs in which neither group has any spread. The t-test is
    scipy's, which does not have Holm's procedure.

    Args:
        groups: scores by name, one score a run.
        error: the chance of calling any equal groups different, over all pairs, in (0, 1).

    Raises:
        ImportError: scipy is not installed.

    Example:
        >>> (pair,) = compare_pairs({"a": [0.1, 0.2, 0.3], "b": [0.9, 0.8, 0.7]})
        >>> pair.significant
        True

    Reference:
        Welch, The generalization of "Student's" problem when several different population variances
        are involved, Biometrika 34, 1947. Holm, A simple sequentially rejective multiple test
        procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    usable = {name: scores for name, scores in groups.items() if _usable(scores)}
    tested = [
        (_welch(usable[a], usable[b]), a, b)
        for a, b in combinations(usable, 2)
        if variance(usable[a]) + variance(usable[b]) > 0
    ]
    tested.sort(key=lambda test: test[0].pvalue)
    pairs, significant, corrected, level = list[Pair](), True, 0.0, error
    for done, (test, a, b) in enumerate(tested):
        left = len(tested) - done
        if significant:  # from the first failure on, the level stays
            level = error / left
            significant = bool(test.pvalue <= level)
        corrected = min(1.0, max(corrected, left * float(test.pvalue)))
        low, high = map(float, test.confidence_interval(1 - level))
        difference = fmean(usable[a]) - fmean(usable[b])
        pairs.append(Pair(a, b, difference, low, high, corrected, significant))
    return pairs


def compare_scores(groups: Mapping[str, Sequence[float]], metric: Metric) -> list[str]:
    r"""Report scores, significant differences and indistinguishable pairs in plain sentences.

    Args:
        groups: test scores by schedule, one score a finished run.
        metric: what the scores are, and which way is better.

    Example:
        >>> print(*compare_scores({"a": [0.5], "b": [0.7]}, Metric()), sep="\n")
        Test accuracy: a 50.00% (n = 1), b 70.00% (n = 1).
        a and b cannot be compared at n = 1: another seed may change a score by as much.
    """
    groups = {name: scores for name, scores in groups.items() if len(scores) > 0}
    if not groups:
        return ["No run has finished: there is nothing to compare."]
    said = [f"Test {metric.name}: {', '.join(_figures(n, s, metric) for n, s in groups.items())}."]
    broken = [name for name, scores in groups.items() if not all(map(math.isfinite, scores))]
    single = [name for name, scores in groups.items() if len(scores) == 1 and name not in broken]
    if broken:
        verb = "have" if len(broken) > 1 else "has"
        said.append(f"{joined(broken)} {verb} runs whose score is not finite: not compared.")
    if len(groups) == 1:
        return said
    if single:
        said.append(
            f"{joined(single)} cannot be compared at n = 1: "
            "another seed may change a score by as much."
        )
    return [*said, *_spreadless(groups, metric), *_judged(groups, metric)]


def _usable(scores: Sequence[float]) -> bool:
    return len(scores) > 1 and all(map(math.isfinite, scores))


def _welch(a: Sequence[float], b: Sequence[float]) -> Any:
    with warnings.catch_warnings():  # about groups whose scores are all equal
        warnings.simplefilter("ignore", RuntimeWarning)
        return require_scipy().ttest_ind(a, b, equal_var=False)


def _figures(name: str, scores: Sequence[float], metric: Metric) -> str:
    finite = [score for score in scores if math.isfinite(score)]
    spread = f" ± {spread_text(stdev(finite), metric, 2)}" if len(finite) > 1 else ""
    shown = f"{score_text(fmean(finite), metric, 2)}{spread}" if finite else "not finite"
    lost = f", {len(scores) - len(finite)} more not finite" if 0 < len(finite) < len(scores) else ""
    return f"{name} {shown} (n = {len(finite) or len(scores)}{lost})"


def _spreadless(groups: Mapping[str, Sequence[float]], metric: Metric) -> list[str]:
    """Say which groups have no spread; they give no estimate of how much runs differ."""
    flat = [n for n, s in groups.items() if _usable(s) and variance(s) == 0]
    if len(flat) < 2:
        return []
    return [
        f"{joined(flat)} show no spread at all, each the same {metric.name} in every run: "
        "that is no estimate of how much another run would differ."
    ]


def _judged(groups: Mapping[str, Sequence[float]], metric: Metric) -> list[str]:
    pairs = compare_pairs(groups)
    if not pairs:
        return []
    significant = [pair for pair in pairs if pair.significant]
    others = [pair for pair in pairs if not pair.significant]
    said = _significant_texts(significant, metric)
    if others:
        said.append(_indistinguishable_text(others, groups, metric, all_pairs=not significant))
    said.append(
        f"Welch's t-test over {plural(len(pairs), 'pair')} with Holm's correction: the chance of "
        "calling any two equal schedules different is 5%. Confidence intervals are at each "
        "pair's level; p is corrected."
    )
    return said


def _significant_texts(pairs: Sequence[Pair], metric: Metric) -> list[str]:
    """One sentence for each schedule that beats others, largest differences first."""
    found: dict[str, list[str]] = {}
    for pair in sorted(pairs, key=lambda pair: -abs(pair.difference)):
        first_wins = (pair.difference > 0) == metric.higher_is_better
        better, worse = (pair.first, pair.second) if first_wins else (pair.second, pair.first)
        low, high = sorted((abs(pair.low), abs(pair.high)))
        found.setdefault(better, []).append(
            f"than {worse} by {difference_text(abs(pair.difference), metric)} "
            f"({interval_text(low, high, metric)}, p = {number(pair.p, 2)})"
        )
    return [f"{better} is better {joined(told)}." for better, told in found.items()]


def _indistinguishable_text(
    pairs: Sequence[Pair],
    groups: Mapping[str, Sequence[float]],
    metric: Metric,
    all_pairs: bool,
) -> str:
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    sizes = sorted({len(groups[name]) for name in names})
    size = f"n = {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
    told = [
        f"{pair.first} and {pair.second} (difference {difference_text(pair.difference, metric)}, "
        f"{interval_text(pair.low, pair.high, metric)})"
        for pair in pairs[:_MOST_PAIRS]
    ]
    if len(pairs) > _MOST_PAIRS:
        told.append(f"{len(pairs) - _MOST_PAIRS} more pairs")
    begin = "All schedules are s" if all_pairs else "S"
    return f"{begin}tatistically indistinguishable at {size}: {'; '.join(told)}."


def interval_text(low: float, high: float, metric: Metric) -> str:
    """Write a confidence interval: ``interval −0.20 to 1.35``, in points where in percent."""
    if metric.percent:
        return f"interval {100 * low:.2f} to {100 * high:.2f}".replace("-", "−")
    return f"interval {number(low, 3)} to {number(high, 3)}".replace("-", "−")
