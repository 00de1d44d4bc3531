"""Print the runs under a folder as Markdown tables: one table per recipe, one row per schedule.

Scores are means and standard deviations over seeds, with n; costs are means.

python benchmarks/training/summarize.py benchmarks/training/results/FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from dynarank.records import Metric, Run, SummaryRecord, find_runs, read_run
from dynarank.report.formats import score_text, spread_text

COSTS = (
    "trainable, peak | trainable, mean | training FLOPs | peak memory, MiB | training, s, fastest"
)


def finished(runs: Sequence[Run]) -> dict[str, list[SummaryRecord]]:
    """Return the summaries of the finished runs, by schedule."""
    found: dict[str, list[SummaryRecord]] = {}
    for run in runs:
        if run.summary is not None:
            found.setdefault(run.header.schedule, []).append(run.summary)
    return found


def score(values: list[float], metric: Metric) -> str:
    """Write the mean, and the standard deviation of more than one value."""
    mean = score_text(fmean(values), metric, 2)
    return f"{mean} ± {spread_text(stdev(values), metric, 2)}" if len(values) > 1 else mean


def row(schedule: str, runs: list[SummaryRecord], metric: Metric) -> str:
    """Write one schedule's row."""
    others = [f"{k} {fmean(run.scores[k] for run in runs):.3f}" for k in runs[0].scores]
    cells = [
        schedule,
        str(len(runs)),
        score([run.test_score for run in runs], metric) + "".join(f", {one}" for one in others),
        score([run.best_test_score for run in runs], metric),
        f"{runs[0].trainable_parameters_peak:,}",
        f"{fmean(run.trainable_parameters_mean for run in runs):,.0f}",
        f"{fmean(run.relative_flops for run in runs):.3f}x",
        f"{fmean(run.memory_bytes for run in runs) / 2**20:.1f}",
        f"{min(run.train_seconds for run in runs):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def provenance(run: Run) -> str:
    """Write the data, hardware, versions and commit of a run."""
    header = run.header
    size = run.config.get("train_size", run.config.get("train_images", 0))
    unit = "bytes of training text" if header.recipe == "text-gpt" else "training examples"
    versions = ", ".join(f"{name} {number}" for name, number in header.versions.items())
    return (
        f"{header.recipe}: {size:,} {unit}, "
        f"{header.epochs} epochs of {header.steps_per_epoch} steps, {header.precision} on "
        f"{header.hardware}; {versions}; commit {header.commit}; first run {header.started[:10]}."
    )


def main(folder: Path) -> None:
    """Print a table for each recipe."""
    recipes: dict[str, list[Run]] = {}
    for run in map(read_run, find_runs(folder)):
        recipes.setdefault(run.header.recipe, []).append(run)
    for runs in recipes.values():
        metric = runs[0].header.metric
        print(f"| schedule | n | test {metric.name} | best | {COSTS} |\n|---|" + "--:|" * 8)
        for schedule, ends in finished(runs).items():
            print(row(schedule, ends, metric))
        print(f"\n{provenance(runs[0])}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
