"""What the records say so far, for the terminal: how far experiments are, and their tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.training.harness import evidence, pictures
from benchmarks.training.harness.definition import of_one_problem
from benchmarks.training.harness.experiment import Experiment, get
from benchmarks.training.harness.jobs import never, reported, untimed
from benchmarks.training.harness.record import Run
from benchmarks.training.harness.store import Store
from benchmarks.training.harness.summary import ALIKE, FULL, Summaries


def status(names: Sequence[str], results: Path) -> None:
    """Print how far these experiments are."""
    print(f"{'':20}{'reported runs':>16}{'tuning runs':>13}{'CPU time':>11}{'to do, about':>14}")
    for name in names:
        print(_line(name, get(name), of_one_problem(Store(name, results).runs(get(name).metric))))


def _line(name: str, experiment: Experiment, runs: Sequence[Run]) -> str:
    done, spent = reported(experiment, runs), sum(run["cpu_seconds"] for run in runs)
    possible = [arm for arm in experiment.arms if not never(arm, experiment, runs)]
    wanted = len(possible) * len(experiment.seeds)
    left = sum(arm.length for arm, _ in untimed(experiment, runs))
    if len(done) < wanted:
        left += len(experiment.seeds) * sum(arm.length for arm in possible) - _lengths(done)
    to_do = "not begun" if not runs else "done"
    if runs and left:
        to_do = _time(left * spent / _lengths(runs))
    tuning = sum(run["part"] == "valid" for run in runs)
    return f"{name:20}{f'{len(done)} of {wanted}':>16}{tuning:13}{_time(spent):>11}{to_do:>14}"


def _lengths(runs: Sequence[Run]) -> float:
    """Of how many whole runs these have the steps; older records do not say it."""
    return sum(run.get("length", 1.0) for run in runs)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def table(name: str, results: Path, folder: Path | None) -> None:
    """Print the table of an experiment and what it says; draw its picture into a folder."""
    found = Summaries(name, folder=results)
    if FULL not in found.arms:
        sys.exit(
            f"{results} has no reported run of full rank for {name} yet, and all is relative to "
            f"it: python -m benchmarks.training run {name} --results {results}"
        )
    for part in evidence.block(found).split("\n\n"):
        if not part.startswith("!["):
            print(_aligned(part) if part.startswith("|") else part, end="\n\n")
    for note in _notes(found):
        print(note, end="\n\n")
    if folder is not None:
        draw = pictures.times if name.endswith("grid") else pictures.fronts
        draw(found, path := folder / f"{name}.svg")
        print(path)


def _notes(found: Summaries) -> Iterator[str]:
    """Which arms have no counterpart, and which never run."""
    without = [arm for arm in found.arms if not arm.startswith("fixed") and arm != FULL]
    if without := [arm for arm in without if found.counterpart(arm) is None]:
        what = f"Without fixed low rank of the same FLOPs, within {ALIKE:g} of full rank's"
        yield f"{what}: {'; '.join(without)}."
    if found.never:
        yield f"Never run: {'; '.join(f'{arm} ({why})' for arm, why in found.never.items())}."


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
