"""What the records say so far, for the terminal: how far experiments are, and their tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.training.harness import evidence, pictures
from benchmarks.training.harness.arm import Arm
from benchmarks.training.harness.experiment import Experiment, get
from benchmarks.training.harness.jobs import WAITING, schedule_of
from benchmarks.training.harness.store import Run, Store
from benchmarks.training.harness.summary import FULL, Summaries


def status(names: Sequence[str], results: Path) -> None:
    """Print how far these experiments are."""
    print(f"{'':16}{'reported runs':>16}{'tuning runs':>13}{'CPU time':>11}{'to do, about':>14}")
    for name in names:
        print(_line(name, get(name), Store(name, results).runs()))


def _line(name: str, experiment: Experiment, runs: Sequence[Run]) -> str:
    known = {(run["arm"], run["seed"]) for run in runs if run["part"] == "test"}
    wanted = {(a.name, s) for a in _possible(experiment, runs) for s in experiment.seeds}
    left, spent = len(wanted - known), sum(run["cpu_seconds"] for run in runs)
    to_do = "done" if not left else _time(left * spent / len(runs)) if runs else "not begun"
    done = f"{len(wanted & known)} of {len(wanted)}"
    tuning = sum(run["part"] == "valid" for run in runs)
    return f"{name:16}{done:>16}{tuning:13}{_time(spent):>11}{to_do:>14}"


def _possible(experiment: Experiment, runs: Sequence[Run]) -> Iterator[Arm]:
    """The arms that run, without fixed low rank for one that costs more than any low rank."""
    done = [run["arm"] for run in runs if run["part"] == "test"]
    for arm in experiment.arms:
        last = arm.spends is not None and done.count(arm.spends) >= len(experiment.seeds)
        if not (last and schedule_of(arm, experiment, runs) is WAITING):
            yield arm


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def table(name: str, results: Path, folder: Path | None) -> None:
    """Print the table of an experiment and what it says; draw its picture into a folder."""
    found = Summaries(name, Store(name, results).runs())
    if FULL not in found.arms:
        sys.exit(
            f"{results} has no reported run of full rank for {name} yet, and all is relative to "
            f"it: python -m benchmarks.training run {name} --results {results}"
        )
    for part in evidence.block(found).split("\n\n"):
        if not part.startswith("!["):
            print(_aligned(part) if part.startswith("|") else part, end="\n\n")
    if folder is not None:
        draw = pictures.times if name.endswith("grid") else pictures.fronts
        draw(found, path := folder / f"{name}.svg")
        print(path)


def _aligned(rows: str) -> str:
    """A Markdown table with columns of one width."""
    head, rule, *body = (row[2:-2].split(" | ") for row in rows.splitlines())
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    marks = [mark.rjust(width, "-") for mark, width in zip(rule, widths, strict=True)]
    lines = [
        [name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]
        for name, *cells in (head, marks, *body)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
