"""What the pages on methods share: spreads, rows of tables, whole runs and their comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dynarank.records import SummaryRecord
from dynarank.report.comparison import compare_pairs

from .records import deviation, mean, read_runs

Summaries = Mapping[str, Sequence[SummaryRecord]]


def spread(values: Sequence[float], digits: int) -> str:
    """Write mean and standard deviation.

    Example:
        >>> spread([1.0, 2.0, 3.0], 1)
        '2.0 ± 1.0'
    """
    return f"{mean(values):.{digits}f} ± {deviation(values):.{digits}f}"


def number(*groups: Sequence[object]) -> str:
    """Write how many runs each of these has; it is an error if they differ.

    Example:
        >>> number([1.0, 2.0], [3.0, 4.0])
        'n = 2'
    """
    (n,) = {len(group) for group in groups}
    return f"n = {n}"


def row(*cells: str) -> str:
    """Write a row of a table.

    Example:
        >>> row("a", "b")
        '| a | b |'
    """
    return f"| {' | '.join(cells)} |"


def summaries(folder: str) -> dict[str, list[SummaryRecord]]:
    """Return what the finished runs in a folder of training results came to, by schedule."""
    found: dict[str, list[SummaryRecord]] = {}
    for run in read_runs(f"training/results/{folder}"):
        if run.summary is not None:
            found.setdefault(run.header.schedule, []).append(run.summary)
    return found


def accuracies(runs: Summaries) -> dict[str, list[float]]:
    """Return test scores in percent, by schedule."""
    return {name: [100 * run.test_score for run in group] for name, group in runs.items()}


def flops(runs: Iterable[SummaryRecord]) -> str:
    """Write the mean training FLOPs relative to full rank."""
    return f"{mean(run.relative_flops for run in runs):.3f}"


def distinct(runs: Summaries) -> list[tuple[str, str]]:
    """Return the schedules that differ significantly: Welch's test with Holm's correction."""
    pairs = compare_pairs(accuracies(runs))
    return [(pair.first, pair.second) for pair in pairs if pair.significant]


def verdict(runs: Summaries) -> str:
    """Say whether any two schedules differ significantly."""
    pairs = distinct(runs)
    return f"significantly different: {pairs}" if pairs else "statistically indistinguishable"
