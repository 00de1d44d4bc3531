"""Student's t distribution, from ``math`` alone: what the comparison of runs is judged by."""

from __future__ import annotations

import math

__all__ = ["t_interval_factor", "two_sided_p"]

_TINY = 1e-300


def two_sided_p(t: float, freedom: float) -> float:
    """The chance of a ``|T|`` at least as large as ``|t|``.

    ``P(|T| >= |t|) = I_x(freedom / 2, 1 / 2)``, ``x = freedom / (freedom + t^2)``, where I is the
    regularized incomplete beta function.

    Args:
        t: the statistic; infinite gives 0.
        freedom: degrees of freedom, above 0, whole or not.

    Raises:
        ValueError: the degrees of freedom are not above 0, or ``t`` is not a number.

    Example:
        >>> round(two_sided_p(4.302653, 2), 6)
        0.05
    """
    if not freedom > 0 or math.isnan(t):
        raise ValueError(f"t is a number and freedom above 0, got t = {t} and freedom = {freedom}")
    if math.isinf(t):
        return 0.0
    square = t * t
    x, y = freedom / (freedom + square), square / (freedom + square)
    return _incomplete_beta(x, y, freedom / 2, 0.5)


def t_interval_factor(error: float, freedom: float) -> float:
    """How many standard errors reach to each side: the t with ``two_sided_p(t) == error``.

    Args:
        error: the chance that the interval misses, in (0, 1): 0.05 for 95%.
        freedom: degrees of freedom, above 0.

    Raises:
        ValueError: ``error`` is not in (0, 1).

    Example:
        >>> round(t_interval_factor(0.05, 2), 4)
        4.3027
    """
    if not 0 < error < 1:
        raise ValueError(f"the chance of an error lies in (0, 1), got {error}")
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > error:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:  # halving, as p falls with t
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if two_sided_p(middle, freedom) > error else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, y: float, a: float, b: float) -> float:
    """I_x(a, b) with y = 1 - x given apart, as the difference would lose its digits."""
    if x <= 0 or y <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction is quick on the other side
        return 1 - _incomplete_beta(y, x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_x = math.log(x) if x < 0.5 else math.log1p(-y)
    log_y = math.log(y) if y < 0.5 else math.log1p(-x)
    return math.exp(log_front + a * log_x + b * log_y) / (a * _beta_fraction(x, a, b))


def _beta_fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    value, c, d = 1.0, 1.0, 0.0
    for step in range(1, 10_000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + term * d) or _TINY)
        c = (1 + term / c) or _TINY
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
