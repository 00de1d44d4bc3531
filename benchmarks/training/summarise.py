"""Print the runs under a folder as one Markdown table: a row a schedule, mean and spread of seeds.

python benchmarks/training/summarise.py benchmarks/training/results/FOLDER
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from dynarank.records import Run, SummaryRecord, find_runs, read_run

HEADER = (
    "| schedule | n | test accuracy, % | best, % | trainable, peak | trainable, mean "
    "| training FLOPs | peak memory, MiB | training, s, fastest |\n|---|" + "--:|" * 8
)


def finished(folder: Path) -> dict[str, list[SummaryRecord]]:
    """Return the summaries of the finished runs, by schedule."""
    found: dict[str, list[SummaryRecord]] = {}
    for run in map(read_run, find_runs(folder)):
        if run.summary is not None:
            found.setdefault(run.header.schedule, []).append(run.summary)
    return found


def spread(values: list[float], digits: int) -> str:
    """Write the mean, and the standard deviation of more than one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def row(schedule: str, runs: list[SummaryRecord]) -> str:
    """Write one schedule's row."""
    cells = [
        schedule,
        str(len(runs)),
        spread([100 * run.test_score for run in runs], 2),
        spread([100 * run.best_test_score for run in runs], 2),
        f"{runs[0].trainable_parameters_peak:,}",
        f"{runs[0].trainable_parameters_mean:,.0f}",
        f"{runs[0].relative_flops:.3f}x",
        spread([run.memory_bytes / 2**20 for run in runs], 1),
        f"{min(run.train_seconds for run in runs):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def provenance(run: Run) -> str:
    """Write where and with what a run was made."""
    header = run.header
    versions = ", ".join(f"{name} {number}" for name, number in header.versions.items())
    return (
        f"{header.recipe}, {header.epochs} epochs of {header.steps_per_epoch} steps, "
        f"{header.precision} on {header.hardware}; {versions}; commit {header.commit}; "
        f"first run {header.started[:10]}."
    )


def main(folder: Path) -> None:
    """Print the table."""
    print(HEADER)
    for schedule, runs in finished(folder).items():
        print(row(schedule, runs))
    print(f"\n{provenance(read_run(find_runs(folder)[0]))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
