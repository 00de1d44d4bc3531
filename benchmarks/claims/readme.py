"""README.md."""

from __future__ import annotations

from collections.abc import Iterator

from dynarank.records import SummaryRecord

from .records import deviation, mean, read_runs

PAGE = "README.md"
DEMO = "training/results/2026-11-28-demo"
SETTINGS = ("With Python 3.11 or newer", "Apache-2.0")


def summaries(folder: str, schedule: str) -> list[SummaryRecord]:
    """Return what the finished runs of a schedule came to."""
    runs = [run for run in read_runs(folder) if run.header.schedule == schedule]
    return [run.summary for run in runs if run.summary is not None]


def claims() -> Iterator[str]:
    """Yield the demo's table."""
    for schedule in ("full-rank", "low-rank", "decay"):
        runs = summaries(DEMO, schedule)
        scores = [100 * run.test_score for run in runs]
        yield (
            f"| {schedule.replace('-', ' ')} | {mean(scores):.2f} ± {deviation(scores):.2f} "
            f"| {mean(run.relative_flops for run in runs):.3f}x "
            f"| {runs[0].trainable_parameters_peak:,} |"
        )
