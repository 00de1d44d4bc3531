"""Print the runs of a file as Markdown tables, one for each problem, one row for each arm.

"Gap closed" is the share of the distance from the arm named "low rank" to "full rank". ± is the
standard deviation over seeds; the standard error of a mean is it over the root of n.

python benchmarks/training/schedules/summarize.py RUNS.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Run = dict[str, Any]


def grouped(runs: Sequence[Run], key: str) -> dict[str, list[Run]]:
    """The runs by the value of a key, in order of appearance."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run[key], []).append(run)
    return found


def mean(runs: Sequence[Run], key: str) -> float:
    """The mean over runs."""
    return fmean(run[key] for run in runs)


def spread(runs: Sequence[Run], key: str) -> tuple[float, float]:
    """The standard deviation over runs, and the standard error of their mean."""
    deviation = stdev(run[key] for run in runs) if len(runs) > 1 else float("nan")
    return deviation, deviation / len(runs) ** 0.5


def row(arm: str, runs: Sequence[Run], metric: str, arms: dict[str, list[Run]]) -> str:
    """Write one arm's row."""
    low, full = (mean(arms[name], metric) for name in ("low rank", "full rank"))
    deviation, error = spread(runs, metric)
    digits = 2 if metric == "accuracy" else 3
    cells = [
        arm,
        str(len(runs)),
        f"{runs[0]['rate']:g}",
        f"{mean(runs, 'flops'):.3f}",
        f"{mean(runs, 'end_flops'):.3f}",
        f"{mean(runs, metric):.{digits}f} ± {deviation:.{digits}f}",
        f"{error:.{digits}f}",
        f"{100 * (mean(runs, metric) - low) / (full - low):.0f}",
        f"{mean(runs, 'cpu_seconds'):.1f}",
        f"{mean(runs, 'cpu_seconds') / mean(arms['full rank'], 'cpu_seconds'):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(path: Path) -> None:
    """Print a table for each problem."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for problem, runs in grouped([json.loads(line) for line in lines], "problem").items():
        metric = "accuracy" if "accuracy" in runs[0] else "loss"
        head = ("arm", "n", "rate", "FLOPs", "end", metric, "s.e.", "gap closed, %", "CPU s")
        print(f"\n### {problem}\n\n| {' | '.join(head)} | of full |\n|---|" + "--:|" * len(head))
        arms = grouped(runs, "arm")
        for arm, of_arm in arms.items():
            print(row(arm, of_arm, metric, arms))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
