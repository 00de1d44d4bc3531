"""Print the runs of a file as Markdown tables, one for each problem, one row for each arm.

"Gap closed" is the share of the distance from the arm named "low rank" to "full rank". ± is the
standard deviation over seeds; the standard error (s.e.) of a mean is it over the root of n. Arms
named "NAME B" are compared with "fixed B", a fixed low rank of the same cost: the difference in
favor of NAME, in standard errors of the difference.

python benchmarks/training/schedules/summarize.py RUNS.jsonl
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Run = dict[str, Any]

HEAD = (
    "n", "rate", "FLOPs", "end", "result", "s.e.", "gap closed, %", "over fixed, s.e.", "CPU s",
    "of full",
)  # fmt: skip


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


def against_fixed(arm: str, metric: str, arms: dict[str, list[Run]]) -> str:
    """The gain over fixed low rank of the same budget, in standard errors of the difference."""
    *name, budget = arm.split()
    fixed = arms.get(f"fixed {budget}", [])
    if name == ["fixed"] or min(len(fixed), len(arms[arm])) < 2:
        return ""
    gain = mean(arms[arm], metric) - mean(fixed, metric)
    error = math.hypot(spread(arms[arm], metric)[1], spread(fixed, metric)[1])
    return f"{gain * (1 if metric == 'accuracy' else -1) / error:+.1f}"


def closed(runs: Sequence[Run], metric: str, arms: dict[str, list[Run]]) -> str:
    """The share of the gap from "low rank" to "full rank" that is closed, in %."""
    if not arms.keys() >= {"low rank", "full rank"}:
        return ""
    low, full = (mean(arms[name], metric) for name in ("low rank", "full rank"))
    return str(round(100 * (mean(runs, metric) - low) / (full - low)))


def row(arm: str, runs: Sequence[Run], metric: str, arms: dict[str, list[Run]]) -> str:
    """Write one arm's row."""
    deviation, error = spread(runs, metric)
    digits = 2 if metric == "accuracy" else 3
    seconds, full = mean(runs, "cpu_seconds"), arms.get("full rank")
    cells = [
        arm,
        str(len(runs)),
        f"{runs[0]['rate']:g}",
        f"{mean(runs, 'flops'):.3f}",
        f"{mean(runs, 'end_flops'):.3f}",
        f"{mean(runs, metric):.{digits}f} ± {deviation:.{digits}f}",
        f"{error:.{digits}f}",
        closed(runs, metric, arms),
        against_fixed(arm, metric, arms),
        f"{seconds:.1f}",
        f"{seconds / mean(full, 'cpu_seconds'):.2f}" if full else "",
    ]
    return f"| {' | '.join(cells)} |"


def main(path: Path) -> None:
    """Print a table for each problem."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for problem, runs in grouped([json.loads(line) for line in lines], "problem").items():
        metric = "accuracy" if "accuracy" in runs[0] else "loss"
        print(f"\n### {problem}\n\n| arm | {' | '.join(HEAD)} |\n|---|{'--:|' * len(HEAD)}")
        arms = grouped(runs, "arm")
        for arm, of_arm in arms.items():
            print(row(arm, of_arm, metric, arms))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
