"""Number formatting in reports: 272,762; 56.9%; 0.567x; 12.3 MiB; 1 min 32 s."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dynarank.records import Metric

__all__ = [
    "bytes_text",
    "count",
    "difference_text",
    "error_text",
    "flops_text",
    "joined",
    "number",
    "percent",
    "plural",
    "range_text",
    "ratio",
    "score_text",
    "seconds_text",
    "spread_text",
]

NOT_FINITE = "not finite"


def count(value: float) -> str:
    """Write a whole number with thousands separated: ``272,762``."""
    return f"{value:,.0f}" if math.isfinite(value) else NOT_FINITE


def number(value: float, digits: int = 4) -> str:
    """Write a number to ``digits`` significant digits: ``4.4``."""
    return f"{value:.{digits}g}" if math.isfinite(value) else NOT_FINITE


def percent(value: float, digits: int = 1) -> str:
    """Write a share between 0 and 1 as a percentage: ``56.9%``."""
    return f"{value:.{digits}%}" if math.isfinite(value) else NOT_FINITE


def range_text(values: Iterable[int]) -> str:
    """Write the least and the largest of whole numbers: ``5 to 28``, ``8``; nothing for none."""
    known = sorted(values)
    return " to ".join(dict.fromkeys(f"{value}" for value in (*known[:1], *known[-1:])))


def ratio(value: float) -> str:
    """Write a multiple: ``0.567x``."""
    return f"{value:.3f}x" if math.isfinite(value) else NOT_FINITE


def score_text(value: float, metric: Metric, digits: int = 1) -> str:
    """Write a score in its metric: ``67.1%``, ``12.34``."""
    return percent(value, digits) if metric.percent else number(value)


def spread_text(value: float, metric: Metric, digits: int = 1) -> str:
    """Write a standard deviation beside its score, without the unit: ``0.6``."""
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{100 * value:.{digits}f}" if metric.percent else number(value, 2)


def difference_text(value: float, metric: Metric, digits: int = 2) -> str:
    """Write the difference of two scores: ``1.25 points``, ``−0.318``."""
    points = metric.percent and math.isfinite(value)
    written = f"{100 * value:.{digits}f} points" if points else number(value, 3)
    return written.replace("-", "−")


def bytes_text(value: float) -> str:
    """Write a size in binary units: ``12.3 MiB``."""
    return _scaled(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"))


def flops_text(value: float) -> str:
    """Write floating-point operations in decimal units: ``1.9 GFLOP``."""
    return _scaled(value, 1000.0, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def seconds_text(value: float) -> str:
    """Write a duration: ``0.42 s``, ``42 s``, ``1 min 32 s``, ``2 h 5 min``."""
    if not math.isfinite(value):
        return NOT_FINITE
    if value < 9.995:
        return f"{value:.2f} s"
    total = round(value)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def error_text(value: float) -> str:
    """Write an error to one significant digit: ``1e-7``; ``0`` when exact."""
    if not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def plural(amount: int, noun: str) -> str:
    """Count things: ``1 layer``, ``19 layers``."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def joined(items: Sequence[str]) -> str:
    """List words: ``a``; ``a and b``; ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def _scaled(value: float, base: float, units: Sequence[str]) -> str:
    if not math.isfinite(value):
        return NOT_FINITE
    power = 0
    while power + 1 < len(units) and abs(value) >= base * 0.99995:
        value, power = value / base, power + 1
    return f"{value:,.0f} {units[0]}" if power == 0 else f"{value:,.1f} {units[power]}"
