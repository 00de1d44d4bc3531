"""What the pages of the methods share: reading records, writing means and spreads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dynarank.records import SummaryRecord, find_runs, read_run
from dynarank.report.comparison import compare_pairs

BENCHMARKS = Path(__file__).parents[1]


def read(path: str) -> Any:
    """Return what a JSON file under ``benchmarks/`` holds."""
    return json.loads((BENCHMARKS / path).read_text(encoding="utf-8"))


def read_lines(path: str) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines under ``benchmarks/``."""
    lines = (BENCHMARKS / path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def of(rows: Iterable[dict[str, Any]], key: str, **fixed: Any) -> list[Any]:
    """Return one value of each row that has the fixed ones."""
    return [row[key] for row in rows if key in row and fixed.items() <= row.items()]


def summaries(folder: str) -> dict[str, list[SummaryRecord]]:
    """Return the ends of the runs in a folder of training results, by schedule."""
    found: dict[str, list[SummaryRecord]] = {}
    for run in map(read_run, find_runs(BENCHMARKS / "training/results" / folder)):
        assert run.summary is not None
        found.setdefault(run.header.schedule, []).append(run.summary)
    return found


def spread(values: Iterable[float], digits: int) -> str:
    """Write mean and sample standard deviation.

    Example:
        >>> spread([1.0, 2.0, 3.0], 1)
        '2.0 ± 1.0'
    """
    values = list(values)
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def row(*cells: str) -> str:
    """Write a row of a table.

    Example:
        >>> row("a", "b")
        '| a | b |'
    """
    return f"| {' | '.join(cells)} |"


def accuracies(runs: Mapping[str, Sequence[SummaryRecord]]) -> dict[str, list[float]]:
    """Return the test scores of runs in percent, by schedule."""
    return {name: [100 * run.test_score for run in group] for name, group in runs.items()}


def flops(runs: Iterable[SummaryRecord]) -> str:
    """Write the mean training FLOPs relative to full rank."""
    return f"{fmean(run.relative_flops for run in runs):.3f}"


def distinct(scores: Mapping[str, Sequence[float]]) -> list[tuple[str, str]]:
    """Return the pairs that differ significantly by Welch's test with Holm's correction."""
    return [(pair.first, pair.second) for pair in compare_pairs(scores) if pair.significant]


def verdict(scores: Mapping[str, Sequence[float]]) -> str:
    """Say whether any two schedules differ significantly."""
    pairs = distinct(scores)
    return f"significantly different: {pairs}" if pairs else "statistically indistinguishable"
