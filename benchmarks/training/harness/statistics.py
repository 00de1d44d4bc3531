"""Means, spreads and paired differences of arms that ran on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

Values = Mapping[int, float]
"""A result by seed."""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences over seeds, with its 95% interval by Student's t.

    Args:
        mean: of one arm minus the other.
        error: the standard error of the mean.
        low: the lower end of the interval.
        high: the upper end.
        p: of the two-sided t-test that the mean is zero.
        n: the number of pairs.
    """

    mean: float
    error: float
    low: float
    high: float
    p: float
    n: int

    @property
    def met(self) -> bool:
        """Whether the one arm is no worse than the other by more than a standard error."""
        return self.mean >= -self.error


def paired(one: Values, other: Values) -> Difference | None:
    """The differences on the seeds that both have; None with fewer than two.

    Example:
        >>> paired({0: 3.0, 1: 4.0, 2: 5.5}, {0: 2.0, 1: 3.0, 2: 4.0}).mean
        1.1666666666666667
    """
    seeds = sorted(one.keys() & other.keys())
    differences = [round(one[seed] - other[seed], 9) for seed in seeds]  # results have six digits
    n = len(differences)
    if n < 2:
        return None
    from scipy import stats

    mean, error = fmean(differences), stdev(differences) / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Difference(mean, error, mean - reach, mean + reach, p, n)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values with Holm's correction for their number, in their order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=ps.__getitem__)
    corrected, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = largest
    return corrected


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; nan of one value."""
    return stdev(values) if len(values) > 1 else math.nan


def on_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names whose (cost, quality) no other has at least as well, and one of both better.

    Example:
        >>> sorted(on_front({"a": (1.0, 5.0), "b": (0.5, 5.0), "c": (0.2, 3.0)}))
        ['b', 'c']
    """
    return {
        name
        for name, (cost, quality) in points.items()
        if not any(
            (c <= cost and q >= quality) and (c < cost or q > quality) for c, q in points.values()
        )
    }


def corrected(pairs: Mapping[str, Difference], level: float = 0.05) -> list[str]:
    """Which of these differences are not zero, by paired t-tests with Holm's correction."""
    ps = holm([one.p for one in pairs.values()])
    return [name for name, p in zip(pairs, ps, strict=True) if p < level]
